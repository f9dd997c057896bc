"""The law of one pixel's level given raw numbers of a network: what the likelihood models share."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from genjax.data import DataSpec
from genjax.variational import categorical_log_likelihood, logistic_mixture_log_likelihood

Kind = Literal["mixture", "categorical"]


class PixelLaw(NamedTuple):
    """numbers: raw ones for each pixel and channel. raw: [batch, *event, numbers]."""

    numbers: int
    levels: int
    log_likelihood: Callable[[jax.Array, jax.Array], jax.Array]
    """(x [batch, *event], raw) -> [batch], nats."""
    sample: Callable[[jax.Array, jax.Array], jax.Array]
    """(key, raw) -> levels [batch, *event], each pixel drawn by itself."""

    def log_probs(self, raw: jax.Array) -> jax.Array:
        """log p of every level of every pixel: [levels, batch, *event]."""
        pixels = raw.reshape(-1, raw.shape[-1])
        each = lambda v: self.log_likelihood(jnp.full(len(pixels), v), pixels)  # noqa: E731
        return jax.lax.map(each, jnp.arange(self.levels)).reshape(self.levels, *raw.shape[:-1])


def pixel_law(kind: Kind, components: int, spec: DataSpec) -> PixelLaw:
    """A mixture of so many discretised logistics, or one probability for each level."""
    levels = spec.levels or 0
    if kind == "categorical":
        return PixelLaw(
            levels,
            levels,
            lambda x, raw: categorical_log_likelihood(x.astype(jnp.int32), raw),
            lambda key, raw: jax.random.categorical(key, raw).astype(jnp.uint8),
        )

    def parts(raw: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits, means, log_scales = jnp.split(raw, 3, axis=-1)
        # At the start the components are spread over the levels, each a few levels wide.
        start = jnp.linspace(-1, 1, components) if components > 1 else jnp.zeros(1)
        means = means + jnp.broadcast_to(start, means.shape)
        # A seventh of a level is as sure as a pixel of the training set may make the model.
        return logits, means, jnp.maximum(log_scales - 2, -math.log(levels) - 2)

    def log_likelihood(x: jax.Array, raw: jax.Array) -> jax.Array:
        return logistic_mixture_log_likelihood(x.astype(jnp.int32), *parts(raw), levels=levels)

    def sample(key: jax.Array, raw: jax.Array) -> jax.Array:
        """A component of each pixel, a number of its logistic, and the level nearest to that."""
        key_k, key_u = jax.random.split(key)
        logits, *numbers = parts(raw)
        k = jax.random.categorical(key_k, logits)[..., None]
        mean, log_scale = (jnp.take_along_axis(z, k, axis=-1)[..., 0] for z in numbers)
        y = mean + jnp.exp(log_scale) * jax.random.logistic(key_u, mean.shape, mean.dtype)
        return jnp.clip(jnp.round((y + 1) * (levels - 1) / 2), 0, levels - 1).astype(jnp.uint8)

    return PixelLaw(3 * components, levels, log_likelihood, sample)


def in_hundreds(
    draw: Callable[..., jax.Array], key: jax.Array, n: int, *rows: jax.Array
) -> jax.Array:
    """n samples, a hundred at a time to bound the memory: draw(key, the hundred's part of rows)."""
    count = -(-n // 100)
    parts = [jnp.resize(x, (count, 100, *x.shape[1:])) for x in rows]
    found = jax.lax.map(lambda given: draw(*given), (jax.random.split(key, count), *parts))
    return found.reshape(-1, *found.shape[2:])[:n]
