"""Numerics that every family needs: reductions, safe roots, broadcasting, accumulation.

Losses, statistics and sums are taken in float32 at least (float64 stays float64), whatever the
dtype of the network's output.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

HIGHEST = jax.lax.Precision.HIGHEST
LOG_2PI = math.log(2 * math.pi)


def at_least_float32(x: Array) -> Array:
    """Cast to float32 what is narrower or not floating; float64 stays as it is."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def sum_event(x: Float[Array, "batch *event"]) -> Float[Array, " batch"]:
    """Sum over every axis but the first, accumulated in float32 at least."""
    return jnp.sum(at_least_float32(x), axis=tuple(range(1, x.ndim)))


def expand_to(x: Float[Array, " batch"], like: Array) -> Array:
    """Reshape `[batch]` to `[batch, 1, ..., 1]`, the rank of `like`, so that it broadcasts."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def masked_mean(
    values: Float[Array, "*shape"], where: Bool[Array, "*shape"] | None = None
) -> Float[Array, ""]:
    """Mean of the values that `where` keeps; 0 where nothing is kept. Masked values may be NaN."""
    values = at_least_float32(values)
    if where is None:
        return jnp.mean(values) if values.size else jnp.zeros((), values.dtype)
    total = jnp.sum(jnp.where(where, values, 0))
    return total / jnp.maximum(jnp.sum(where.astype(values.dtype)), 1)


def log_mean_exp(x: Float[Array, "..."], axis: int | Sequence[int] = 0) -> Float[Array, "..."]:
    """log of the mean of exp(x) over `axis`, in the log domain."""
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    count = math.prod(x.shape[a] for a in axes)
    return jax.nn.logsumexp(at_least_float32(x), axis=axes) - math.log(count)


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square root whose gradient at 0 is 0, not infinite (double `where`)."""
    positive = x > 0
    root = jnp.sqrt(jnp.where(positive, x, 1))
    # NaN in gives NaN out: a norm of something broken must not look like 0.
    return jnp.where(positive, root, jnp.where(x == 0, 0.0, jnp.nan)).astype(root.dtype)


def safe_norm(
    x: Float[Array, "..."], axis: int | Sequence[int] | None = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Euclidean norm over `axis` whose gradient at x = 0 is 0."""
    axes = tuple(axis) if isinstance(axis, Sequence) else axis
    return safe_sqrt(jnp.sum(jnp.square(at_least_float32(x)), axis=axes, keepdims=keepdims))


def event_norm(x: Float[Array, "batch *event"]) -> Float[Array, " batch"]:
    """Euclidean norm of each example over its whole event; gradient 0 at 0."""
    return safe_norm(x, axis=tuple(range(1, x.ndim))) if x.ndim > 1 else jnp.abs(x)
