"""Likelihoods against scipy, against sums over all levels, and at extreme parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special, stats

from genjax.likelihoods import (
    bernoulli_log_likelihood,
    categorical_log_likelihood,
    gaussian_log_likelihood,
    logistic_log_likelihood,
    logistic_mixture_log_likelihood,
    token_log_probs,
)

RNG = np.random.default_rng(0)
SHAPE, LEVELS, COMPONENTS = (4, 2, 3), 17, 3
REAL = RNG.normal(size=SHAPE)
WHOLE = RNG.integers(LEVELS, size=SHAPE)
WHOLE[0, 0], WHOLE[1, 0] = 0, LEVELS - 1
MEAN, LOG_SCALE = RNG.normal(size=SHAPE), RNG.normal(size=SHAPE) - 2
MIX = RNG.normal(size=(3, *SHAPE, COMPONENTS)) - np.array([0, 0, 2]).reshape(3, 1, 1, 1, 1)


def total(values):
    return values.sum(axis=(1, 2))


def bins(x, mean, log_scale, levels=LEVELS):
    """Bin probabilities from scipy's logistic, in float64, the outer bins open."""
    centre, half = 2 * x / (levels - 1) - 1, 1 / (levels - 1)
    # By symmetry both edges are taken on the side where the cdf is small and exact.
    side = np.where(centre > mean, -1.0, 1.0)
    logistic = stats.logistic(0, np.exp(log_scale))
    upper = np.where(x == levels - 1, np.inf, centre + half - mean)
    lower = np.where(x == 0, -np.inf, centre - half - mean)
    return side * (logistic.cdf(side * upper) - logistic.cdf(side * lower))


def f32(*arrays):
    return tuple(jnp.array(a, jnp.float32) for a in arrays)


