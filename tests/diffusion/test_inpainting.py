"""RePaint on a Gaussian: the law of the algorithm in closed form, and what it approaches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd
from genjax.diffusion.inpainting import resampling_order

PROCESS = gd.VariancePreserving(t_min=1e-3)
MEAN = np.array([0.5, -0.3])
COVARIANCE = np.array([[0.6, 0.4], [0.4, 0.5]])
KNOWN = np.array([1.6, 0.0])
MASK = np.array([True, False])
TIMES = np.linspace(1.0, 0.02, 13) ** 2
# Of the second coordinate given the first.
EXACT = MEAN[1] + COVARIANCE[1, 0] / COVARIANCE[0, 0] * (KNOWN[0] - MEAN[0])
EXACT_VARIANCE = COVARIANCE[1, 1] - COVARIANCE[1, 0] ** 2 / COVARIANCE[0, 0]


def levels(t):
    """alpha, sigma^2 of the process at t, in float64."""
    integral = 0.1 * t + 0.5 * 19.9 * t**2
    return np.exp(-0.5 * integral), -np.expm1(-integral)


def by_hand(jump, resamples, times=TIMES):
    """Mean and covariance of what the algorithm returns, by propagating a Gaussian."""
    mean, cov = np.zeros(2), levels(times[0])[1] * np.eye(2)
    n = len(times) - 1

    def down(i, mean, cov):
        (at, vt), (as_, vs) = levels(times[i]), levels(times[i + 1])
        forward = vt - (at / as_) ** 2 * vs
        gain = at * COVARIANCE @ np.linalg.inv(at**2 * COVARIANCE + vt * np.eye(2))
        pull = as_ * forward / vt * gain + at / as_ * vs / vt * np.eye(2)
        mean = pull @ mean + as_ * forward / vt * (MEAN - at * gain @ MEAN)
        cov = pull @ cov @ pull.T + forward * vs / vt * np.eye(2)
        mean[0], cov[0], cov[:, 0] = as_ * KNOWN[0], 0.0, 0.0
        cov[0, 0] = vs
        return mean, cov

    def up(i, mean, cov):
        (at, vt), (as_, vs) = levels(times[i - jump]), levels(times[i])
        ratio = at / as_
        return ratio * mean, ratio**2 * cov + (vt - ratio**2 * vs) * np.eye(2)

    for i in range(n):
        mean, cov = down(i, mean, cov)
        left = n - i - 1
        if (left - 1) % jump == 0 and 1 <= left <= n - jump:
            for _ in range(resamples - 1):
                mean, cov = up(i + 1, mean, cov)
                for j in range(i + 1 - jump, i + 1):
                    mean, cov = down(j, mean, cov)
    return mean, cov


def painted(num, **options):
    denoise = gd.mixture_denoiser(
        gd.GaussianMixture(jnp.ones(1), jnp.float32(MEAN)[None], jnp.float32(COVARIANCE)[None]),
        process=PROCESS,
    )
    known, mask = (np.broadcast_to(v, (num, 2)) for v in (np.float32(KNOWN), MASK))
    return partial(
        gd.inpaint, denoise, jax.random.key(0), jnp.asarray(known), jnp.asarray(mask),
        process=PROCESS, times=jnp.asarray(TIMES, jnp.float32), **options,
    )  # fmt: skip


def test_the_order_of_levels():
    order = lambda *args: list(args[0] - resampling_order(*args))  # noqa: E731
    assert order(4, 1, 2) == [4, 3, 4, 3, 2, 3, 2, 1, 2, 1, 0]
    assert order(5, 2, 3) == [5, 4, 3, 5, 4, 3, 5, 4, 3, 2, 1, 3, 2, 1, 3, 2, 1, 0]
    assert order(3, 2, 1) == [3, 2, 1, 0]


@pytest.mark.parametrize("jump", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_the_samples_have_the_law_of_the_algorithm(jump):
    """Four standard errors of 8000 draws; the known part at the last noise level."""
    mean, cov = by_hand(jump, 4)
    x = np.asarray(jax.jit(painted(8000, jump=jump, resamples=4))(), np.float64)
    error = np.sqrt(np.diag(cov) / len(x))
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 4 * error)
    spread = np.sqrt(np.outer(np.diag(cov), np.diag(cov)) * 2 / len(x))
    np.testing.assert_array_less(np.abs(np.cov(x.T) - cov), 4 * spread)


@pytest.mark.parametrize("jump", [1, 10])
def test_the_law_approaches_the_conditional_one_with_more_resamples(jump):
    """On a fine grid the error of the mean falls from 0.29 to 0.01, that of the variance too."""
    times = np.linspace(1.0, 0.01 ** (1 / 3), 81) ** 3
    alpha, variance = levels(times[-1])
    errors = []
    for resamples in (1, 2, 4, 16, 64):
        mean, cov = by_hand(jump, resamples, times)
        errors.append([mean[1] / alpha - EXACT, (cov[1, 1] - variance) / alpha**2 - EXACT_VARIANCE])
    errors = np.abs(errors)
    assert (errors[1:, 0] < 0.65 * errors[:-1, 0]).all()
    assert errors[0, 0] > 0.25
    assert (errors[-1] < [0.015, 0.02]).all()


@pytest.mark.slow
def test_one_resample_is_replacement_and_rows_depend_on_their_index():
    """Down to time 0, where the known part is returned as it is."""
    num, grid = 4, jnp.asarray([1.0, 0.5, 0.1, 0.0])
    known = jnp.asarray(np.random.default_rng(0).normal(size=(num, 2)), jnp.float32)
    mask = jnp.arange(2 * num).reshape(num, 2) % 3 == 0
    denoise = lambda x, t: 0.3 * x / (1 + t[:, None])  # noqa: E731
    options = {"process": PROCESS, "times": grid}

    @jax.jit
    def together(key):
        paint = partial(gd.inpaint, denoise, key, jump=2, **options)
        step = gd.replacement(known, mask, step=gd.ancestral_step)
        alone = gd.sample(denoise, key, (num, 2), step=step, **options)
        rows = [paint(known[i:], mask[i:], resamples=2, first_index=i) for i in (0, 2)]
        return paint(known, mask, resamples=1), alone, rows

    once, alone, (rows, last) = together(jax.random.key(1))
    np.testing.assert_allclose(once, alone, rtol=1e-6)
    np.testing.assert_array_equal(rows[mask], known[mask])
    np.testing.assert_allclose(rows[2:], last, rtol=1e-6)
    assert np.abs(rows - once)[~mask].max() > 1e-3


@pytest.mark.slow
def test_gradients_reach_the_schedule_and_the_times():
    """Finite down to time 0, and equal to differences."""
    known, mask = jnp.ones((2, 2)), jnp.array([[True, False], [False, True]])

    @jax.jit
    def values(beta, times):
        def total(beta, times):
            process = gd.VariancePreserving(beta_max=beta)
            denoise = lambda x, t: 0.3 * x * process.alpha(t)[:, None]  # noqa: E731
            key = jax.random.key(0)
            return jnp.square(
                gd.inpaint(
                    denoise, key, known, mask, process=process, times=times, jump=1, resamples=2
                )
            ).sum()  # fmt: skip

        return jax.value_and_grad(total, argnums=(0, 1))(beta, times)

    times, h = jnp.array([1.0, 0.5, 0.2, 0.0]), 1e-2
    _, (slope, to_times) = values(6.0, times)
    assert np.isfinite(to_times).all()
    numeric = (values(6.0 + h, times)[0] - values(6.0 - h, times)[0]) / (2 * h)
    np.testing.assert_allclose(slope, numeric, rtol=1e-2)


def test_bad_input(unchecked):
    x, mask = jnp.ones((2, 2)), jnp.ones((2, 2), bool)
    options = {"process": PROCESS, "times": jnp.array([1.0, 0.5, 0.1])}
    paint = partial(gd.inpaint, lambda x, t: x, jax.random.key(0))
    with pytest.raises(ValueError, match="shapes must be equal, got known"):
        paint(x, mask[:1], **options)
    with pytest.raises(ValueError, match="jump must be below the number of steps, 2, got 2"):
        paint(x, mask, jump=2, **options)
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        paint(x, mask, jump=1, resamples=0, **options)
    with pytest.raises(ValueError, match="step must have no memory"):
        paint(x, mask, jump=1, step=partial(gd.dpm_solver_step, order=3), **options)
    with pytest.raises(ValueError, match="decrease of times"):
        paint(x, mask, jump=1, process=PROCESS, times=jnp.array([0.1, 0.5, 1.0]))
