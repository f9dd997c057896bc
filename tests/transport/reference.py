"""What several transport tests share: fixtures, clouds, and a float64 numpy Sinkhorn."""

import json
from pathlib import Path

import jax
import numpy as np

from genjax.transport import SinkhornResult

REFERENCES = Path(__file__).parent.parent / "references"


def load(name):
    return json.loads((REFERENCES / f"{name}.json").read_text())


def clouds(n, m, d, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)).astype(np.float32)
    y = (0.8 * rng.standard_normal((m, d)) + 0.5).astype(np.float32)
    return jax.device_put((x, y))


# One program: without jit a plan is thirty.
plan_of = jax.jit(SinkhornResult.plan)


def squared(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return ((x[:, None, :] - y[None, :, :]) ** 2).sum(-1)


def exact_plan(cost, f, g, a, b, epsilon):
    """The plan of given potentials in float64."""
    cost, f, g, a, b = (np.asarray(z, np.float64) for z in (cost, f, g, a, b))
    z = (f[:, None] + g[None, :] - cost) / epsilon
    with np.errstate(divide="ignore", over="ignore"):
        return np.exp(z + np.log(a)[:, None] + np.log(b)[None, :])


def marginal_error(plan, a, b):
    return np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum()


def logsumexp(z, axis):
    """scipy's, without its care for weights and types, which takes ten times as long."""
    peak = z.max(axis, keepdims=True)
    return np.log(np.exp(z - peak).sum(axis)) + peak.squeeze(axis)


def solve64(cost, a, b, epsilon, tolerance=1e-9, limit=200_000):
    """Potentials, value and <P, C> in float64: annealed log-domain updates, brute force."""
    cost = np.asarray(cost, np.float64)
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a), np.log(b)
    f, g, level = np.zeros(cost.shape[0]), np.zeros(cost.shape[1]), max(cost.mean(), epsilon)
    for count in range(limit):
        past = 0.7 if level == epsilon and count > 100 else 0.0  # over-relaxation
        new = -level * logsumexp((g[None, :] - cost) / level + log_b[None, :], axis=1)
        f = new + past * (new - f)
        new = -level * logsumexp((f[:, None] - cost) / level + log_a[:, None], axis=0)
        g = new + past * (new - g)
        if level > epsilon:
            level = max(0.9 * level, epsilon)
        elif count % 10 == 0:
            plan = exact_plan(cost, f, g, a, b, epsilon)
            if marginal_error(plan, a, b) < tolerance:
                break
    plan = exact_plan(cost, f, g, a, b, epsilon)
    return f, g, a @ f + b @ g, (plan * cost).sum()
