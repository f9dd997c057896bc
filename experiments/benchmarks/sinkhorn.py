"""Sinkhorn beside its peers: value and gradient, to the same marginal error."""

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._models import waiting
from experiments.benchmarks._table import make_rows
from experiments.benchmarks._workload import OURS, Options, Row, build, compare, launch
from genjax.transport import sinkhorn, sinkhorn_divergence

# A side: (x, y, epsilon, config) -> a function of nothing that gives (value, gradient for x,
# potentials f and g with P_ij = exp((f_i + g_j - C_ij) / epsilon) / (n m), or None).
Side = Callable[..., Callable[[], tuple[Any, Any, Any]]]


@dataclass(frozen=True)
class Config(Options):
    """Which rows to print."""

    rounds: int = 7
    n: tuple[int, ...] = (256, 1024, 4096)  # points in each cloud
    d: tuple[int, ...] = (2, 64)  # dimensions
    eps: tuple[float, ...] = (0.1, 0.01, 0.001)  # epsilon, in units of the mean cost
    peers: tuple[str, ...] = ("ott", "ott-momentum", "ott-anderson", "pot", "geomloss")
    problem: Literal["tolerance", "iterations", "divergence", "weights", "compile"] = "tolerance"
    """To an L1 marginal error; a fixed number of iterations; the debiased divergence; genjax with
    general weights beside genjax with uniform ones; or the first call, which compiles."""
    tolerance: float = 1e-3  # L1 marginal error at which every side stops
    iterations: int = 100  # of the fixed-length problem
    seconds: float = 40.0  # no further rounds of a row after this long (two at least)
    slow: float = 60.0  # a peer that took longer than this is left out of rows with more points

    @property
    def workload(self) -> str:
        return "sinkhorn" if self.problem == "tolerance" else f"sinkhorn_{self.problem}"


def clouds(n: int, d: int) -> tuple[np.ndarray, np.ndarray, float]:
    """x ~ N(0, I), y ~ N(0.5, 0.64 I), and the mean cost."""
    r = np.random.RandomState(0)
    x, y = r.randn(n, d).astype(np.float32), (0.8 * r.randn(n, d) + 0.5).astype(np.float32)
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    mean = (wide_x**2).sum(1).mean() + (wide_y**2).sum(1).mean()
    return x, y, float(mean - 2 * wide_x.mean(0) @ wide_y.mean(0))


def figures(x, y, f, g, epsilon, gradient) -> tuple[float, float]:
    """In float64 from the potentials: L1 marginal error, and the gradient's relative error."""
    x, y, f, g = (np.asarray(z, np.float64) for z in (x, y, f, g))
    n, m = len(x), len(y)
    rows, cols, expected = np.zeros(n), np.zeros(m), np.zeros_like(x)
    for s in range(0, n, 512):
        part = x[s : s + 512]
        cost = (part**2).sum(1)[:, None] + (y**2).sum(1)[None, :] - 2 * part @ y.T
        with np.errstate(over="ignore", invalid="ignore"):
            z = (f[s : s + 512, None] + g[None, :] - np.maximum(cost, 0)) / epsilon
            plan = np.exp(z) / (n * m)
        rows[s : s + 512] = plan.sum(1)
        cols += plan.sum(0)
        expected[s : s + 512] = 2 * (plan.sum(1)[:, None] * part - plan @ y)
    error = np.abs(rows - 1 / n).sum() + np.abs(cols - 1 / m).sum()
    gap = np.linalg.norm(np.asarray(gradient, np.float64) - expected) / np.linalg.norm(expected)
    return float(error), float(gap)


def genjax_side(x, y, epsilon, config: Config, weighted: bool = False):
    options: dict[str, Any] = {"tolerance": config.tolerance}
    if config.problem == "iterations":
        options["num_iterations"] = config.iterations
    if weighted:
        options["a"] = jnp.full((len(x),), 1 / len(x))
        options["b"] = jnp.full((len(y),), 1 / len(y))

    def value(x, y):
        if config.problem == "divergence":
            return sinkhorn_divergence(x, y, epsilon=epsilon, **options).value, None
        result = sinkhorn(x, y, epsilon=epsilon, **options)
        return result.value, (result.f, result.g)

    return jax_step(value, x, y)


def jax_step(value, x, y):
    run = waiting(jax.jit(jax.value_and_grad(value, has_aux=True)), jnp.asarray(x), jnp.asarray(y))

    def step():
        (out, potentials), gradient = run()
        return out, gradient, potentials

    return step


def ott_side(x, y, epsilon, config: Config, kind: str = ""):
    from ott.geometry import pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import acceleration
    from ott.solvers.linear import sinkhorn as ott_sinkhorn
    from ott.tools import sinkhorn_divergence as ott_divergence

    options: dict[str, Any] = {"threshold": config.tolerance, "max_iterations": 20_000}
    if config.problem == "iterations":
        count = config.iterations
        options = {"threshold": -1.0, "min_iterations": count, "max_iterations": count}
    if kind == "momentum":
        options["momentum"] = acceleration.Momentum(start=30, value=1.0)
    if kind == "anderson":
        options["anderson"] = acceleration.AndersonAcceleration(memory=5, refresh_every=5)
    shift = epsilon * np.log(len(x))

    def value(x, y):
        if config.problem == "divergence":
            more = {"epsilon": epsilon, "static_b": False, "solve_kwargs": options}
            return ott_divergence.sinkdiv(x, y, **more)[0], None
        cloud = pointcloud.PointCloud(x, y, epsilon=epsilon)
        out = ott_sinkhorn.Sinkhorn(**options)(linear_problem.LinearProblem(cloud))
        return out.reg_ot_cost, (out.f + shift, out.g + shift)

    return jax_step(value, x, y)


