"""Unbalanced Sinkhorn beside POT: value and gradient for x, to the same marginal error.

    genjax  unbalanced_sinkhorn and its gradient, jitted, with the potentials
    pot     ot.unbalanced.sinkhorn_unbalanced in NumPy with the largest of its stopping thresholds
            that reaches the error, in float32 or else in float64, and the gradient from its plan

The penalty is the mean cost. The error is the L1 distance of the plan's marginals from those that
its potentials say, in float64.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._models import waiting
from experiments.benchmarks._workload import OURS, Options, Row, Side, compare, launch
from experiments.benchmarks.sinkhorn import clouds
from genjax.transport import unbalanced_sinkhorn


@dataclasses.dataclass(frozen=True)
class Config(Options):
    rounds: int = 7
    n: tuple[int, ...] = (256, 1024)  # points in each cloud
    eps: tuple[float, ...] = (0.1, 0.01)  # epsilon, in units of the mean cost
    tolerance: float = 1e-3  # L1 marginal error at which both stop


def marginal_error(x: Any, y: Any, f: Any, g: Any, epsilon: float, penalty: float) -> float:
    """How far the plan of the potentials is from the optimality conditions, for uniform weights."""
    x, y, f, g = (np.asarray(z, np.float64) for z in (x, y, f, g))
    cost = ((x[:, None] - y[None]) ** 2).sum(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        plan = np.exp((f[:, None] + g[None] - cost) / epsilon) / (len(x) * len(y))
        rows = np.abs(plan.sum(1) - np.exp(-f / penalty) / len(x)).sum()
        return float(rows + np.abs(plan.sum(0) - np.exp(-g / penalty) / len(y)).sum())


def genjax_side(x: Any, y: Any, epsilon: float, penalty: float, config: Config) -> Side:
    def value(x, y):
        options = {"epsilon": epsilon, "marginal_penalty": penalty}
        result = unbalanced_sinkhorn(x, y, tolerance=config.tolerance, **options)
        return result.value, jax.lax.stop_gradient((result.f, result.g))

    run = waiting(jax.jit(jax.value_and_grad(value, has_aux=True)), jnp.asarray(x), jnp.asarray(y))

    def step():
        (found, potentials), gradient = run()
        return found, gradient, potentials

    return step


def pot_side(x: Any, y: Any, epsilon: float, penalty: float, config: Config) -> Side:
    import ot

    def step(dtype: Any, stop: float) -> Any:
        x, y = points[dtype]
        a, b = (np.full(len(z), 1 / len(z), dtype) for z in (x, y))
        options = {"stopThr": stop, "numItermax": 20_000, "log": True}
        run = partial(ot.unbalanced.sinkhorn_unbalanced, **options)
        plan, log = run(a, b, ot.dist(x, y), epsilon, penalty)
        mass = plan.sum()
        value = log["total_cost"] + epsilon * (1 - mass) + 2 * penalty * (1 - mass)
        gradient = 2 * (plan.sum(1)[:, None] * x - plan @ y)
        return value, gradient, (epsilon * log["logu"], epsilon * log["logv"])

    def error(dtype: Any, stop: float) -> float:
        return marginal_error(x, y, *step(dtype, stop)[2], epsilon, penalty)

    points = {dtype: (x.astype(dtype), y.astype(dtype)) for dtype in (np.float32, np.float64)}
    tried = [(dtype, 10.0**-k) for dtype in points for k in range(1, 9)]
    chosen = next((each for each in tried if error(*each) <= config.tolerance), tried[-1])
    return partial(step, *chosen)


def case(n: int, eps: float, config: Config) -> list[Row]:
    """Time both sides in turn, and check each in float64."""
    x, y, mean = clouds(n, 2)
    given = (x, y, eps * mean, mean)
    makers = {OURS: partial(genjax_side, *given, config), "pot": partial(pot_side, *given, config)}

    def checks(results: dict[str, Any]) -> dict[str, dict[str, float]]:
        return {
            name: {
                "value": float(value),
                "marginal_error": marginal_error(x, y, *potentials, *given[2:]),
            }
            for name, (value, _, potentials) in results.items()
        }

    options: Any = {"case": f"n={n} eps={eps:g}", "targets": {"pot": 10.0}, "checks": checks}
    return compare("unbalanced", makers, config, **options, warm=0)


def main(config: Config) -> list[Row]:
    """Print a line for each row and return the rows."""
    return [row for n in config.n for eps in config.eps for row in case(n, eps, config)]


if __name__ == "__main__":
    launch(main, Config)
