"""Pieces that the networks share: norms, attention, positions, embeddings, patches, dropout.

Pure functions and small linen modules. Norms and softmax are computed in float32 at least.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from genjax import checks, sharding
from genjax.numerics import at_least_float32
from genjax.typing import PRNGKey

HIDDEN_LOGIT = -1e30  # finite, so that a row of hidden keys has a softmax without NaN


def drop(x: Array, rate: float, key: PRNGKey | None, layer: int) -> Array:
    """Apply dropout with a key of the layer's own; the identity where `key` is None."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def on_flat(layer: Callable[[Array], Array], x: Float[Array, "*batch features"]) -> Array:
    """Apply a dense layer with the leading axes taken together.

    XLA on CPU is several times slower where the gradient for the weights sums over two axes.
    """
    y = layer(sharding.split_batch(x.reshape(-1, x.shape[-1])))
    return y.reshape(*x.shape[:-1], y.shape[-1])


class Norm(nn.Module):
    """Layer norm (x - mean) / sqrt(var + epsilon), or RMS norm x / sqrt(mean x^2 + epsilon).

    Over the last axis, then times `scale` and plus `bias` where asked for, in the type of x.
    """

    kind: Literal["layer", "rms"] = "layer"
    use_scale: bool = True
    use_bias: bool = False
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        checks.one_of("norm", self.kind, ("layer", "rms"))
        wide = at_least_float32(x)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide = wide / jnp.sqrt(square + self.epsilon)
        shape = (*(1,) * (x.ndim - 1), x.shape[-1])
        if self.use_scale:
            wide = wide * self.param("scale", nn.initializers.ones, shape[-1:]).reshape(shape)
        if self.use_bias:
            wide = wide + self.param("bias", nn.initializers.zeros, shape[-1:]).reshape(shape)
        return wide.astype(x.dtype)


class GroupNorm(nn.Module):
    """Normalise groups of channels over the image, statistics in float32.

    Sums run over the image first and over the channels of a group after, which keeps the channel
    axis innermost; then one scale and one shift for each image and channel.
    """

    groups: int = 8

    @nn.compact
    def __call__(self, x: Float[Array, "batch *image channels"]) -> Float[Array, "..."]:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"channels must be a multiple of groups={self.groups}, got {channels} channels"
            )
        gain = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        wide = at_least_float32(x).reshape(x.shape[0], -1, channels)
        by_group = (x.shape[0], self.groups, channels // self.groups)
        mean = jnp.mean(wide, axis=1).reshape(by_group).mean(axis=2, keepdims=True)
        square = jnp.mean(jnp.square(wide), axis=1).reshape(by_group).mean(axis=2, keepdims=True)
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        scale = gain.reshape(1, *by_group[1:]) / jnp.sqrt(variance + 1e-5)
        shift = bias.reshape(1, *by_group[1:]) - mean * scale
        scale, shift = (v.reshape(x.shape[0], 1, channels) for v in (scale, shift))
        return (wide * scale + shift).reshape(x.shape).astype(x.dtype)


def attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads dim"],
    *,
    mask: Bool[Array, "queries keys"] | Bool[Array, "rows queries keys"] | None = None,
    causal: bool = False,
) -> Float[Array, "batch queries heads dim"]:
    """softmax(q k^T / sqrt(dim)) v of every head; a query that may read no key gets 0.

    Query head h reads key head h // (heads / kv_heads) (Ainslie et al. 2023). mask: True where a
    query may read a key; what is hidden must be finite. causal: the last query stands at the last
    key, and each reads the keys up to its own. Compiled for accelerators this is
    `jax.nn.dot_product_attention` (but for float64, which that function rounds to float32). On CPU
    more than 64 queries go head by head, recomputed in the backward pass: weights that stay in the
    processor's cache make it several times as fast.
    """
    queries, heads = query.shape[1:3]
    keys, kv_heads = key.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads = {kv_heads}, got {heads}")
    if mask is not None and mask.ndim == 2:
        mask = mask[None]
    some_read_none = mask is not None or (causal and queries > keys)
    if causal:
        last = jnp.arange(queries)[:, None] + (keys - queries)
        earlier = (jnp.arange(keys)[None, :] <= last)[None]
        mask = earlier if mask is None else mask & earlier
    given = (query, key, value, *(() if mask is None else (mask,)))
    if query.dtype == jnp.float64:
        out = _on_cpu(*given)
    else:
        # Chosen where it is compiled, so that a program for another machine has its own form.
        out = jax.lax.platform_dependent(*given, cpu=_on_cpu, default=_on_accelerator)
    if mask is not None and some_read_none:
        out = jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], out, 0)
    return out


