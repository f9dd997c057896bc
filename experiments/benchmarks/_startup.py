"""Import time, time to the first step and compile time of one experiment, in this process.

The experiment is run as a user runs it, up to its second call of the compiled step.
"""

import contextlib
import dataclasses
import importlib
import inspect
import tempfile
import time
from typing import Any

from experiments.benchmarks._table import OURS, Row, show

BEGUN = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Config:
    experiment: str = "vae"  # which experiment, with its default options


class _Enough(BaseException):
    """Ends the experiment once its step is timed."""


def main(config: Config) -> list[Row]:
    import jax
    import numpy as np

    since = lambda start: 1e3 * (time.perf_counter() - start)  # noqa: E731
    found = {"import_jax_ms": since(BEGUN)}
    module = importlib.import_module(f"experiments.{config.experiment}")
    found["import_all_ms"] = since(BEGUN)
    name = f"startup_{config.experiment}"
    functions = filter(inspect.isfunction, vars(module).values())  # its own, and those it imports
    if not any("_run.fit(" in inspect.getsource(function) for function in functions):
        return show([Row(name, "", OURS, note="has no training loop", checks=found)])
    from experiments import _run

    compiling, calls = [0.0], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiling.append(seconds) if "backend_compile" in name else None
    )

    def fit(run: Any, state: Any, step_fn: Any, batches: Any, **_: Any) -> Any:
        steps, before = run.config.steps_per_call, sum(compiling)
        for i in range(2):
            several = [batches(i * steps + j) for j in range(steps)]
            batch = jax.tree.map(lambda *x: np.stack(x), *several) if steps > 1 else several[0]
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step_fn(state, batch))
            calls.append(since(start))
            found.setdefault("first_step_ms", since(BEGUN))
            found.setdefault("compile_ms", 1e3 * (sum(compiling) - before))
        raise _Enough

    _run.fit = fit
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        module.main(module.Config(run_dir=f"{folder}/run", progress=False))
    if not calls:
        return show([Row(name, "", OURS, note="no training loop by default", checks=found)])
    return show([Row(name, "", OURS, calls[1], first_ms=calls[0], checks=found)])
