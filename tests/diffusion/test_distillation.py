"""Distillation: two steps in one, and the difference of two Gaussians' scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd

KEY = jax.random.key(0)
PROCESS = gd.Cosine()
X = jax.random.normal(KEY, (6, 2))


def gaussian(mean, std):
    """E[x_0 | x_t] of data N(mean, std^2)."""

    def denoise(x, t):
        alpha, sigma = (s(t)[:, None] for s in (PROCESS.alpha, PROCESS.sigma))
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return denoise


def test_one_step_to_the_target_is_two_of_the_teacher(x64):
    t, s = jnp.linspace(0.3, 1, 6), jnp.linspace(0, 0.5, 6)
    teacher = gaussian(0.4, 0.6)

    @jax.jit
    def run(x):
        target = gd.progressive_target(teacher, x, t, s, process=PROCESS)
        once = gd.ddim_move(PROCESS, target, x, t, s)
        m = (t + s) / 2
        first = gd.ddim_move(PROCESS, teacher(x, t), x, t, m)
        return once, gd.ddim_move(PROCESS, teacher(first, m), first, m, s)

    np.testing.assert_allclose(*run(jnp.asarray(X)), rtol=1e-9)


def test_the_loss_vanishes_for_a_point():
    """A teacher that knows the only image is its own target; an offset costs max(SNR, 1) of it."""
    point = lambda x, t: 0 * x + 0.4  # noqa: E731

    @jax.jit
    def run(x, off):
        student = lambda x, t: point(x, t) + off  # noqa: E731
        return gd.progressive_distillation_loss(
            student, point, KEY, x, process=PROCESS, num_steps=8
        )

    losses, aux = run(X, 0.0)
    np.testing.assert_allclose(losses, 0, atol=1e-6)
    snr = (PROCESS.alpha(aux["t"]) / PROCESS.sigma(aux["t"])) ** 2
    np.testing.assert_allclose(run(X, 0.1)[0], np.maximum(snr, 1) * 0.02, rtol=1e-3, atol=1e-5)
    places = aux["t"] * 8 / PROCESS.t_max
    np.testing.assert_allclose(places, np.round(places), atol=1e-5)


def test_the_gradient_is_the_difference_of_the_scores(x64):
    """sigma^2 / alpha times it, over the mean distance; 0 where the laws agree."""
    t, x = jnp.linspace(0.2, 0.9, 6), X.astype(jnp.float64)
    real = gaussian(0.4, 0.6)

    def score(x, t, mean, std):
        alpha, sigma = (s(t)[:, None] for s in (PROCESS.alpha, PROCESS.sigma))
        return -(x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    @jax.jit
    def run(x, mean, std):
        loss = lambda x: jnp.sum(  # noqa: E731
            gd.distribution_matching_loss(real, gaussian(mean, std), KEY, x, process=PROCESS, t=t)[
                0
            ]
        )
        return jax.value_and_grad(loss)(x)

    noise = jax.random.normal(jax.random.split(KEY)[1], x.shape, x.dtype)
    alpha, sigma = (s(t)[:, None] for s in (PROCESS.alpha, PROCESS.sigma))
    x_t = alpha * x + sigma * noise
    gap = score(x_t, t, -0.2, 0.9) - score(x_t, t, 0.4, 0.6)
    size = jnp.mean(jnp.abs(x - real(x_t, t)), axis=1, keepdims=True)
    value, gradient = run(x, -0.2, 0.9)
    np.testing.assert_allclose(gradient, sigma**2 / alpha * gap / size, rtol=1e-8)
    np.testing.assert_allclose(value, np.sum(gradient**2) / 2, rtol=1e-8)
    np.testing.assert_allclose(run(x, 0.4, 0.6)[1], 0, atol=1e-12)


def test_what_does_not_fit_is_refused_by_name(unchecked):
    with pytest.raises(ValueError, match="times must fall"):
        gd.progressive_target(
            gaussian(0, 1), X, jnp.full(6, 0.2), jnp.full(6, 0.2), process=PROCESS
        )
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        gd.progressive_distillation_loss(
            gaussian(0, 1), gaussian(0, 1), KEY, X, process=PROCESS, num_steps=0
        )
