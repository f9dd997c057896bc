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
    experiment: str = "vae"
    """Which experiment, with its default options."""


class _Enough(BaseException):
    """Ends the experiment once its step is timed."""


def main(config: Config) -> list[Row]:
    import jax

    imports = {"import_jax_ms": _since(BEGUN)}
    module = importlib.import_module(f"experiments.{config.experiment}")
    imports["import_all_ms"] = _since(BEGUN)
    name = f"startup_{config.experiment}"
    functions = filter(inspect.isfunction, vars(module).values())  # its own, and those it imports
    if not any("_run.fit(" in inspect.getsource(function) for function in functions):
        return show([Row(name, "", OURS, note="has no training loop", checks=imports)])
    from experiments import _run

    compiling: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiling.append(seconds) if "backend_compile" in name else None
    )
    found: dict[str, float] = {}

    def fit(run: Any, state: Any, step_fn: Any, batches: Any, **_: Any) -> Any:
        steps, calls = run.config.steps_per_call, []
        before = sum(compiling)
        for i in range(2):
            batch = _load(batches, i * steps, steps)
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step_fn(state, batch))
            calls.append(_since(start))
            if i == 0:
                found["first_step_ms"] = _since(BEGUN)
                found["compile_ms"] = 1e3 * (sum(compiling) - before)
        found["first_call_ms"], found["second_call_ms"] = calls
        raise _Enough

    _run.fit = fit
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Enough):
        module.main(module.Config(run_dir=f"{folder}/run", progress=False))
    if not found:
        return show([Row(name, "", OURS, note="no training loop by default", checks=imports)])
    first, second = found.pop("first_call_ms"), found.pop("second_call_ms")
    return show([Row(name, "", OURS, second, first_ms=first, checks={**imports, **found})])


def _since(start: float) -> float:
    return 1e3 * (time.perf_counter() - start)


def _load(batches: Any, step: int, steps: int) -> Any:
    import jax
    import numpy as np

    if steps == 1:
        return batches(step)
    return jax.tree.map(lambda *x: np.stack(x), *[batches(step + i) for i in range(steps)])
