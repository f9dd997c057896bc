import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd

VP = gd.VariancePreserving()
# Two classes, Gaussian each: mean, variance of the data, share.
CLASSES = [(jnp.array([-1.0, 0.5]), 0.2, 0.3), (jnp.array([1.5, 0.5]), 0.4, 0.7)]


def _one(index):
    """The exact denoiser and log density of one class."""
    mean, variance, _ = CLASSES[index]

    def total(t):
        return (VP.alpha(t) ** 2 * variance + VP.variance(t))[:, None]

    def denoise(x, t):
        alpha = VP.alpha(t)[:, None]
        return mean[None] + alpha * variance / total(t) * (x - alpha * mean[None])

    def log_prob(x, t):
        offset = x - VP.alpha(t)[:, None] * mean[None]
        return jnp.sum(-0.5 * offset**2 / total(t) - 0.5 * jnp.log(total(t)), axis=1)

    return denoise, log_prob


def _log_joint(x, t):
    """log p(y, x_t) [class, batch]."""
    return jnp.stack([jnp.log(c[2]) + _one(i)[1](x, t) for i, c in enumerate(CLASSES)])


def _log_class(x, t):
    """log p(y = 0 | x_t), exact."""
    return jax.nn.log_softmax(_log_joint(x, t), axis=0)[0]


def _free(x, t):
    """The exact denoiser without the class."""
    weights = jax.nn.softmax(_log_joint(x, t), axis=0)
    return sum(w[:, None] * _one(i)[0](x, t) for i, w in enumerate(weights))


def test_exact_classifier_gives_the_conditional_denoiser(x64, compiled, key):
    x, t = jax.random.normal(key, (16, 2)), jnp.linspace(0.05, 1.0, 16)
    guided = gd.classifier_guidance(_free, _log_class, process=VP)
    expected, free = compiled(lambda: (_one(0)[0](x, t), _free(x, t)))()
    np.testing.assert_allclose(compiled(guided)(x, t), expected, rtol=1e-9, atol=1e-10)
    twice = gd.classifier_guidance(_free, _log_class, process=VP, scale=2.0)
    found = compiled(twice)(x, t)
    np.testing.assert_allclose(found - free, 2 * (expected - free), rtol=1e-9, atol=1e-10)


def test_classifier_free_guidance_is_the_linear_rule_in_noise_too(compiled, key):
    x, t = jax.random.normal(key, (16, 2)), jnp.linspace(0.05, 1.0, 16)
    conditional, free = _one(0)[0], _free

    def noise(denoise):
        options = {"source": "x0", "target": "epsilon", "process": VP}
        return gd.convert(denoise(x, t), x, t, **options)

    for scale in (0.0, 1.0, 3.0):
        guided = gd.classifier_free_guidance(conditional, free, process=VP, scale=scale)
        # Ho & Salimans 2022, eq. 6, w = scale - 1.
        expected = scale * noise(conditional) - (scale - 1) * noise(free)
        np.testing.assert_allclose(noise(compiled(guided)), expected, atol=2e-4)


def test_guidance_interval(compiled, key):
    x, t = jax.random.normal(key, (5, 2)), jnp.array([0.05, 0.2, 0.4, 0.6, 1.0])
    conditional, free = _one(0)[0], _free
    level = np.asarray(VP.noise_ratio(t))
    guided = gd.classifier_free_guidance(
        conditional,
        free,
        process=VP,
        scale=4.0,
        interval=(float(level[1]) * 0.99, float(level[2]) * 1.01),
    )
    value, only = compiled(guided)(x, t), conditional(x, t)
    full = gd.classifier_free_guidance(conditional, free, process=VP, scale=4.0)(x, t)
    np.testing.assert_allclose(value[jnp.array([0, 3, 4])], only[jnp.array([0, 3, 4])], atol=1e-6)
    np.testing.assert_allclose(value[1:3], full[1:3], atol=1e-6)
    assert np.all(np.abs(value[1:3] - only[1:3]).max(1) > 1e-3)


def test_bad_input(unchecked):
    with pytest.raises(ValueError, match=r"interval\[0\] must lie in"):
        gd.classifier_free_guidance(
            lambda x, t: x, lambda x, t: x, process=VP, scale=2.0, interval=(3.0, 1.0)
        )