def pot_side(x, y, epsilon, config: Config):
    import ot
    import torch

    n = len(x)
    # POT stops on the 2-norm of one marginal: for errors of one size, sqrt(2 / pi) sqrt(n) of it.
    stop = config.tolerance / (0.798 * n**0.5) if config.problem == "tolerance" else 0.0
    limit = config.iterations if config.problem == "iterations" else 20_000
    points, fixed = torch.tensor(x, requires_grad=True), torch.tensor(y)
    options = {"reg_type": "KL", "max_iter": limit, "tol": stop, "grad": "envelope"}

    def step():
        result = ot.solve_sample(points, fixed, reg=epsilon, **options)
        (gradient,) = torch.autograd.grad(result.value, points)
        f, g = (epsilon * (z.detach().numpy() + np.log(n)) for z in result.potentials)
        return result.value.item(), gradient.numpy(), (f, g)

    return step


def geomloss_side(x, y, epsilon, config: Config):
    import torch
    from geomloss import SamplesLoss

    # Its cost is |x - y|^2 / 2 and it has no stopping rule: its own annealing, slowly enough.
    points, fixed = torch.tensor(x, requires_grad=True), torch.tensor(y)
    options = {"p": 2, "blur": (epsilon / 2) ** 0.5, "scaling": 0.9, "backend": "tensorized"}
    debias = config.problem == "divergence"
    loss = SamplesLoss("sinkhorn", debias=debias, **options)
    potentials = SamplesLoss("sinkhorn", debias=False, potentials=True, **options)

    def step():
        value = loss(points, fixed)
        (gradient,) = torch.autograd.grad(value, points)
        return 2 * value.item(), 2 * gradient.numpy(), read

    def read():
        f, g = potentials(points.detach(), fixed)
        return 2 * f.numpy().ravel(), 2 * g.numpy().ravel()

    return step


SIDES: dict[str, tuple[str, Side]] = {
    "genjax": ("jax", genjax_side),
    "genjax-weights": ("jax", lambda *z: genjax_side(*z, weighted=True)),
    "ott": ("ott", ott_side),
    "ott-momentum": ("ott", lambda *z: ott_side(*z, kind="momentum")),
    "ott-anderson": ("ott", lambda *z: ott_side(*z, kind="anderson")),
    "pot": ("ot", pot_side),
    "geomloss": ("geomloss", geomloss_side),
}


def target(n: int, d: int, eps: float, peer: str, config: Config) -> float | None:
    """What the ratio has to be, to a tolerance; None where nothing is asked."""
    if config.problem == "compile":
        return 1 / 1.5 if peer == "ott" else None
    if config.problem != "tolerance":
        return None
    small, large = (d >= 64), eps >= 0.05
    if peer == "ott":
        if large:
            return 2.0 if small and n >= 4096 else 3.0
        return (3.5 if small else 15.0) if eps >= 0.005 else (18.0 if small else 40.0)
    if peer.startswith("ott-"):
        return (2.0 if small else 3.0) if eps >= 0.005 else 8.0
    return 10.0


def afresh(make: Callable[[], Any]) -> Any:
    """Make a side and call it once: it traces and compiles."""
    jax.clear_caches()
    return make()()


def case(n: int, d: int, eps: float, names: list[str], config: Config) -> list[Row]:
    """Time the sides in turn, and check each in float64."""
    x, y, mean = clouds(n, d)
    epsilon = eps * mean
    makers: dict[str, Any] = {k: partial(SIDES[k][1], x, y, epsilon, config) for k in names}
    if config.problem == "compile":
        makers = {name: partial(partial, afresh, make) for name, make in makers.items()}

    def checks(results: dict[str, Any]) -> dict[str, dict[str, float]]:
        found = {}
        for name, (value, gradient, potentials) in results.items():
            found[name] = {"value": float(value)}
            potentials = potentials() if callable(potentials) else potentials
            if potentials is not None and config.problem != "divergence":
                error, gap = figures(x, y, *potentials, epsilon, gradient)
                found[name] |= {"marginal_error": error, "gradient_error": gap}
        return found

    def work() -> dict[str, float]:
        if n < 4096:
            return {}
        count = config.iterations
        if config.problem != "iterations":
            run = jax.jit(lambda x, y: sinkhorn(x, y, epsilon=epsilon, tolerance=config.tolerance))
            count = int(run(jnp.asarray(x), jnp.asarray(y)).num_iterations)
        # Two passes over the kernel in every iteration: what its memory would take.
        return {"bytes": 8.0 * n * n * count}

    goals = {name: target(n, d, eps, name, config) for name in names}
    options = {"case": f"n={n} d={d} eps={eps:g}", "targets": goals, "seconds": config.seconds}
    more = {"checks": checks, "work": work, "warm": 0}
    return compare(config.workload, makers, config, **options, **more)


def main(config: Config) -> list[Row]:
    """Print a line for each row and return the rows."""
    if config.problem == "compile":
        jax.config.update("jax_enable_compilation_cache", False)
    peers = (OURS, "genjax-weights") if config.problem == "weights" else (OURS, *config.peers)
    found, notes = build({p: partial(importlib.import_module, SIDES[p][0]) for p in peers})
    print(f"# {config.problem}, tolerance {config.tolerance}; marginal_error: L1, in float64")
    table: list[Row] = make_rows(config.workload, {}, notes=notes)
    for n in config.n:
        limit = 1e3 * config.slow / 16
        slow = {r.side for r in table if r.ms is not None and r.ms > limit and r.side != OURS}
        for d, eps in itertools.product(config.d, config.eps):
            table += case(n, d, eps, [name for name in found if name not in slow], config)
    return table


if __name__ == "__main__":
    launch(main, Config)
