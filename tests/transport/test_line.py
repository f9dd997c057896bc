"""Exact transport on the line against POT, scipy and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from scipy.stats import wasserstein_distance

from genjax.transport import transport_1d


@functools.cache
def solved(p):
    def run(x, y, a, b):
        found = transport_1d(x, y, p=p, a=a, b=b)
        return found.value, found.plan()

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3), has_aux=True))


def samples(n=9, m=6):
    """Two samples with ties inside and between, and a point of no weight in each."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=n), rng.normal(size=m) + 0.5
    x[3], y[2], y[4] = x[1], x[1], y[0]
    a, b = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))
    a[5], b[1] = 0, 0
    return x, y, a / a.sum(), b / b.sum()


@pytest.mark.parametrize("p", [1, 2, 1.5])
def test_value_and_plan_are_those_of_pot(x64, p):
    x, y, a, b = samples()
    (value, plan), _ = solved(p)(x, y, a, b)
    np.testing.assert_allclose(value, ot.wasserstein_1d(x, y, a, b, p=p), rtol=1e-12)
    expected = ot.emd2(a, b, np.abs(x[:, None] - y[None]) ** p)  # a linear program
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(np.sum(plan * np.abs(x[:, None] - y[None]) ** p), value, rtol=1e-12)
    np.testing.assert_allclose(plan.sum(1), a, atol=1e-15)
    np.testing.assert_allclose(plan.sum(0), b, atol=1e-15)
    assert np.min(plan) >= 0
    if p == 1:
        np.testing.assert_allclose(value, wasserstein_distance(x, y, a, b), rtol=1e-12)


@pytest.mark.parametrize("p", [1, 2, 1.5])
def test_gradients_against_finite_differences(x64, p):
    rng = np.random.default_rng(2)
    args = [
        rng.normal(size=9),
        rng.normal(size=6),
        rng.dirichlet(np.ones(9)),
        rng.dirichlet(np.ones(6)),
    ]
    gradients = solved(p)(*args)[1]
    for k, gradient in enumerate(gradients):
        along = rng.normal(size=args[k].shape)
        if k > 1:
            along -= along.mean()  # weights keep their sum
        ends = []
        for sign in (1, -1):
            moved = list(args)
            moved[k] = args[k] + sign * 1e-6 * along
            ends.append(ot.wasserstein_1d(*moved, p=p))
        np.testing.assert_allclose(gradient @ along, (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


def test_equal_samples_and_float32():
    x, _, a, _ = (z.astype(np.float32) for z in samples())
    for p in (1, 2, 1.5):
        (value, plan), gradient = solved(p)(x, x, a, a)
        assert value == 0
        np.testing.assert_allclose(plan, np.diag(a / a.sum()), atol=1e-7)
        assert all(np.all(g == 0) for g in gradient[:2])
    # 10,000 points in float32: integers 0 to 9 against all of them moved by 1, then scaled.
    rng = np.random.default_rng(0)
    x = rng.integers(0, 10, 10_000).astype(np.float32)
    y = rng.permutation(x)[:5_000] * 0 + 10
    both = jax.jit(jax.value_and_grad(lambda x, y: transport_1d(x, y, p=1).value))
    for scale in (1e-3, 1.0, 1e3):
        value, gradient = both(scale * x, scale * y)
        np.testing.assert_allclose(value, scale * np.mean(10 - x), rtol=1e-5)
        np.testing.assert_allclose(gradient, -1e-4, rtol=1e-6)


def test_one_point_and_different_sizes():
    found = transport_1d(jnp.array([2.0]), jnp.arange(5.0))
    np.testing.assert_allclose(found.value, 2.0)  # the mean of (2 - k)^2
    np.testing.assert_allclose(found.plan(), np.full((1, 5), 0.2), rtol=1e-6)


def test_points_that_are_not_finite_are_seen():
    x = jnp.array([0.0, jnp.nan, 1.0])
    for p in (1, 2, 1.5):
        assert np.isnan(transport_1d(x, x, p=p).value)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (jnp.ones((3, 1)), {}, "x must have rank 1"),
        (jnp.ones(0), {}, "x must hold at least one"),
        (jnp.ones(3), {"p": 0.5}, "p must be at least 1"),
        (jnp.ones(3), {"a": jnp.ones(2) / 2}, "a must have shape"),
        (jnp.ones(3), {"a": jnp.ones(3)}, "the sum of a must lie in"),
    ],
    ids=str,
)
def test_errors(unchecked, x, options, message):
    with pytest.raises(ValueError, match=message):
        transport_1d(x, jnp.ones(4), **options)