def _on_accelerator(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    wide = None if mask is None else mask[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=wide)


def _on_cpu(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
    batch, queries, heads, dim = query.shape
    kv_heads = key.shape[2]
    # The queries that share a key head are more queries of that head.
    group = heads // kv_heads
    form = _by_head if queries > 64 else _all_heads
    grouped = query.reshape(batch, queries, kv_heads, group, dim).swapaxes(2, 3)
    wide = None if mask is None else jnp.repeat(mask, group, axis=1)
    out = form(grouped.reshape(batch, queries * group, kv_heads, dim), key, value, wide)
    return out.reshape(batch, queries, group, kv_heads, dim).swapaxes(2, 3).reshape(query.shape)


def _weights(logits: Array, mask: Array | None, dtype: Any) -> Array:
    logits = at_least_float32(logits)
    if mask is not None:
        logits = jnp.where(mask, logits, HIDDEN_LOGIT)
    return jax.nn.softmax(logits, axis=-1).astype(dtype)


def _all_heads(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    logits = jnp.einsum("bqhd,bkhd->bhqk", query / query.shape[-1] ** 0.5, key)
    weights = _weights(logits, None if mask is None else mask[:, None], value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _by_head(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    batch, queries, heads, dim = query.shape
    query = jnp.moveaxis(query / dim**0.5, 1, 2).reshape(-1, queries, dim)
    # Keys and values as [dim, keys]: their gradients then are products that XLA does well.
    key, value = (jnp.transpose(z, (0, 2, 3, 1)) for z in (key, value))
    key, value = (z.reshape(batch * heads, dim, -1) for z in (key, value))
    shared = mask is None or mask.shape[0] == 1

    @jax.checkpoint
    def one(parts: tuple[Array, Array, Array, Array]) -> Array:
        query, key, value, row = parts
        # The mask of a row of the batch is read where it lies, not copied for every head.
        seen = mask if mask is None else mask[0 if shared else row]
        return jnp.einsum("qk,dk->qd", _weights(query @ key, seen, value.dtype), value)

    rows = jnp.repeat(jnp.arange(batch), heads)
    attended = jax.lax.map(one, (query, key, value, rows))
    return jnp.moveaxis(attended.reshape(batch, heads, queries, dim), 1, 2)


class Cache(NamedTuple):
    """Keys and values of the positions read so far, of fixed length; what is unwritten is 0.

    Head by head, as attention reads them: the other order would be copied for every token.
    """

    keys: Float[Array, "batch kv_heads length dim"]
    values: Float[Array, "batch kv_heads length dim"]


def write_cache(
    cache: Cache, keys: Array, values: Array, start: int | Int[Array, ""] | Int[Array, " batch"]
) -> Cache:
    """Put keys and values [batch, new, kv_heads, dim] at start, ..., start + new - 1.

    start: one for all rows or one for each. Beyond the end is a ValueError where `start` is known;
    where it is traced the new entries become NaN, since a write there would be moved back in
    silence, over what earlier positions wrote.
    """
    length, new = cache.keys.shape[2], keys.shape[1]
    if checks.is_concrete(start):
        checks.between("start", start, 0, length - new)
    start = jnp.asarray(start)

    def write(old: Array, part: Array) -> Array:
        fits = (start + new <= length).reshape(*start.shape, *(1,) * (4 - start.ndim))
        part = jnp.swapaxes(jnp.where(fits, part, jnp.nan).astype(old.dtype), 1, 2)
        if start.ndim == 0:
            return jax.lax.dynamic_update_slice_in_dim(old, part, start, axis=2)
        return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))(old, part, start)

    return Cache(write(cache.keys, keys), write(cache.values, values))


def _angles(positions: Array, num: int, base: float, dtype: Any) -> Array:
    """positions * base^(-i / num), i < num, on a new last axis; float32 at least."""
    rates = base ** (-jnp.arange(num, dtype=jnp.promote_types(dtype, jnp.float32)) / num)
    return positions[..., None].astype(rates.dtype) * rates.reshape(*(1,) * positions.ndim, -1)


def rotary(
    x: Float[Array, "batch length heads dim"],
    positions: Int[Array, " length"] | Int[Array, "rows length"],
    *,
    base: float = 10_000.0,
    layout: Literal["half", "interleaved"] = "half",
) -> Float[Array, "batch length heads dim"]:
    """Turn pair i of the features at position t by the angle t base^(-2 i / dim).

    Pairs are (i, i + dim / 2) in the layout "half" and (2 i, 2 i + 1) in "interleaved"; weights
    trained with one are wrong in the other. Products of turned queries and keys depend on the
    difference of their positions alone. Keys are kept turned in a cache, each by its own position.
    Su et al. 2021 (arXiv:2104.09864), section 3.2.2.
    """
    checks.one_of("layout", layout, ("half", "interleaved"))
    if x.shape[-1] % 2:
        raise ValueError(f"dim must be even to be turned in pairs, got {x.shape[-1]}")
    positions = positions[None] if positions.ndim == 1 else positions
    angle = _angles(positions, x.shape[-1] // 2, base, x.dtype)[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    wide, half = at_least_float32(x), layout == "half"
    a, b = jnp.split(wide, 2, axis=-1) if half else (wide[..., ::2], wide[..., 1::2])
    turned = [a * cos - b * sin, a * sin + b * cos]
    joined = jnp.concatenate(turned, axis=-1) if half else jnp.stack(turned, axis=-1)
    return joined.reshape(x.shape).astype(x.dtype)


def sinusoidal(
    positions: Float[Array, "*batch"] | Int[Array, "*batch"], num: int, *, base: float = 10_000.0
) -> Float[Array, "*batch num"]:
    """[sin(p f), cos(p f)] at num / 2 frequencies f = base^(-2 i / num) (Vaswani et al. 2017).

    For positions and step numbers, of order 1 to `base`.
    """
    _even(num)
    angle = _angles(positions, num // 2, base, jnp.float32)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def fourier_features(
    t: Float[Array, " batch"], num: int, *, min_frequency: float = 0.25, max_frequency: float = 16.0
) -> Float[Array, "batch num"]:
    """[cos(2 pi f t), sin(2 pi f t)] at num / 2 frequencies f, equally spaced in the logarithm.

    For t of order 1: a time in [0, 1], or EDM's log(sigma) / 4. Float32 whatever the type of t.

    >>> fourier_features(jnp.array([0.0, 0.5]), 8).shape
    (2, 8)
    """
    _even(num)
    steps = jnp.linspace(math.log(min_frequency), math.log(max_frequency), num // 2)
    angle = 2 * math.pi * jnp.exp(steps)[None, :] * at_least_float32(t)[:, None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def harmonics(t: Float[Array, " batch"], num: int) -> Float[Array, "batch features"]:
    """[t, sin(pi k t), cos(pi k t)] for k = 1, ..., num; for times in [0, 1]."""
    t = at_least_float32(t)[:, None]
    angle = math.pi * t * jnp.arange(1, num + 1, dtype=t.dtype)[None]
    return jnp.concatenate([t, jnp.sin(angle), jnp.cos(angle)], axis=1)


def _even(num: int) -> None:
    checks.integer("num", num, 2)
    if num % 2:
        raise ValueError(f"num must be even (a cosine and a sine of each frequency), got {num}")


def labels_or_null(
    classes: int | None, label: Int[Array, " batch"] | None, batch: int
) -> Int[Array, " batch"] | None:
    """The labels, or the null class `classes` for every row; None where `classes` is None."""
    if classes is None:
        if label is not None:
            raise ValueError("label is given, but the network has classes=None")
        return None
    if label is None:
        return jnp.full(batch, classes)
    checks.shape("label", label, (batch,))
    return label


class Conditioning(nn.Module):
    """One vector of time and class: an MLP of the time's features plus a row for the class.

    features: its size. classes: number of labels; the label `classes`, and no label, mean "no
    class", which has a row of its own (for classifier-free guidance).
    """

    features: int
    classes: int | None = None
    num_frequencies: int = 32
    dtype: Any = None

    @nn.compact
    def __call__(
        self, t: Float[Array, " batch"], label: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch features"]:
        checks.rank("t", t, 1)
        label = labels_or_null(self.classes, label, len(t))
        h = fourier_features(t, 2 * self.num_frequencies)
        h = nn.Dense(self.features, dtype=self.dtype)(h)
        h = nn.Dense(self.features, dtype=self.dtype)(nn.silu(h))
        if self.classes is not None:
            h = h + nn.Embed(self.classes + 1, self.features, dtype=self.dtype)(label)
        return nn.silu(h)


def patchify(
    x: Float[Array, "batch height width channels"], patch: int
) -> Float[Array, "batch tokens features"]:
    """Squares of patch x patch pixels, row by row: [batch, tokens, patch * patch * channels]."""
    checks.rank("images", x, 4)
    b, h, w, c = x.shape
    if h % patch or w % patch:
        raise ValueError(
            f"images must be [batch, h, w, c] with sides multiples of the patch {patch}, "
            f"got {x.shape}"
        )
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(
    tokens: Float[Array, "batch tokens features"], patch: int, image: tuple[int, ...]
) -> Float[Array, "batch height width channels"]:
    """The inverse of `patchify` for images of that (height, width, channels)."""
    h, w, c = image
    wanted = ((h // patch) * (w // patch), patch * patch * c)
    if h % patch or w % patch or tokens.shape[1:] != wanted:
        raise ValueError(
            f"tokens of images {image} must be [batch, *{wanted}], got shape {tokens.shape}"
        )
    x = tokens.reshape(len(tokens), h // patch, w // patch, patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(tokens), h, w, c)