@pytest.mark.parametrize("log_var", [0.0, -1, MEAN[0, 0, 0], MEAN[0], LOG_SCALE])
def test_gaussian(compiled, log_var):
    """Fixed, per element of the event, and per example."""
    x, mean = f32(REAL, MEAN)
    variance = f32(log_var)[0] if isinstance(log_var, np.ndarray) else log_var
    value = compiled(lambda x, m: gaussian_log_likelihood(x, m, variance))(x, mean)
    expected = total(stats.norm.logpdf(REAL, MEAN, np.exp(np.asarray(log_var) / 2)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_bernoulli(compiled):
    logits = 3 * MEAN
    for x in (WHOLE > 8, (WHOLE > 8).astype(np.uint8), (WHOLE > 8).astype(np.float32)):
        value = compiled(bernoulli_log_likelihood)(jnp.array(x), *f32(logits))
        expected = total(stats.bernoulli.logpmf(x.astype(int), special.expit(logits)))
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_bernoulli_at_logits_of_200_is_finite_in_value_and_gradient(compiled):
    logits = jnp.array([[200.0, -200.0, 200.0, -200.0]])
    x = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    value, gradient = compiled(jax.value_and_grad(lambda a: bernoulli_log_likelihood(x, a).sum()))(
        logits
    )
    np.testing.assert_allclose(value, -400)
    np.testing.assert_allclose(gradient, [[0, 0, -1, 1]], atol=1e-30)


def test_bernoulli_of_sure_logits(compiled):
    """0 where +-infinity is right, -infinity where it is wrong; grey values; float32 tails."""
    big = jnp.inf
    x = jnp.array([[1.0], [0.0], [1.0], [0.0], [0.5], [1.0]])
    logits = jnp.array([[big], [-big], [-big], [big], [big], [20.0]])
    value = compiled(bernoulli_log_likelihood)(x, logits)
    np.testing.assert_allclose(value, [0, 0, -big, -big, -big, -np.log1p(np.exp(-20.0))], rtol=1e-5)
    by_logits, by_x = compiled(jax.grad(lambda a, x: bernoulli_log_likelihood(x, a).sum(), (0, 1)))(
        logits, x
    )
    np.testing.assert_array_equal(by_logits[:2], 0)
    np.testing.assert_allclose(by_x[5], 20, rtol=1e-5)  # the logit


def test_categorical(compiled):
    logits = RNG.normal(size=(*SHAPE, LEVELS))
    expected = total(
        np.take_along_axis(special.log_softmax(logits, -1), WHOLE[..., None], -1)[..., 0]
    )
    for dtype in (np.int32, np.uint8):
        value = compiled(categorical_log_likelihood)(jnp.array(WHOLE, dtype), *f32(logits))
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_categorical_extremes(compiled):
    logits = jnp.array([[[200.0, -200.0]], [[-200.0, 200.0]]])
    value, gradient = compiled(
        jax.value_and_grad(lambda a: categorical_log_likelihood(jnp.zeros((2, 1), int), a).sum())
    )(logits)
    np.testing.assert_allclose(value, -400)
    assert np.isfinite(gradient).all()


def test_logistic(compiled):
    value = compiled(lambda *a: logistic_log_likelihood(*a, levels=LEVELS))(
        jnp.array(WHOLE), *f32(MEAN, LOG_SCALE)
    )
    np.testing.assert_allclose(value, total(np.log(bins(WHOLE, MEAN, LOG_SCALE))), rtol=1e-5)


def test_logistic_mixture(compiled):
    logits, means, scales = MIX
    value = compiled(lambda *a: logistic_mixture_log_likelihood(*a, levels=LEVELS))(
        jnp.array(WHOLE), *f32(logits, means, scales)
    )
    p = (special.softmax(logits, -1) * bins(WHOLE[..., None], means, scales)).sum(-1)
    np.testing.assert_allclose(value, total(np.log(p)), rtol=1e-5)


def test_one_component_is_the_logistic():
    x, (mean, scale) = jnp.array(WHOLE), f32(MEAN, LOG_SCALE)
    mixture = logistic_mixture_log_likelihood(
        x, jnp.zeros((*SHAPE, 1)), mean[..., None], scale[..., None], levels=LEVELS
    )
    single = logistic_log_likelihood(x, mean, scale, levels=LEVELS)
    np.testing.assert_allclose(mixture, single, rtol=1e-6)


def test_probabilities_of_all_levels_sum_to_one():
    mean, log_scale, x = (
        a.reshape(-1, 1)
        for a in np.meshgrid(
            [-300.0, -0.3, 0.0, 1.0], [-20.0, -7.0, -2.0, 3.0, 30.0], np.arange(LEVELS)
        )
    )
    each = logistic_log_likelihood(jnp.array(x), *f32(mean, log_scale), levels=LEVELS)
    total = special.logsumexp(np.asarray(each).reshape(5, 4, LEVELS), axis=-1)
    np.testing.assert_allclose(total, 0, atol=3e-6)


def test_logistic_extremes_are_finite_in_value_and_gradient(compiled):
    mean, log_scale, x = (
        jnp.array(a.reshape(-1, 1))
        for a in np.meshgrid([-200.0, 0.0, 200.0], [-200.0, -7.0, 60.0, 1e3], np.arange(LEVELS))
    )
    loss = lambda m, s: logistic_log_likelihood(x.astype(int), m, s, levels=LEVELS).sum()  # noqa: E731
    out = compiled(jax.value_and_grad(loss, argnums=(0, 1)))(
        mean.astype(jnp.float32), log_scale.astype(jnp.float32)
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    # A bin well inside holds its width over 4 scales, however wide: the gradient leads back.
    wide = jnp.array([[59.0], [61.0], [1e3]])
    inside = lambda s: logistic_log_likelihood(jnp.full((3, 1), 5), 0 * s, s, levels=17)  # noqa: E731
    np.testing.assert_allclose(inside(wide), np.log(1 / 32) - wide[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(jax.grad(lambda s: inside(s).sum())(wide), -1)


def test_gradients(x64):
    x = jnp.array(WHOLE)
    binary = jnp.array(WHOLE > 8)
    cases = (
        (gaussian_log_likelihood, (REAL, MEAN, LOG_SCALE)),
        (lambda a: bernoulli_log_likelihood(binary, a), (MEAN,)),
        (lambda a: categorical_log_likelihood(x, a), (RNG.normal(size=(*SHAPE, LEVELS)),)),
        (lambda *a: logistic_log_likelihood(x, *a, levels=LEVELS), (MEAN, LOG_SCALE)),
        (lambda *a: logistic_mixture_log_likelihood(x, *a, levels=LEVELS), tuple(MIX)),
    )
    for function, args in cases:
        check_grads(jax.jit(function), tuple(map(jnp.array, args)), order=1, rtol=1e-5)


def test_bfloat16_in_float32_out():
    x = jnp.array(WHOLE)
    half = jnp.array(MEAN, jnp.bfloat16)
    many = jnp.array(MIX[0], jnp.bfloat16)
    for value in (
        gaussian_log_likelihood(half, half, half),
        bernoulli_log_likelihood(jnp.array(WHOLE > 8), half),
        categorical_log_likelihood(jnp.clip(x, 0, COMPONENTS - 1), many),
        logistic_log_likelihood(x, half, half, levels=LEVELS),
        logistic_mixture_log_likelihood(x, many, many, many, levels=LEVELS),
    ):
        assert value.dtype == jnp.float32
        assert value.shape == (4,)


def test_bad_input(unchecked):
    x, real = jnp.array(WHOLE), jnp.array(REAL, jnp.float32)
    with pytest.raises(ValueError, match=r"must broadcast to x \(4, 2, 3\), got shape \(5,\)"):
        gaussian_log_likelihood(real, real, jnp.zeros(5))
    with pytest.raises(ValueError, match="shapes must be equal"):
        gaussian_log_likelihood(real, real[:2])
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\]"):
        bernoulli_log_likelihood(x, real)
    with pytest.raises(TypeError, match=r"whole numbers 0 \.\. 2, got dtype float32"):
        categorical_log_likelihood(real, jnp.zeros((*SHAPE, 3)))
    with pytest.raises(ValueError, match=r"x must lie in \[0, 2\]"):
        categorical_log_likelihood(x, jnp.zeros((*SHAPE, 3)))
    with pytest.raises(ValueError, match=r"logits without the last axis \(4, 3, 2\)"):
        categorical_log_likelihood(x, jnp.zeros((4, 3, 2, 17)))
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        logistic_log_likelihood(x, real, real, levels=1)
    with pytest.raises(ValueError, match=r"x must lie in \[0, 7\]"):
        logistic_log_likelihood(x, real, real, levels=8)
    with pytest.raises(ValueError, match="shapes must be equal"):
        logistic_mixture_log_likelihood(x, *f32(MIX[0], MIX[1]), real[..., None], levels=17)


@pytest.mark.parametrize("wrong", [-100, -1, 4])
def test_a_level_outside_is_seen_under_jit(wrong):
    logits, x = jnp.zeros((1, 2, 4)), jnp.array([[wrong, 3]])
    nats = jax.jit(token_log_probs)(logits, x)
    assert np.isnan(nats[0, 0])
    np.testing.assert_allclose(nats[0, 1], -np.log(4), rtol=1e-6)
    assert np.isnan(jax.jit(categorical_log_likelihood)(x, logits)[0])
