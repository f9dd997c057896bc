"""Import time, time to the first step and compile time of one experiment, in this process.

The experiment is run as a user runs it, up to its second call of the compiled step. Under the name
sinkhorn_compile: the first call of the solver's value and gradient beside ott-jax's.
"""

import contextlib
import dataclasses
import importlib
import inspect
import tempfile
import time
from functools import partial
from typing import Any

from experiments.benchmarks._table import OURS, Row, show

BEGUN = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class Config:
    experiment: str = "vae"  # which experiment, with its default options, or sinkhorn_compile
    n: int = 1024  # points in each cloud of sinkhorn_compile
    rounds: int = 5  # how often its two sides are timed in turn


class _Enough(BaseException):
    """Ends the experiment once its step is timed."""


def sinkhorn_compile(config: Config) -> list[Row]:
    """Time jit(value_and_grad) of both solvers, traced and compiled anew in every call."""
    import jax

    from experiments.benchmarks import _workload, sinkhorn

    jax.config.update("jax_enable_compilation_cache", False)
    x, y, mean = sinkhorn.clouds(config.n, 2)

    def first_call(name: str) -> float:
        jax.clear_caches()
        return float(sinkhorn.SIDES[name][1](x, y, 0.01 * mean, sinkhorn.Config())()[0])

    makers = {name: partial(partial, first_call, name) for name in (OURS, "ott")}
    values = lambda results: {name: {"value": x} for name, x in results.items()}  # noqa: E731
    # At most 1.5 times as long as ott-jax's.
    options = {"case": f"n={config.n} d=2 eps=0.01", "targets": 1 / 1.5, "checks": values}
    given = _workload.Options(rounds=config.rounds)
    return _workload.compare("sinkhorn_compile", makers, given, warm=0, **options)


def main(config: Config) -> list[Row]:
    if config.experiment == "sinkhorn_compile":
        return sinkhorn_compile(config)
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
