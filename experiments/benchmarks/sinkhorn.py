"""Sinkhorn beside its peers: value and gradient, to the same marginal error, paired in one process.

`python -m experiments.benchmarks.sinkhorn --n 256 1024 --d 2 --eps 0.01 --peers ott ott-best`
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments.benchmarks._table import OURS, Row, make_rows, show
from experiments.benchmarks._timing import in_turn
from genjax.transport import sinkhorn, sinkhorn_divergence

# A side: (x, y, epsilon, config) -> a function of nothing that gives (value, gradient for x,
# potentials f and g with P_ij = exp((f_i + g_j - C_ij) / epsilon) / (n m), or None).
Side = Callable[..., Callable[[], tuple[Any, Any, Any]]]
PEERS = ("ott", "ott-momentum", "ott-anderson", "pot", "pot-numpy", "geomloss")


@dataclass(frozen=True)
class Config:
    """Which rows to print."""

    n: tuple[int, ...] = (256, 1024, 4096)
    """Points in each cloud."""
    d: tuple[int, ...] = (2, 64)
    """Dimensions."""
    eps: tuple[float, ...] = (0.1, 0.01, 0.001)
    """epsilon, in units of the mean cost."""
    peers: tuple[str, ...] = ("ott", "ott-momentum", "ott-anderson", "pot", "geomloss")
    """Whom to compare with; what is not installed is named and skipped."""
    problem: Literal["tolerance", "iterations", "divergence", "weights"] = "tolerance"
    """To an L1 marginal error; a fixed number of iterations; the debiased divergence; or genjax
    with general weights beside genjax with uniform ones."""
    tolerance: float = 1e-3
    """L1 marginal error at which every side stops."""
    iterations: int = 100
    """Iterations of the fixed-length problem."""
    repeats: int = 7
    """Interleaved rounds."""
    statistic: Literal["median", "min"] = "median"
    """Of a side's times; the least is steadier on a machine that has other work."""
    seconds: float = 40.0
    """No further rounds of a row after this long (two at least)."""
    slow: float = 60.0
    """A peer that took longer than this is left out of rows with more points."""
    data: Literal["gaussians", "moons"] = "gaussians"
    """Two isotropic Gaussians, or a bent cloud against a mixture of eight."""


def clouds(n: int, d: int, data: str = "gaussians") -> tuple[np.ndarray, np.ndarray, float]:
    """x ~ N(0, I), y ~ N(0.5, 0.64 I), or two curved clouds; and the mean cost."""
    r = np.random.RandomState(0)
    x, y = r.randn(n, d), 0.8 * r.randn(n, d) + 0.5
    if data == "moons":
        angle = np.pi * r.rand(n)
        x[:, 0], x[:, 1] = 2 * np.cos(angle) + 0.1 * x[:, 0], 3 * np.sin(angle) + 0.1 * x[:, 1]
        y = 0.2 * y + 2 * np.sign(r.randn(8, d))[r.randint(0, 8, n)]
    x, y = x.astype(np.float32), y.astype(np.float32)
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
    run = jax.jit(jax.value_and_grad(value, has_aux=True))
    x, y = jnp.asarray(x), jnp.asarray(y)

    def step():
        (out, potentials), gradient = jax.block_until_ready(run(x, y))
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
            out = ott_divergence.sinkdiv(
                x, y, epsilon=epsilon, static_b=False, solve_kwargs=options
            )
            return out[0], None
        cloud = pointcloud.PointCloud(x, y, epsilon=epsilon)
        out = ott_sinkhorn.Sinkhorn(**options)(linear_problem.LinearProblem(cloud))
        return out.reg_ot_cost, (out.f + shift, out.g + shift)

    return jax_step(value, x, y)


