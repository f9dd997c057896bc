"""What the machine can do at most, measured in the same run as the workloads.

flops    float32 matrix product, 2048 x 2048 (8192 on an accelerator)
bytes    float32 matrix times vector, 4096 x 4096 (16384): the matrix is streamed
exps     exp fused into a sum over rows, 4096 x 4096
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks._table import Row, show
from experiments.benchmarks._timing import in_turn


@dataclasses.dataclass(frozen=True)
class Config:
    rounds: int = 15
    """How often the three are timed in turn."""


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
    sides = {
        name: lambda f=f: jax.block_until_ready(f()) for name, (f, _) in programs.items()
    }  # fmt: skip
    times = in_turn(sides, rounds=config.rounds, warm=2)
    made = []
    for name, t in times.items():
        low, high = t.quartiles
        # The ceiling is what the machine can do: the best round.
        rate = programs[name][1] / (min(t.rounds) / 1e3)
        made.append(Row("ceiling", "", name, t.median, low, high, checks={"per_second": rate}))
    return show(made)


def rates(rows: list[Row]) -> dict[str, float]:
    """Read the rates from the rows that `main` made."""
    return {row.side: row.checks["per_second"] for row in rows if row.workload == "ceiling"}


def work_of(compiled: Any, *args: Any, times: int = 1) -> dict[str, float]:
    """Flops and exponentials of a jitted program as XLA counts them before it optimises.

    A loop counts once: `times` says how often its body runs where that is all of the work.
    """
    cost = compiled.lower(*args).cost_analysis() or {}
    return {
        "flops": times * float(cost.get("flops", 0.0)),
        "exps": times * float(cost.get("transcendentals", 0.0)),
    }


if __name__ == "__main__":
    main(Config())
