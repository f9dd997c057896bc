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


def test_the_interval_skips_the_second_network(key):
    """Counted at run time: the unconditional network is called at the two inner of five times."""
    calls = {"conditional": 0, "free": 0}

    def counted(name, denoise):
        def count(_):
            calls[name] += 1

        def wrapped(x, t):
            jax.debug.callback(count, t[0])
            return denoise(x, t)

        return wrapped

    times = jnp.array([1.0, 0.6, 0.4, 0.2, 0.05, 0.0])
    level = np.asarray(VP.noise_ratio(times))
    guided = gd.classifier_free_guidance(
        counted("conditional", _one(0)[0]), counted("free", _free), process=VP, scale=4.0,
        interval=(float(level[3]) * 0.99, float(level[2]) * 1.01),
    )  # fmt: skip
    draw = jax.jit(
        lambda key: gd.sample(guided, key, (3, 2), process=VP, times=times, step=gd.ddim_step)
    )
    jax.block_until_ready(draw(key))
    jax.effects_barrier()
    assert calls == {"conditional": 5, "free": 2}


def test_rescaled_guidance_has_the_conditional_spread(compiled, key):
    """Lin et al. 2024, eqs 15-16, by numpy in float64; finite where the mean is constant."""
    x, t = jax.random.normal(key, (16, 2)), jnp.linspace(0.05, 1.0, 16)
    mean, free = (np.asarray(f(x, t), np.float64) for f in (_one(0)[0], _free))
    guided = free + 7.5 * (mean - free)
    ratio = mean.std(1, keepdims=True) / guided.std(1, keepdims=True)
    for share in (0.7, 1.0):
        rule = gd.classifier_free_guidance(_one(0)[0], _free, process=VP, scale=7.5, rescale=share)
        expected = (share * ratio + 1 - share) * guided
        np.testing.assert_allclose(compiled(rule)(x, t), expected, rtol=2e-4, atol=1e-5)

    def constant(c):
        flat = lambda x, t: c * jnp.ones_like(x)  # noqa: E731
        rule = gd.classifier_free_guidance(flat, flat, process=VP, scale=3.0, rescale=0.7)
        return jnp.sum(rule(x, t))

    np.testing.assert_allclose(jax.value_and_grad(constant)(2.0), (64.0, 32.0), rtol=1e-6)


def test_clipping_and_dynamic_thresholding(compiled, key):
    """Saharia et al. 2022 by numpy; a mean within the limit stays, one example leaves the rest."""
    x, t = 2 * jax.random.normal(key, (4, 5, 6)), jnp.ones(4)
    x = x.at[0].multiply(0.1)
    identity = lambda x, t: x  # noqa: E731
    clip = compiled(gd.clipped(identity, low=-0.5, high=1.0))(x, t)
    np.testing.assert_array_equal(clip, np.clip(x, -0.5, 1.0))
    value = compiled(gd.dynamic_thresholding(identity, quantile=0.9, limit=1.5))(x, t)
    size = np.quantile(np.abs(np.asarray(x, np.float64)).reshape(4, -1), 0.9, axis=1)
    size = np.maximum(size, 1.5)[:, None, None]
    np.testing.assert_allclose(value, np.clip(x, -size, size) / size * 1.5, rtol=1e-6)
    np.testing.assert_array_equal(value[0], x[0])
    assert np.abs(value).max() <= 1.5
    slope = jax.grad(lambda x: gd.dynamic_thresholding(identity)(x, t).sum())
    assert np.isfinite(slope(x)).all()
    assert np.isfinite(slope(0 * x)).all()


def test_bad_input(unchecked):
    for rule in (gd.clipped, gd.dynamic_thresholding):
        with pytest.raises(ValueError, match="must"):
            rule(lambda x, t: x, **{"high" if rule is gd.clipped else "limit": -1.0})
    with pytest.raises(ValueError, match="rescale must lie in"):
        gd.classifier_free_guidance(_free, _free, process=VP, scale=2.0, rescale=1.5)
    with pytest.raises(ValueError, match=r"interval\[0\] must lie in"):
        gd.classifier_free_guidance(
            lambda x, t: x, lambda x, t: x, process=VP, scale=2.0, interval=(3.0, 1.0)
        )
