"""TarFlow: blocks of a causal transformer, each an affine autoregressive map of patches.

Zhai et al. (2024), arXiv:2412.06329. Attention is written as pure functions of a tree of weights,
so that training (all positions at once) and sampling (one position, keys and values kept) share
the same few lines.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks, flows, numerics
from genjax.networks.mlp import drop
from genjax.typing import Params, PRNGKey


def _normalise(x: Array, scale: Array) -> Array:
    """Layer norm without a bias, statistics in float32."""
    wide = numerics.at_least_float32(x)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * inverse).astype(x.dtype) * (1 + scale.reshape((1,) * (x.ndim - 1) + (-1,)))


def _attend(q: Array, k: Array, v: Array, mask: Array, temperature: Array) -> Array:
    """softmax(q k / (sqrt(d) temperature)) v; mask [queries, keys], temperature [batch]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    scores = numerics.at_least_float32(scores) / numerics.expand_to(temperature, scores)
    mask = jnp.broadcast_to(mask, scores.shape)
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _layer(
    p: Params,
    h: Array,
    mask: Array,
    temperature: Array,
    heads: int,
    cache: tuple[Array, Array] | None = None,
    position: Array | int = 0,
    dropout: tuple[float, PRNGKey | None] = (0.0, None),
) -> tuple[Array, tuple[Array, Array]]:
    """One pre-norm transformer layer on [batch, positions, width]; returns keys and values too."""
    rate, key = dropout
    batch, length, width = h.shape
    qkv = jnp.matmul(_normalise(h, p["norm_a"]), p["qkv"])
    q, k, v = jnp.split(qkv.reshape(batch, length, 3 * heads, width // heads), 3, axis=2)
    if cache is not None:
        k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, position, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, position, axis=1)
    out = _attend(q, k, v, mask, temperature).reshape(h.shape)
    h = h + drop(jnp.matmul(out, p["out"]), rate, key, 0)
    inner = jax.nn.gelu(jnp.matmul(_normalise(h, p["norm_b"]), p["up"]))
    return h + drop(jnp.matmul(inner, p["down"]), rate, key, 1), (k, v)


class TarFlow(nn.Module):
    """Flow of images [h, w, c] to z [tokens, patch * patch * c], and back.

    Block: z_t = (x_t - mu_t) exp(-alpha_t) with mu, alpha from the positions before t; z_0 = x_0;
    every other block reads the sequence backwards. Log-scales stay within `bound`. The last layer
    starts at 0: the flow begins as the identity. With `classes` the model takes labels; the label
    `classes` stands for none (train with a share of labels so replaced, for guidance).
    """

    patch: int = 2
    blocks: int = 4
    layers: int = 2
    width: int = 128
    heads: int = 4
    classes: int = 0
    dropout: float = 0.0
    bound: float = 3.0

    def _tokens(self, x: Array) -> Array:
        p = self.patch
        if x.ndim != 4 or x.shape[1] % p or x.shape[2] % p:
            raise ValueError(
                f"images must be [batch, h, w, c] with sides multiples of the patch {p}, "
                f"got {x.shape}"
            )
        b, h, w, c = x.shape
        x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, (h // p) * (w // p), p * p * c)

    def _image(self, tokens: Array, image: tuple[int, ...]) -> Array:
        p, (h, w, c) = self.patch, image
        wanted = ((h // p) * (w // p), p * p * c)
        if h % p or w % p or tokens.shape[1:] != wanted:
            raise ValueError(f"z of images {image} must be [batch, *{wanted}], got {tokens.shape}")
        x = tokens.reshape(len(tokens), h // p, w // p, p, p, c).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(len(tokens), h, w, c)

    def _weights(self, length: int, dim: int) -> Params:
        """All weights, those of blocks and layers stacked: scans run over them."""
        blocks, width = self.blocks, self.width
        if width % self.heads:
            raise ValueError(f"width must be a multiple of heads = {self.heads}, got {width}")
        deep = (blocks, self.layers)
        normal, zeros = nn.initializers.normal, nn.initializers.zeros_init()

        def dense(name: str, i: int, o: int, *lead: int) -> Array:
            return self.param(name, normal(i**-0.5), (*lead, i, o))

        # Residual branches start small, as deep as they are stacked.
        small = normal((2 * self.layers * width) ** -0.5)
        weights = {
            "in": dense("in", dim, width, blocks),
            "position": self.param("position", normal(0.02), (blocks, length, width)),
            "last_norm": self.param("last_norm", zeros, (blocks, width)),
            "last": self.param("last", zeros, (blocks, width, 2 * dim)),
            "layers": {
                "norm_a": self.param("norm_a", zeros, (*deep, width)),
                "norm_b": self.param("norm_b", zeros, (*deep, width)),
                "qkv": dense("qkv", width, 3 * width, *deep),
                "out": self.param("out", small, (*deep, width, width)),
                "up": dense("up", width, 4 * width, *deep),
                "down": self.param("down", small, (*deep, 4 * width, width)),
            },
        }
        if self.classes:
            shape = (blocks, self.classes + 1, width)
            weights["label"] = self.param("label", normal(0.02), shape)
        return weights

    def _read(
        self,
        p: Params,
        x: Array,
        label: Array | None,
        start: Array | int = 0,
        temperature: Array | None = None,
        cache: tuple[Array, Array] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[Array, Any]:
        """Raw parameters [batch, positions, 2 dim] from inputs that are already shifted by one."""
        length, total = x.shape[1], p["position"].shape[0]
        place = jax.lax.dynamic_slice_in_dim(p["position"], start, length)
        h = jnp.matmul(x, p["in"]) + place[None]
        if label is not None:
            h = h + p["label"][label][:, None]
        temperature = jnp.ones(len(x), jnp.float32) if temperature is None else temperature
        mask = jnp.arange(total)[None, :] <= (start + jnp.arange(length))[:, None]
        mask = mask[:, :length] if cache is None else mask

        def body(h: Array, scanned: tuple) -> tuple[Array, Any]:
            weights, kept, i = scanned
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            h, kept = _layer(
                weights, h, mask, temperature, self.heads, kept, start, (self.dropout, key)
            )
            return h, (None if cache is None else kept)

        h, cache = jax.lax.scan(body, h, (p["layers"], cache, jnp.arange(self.layers)))
        raw = jnp.matmul(_normalise(h, p["last_norm"]), p["last"])
        # The first position has nothing before it: z_0 = x_0.
        first = (start + jnp.arange(length) == 0)[None, :, None]
        return jnp.where(first, 0, raw), cache

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        label: Int[Array, " batch"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[Float[Array, "batch tokens dim"], Float[Array, " batch"]]:
        """Data to base: z [batch, tokens, dim] and log |det dz/dx|."""
        label = self._label(label, len(x))
        log_det = jnp.zeros(len(x), jnp.promote_types(x.dtype, jnp.float32))
        tokens = self._tokens(x)

        def block(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
            (x, log_det), (p, i) = carry, scanned
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)

            def conditioner(_: Any, x: Array) -> Array:
                shifted = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
                return self._read(p, shifted, label, dropout_key=key)[0]

            made = flows.masked_autoregressive(conditioner, flows.standardise(self.bound))
            y, change = made.forward(None, x)
            return (y[:, ::-1], log_det + change), None

        weights = self._weights(*tokens.shape[1:])
        (z, log_det), _ = jax.lax.scan(block, (tokens, log_det), (weights, jnp.arange(self.blocks)))
        return z, log_det

    @nn.compact
    def inverse(
        self,
        z: Float[Array, "batch tokens dim"],
        image: tuple[int, ...],
        *,
        label: Int[Array, " batch"] | None = None,
        guidance: float | int | Float[Array, ""] = 0.0,
        anneal: bool = False,
        temperature: float | int = 1.0,
    ) -> tuple[Float[Array, "batch height width channels"], Float[Array, " batch"]]:
        """Base to data, one position after another with keys and values kept: (x, log |det|).

        guidance w > 0 moves both mu and alpha away from what they are without the label,
        a_c + w (a_c - a_u); with `anneal` w grows along the sequence as w t / (T - 1).
        `temperature` divides the attention of the branch without the label (section 2.6).
        """
        guided = not (checks.is_concrete(guidance) and float(guidance) == 0)
        if guided and (not self.classes or label is None):
            raise ValueError("guidance needs a TarFlow with classes, and labels")
        weights = self._weights(*z.shape[1:])
        label = self._label(label, len(z))
        hot = jnp.ones(len(z), jnp.float32)
        if guided and label is not None:
            label = jnp.concatenate([label, jnp.full_like(label, self.classes)])
            hot = jnp.concatenate([hot, temperature * hot])
        batch, length, _ = z.shape
        shape = (self.layers, len(hot), length, self.heads, self.width // self.heads)
        empty = jnp.zeros(shape, z.dtype)

        def block(carry: tuple, p: Params) -> tuple[tuple, None]:
            y, log_det = carry
            y = y[:, ::-1]

            def position(carry: tuple, t: Array) -> tuple[tuple, tuple[Array, Array]]:
                before, cache = carry
                both = jnp.concatenate([before, before]) if guided else before
                raw, cache = self._read(p, both[:, None], label, t, hot, cache)
                alpha, mu = jnp.split(raw[:, 0], 2, axis=-1)
                alpha = flows.bijections.bounded(alpha, self.bound)
                if guided:
                    w = guidance * (t / max(length - 1, 1) if anneal else 1.0)
                    alpha, mu = (a[:batch] + w * (a[:batch] - a[batch:]) for a in (alpha, mu))
                    alpha = jnp.clip(alpha, -self.bound, self.bound)
                now = (y[:, t] * jnp.exp(alpha) + mu).astype(y.dtype)
                return (now, cache), (now, jnp.sum(alpha, axis=-1))

            start = (jnp.zeros_like(y[:, 0]), (empty, empty))
            _, (x, changes) = jax.lax.scan(position, start, jnp.arange(length))
            x = x.swapaxes(0, 1).astype(y.dtype)
            return (x, log_det + jnp.sum(changes, axis=0)), None

        log_det = jnp.zeros(batch, jnp.promote_types(z.dtype, jnp.float32))
        (tokens, log_det), _ = jax.lax.scan(block, (z, log_det), weights, reverse=True)
        return self._image(tokens, image), log_det

    def _label(self, label: Array | None, batch: int) -> Array | None:
        if label is None:
            return jnp.full(batch, self.classes) if self.classes else None
        if not self.classes:
            raise ValueError("labels came, but the TarFlow has classes=0")
        checks.shape("label", label, (batch,))
        return label
