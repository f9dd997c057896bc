import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd

VP = gd.VariancePreserving()
CLASSES = [
    gd.GaussianMixture(jnp.ones(1), jnp.array([[m, 0.5]]), jnp.array([[[v, 0.0], [0.0, 0.3]]]))
    for m, v in [(-1.0, 0.2), (1.5, 0.4)]
]
PRIOR = (0.3, 0.7)


def _joint():
    parts = [jnp.concatenate(leaves) for leaves in zip(*CLASSES, strict=True)]
    return gd.GaussianMixture(jnp.array(PRIOR), *parts[1:])


def _log_class(x, t):
    """log p(y = 0 | x_t), exact."""
    logs = [
        jnp.log(p) + gd.mixture_log_prob(c, x, t, process=VP)
        for p, c in zip(PRIOR, CLASSES, strict=True)
    ]
    return logs[0] - jnp.logaddexp(*logs)


def test_exact_classifier_gives_the_conditional_denoiser(x64, compiled, key):
    x, t = jax.random.normal(key, (16, 2)), jnp.linspace(0.05, 1.0, 16)
    free = gd.mixture_denoiser(_joint(), process=VP)
    guided = gd.classifier_guidance(free, _log_class, process=VP)
    expected = gd.mixture_denoiser(CLASSES[0], process=VP)(x, t)
    np.testing.assert_allclose(compiled(guided)(x, t), expected, rtol=1e-6, atol=1e-6)
    twice = gd.classifier_guidance(free, _log_class, process=VP, scale=2.0)(x, t)
    np.testing.assert_allclose(twice - free(x, t), 2 * (expected - free(x, t)), atol=2e-6)


def test_classifier_free_guidance_is_the_linear_rule_in_noise_too(compiled, key):
    x, t = jax.random.normal(key, (16, 2)), jnp.linspace(0.05, 1.0, 16)
    conditional, free = (gd.mixture_denoiser(m, process=VP) for m in (CLASSES[0], _joint()))

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
    conditional, free = (gd.mixture_denoiser(m, process=VP) for m in (CLASSES[0], _joint()))
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
