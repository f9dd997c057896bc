"""Densities over a base: values, samples, the list of a multi-scale flow, Tweedie's step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from genjax import flows

KEY = jax.random.key(0)
SCALE = {"shift": jnp.asarray([1.0, -2.0]), "log_scale": jnp.asarray([0.5, -0.3])}


def test_affine_flow_is_a_gaussian(compiled):
    """z = (x + shift) e^s, so x ~ N(-shift, e^{-2s}): value and gradient in closed form."""
    x = jax.random.normal(KEY, (6, 2))
    base = flows.normal((2,))
    run = compiled(lambda x: flows.log_prob(flows.actnorm(), base, SCALE, x))
    s = 10 * np.tanh(np.asarray(SCALE["log_scale"]) / 10)
    expected = stats.norm(-np.asarray(SCALE["shift"]), np.exp(-s)).logpdf(x).sum(1)
    np.testing.assert_allclose(run(x), expected, rtol=2e-6)
    slope = jax.grad(lambda x: jnp.sum(run(x)))(x)
    np.testing.assert_allclose(slope, -(x + SCALE["shift"][None]) * np.exp(2 * s)[None], rtol=1e-5)


def test_samples_have_the_law_and_the_log_prob_they_come_with(compiled):
    base = flows.normal((2,))
    draw = compiled(lambda key: flows.sample_and_log_prob(flows.actnorm(), base, SCALE, key, 4000))
    x, log_prob = draw(KEY)
    np.testing.assert_allclose(log_prob, flows.log_prob(flows.actnorm(), base, SCALE, x), atol=2e-5)
    for i in range(2):
        law = stats.norm(-SCALE["shift"][i], np.exp(-SCALE["log_scale"][i]))
        assert stats.kstest(np.asarray(x[:, i]), law.cdf).pvalue > 1e-3
    again = flows.sample(flows.actnorm(), base, SCALE, KEY, 4000)
    np.testing.assert_allclose(again, x, atol=2e-6)


def test_sample_i_does_not_depend_on_the_number_of_samples():
    for base in (flows.normal((3,)), flows.uniform((3,)), flows.normal([(2,), (1, 2)])):
        few, many = base.sample(KEY, 2), base.sample(KEY, 64)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:2]), few, many)


def test_bases_equal_scipy():
    z = jax.random.normal(KEY, (5, 2, 3))
    expected = stats.norm(0, 0.7).logpdf(z).sum((1, 2))
    np.testing.assert_allclose(flows.normal((2, 3), 0.7).log_prob(z), expected, rtol=1e-5)
    parts = [z[:, 0], z]
    both = stats.norm().logpdf(z).sum((1, 2)) + stats.norm().logpdf(z[:, 0]).sum(1)
    np.testing.assert_allclose(flows.normal([(3,), (2, 3)]).log_prob(parts), both, rtol=1e-5)
    box = flows.uniform((2,), -1.0, 3.0)
    inside = box.log_prob(jnp.asarray([[0.0, 2.9], [0.0, 3.1]]))
    np.testing.assert_allclose(inside, [-2 * np.log(4), -np.inf], rtol=1e-6)


def test_an_empty_batch_has_an_empty_log_prob():
    none = jnp.zeros((0, 2))
    assert flows.normal((2,)).log_prob(none).shape == (0,)
    assert flows.uniform((2,)).log_prob(none).shape == (0,)
    rescaled = flows.log_prob(flows.rescale(0, 2), flows.uniform((2,)), None, none)
    assert rescaled.shape == flows.divergence(jnp.tanh, none)[1].shape == (0,)


def test_multi_scale_log_prob_counts_every_part():
    """Two levels of actnorm: the same Gaussian, whatever leaves early."""
    x = jax.random.normal(KEY, (3, 4))
    params = [flows.actnorm_init(x), flows.actnorm_init(x[:, :2])]
    bijection = flows.multi_scale([flows.actnorm(), flows.actnorm()])
    z_list, log_det = bijection.forward(params, x)
    assert [z.shape for z in z_list] == [(3, 2), (3, 2)]
    base = flows.normal([(2,), (2,)])
    expected = base.log_prob(z_list) + log_det
    np.testing.assert_allclose(flows.log_prob(bijection, base, params, x), expected)
    np.testing.assert_allclose(bijection.inverse(params, z_list)[0], x, atol=1e-5)


def test_denoise_is_the_posterior_mean_of_a_gaussian(compiled):
    """x ~ N(0, 4), y = x + sigma e: E[x | y] = 4 y / (4 + sigma^2)."""
    sigma = 0.6

    def noisy(y):
        return jnp.sum(jax.scipy.stats.norm.logpdf(y, 0, (4 + sigma**2) ** 0.5), axis=1)

    y = jax.random.normal(KEY, (5, 3))
    clean = compiled(lambda y: flows.denoise(noisy, y, sigma))(y)
    np.testing.assert_allclose(clean, y * 4 / (4 + sigma**2), rtol=1e-5)


def test_bad_input_is_named(unchecked):
    x = jnp.zeros((2, 3))
    cases = [
        (ValueError, "shape \\(2,\\)", lambda: flows.normal((2,)).log_prob(x)),
        (ValueError, "shape \\(2,\\)", lambda: flows.uniform((2,)).log_prob(x)),
        (TypeError, "list of 2", lambda: flows.normal([(3,), (3,)]).log_prob(x)),
        (ValueError, "scale", lambda: flows.normal((2,), 0.0)),
        (ValueError, "high - low", lambda: flows.uniform((2,), 1.0, 1.0)),
        (ValueError, "sigma", lambda: flows.denoise(lambda y: y[:, 0], x, -1.0)),
        (
            ValueError,
            "n must be at least 1",
            lambda: flows.sample(flows.actnorm(), flows.normal((2,)), SCALE, KEY, 0),
        ),
    ]
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()
