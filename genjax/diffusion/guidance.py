"""Guidance: denoisers made of denoisers, steered to a class."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax import checks
from genjax.diffusion.schedules import Process, Scalar
from genjax.numerics import expand_to
from genjax.typing import DenoiserFn


def classifier_guidance(
    denoise: DenoiserFn,
    log_prob: Callable[[Array, Array], Array],
    *,
    process: Process,
    scale: Scalar = 1.0,
) -> DenoiserFn:
    """D + scale sigma^2 / alpha grad_x log p(y | x_t): Tweedie's mean under the guided score.

    `log_prob` maps (x_t, t) to log p(y | x_t) [batch] for the wanted y (Dhariwal & Nichol 2021,
    Algorithm 2: score + scale grad log p(y | x_t)). With scale 1 and the exact classifier the
    result is the exact conditional denoiser.
    """

    def guided(x: Array, t: Array) -> Array:
        gradient = jax.grad(lambda x: jnp.sum(log_prob(x, t)))(x)
        return denoise(x, t) + expand_to(scale * process.variance(t) / process.alpha(t), x) * (
            gradient
        )

    return guided


def classifier_free_guidance(
    conditional: DenoiserFn,
    unconditional: DenoiserFn,
    *,
    process: Process,
    scale: Scalar,
    interval: tuple[float, float] | None = None,
) -> DenoiserFn:
    """U + scale (C - U): extrapolate from the unconditional mean U past the conditional one C.

    Scale 1 is conditional, 0 unconditional; Ho & Salimans 2022, eq. 6, have w = scale - 1. The
    weights sum to 1, so the rule is the same for means, noises and scores. With `interval` (low,
    high) of noise levels sigma / alpha, C alone is used outside (Kynkäänniemi et al. 2024).
    """
    if interval is not None:
        low, high = interval
        checks.between("interval[0]", low, 0, high)

    def guided(x: Array, t: Array) -> Array:
        mean, free = conditional(x, t), unconditional(x, t)
        weight = jnp.broadcast_to(jnp.asarray(scale, mean.dtype), t.shape)
        if interval is not None:
            level = process.noise_ratio(t)
            weight = jnp.where((level >= low) & (level <= high), weight, 1.0)
        return free + expand_to(weight, x) * (mean - free)

    return guided
