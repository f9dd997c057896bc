"""Multistep solvers: weak orders on a Gaussian, where the law of the sampler is known exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd
from genjax.diffusion.multistep import _moments
from tests.diffusion.test_samplers import move_with_noise, replay

VP = gd.VariancePreserving(t_min=0.02)
VARIANCE = 0.25


def denoise_gaussian(x, t):
    """E[x_0 | x_t] for data N(0, VARIANCE)."""
    alpha, noise = VP.alpha(t)[:, None], VP.variance(t)[:, None]
    return alpha * VARIANCE / (alpha**2 * VARIANCE + noise) * x


def variance_error(step, num):
    """Of the sampler's law at t_min: a sample is linear in its normals, with slopes c."""
    times = gd.time_grid(VP, num, spacing="log_snr", to_zero=False)

    def end(noise):
        return replay(step, denoise_gaussian, VP, times, noise[:, None, None])[-1, 0, 0]

    slopes = jax.jit(jax.grad(end))(jnp.zeros(num + 1))
    exact = VP.alpha(VP.t_min) ** 2 * VARIANCE + VP.variance(VP.t_min)
    return float(jnp.abs(jnp.sum(jnp.square(slopes)) - exact))


@pytest.mark.parametrize(
    ("step", "order"),
    [
        (gd.euler_maruyama_step, 1),
        (gd.ancestral_step, 1),
        (partial(gd.dpm_solver_step, eta=1.0), 2),
        (partial(gd.dpm_solver_step, eta=0.5), 2),
        (partial(gd.dpm_solver_step, order=3, eta=1.0), 2),
    ],
    ids=["euler_maruyama", "ancestral", "dpm_solver_sde", "dpm_solver_half", "dpm_solver_3_sde"],
)
def test_stochastic_samplers_reach_the_law_at_their_order(step, order, x64):
    errors = [variance_error(step, num) for num in (64, 128)]
    assert errors[1] < 0.05 / order**3
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.3)


@pytest.mark.parametrize(
    "step",
    [gd.dpm_solver_step, partial(gd.dpm_solver_step, order=3), gd.unipc_step],
    ids=["2m", "3m", "unipc"],
)
def test_a_mean_that_is_a_polynomial_is_integrated_exactly(step, x64, key):
    """D = c0 + c1 l + c2 l^2, by Gauss-Legendre: what the step's own polynomial can hold.

    The parabola needs two steps before it; with DPM-Solver++(2M) and the predictor of UniPC the
    integral of a slope is B(h) / 2 in place of the exact one, so they are asked for a constant.
    """
    order3 = getattr(step, "keywords", {}).get("order") == 3
    coefs = np.array([0.3, -0.7, 0.4]) if order3 else np.array([0.3, 0.0, 0.0])
    level = lambda t: 0.5 * VP.log_snr(t)  # noqa: E731
    mean = lambda t: sum(c * level(t) ** k for k, c in enumerate(coefs))  # noqa: E731
    t, s, before, earlier = 0.5, 0.4, 0.63, 0.7
    x = jnp.full((2, 1), 1.7)
    history = [mean(before) + 0 * x, jnp.asarray(before), mean(earlier) + 0 * x, earlier]
    move = gd.Move(jnp.asarray(t), jnp.asarray(s), VP, key, 0, *history)
    found, _ = jax.jit(lambda x: step(lambda x, t: mean(t) + 0 * x, x, move))(x)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    h = float(level(s) - level(t))
    u = 0.5 * h * (nodes + 1)
    inside = sum(c * (float(level(t)) + u) ** k for k, c in enumerate(coefs))
    integral = np.sum(0.5 * h * weights * np.exp(u - h) * inside)
    expected = VP.sigma(s) / VP.sigma(t) * 1.7 + VP.alpha(s) * integral
    np.testing.assert_allclose(found, np.full((2, 1), expected), rtol=1e-12)


def test_moments(x64):
    """Against quadrature on both sides of the switch at h = 1, and in float32 for small h."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u, weights = 0.5 * (nodes + 1), 0.5 * weights
    for h in (1e-6, 0.01, 0.5, 0.999, 1.001, 5.0, 30.0):
        expected = [h * np.sum(weights * np.exp(h * (u - 1)) * u**k) for k in range(3)]
        np.testing.assert_allclose(_moments(jnp.asarray(h), 3), expected, rtol=1e-12)
        narrow = _moments(jnp.float32(h), 3)
        np.testing.assert_allclose(narrow, expected, rtol=3e-6)


def test_the_correction_of_unipc_by_hand(x64, key):
    """One step from t with two means before it: a parabola by numpy.polyfit."""
    t, s, before, earlier = 0.5, 0.4, 0.63, 0.7
    level = lambda t: float(0.5 * VP.log_snr(t))  # noqa: E731
    x, values = 1.7, {t: 0.8, before: -0.2, earlier: 0.5}
    nodes, weights = np.polynomial.legendre.leggauss(40)

    def integral(start, width, polynomial):
        u = 0.5 * width * (nodes + 1)
        return np.sum(0.5 * width * weights * np.exp(u - width) * polynomial(start + u))

    def halved(start, width, slope):
        return -np.expm1(-width) * 0.5 * width * slope

    h_before, h = level(t) - level(before), level(s) - level(t)
    points = np.array([level(z) for z in values]), np.array(list(values.values()))
    parabola = np.poly1d(np.polyfit(*points, 2))
    constant = -np.expm1(-h_before) * values[before]
    slope = (values[before] - values[earlier]) / (level(before) - level(earlier))
    gained = integral(level(before), h_before, parabola) - constant
    corrected = x + float(VP.alpha(t)) * (gained - halved(0, h_before, slope))
    slope = (values[t] - values[before]) / h_before
    target = -np.expm1(-h) * values[t] + halved(0, h, slope)
    expected = float(VP.sigma(s) / VP.sigma(t)) * corrected + float(VP.alpha(s)) * target
    full = lambda value: jnp.full((1, 1), value)  # noqa: E731
    history = (full(values[before]), jnp.asarray(before), full(values[earlier]), earlier)
    move = gd.Move(jnp.asarray(t), jnp.asarray(s), VP, key, 0, *history)
    found, _ = gd.unipc_step(lambda x, now: full(values[t]), full(x), move)
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-9)


def test_without_noise_the_sde_is_the_ode(key):
    x, z = jax.random.normal(key, (2, 3, 2))
    denoise = lambda x, t: jnp.tanh(x)  # noqa: E731
    before = (0.3 * z, jnp.float32(0.63), 0.5 * x, jnp.float32(0.7))
    move = move_with_noise(z, jnp.float32(0.5), jnp.float32(0.4), VP, *before)
    for order in (2, 3):
        ode, _ = gd.dpm_solver_step(denoise, x, move, order=order)
        sde, _ = gd.dpm_solver_step(denoise, x, move, order=order, eta=jnp.float32(0))
        np.testing.assert_allclose(sde, ode, rtol=1e-6)
    with pytest.raises(ValueError, match="order must be one of"):
        gd.dpm_solver_step(denoise, x, move, order=4)
