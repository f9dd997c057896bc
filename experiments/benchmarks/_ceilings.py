"""What the machine can do at most, measured in the same run as the workloads.

flops    float32 matrix product, 2048 x 2048 (8192 on an accelerator)
bytes    float32 matrix times vector, 4096 x 4096 (16384): the matrix is streamed
exps     exp fused into a sum over rows, 4096 x 4096
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks._table import Row, make_rows, show
from experiments.benchmarks._timing import in_turn
from experiments.benchmarks._workload import Options

Config = Options


def main(config: Config) -> list[Row]:
    """Time the three; the rate of each is in its `checks`, per second."""
    large = jax.default_backend() != "cpu"
    n, m = (8192, 16384) if large else (2048, 4096)
    key = jax.random.key(0)
    square, wide = jax.random.normal(key, (n, n)), jax.random.normal(key, (m, m))
    rows = jax.random.normal(key, (4096, 4096))
    programs: dict[str, tuple[Any, float]] = {
        "flops": (partial(jax.jit(jnp.matmul), square, square), 2.0 * n**3),
        "bytes": (partial(jax.jit(jnp.matmul), wide, wide[0]), 4.0 * m * m),
        "exps": (partial(jax.jit(lambda x: jnp.exp(x).sum(axis=1)), rows), 4096.0**2),
    }
    sides = {name: lambda f=f: jax.block_until_ready(f()) for name, (f, _) in programs.items()}
    times = in_turn(sides, rounds=config.rounds, warm=2)
    # The ceiling is what the machine can do: the best round.
    checks = {k: {"per_second": 1e3 * programs[k][1] / min(t.rounds)} for k, t in times.items()}
    return show(make_rows("ceiling", times, checks=checks))


def work_of(compiled: Any, *args: Any, times: int = 1) -> dict[str, float]:
    """Flops and exponentials of a jitted program as XLA counts them before it optimises.

    A loop counts once: `times` says how often its body runs where that is all of the work.
    """
    cost = compiled.lower(*args).cost_analysis() or {}
    names = {"flops": "flops", "exps": "transcendentals"}
    return {what: times * float(cost.get(name, 0.0)) for what, name in names.items()}
