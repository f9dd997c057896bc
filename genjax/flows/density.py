"""Densities by change of variables: log_prob, sample, and both at once, over a base density."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks, numerics
from genjax.flows.bijections.base import Bijection, Number
from genjax.typing import LogProbFn, Params, PRNGKey

__all__ = ["Base", "denoise", "log_prob", "normal", "sample", "sample_and_log_prob", "uniform"]


class Base(NamedTuple):
    """A density to start from: `log_prob(z) -> [batch]` in nats, `sample(key, n) -> z`."""

    log_prob: Callable[[Any], Array]
    sample: Callable[[PRNGKey, int], Any]


def _is_shape(shape: Any) -> bool:
    return all(isinstance(size, int) for size in shape)


def _check_event(z: Any, shape: tuple[int, ...]) -> None:
    if not hasattr(z, "shape") or z.shape[1:] != shape:
        got = getattr(z, "shape", type(z).__name__)
        raise ValueError(f"the base needs events of shape {shape}, got {got} with its batch axis")


def normal(shape: Sequence, scale: Number = 1.0) -> Base:
    """N(0, scale^2 I) on events of the given shape, or on a list of shapes for multi-scale flows.

    log p(z) = -|z|^2 / (2 scale^2) - D log(scale sqrt(2 pi)). Sampling with scale 0.7 is Glow's
    temperature of 0.7. Example i is the same whatever the number of samples.

    >>> normal((2,)).log_prob(jnp.zeros((1, 2))).round(4)
    Array([-1.8379], dtype=float32)
    """
    checks.positive("scale", scale)
    if not _is_shape(shape):
        parts = [normal(part, scale) for part in shape]

        def log_prob_list(z: Sequence[Array]) -> Array:
            if not isinstance(z, list | tuple) or len(z) != len(parts):
                raise TypeError(f"the base needs a list of {len(parts)} arrays, one per scale")
            terms = [part.log_prob(z_part) for part, z_part in zip(parts, z, strict=True)]
            return jnp.sum(jnp.stack(terms), axis=0)

        def sample_list(key: PRNGKey, n: int) -> list[Array]:
            keys = jax.random.split(key, len(parts))
            return [part.sample(k, n) for part, k in zip(parts, keys, strict=True)]

        return Base(log_prob_list, sample_list)

    shape = tuple(shape)

    def log_prob(z: Array) -> Array:
        _check_event(z, shape)
        log_scale = jnp.log(jnp.asarray(scale, jnp.promote_types(z.dtype, jnp.float32)))
        count = math.prod(shape)
        square = numerics.sum_event(jnp.square(numerics.at_least_float32(z) / scale))
        return -0.5 * square - count * (0.5 * numerics.LOG_2PI + log_scale)

    def sample(key: PRNGKey, n: int) -> Array:
        return scale * jax.random.normal(key, (n, *shape))

    return Base(log_prob, sample)


def uniform(shape: Sequence[int], low: Number = 0.0, high: Number = 1.0) -> Base:
    """Uniform density on [low, high]^D: log p(z) = -D log(high - low) inside, -inf outside.

    >>> uniform((2,), 0.0, 2.0).log_prob(jnp.ones((1, 2))).round(4)
    Array([-1.3863], dtype=float32)
    """
    checks.positive("high - low", high - low)
    shape = tuple(shape)

    def log_prob(z: Array) -> Array:
        _check_event(z, shape)
        inside = jnp.all((z >= low) & (z <= high), axis=tuple(range(1, z.ndim)))
        level = -math.prod(shape) * jnp.log(
            jnp.asarray(high - low, jnp.promote_types(z.dtype, jnp.float32))
        )
        return jnp.where(inside, level, -jnp.inf)

    def sample(key: PRNGKey, n: int) -> Array:
        return jax.random.uniform(key, (n, *shape), minval=low, maxval=high)

    return Base(log_prob, sample)


def log_prob(
    bijection: Bijection, base: Base, params: Params, x: Float[Array, "batch *event"]
) -> Float[Array, " batch"]:
    """log p(x) = log p_base(z) + log |det dz/dx| with z = forward(x), in nats.

    The change of variables; Papamakarios et al. (2021), eq. (6). The Jacobian belongs to it:
    without the second term the result is no density.

    >>> flow, base = rescale(0.0, 4.0), uniform((2,))
    >>> log_prob(flow, base, (), jnp.ones((1, 2))).round(4)
    Array([-2.7726], dtype=float32)
    """
    checks.min_rank("x", x, 1)
    z, log_det = bijection.forward(params, x)
    return base.log_prob(z) + log_det


def sample(
    bijection: Bijection, base: Base, params: Params, key: PRNGKey, n: int
) -> Float[Array, "batch *event"]:
    """Draw n samples: z from the base, x = inverse(z).

    >>> flow, base = rescale(0.0, 4.0), uniform((2,))
    >>> sample(flow, base, (), jax.random.key(0), 5).shape
    (5, 2)
    """
    checks.integer("n", n, 1)
    return bijection.inverse(params, base.sample(key, n))[0]


def sample_and_log_prob(
    bijection: Bijection, base: Base, params: Params, key: PRNGKey, n: int
) -> tuple[Float[Array, "batch *event"], Float[Array, " batch"]]:
    """Draw n samples and their log-densities at once, log p(x) = log p_base(z) - log |det dx/dz|.

    Both come from the one inverse pass; gradients with respect to `params` are reparametrised.

    >>> flow, base = rescale(0.0, 4.0), uniform((2,))
    >>> x, log_p = sample_and_log_prob(flow, base, (), jax.random.key(0), 3)
    >>> log_p.round(4)
    Array([-2.7726, -2.7726, -2.7726], dtype=float32)
    """
    checks.integer("n", n, 1)
    z = base.sample(key, n)
    x, log_det = bijection.inverse(params, z)
    return x, base.log_prob(z) - log_det


def denoise(
    log_prob_fn: LogProbFn, y: Float[Array, "batch *event"], sigma: Number | Float[Array, ""]
) -> Float[Array, "batch *event"]:
    """Remove noise of standard deviation sigma: E[x | y] = y + sigma^2 grad log p(y).

    Tweedie's formula, the last step of TarFlow (Zhai et al., 2024, section 2.5): `log_prob_fn` is
    the density of the noisy data y = x + sigma eps.

    >>> log_prob = lambda y: -(y**2).sum(-1) / 4  # of N(0, 1) with noise of variance 1
    >>> denoise(log_prob, jnp.ones((1, 2)), 1.0)
    Array([[0.5, 0.5]], dtype=float32)
    """
    checks.at_least("sigma", sigma, 0)
    score = jax.grad(lambda noisy: jnp.sum(log_prob_fn(noisy)))(y)
    return y + jnp.square(jnp.asarray(sigma, y.dtype)) * score
