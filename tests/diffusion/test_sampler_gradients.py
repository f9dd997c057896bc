"""Gradients of samplers down to time 0, for schedules, options and times."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd
from tests.diffusion.test_samplers import STEPS


@pytest.mark.slow
def test_every_step_to_time_0_has_finite_gradients(key):
    """For schedule, eta and times; under vmap, where both branches of a step are computed."""
    exact = gd.posterior_sampling(lambda x: x, jnp.ones((3, 1)), noise_std=0.0)
    steps = STEPS | {"dps": exact, "eta": None}

    def total(offset, eta, t, s, step):
        process = gd.Cosine(offset)
        step = partial(gd.ddim_step, eta=eta) if step is None else step

        def denoise(x, t):
            alpha, variance = process.alpha(t), process.variance(t)
            return 0.25 * alpha / (0.25 * alpha**2 + variance) * x

        before = (jnp.ones((3, 1)), jnp.float32(0.9), 0.5 * jnp.ones((3, 1)), jnp.float32(0.95))
        x, _ = step(denoise, jnp.ones((3, 1)), gd.Move(t, s, process, key, 0, *before))
        return jnp.square(x).sum()

    @jax.jit
    def values_and_grads(offset, s):
        def both(step):
            f = jax.value_and_grad(partial(total, step=step), argnums=(0, 1, 2, 3))
            return jax.vmap(f, in_axes=(0, None, None, 0))(offset, 0.0, 0.6, s)

        return {name: both(step) for name, step in steps.items()}

    h = 1e-3
    for name, (value, grads) in values_and_grads(
        jnp.array([0.05, 0.05 - h, 0.05 + h, 0.05]), jnp.array([0.0, 0.0, 0.0, 0.3])
    ).items():
        assert all(np.isfinite(g).all() for g in grads), name
        numeric = (value[2] - value[1]) / (2 * h)
        np.testing.assert_allclose(grads[0][0], numeric, rtol=1e-2, atol=5e-3, err_msg=name)


def test_ddim_differentiates_as_its_closed_form():
    """For D = 0.3 x_t / alpha_t the sample at 0 is the start times a product of the schedule."""

    def ratio(beta):
        process = gd.VariancePreserving(beta_max=beta)
        x = gd.sample(
            lambda x, t: 0.3 * x / process.alpha(t)[:, None], jax.random.key(0), (1, 1),
            process=process, times=jnp.array([1.0, 0.5, 0.0]), step=gd.ddim_step,
            x_init=jnp.ones((1, 1)),
        )  # fmt: skip
        return x[0, 0]

    def by_hand(beta):
        alpha = [np.exp(-0.05 * t - 0.25 * (beta - 0.1) * t**2) for t in (1.0, 0.5)]
        sigma = [np.sqrt(1 - a**2) for a in alpha]
        return 0.3 / alpha[1] * (0.3 * alpha[1] / alpha[0] + 0.7 * sigma[1] / sigma[0])

    value, slope = jax.value_and_grad(ratio)(6.0)
    np.testing.assert_allclose(value, by_hand(6.0), rtol=1e-5)
    np.testing.assert_allclose(slope, (by_hand(6.001) - by_hand(5.999)) / 2e-3, rtol=1e-4)
