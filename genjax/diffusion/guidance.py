"""Denoisers made of denoisers: steered to a class, or kept within the range of the data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax import checks
from genjax.diffusion.schedules import Process, Scalar
from genjax.numerics import expand_to, safe_sqrt, sum_event
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

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> log_prob = lambda x, t: -jnp.sum((x - 1) ** 2, -1) / 2
    >>> guided = classifier_guidance(denoise, log_prob, process=EDM())
    >>> guided(jnp.zeros((1, 2)), jnp.ones(1))
    Array([[1., 1.]], dtype=float32)
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
    rescale: Scalar = 0.0,
) -> DenoiserFn:
    """U + scale (C - U): extrapolate from the unconditional mean U past the conditional one C.

    Scale 1 is conditional, 0 unconditional; Ho & Salimans 2022, eq. 6, have w = scale - 1. The
    weights sum to 1, so the rule is the same for means, noises and scores. With `interval` (low,
    high) of noise levels sigma / alpha, C alone is used outside (Kynkäänniemi et al. 2024), and
    where no time of the batch lies inside U is not computed. `rescale` = r takes the guided mean G
    to (r std(C) / std(G) + 1 - r) G, std over the elements of an example: large scales then do not
    saturate it (Lin et al. 2024, eqs 15-16, who have it for the network's prediction; r = 0.7).

    >>> conditional, unconditional = (lambda x, t, c=c: c + 0 * x for c in (1.0, 0.0))
    >>> guided = classifier_free_guidance(conditional, unconditional, process=EDM(), scale=3.0)
    >>> guided(jnp.zeros((1, 2)), jnp.ones(1))
    Array([[3., 3.]], dtype=float32)
    """
    checks.between("rescale", rescale, 0, 1)
    if interval is not None:
        low, high = interval
        checks.between("interval[0]", low, 0, high)

    def both(x: Array, t: Array) -> tuple[Array, Array]:
        mean, free = conditional(x, t), unconditional(x, t)
        weight = jnp.broadcast_to(jnp.asarray(scale, mean.dtype), t.shape)
        guided = free + expand_to(weight, x) * (mean - free)
        if isinstance(rescale, int | float) and rescale == 0:
            return guided, mean
        spread = _std(guided)
        ratio = jnp.where(spread > 0, _std(mean) / jnp.where(spread > 0, spread, 1.0), 1.0)
        shrink = expand_to(rescale * ratio + 1 - rescale, guided)
        return (shrink * guided).astype(mean.dtype), mean

    def within(x: Array, t: Array) -> Array:
        level = process.noise_ratio(t)
        inside = (level >= low) & (level <= high)

        def some(x: Array, t: Array) -> Array:
            return jnp.where(expand_to(inside.astype(t.dtype), x) > 0, *both(x, t))

        return jax.lax.cond(jnp.any(inside), some, conditional, x, t)

    return within if interval is not None else lambda x, t: both(x, t)[0]


def _std(x: Array) -> Array:
    """Standard deviation over the event, [batch]; its gradient is 0 where it is 0."""
    count = x[0].size
    mean = expand_to(sum_event(x) / count, x)
    return safe_sqrt(sum_event(jnp.square(x - mean)) / count)


def clipped(denoise: DenoiserFn, *, low: float = -1.0, high: float = 1.0) -> DenoiserFn:
    """min(max(D, low), high): the mean kept within the range of the data (Ho et al. 2020).

    >>> clipped(lambda x, t: 5 * x)(jnp.ones((1, 2)), jnp.ones(1))
    Array([[1., 1.]], dtype=float32)
    """
    checks.positive("high - low", high - low)
    return lambda x, t: jnp.clip(denoise(x, t), low, high)


def dynamic_thresholding(
    denoise: DenoiserFn, *, quantile: float = 0.995, limit: float = 1.0
) -> DenoiserFn:
    """D clipped to [-s, s], times limit / s, s = max(limit, the quantile of |D|) of each example.

    For data in [-limit, limit]: pixels that strong guidance pushes out come back without saturating
    the others (Saharia et al. 2022, section 2.3).

    >>> dynamic_thresholding(lambda x, t: 5 * x)(jnp.ones((1, 2)), jnp.ones(1))
    Array([[1., 1.]], dtype=float32)
    """
    checks.between("quantile", quantile, 0, 1)
    checks.positive("limit", limit)

    def thresholded(x: Array, t: Array) -> Array:
        mean = denoise(x, t)
        size = jnp.quantile(jnp.abs(mean).reshape(len(mean), -1), quantile, axis=1)
        size = expand_to(jnp.maximum(size, limit), mean).astype(mean.dtype)
        return jnp.clip(mean * (limit / size), -limit, limit)

    return thresholded