def pot_side(x, y, epsilon, config: Config, numpy: bool = False):
    import ot

    n = len(x)
    # POT stops on the 2-norm of one marginal: for errors of one size, sqrt(2 / pi) sqrt(n) of it.
    stop = config.tolerance / (0.798 * n**0.5) if config.problem == "tolerance" else 0.0
    limit = config.iterations if config.problem == "iterations" else 20_000
    if numpy:
        weights = np.full(n, 1 / n, np.float32)

        def step():
            cost = ot.dist(x, y)
            plan, log = ot.sinkhorn(
                weights,
                weights,
                cost,
                np.float32(epsilon),
                method="sinkhorn_log",
                numItermax=limit,
                stopThr=stop,
                log=True,
            )
            gradient = 2 * (plan.sum(1)[:, None] * x - plan @ y)
            f, g = (epsilon * (log[k] + np.log(n)) for k in ("log_u", "log_v"))
            return (plan * cost).sum(), gradient, (f, g)

        return step
    import torch

    points, fixed = torch.tensor(x, requires_grad=True), torch.tensor(y)

    def step_torch():
        result = ot.solve_sample(
            points, fixed, reg=epsilon, reg_type="KL", max_iter=limit, tol=stop, grad="envelope"
        )
        (gradient,) = torch.autograd.grad(result.value, points)
        f, g = (epsilon * (z.detach().numpy() + np.log(n)) for z in result.potentials)
        return result.value.item(), gradient.numpy(), (f, g)

    return step_torch


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
        return 2 * value.item(), 2 * gradient.numpy(), (lambda: read())

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
    "pot-numpy": ("ot", lambda *z: pot_side(*z, numpy=True)),
    "geomloss": ("geomloss", geomloss_side),
}


def target(n: int, d: int, eps: float, peer: str, config: Config) -> float | None:
    """What the ratio has to be, to a tolerance; None where nothing is asked."""
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


def compare(n: int, d: int, eps: float, names: list[str], config: Config) -> list[Row]:
    """Time the sides in turn, A B A B, and check each in float64."""
    x, y, mean = clouds(n, d, config.data)
    epsilon = eps * mean
    steps = {name: SIDES[name][1](x, y, epsilon, config) for name in names}
    last: dict[str, Any] = {}

    def side(name: str) -> Callable[[], None]:
        def call() -> None:
            last[name] = steps[name]()

        return call

    sides = {name: side(name) for name in names}
    times = in_turn(sides, rounds=config.repeats, warm=0, seconds=config.seconds)
    checks: dict[str, dict[str, float]] = {}
    for name, (value, gradient, potentials) in last.items():
        checks[name] = {"value": float(value)}
        potentials = potentials() if callable(potentials) else potentials
        if potentials is not None and config.problem != "divergence":
            error, gap = figures(x, y, *potentials, epsilon, gradient)
            checks[name] |= {"marginal_error": error, "gradient_error": gap}
    # Two passes over the kernel in every iteration: what its memory would take.
    work = {"bytes": 8.0 * n * n * iterations(x, y, epsilon, config)} if n >= 4096 else {}
    if config.statistic == "min":
        times = {name: t._replace(rounds=[min(t.rounds)]) for name, t in times.items()}
    goals = {name: target(n, d, eps, name, config) for name in names}
    return make_rows(
        NAMES[config.problem],
        times,
        case=f"n={n} d={d} eps={eps:g}",
        targets={name: goal for name, goal in goals.items() if goal is not None},
        checks=checks,
        work=work,
    )


def iterations(x, y, epsilon, config: Config) -> float:
    """How many iterations genjax makes of the problem."""
    if config.problem == "iterations":
        return float(config.iterations)
    run = jax.jit(lambda x, y: sinkhorn(x, y, epsilon=epsilon, tolerance=config.tolerance))
    return float(run(jnp.asarray(x), jnp.asarray(y)).num_iterations)


NAMES = {
    "tolerance": "sinkhorn",
    "iterations": "sinkhorn_iterations",
    "divergence": "sinkhorn_divergence",
    "weights": "sinkhorn_weights",
}


def main(config: Config) -> list[Row]:
    """Print a line for each row and return the rows."""
    warnings.filterwarnings("ignore")
    peers = ("genjax-weights",) if config.problem == "weights" else config.peers
    notes = {p: f"{SIDES[p][0]} is not installed" for p in peers if not _installed(SIDES[p][0])}
    for name, why in notes.items():
        print(f"# {name} skipped: {why}")
    names = [OURS, *(p for p in peers if p not in notes)]
    kind = f"{config.statistic} of ms per call"
    print(f"# {config.problem}, {config.data}, tolerance {config.tolerance}: {kind}")
    print("# marginal_error: L1, of the potentials, in float64", flush=True)
    table: list[Row] = make_rows(NAMES[config.problem], {}, notes=notes)
    slow: set[str] = set()
    for n in config.n:
        for d in config.d:
            for eps in config.eps:
                chosen = [name for name in names if name not in slow]
                table += show(compare(n, d, eps, chosen, config))
        limit = 1e3 * config.slow / 16
        slow |= {r.side for r in table if r.ms is not None and r.ms > limit and r.side != OURS}
    return table


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    main(tyro.cli(Config))
