"""TarFlow: blocks of a causal transformer, each an affine autoregressive map of patches.

Zhai et al. (2024), arXiv:2412.06329. Training reads all positions at once; sampling reads one
position at a time, with the keys and values of those before it in a cache.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks, flows
from genjax.networks.layers import Cache, Norm, labels_or_null, on_flat, patchify, unpatchify
from genjax.networks.transformer import Block, apply_stack, empty_cache, stacked
from genjax.typing import Params, PRNGKey

__all__ = ["TarFlow"]


class CausalConditioner(nn.Module):
    """Raw (alpha, mu) [batch, positions, 2 dim] of each position from those before it.

    x: the sequence moved on by one, so that position t holds number t - 1. The last layer starts at
    0, and the first position, with nothing before it, always gets 0.
    """

    length: int
    layers: int
    width: int
    heads: int
    classes: int | None
    dropout: float
    remat: bool = False

    def block(self) -> Block:
        """One transformer block; residual branches start small, as deep as they are stacked."""
        return Block(
            self.heads,
            causal=True,
            use_bias=False,
            dropout=self.dropout,
            kernel_init=nn.initializers.normal(self.width**-0.5),
            residual_init=nn.initializers.normal((2 * self.layers * self.width) ** -0.5),
            parent=None,
        )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch positions dim"],
        label: Int[Array, " batch"] | None = None,
        *,
        start: int | Int[Array, ""] = 0,
        cache: Cache | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "batch positions raw"], Cache | None]:
        normal, zeros = nn.initializers.normal, nn.initializers.zeros_init()
        dim, count = x.shape[-1], x.shape[1]
        place = self.param("position", normal(0.02), (self.length, self.width), jnp.float32)
        place = jax.lax.dynamic_slice_in_dim(place, start, count)[None]
        enter = nn.Dense(self.width, False, kernel_init=normal(dim**-0.5), name="in")
        h = on_flat(enter, x) + place
        if self.classes is not None:
            rows = nn.Embed(self.classes + 1, self.width, embedding_init=normal(0.02), name="label")
            h = h + rows(label)[:, None]
        block = self.block()
        params = stacked(self, "layers", block, self.layers, h[:1, :1])
        options = {**options, "cache": cache, "start": start, "remat": self.remat}
        h, cache = apply_stack(block, params, h, **options)
        last = nn.Dense(2 * dim, False, kernel_init=zeros, name="last")
        raw = on_flat(last, Norm(name="last_norm")(h))
        first = (start + jnp.arange(count) == 0)[None, :, None]
        return jnp.where(first, 0, raw), cache


class TarFlow(nn.Module):
    """Flow of images [h, w, c] to z [tokens, patch * patch * c], and back.

    Block: z_t = (x_t - mu_t) exp(-alpha_t) with mu, alpha from the positions before t; z_0 = x_0;
    every other block reads the sequence backwards. Log-scales stay within `bound`. The flow begins
    as the identity. With `classes` the model takes labels; the label `classes`, and no label,
    stand for none (train with a share of labels so replaced, for guidance). remat: recompute the
    transformer's blocks in the backward pass instead of keeping what they compute.
    """

    patch: int = 2
    blocks: int = 4
    layers: int = 2
    width: int = 128
    heads: int = 4
    classes: int | None = None
    dropout: float = 0.0
    bound: float = 3.0
    remat: bool = False

    def _conditioner(self, tokens: Array) -> tuple[CausalConditioner, Params]:
        """The conditioner of every block, and the parameters of all blocks, stacked."""
        length, dim = tokens.shape[1:]
        conditioner = CausalConditioner(
            *(length, self.layers, self.width, self.heads, self.classes, self.dropout, self.remat),
            parent=None,
        )
        label = labels_or_null(self.classes, None, 1)
        one = jnp.zeros((1, 1, dim), tokens.dtype)
        return conditioner, stacked(self, "blocks", conditioner, self.blocks, one, label)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        label: Int[Array, " batch"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[Float[Array, "batch tokens dim"], Float[Array, " batch"]]:
        """Data to base: z [batch, tokens, dim] and log |det dz/dx|."""
        label = labels_or_null(self.classes, label, len(x))
        log_det = jnp.zeros(len(x), jnp.promote_types(x.dtype, jnp.float32))
        tokens = patchify(x, self.patch)
        net, params = self._conditioner(tokens)

        def block(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
            (x, log_det), (p, i) = carry, scanned
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)

            def conditioner(p: Params, x: Array) -> Array:
                shifted = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
                return net.apply({"params": p}, shifted, label, dropout_key=key)[0]

            made = flows.masked_autoregressive(conditioner, flows.standardise(self.bound))
            y, change = made.forward(p, x)
            return (y[:, ::-1], log_det + change), None

        (z, log_det), _ = jax.lax.scan(block, (tokens, log_det), (params, jnp.arange(self.blocks)))
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
        net, params = self._conditioner(z)
        batch, length, _ = z.shape
        labels, divide = labels_or_null(self.classes, label, batch), None
        if guided:
            if self.classes is None or label is None:
                raise ValueError("guidance needs a TarFlow with classes, and labels")
            labels = jnp.concatenate([label, jnp.full_like(label, self.classes)])
            ones = jnp.ones(batch, jnp.float32)
            divide = jnp.concatenate([ones, temperature * ones])
        rows = 2 * batch if guided else batch
        empty = empty_cache(net.block(), self.layers, rows, length, self.width, z.dtype)

        def block(carry: tuple, p: Params) -> tuple[tuple, None]:
            y, log_det = carry
            y = y[:, ::-1]

            def position(carry: tuple, t: Array) -> tuple[tuple, tuple[Array, Array]]:
                before, cache = carry
                both = jnp.concatenate([before, before]) if guided else before
                raw, cache = net.apply(
                    {"params": p}, both[:, None], labels, start=t, cache=cache, temperature=divide
                )
                alpha, mu = jnp.split(raw[:, 0], 2, axis=-1)
                alpha = flows.bijections.bounded(alpha, self.bound)
                if guided:
                    w = guidance * (t / max(length - 1, 1) if anneal else 1.0)
                    alpha, mu = (a[:batch] + w * (a[:batch] - a[batch:]) for a in (alpha, mu))
                    alpha = jnp.clip(alpha, -self.bound, self.bound)
                now = (y[:, t] * jnp.exp(alpha) + mu).astype(y.dtype)
                return (now, cache), (now, jnp.sum(alpha, axis=-1))

            _, (x, changes) = jax.lax.scan(
                position, (jnp.zeros_like(y[:, 0]), empty), jnp.arange(length)
            )
            x = x.swapaxes(0, 1).astype(y.dtype)
            return (x, log_det + jnp.sum(changes, axis=0)), None

        log_det = jnp.zeros(batch, jnp.promote_types(z.dtype, jnp.float32))
        (tokens, log_det), _ = jax.lax.scan(block, (z, log_det), params, reverse=True)
        return unpatchify(tokens, self.patch, image), log_det
