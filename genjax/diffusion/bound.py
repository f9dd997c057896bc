"""DDPM's variational bound, with a discretised Gaussian decoder for integer data."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from genjax.diffusion.denoising import check_times, same_shape
from genjax.diffusion.discrete import posterior
from genjax.diffusion.schedules import Process, Scalar
from genjax.numerics import at_least_float32, exp_excess, expand_to, sum_event
from genjax.randomness import low_discrepancy
from genjax.typing import DenoiserFn, PRNGKey


def discretised_gaussian(
    x: Float[Array, "*shape"],
    mean: Float[Array, "*shape"],
    std: Float[Array, "*shape"],
    *,
    levels: int,
    low: float = -1.0,
    high: float = 1.0,
) -> Float[Array, "*shape"]:
    """Log probability of each value's bin under N(mean, std^2), nats; the outer bins are open.

    `levels` bins of equal width fill [low, high] and x holds their centres, as
    `genjax.data.Scaling` has it (Ho et al. 2020, eq. 13, whose outer centres are -1 and 1: low and
    high are -+256/255). A difference of logs of normal CDFs in the tail where they are small, so it
    neither underflows nor loses its gradient. Raises where concrete x is not at a bin's centre.
    """
    checks.integer("levels", levels, 2)
    checks.positive("std", std)
    x, mean, std = at_least_float32(x), at_least_float32(mean), at_least_float32(std)
    _check_centres(x, levels, low, high)
    half = 0.5 * (high - low) / levels
    lower, upper = (x - half - mean) / std, (x + half - mean) / std
    # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): take the side on which both are at most about 1/2.
    flip = lower > 0
    a, b = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
    log_a, log_b = jax.scipy.special.log_ndtr(a), jax.scipy.special.log_ndtr(b)
    gap = jnp.maximum(log_b - log_a, jnp.finfo(x.dtype).tiny)
    inside = log_b + jnp.log(-jnp.expm1(-gap))
    first, last = x < low + 2 * half, x > high - 2 * half
    outside = jax.scipy.special.log_ndtr(jnp.where(first, upper, -lower))
    return jnp.where(first | last, outside, inside)


def _check_centres(x: Array, levels: int, low: float, high: float) -> None:
    if not checks.is_concrete(x) or not x.size:
        return
    number = (np.asarray(x, np.float64) - low) / (high - low) * levels - 0.5
    nearest = np.clip(np.round(number), 0, levels - 1)
    if not np.all(np.abs(number - nearest) < 0.05):
        half = 0.5 * (high - low) / levels
        raise ValueError(
            f"x must hold centres of the {levels} bins that fill [{low}, {high}], from "
            f"{low + half} to {high - half}, got values from {x.min()} to {x.max()}"
        )


def variational_bound(
    denoise: DenoiserFn,
    key: PRNGKey,
    x: Float[Array, "batch *event"],
    *,
    process: Process,
    num_steps: int,
    levels: int,
    low: float = -1.0,
    high: float = 1.0,
    mix: Scalar = 0.0,
    every_step: bool = False,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """Bound on -log P(x) in nats for the chain of `num_steps` `ancestral_step`s (Ho et al. 2020).

    KL(q(x_T | x) || N(0, sigma_T^2 I)) + sum_i KL(q(x_{i-1} | x_i, x) || p(x_{i-1} | x_i))
    - log P(x | x_1), eq. 5: noise at every step with `every_step`, else one step i per example,
    times T: unbiased either way. x holds centres of `levels` bins that fill [low, high], see
    `discretised_gaussian`. `mix` sets the model's variance as in `ancestral_step`; x_1 is decoded
    with standard deviation sigma(t_1). Raises as `discretised_gaussian` does.
    Returns (losses [batch], aux: "prior", "diffusion", "reconstruction").
    """
    checks.integer("num_steps", num_steps, 1)
    checks.floating("x", x)
    checks.min_rank("x", x, 1)
    x = at_least_float32(x)
    _check_centres(x, levels, low, high)
    dims = x[0].size
    check_times(process.t_max, process)
    signal, noise = process.alpha(process.t_max), process.variance(process.t_max)
    prior = sum_event(0.5 * jnp.square(signal * x) / noise)

    def term(number: Array, key: PRNGKey) -> tuple[Array, Array]:
        """(KL of step i, or 0 for i = 1; -log P(x | x_1), or 0 for i > 1), i = number [batch]."""
        t, s = (process.t_max * n.astype(x.dtype) / num_steps for n in (number, number - 1))
        eps = jax.random.normal(key, x.shape, x.dtype)
        x_t = expand_to(process.alpha(t), x) * x + expand_to(process.sigma(t), x) * eps
        mean = at_least_float32(denoise(x_t, t))
        same_shape(mean, x)
        first = number == 1
        moments = posterior(process, t, s)
        log_ratio = mix * jnp.log(
            jnp.where(first, 1.0, moments.variance / moments.forward_variance)
        )
        variance = jnp.where(first, 1.0, moments.variance / jnp.exp(log_ratio))
        error = sum_event(jnp.square(x - mean))
        kl = 0.5 * dims * exp_excess(log_ratio)
        kl = kl + 0.5 * moments.x0_coef**2 * error / variance
        std = jnp.broadcast_to(expand_to(process.sigma(t), x), x.shape)
        decoded = sum_event(-discretised_gaussian(x, mean, std, levels=levels, low=low, high=high))
        return jnp.where(first, 0.0, kl), jnp.where(first, decoded, 0.0)

    if every_step:

        def body(sums: tuple[Array, Array], number: Array) -> tuple[tuple[Array, Array], None]:
            numbers = jnp.full(x.shape[:1], number)
            kl, decoded = term(numbers, jax.random.fold_in(key, number))
            return (sums[0] + kl, sums[1] + decoded), None

        zeros = jnp.zeros_like(prior)
        (kl, decoded), _ = jax.lax.scan(body, (zeros, zeros), jnp.arange(1, num_steps + 1))
    else:
        time_key, noise_key = jax.random.split(key)
        spread = low_discrepancy(time_key, x.shape[0])
        number = 1 + jnp.minimum((spread * num_steps).astype(jnp.int32), num_steps - 1)
        kl, decoded = (num_steps * value for value in term(number, noise_key))
    return prior + kl + decoded, {"prior": prior, "diffusion": kl, "reconstruction": decoded}
