"""Oracles for genjax.numerics: numpy in float64, gradients by hand, extremes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from genjax import numerics

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3, 2))


def test_at_least_float32_widens_narrow_types_and_keeps_wide_ones(x64):
    for given, wanted in [("bfloat16", "float32"), ("int8", "float32"), ("float32", "float32")]:
        assert numerics.at_least_float32(jnp.ones(2, given)).dtype == wanted
    assert numerics.at_least_float32(jnp.ones(2, "float64")).dtype == "float64"


def test_sum_event_sums_all_but_the_batch_in_float32(compiled):
    got = compiled(numerics.sum_event)(jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(got, X.sum((1, 2)), rtol=1e-5)
    # 4096 ones in bfloat16 would stop at 256 if they were added in bfloat16.
    assert float(numerics.sum_event(jnp.ones((1, 4096), jnp.bfloat16))[0]) == 4096
    np.testing.assert_array_equal(numerics.sum_event(jnp.arange(3.0)), np.arange(3.0))


def test_expand_to_broadcasts_over_the_event():
    assert numerics.expand_to(jnp.ones(4), jnp.ones((4, 3, 2))).shape == (4, 1, 1)


def test_masked_mean_equals_dropping_and_ignores_nan(compiled):
    values = jnp.array([1.0, jnp.nan, 3.0, jnp.inf])
    where = jnp.array([True, False, True, False])
    f = compiled(lambda v, w: numerics.masked_mean(v, w))
    assert float(f(values, where)) == 2.0
    np.testing.assert_array_equal(jax.grad(lambda v: f(v, where))(values), [0.5, 0, 0.5, 0])
    assert float(f(values, jnp.zeros(4, bool))) == 0.0
    assert float(numerics.masked_mean(values[:0])) == 0.0
    np.testing.assert_allclose(numerics.masked_mean(jnp.asarray(X, jnp.float32)), X.mean(), 1e-5)


@pytest.mark.parametrize("axis", [0, 1, (0, 2)])
def test_log_mean_exp_against_scipy_at_extremes(axis, compiled):
    x = jnp.asarray(200 * X, jnp.float32)
    axes = (axis,) if isinstance(axis, int) else axis
    count = np.prod([X.shape[a] for a in axes])
    want = logsumexp(np.asarray(x, np.float64), axis=axis) - np.log(count)
    got = compiled(lambda v: numerics.log_mean_exp(v, axis))(x)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_exp_excess_is_never_negative_and_keeps_its_digits(compiled):
    """Against float64 with mpmath's digits from the series; its derivative is exp(x) - 1."""
    x = np.concatenate([np.geomspace(1e-18, 80, 400), [0.5, 0.0]]).astype(np.float32)
    x = np.concatenate([x, -x])
    wide = x.astype(np.float64)
    series = sum(wide**k / math.factorial(k) for k in range(2, 25))
    exact = np.where(np.abs(wide) < 1, series, np.exp(wide) - 1 - wide)
    value, slope = compiled(jax.vmap(jax.value_and_grad(numerics.exp_excess)))(jnp.asarray(x))
    assert jnp.all(value >= 0)
    np.testing.assert_allclose(value, exact, rtol=2e-5, atol=1e-37)
    np.testing.assert_allclose(slope, np.expm1(wide), rtol=2e-5, atol=1e-37)
    assert numerics.exp_excess(jnp.array(-jnp.inf)) == jnp.inf


def test_safe_sqrt_and_norms_at_zero_nan_and_elsewhere(compiled):
    root = compiled(numerics.safe_sqrt)(jnp.array([0.0, 4.0, jnp.nan, -1.0]))
    np.testing.assert_array_equal(root, [0, 2, np.nan, np.nan])
    assert float(jax.grad(numerics.safe_sqrt)(0.0)) == 0.0
    np.testing.assert_allclose(jax.grad(numerics.safe_sqrt)(4.0), 0.25)
    x = jnp.asarray(X, jnp.float32).at[1].set(0)
    norms = compiled(numerics.event_norm)(x)
    np.testing.assert_allclose(norms, np.sqrt((np.asarray(x) ** 2).sum((1, 2))), rtol=1e-6)
    gradient = jax.grad(lambda v: numerics.event_norm(v).sum())(x)
    want = np.asarray(x) / np.where(norms > 0, norms, 1)[:, None, None]
    np.testing.assert_allclose(gradient, want, rtol=1e-5)
    np.testing.assert_allclose(numerics.safe_norm(x), np.sqrt((np.asarray(x) ** 2).sum()), 1e-6)
    assert numerics.safe_norm(x, axis=-1, keepdims=True).shape == (4, 3, 1)
    np.testing.assert_array_equal(numerics.event_norm(jnp.array([-2.0, 0.0])), [2, 0])


DIMS = [2, numerics.DIRECT_DIMS + 1]  # coordinate by coordinate, and as a matrix product


@pytest.mark.parametrize("d", DIMS)
def test_squared_distances_against_scipy_near_and_far_from_the_origin(d, compiled):
    x, y = (jnp.asarray(RNG.normal(size=(n, d)), jnp.float32) for n in (7, 5))
    want = cdist(np.asarray(x, np.float64), np.asarray(y, np.float64), "sqeuclidean")
    f = compiled(numerics.squared_distances)
    np.testing.assert_allclose(f(x, y), want, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(f(x + 1000, y + 1000), want, rtol=1e-3)
    assert bool(jnp.all(f(x, x) >= 0))
    norms = [jnp.sum(z**2, axis=1) for z in (x, y)]
    np.testing.assert_allclose(f(x, y, norms=tuple(norms)), want, rtol=2e-6, atol=2e-6)
    assert f(x.astype(jnp.bfloat16), y).dtype == jnp.float32


@pytest.mark.parametrize("d", DIMS)
def test_squared_distances_have_exact_gradients_where_points_coincide_too(d, compiled):
    x, y = (jnp.asarray(RNG.normal(size=(n, d)), jnp.float32) for n in (4, 3))
    y = y.at[0].set(x[0])
    weight = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    total = lambda x, y: jnp.sum(weight * numerics.squared_distances(x, y))  # noqa: E731
    by_x, by_y = compiled(jax.grad(total, argnums=(0, 1)))(x, y)
    gaps = 2 * np.asarray(weight)[..., None] * np.asarray(x[:, None] - y[None, :])
    np.testing.assert_allclose(by_x, gaps.sum(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_y, -gaps.sum(0), rtol=1e-4, atol=1e-5)


def test_squared_distances_refuse_other_shapes(unchecked):
    with pytest.raises(ValueError, match="events"):
        numerics.squared_distances(jnp.zeros((3, 2)), jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="x must have rank 2"):
        numerics.squared_distances(jnp.zeros(3), jnp.zeros((3, 4)))


def test_centred_takes_the_mean_of_the_first():
    x, y = numerics.centred(jnp.asarray(X[0]), jnp.asarray(X[1]))
    np.testing.assert_allclose(x, X[0] - X[0].mean(0), atol=1e-6)
    np.testing.assert_allclose(y, X[1] - X[0].mean(0), atol=1e-6)


def test_a_mask_of_another_shape_is_no_mask(unchecked):
    for where in ([True], np.ones((4, 1), bool)):
        with pytest.raises(ValueError, match="shapes must be equal, got values"):
            numerics.masked_mean(jnp.ones(4), jnp.asarray(where))
