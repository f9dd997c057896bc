"""U-Net of (x_t, t, label) for images of 8x8 to 64x64, after Ho et al. 2020."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.networks.convolution import Conv
from genjax.networks.layers import Conditioning, GroupNorm, attention, drop, on_flat
from genjax.typing import PRNGKey

__all__ = ["UNet"]

ZERO = nn.initializers.zeros


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + W e))), e the vector of time and class."""

    channels: int
    groups: int = 8
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, embedded: Array, dropout_key: PRNGKey | None = None) -> Array:
        h = nn.silu(GroupNorm(self.groups)(x))
        h = Conv(self.channels, (3, 3), dtype=self.dtype)(h)
        h = h + nn.Dense(self.channels, dtype=self.dtype)(embedded)[:, None, None, :]
        h = drop(nn.silu(GroupNorm(self.groups)(h)), self.dropout, dropout_key, 0)
        h = Conv(self.channels, (3, 3), dtype=self.dtype, kernel_init=ZERO)(h)
        if x.shape[-1] != self.channels:
            x = on_flat(nn.Dense(self.channels, dtype=self.dtype), x)
        return x + h


class Attention(nn.Module):
    """Self-attention over the pixels, added to its input; softmax in float32."""

    head_dim: int = 8
    groups: int = 8
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        batch, height, width, channels = x.shape
        if channels % self.head_dim:
            raise ValueError(
                f"channels must be a multiple of head_dim={self.head_dim}, got {channels} channels"
            )
        tokens = GroupNorm(self.groups)(x).reshape(batch, height * width, channels)
        heads = channels // self.head_dim
        mixed = on_flat(nn.Dense(3 * channels, dtype=self.dtype), tokens)
        mixed = mixed.reshape(batch, height * width, 3, heads, self.head_dim)
        attended = attention(*(mixed[:, :, i] for i in range(3)))
        out = nn.Dense(channels, dtype=self.dtype, kernel_init=ZERO)
        out = on_flat(out, attended.reshape(tokens.shape))
        return x + out.reshape(x.shape)


def _doubled(x: Array) -> Array:
    """Nearest neighbour, twice the height and width."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


class UNet(nn.Module):
    """Residual blocks on the way down, joined to those on the way up at the same size.

    channels: of each resolution, the first that of x; every further one has half the height and
    width. num_blocks: residual blocks per resolution (one more on the way up). attention: heights
    at which each block is followed by self-attention; the middle always has it. classes: as in
    `Conditioning`. remat: recompute blocks in the backward pass instead of keeping them. dropout:
    in the residual blocks where a key is given. dtype: of the computation; parameters are float32.
    The output starts at 0 and has the shape of x.
    """

    channels: Sequence[int] = (32, 64, 64)
    num_blocks: int = 2
    attention: Sequence[int] = ()
    classes: int | None = None
    embedding: int = 128
    num_frequencies: int = 16
    groups: int = 8
    head_dim: int = 8
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Float[Array, " batch"],
        label: Int[Array, " batch"] | None = None,
        *,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch height width channels"]:
        checks.rank("x", x, 4)
        factor = 2 ** (len(self.channels) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"x must have sides that are multiples of {factor} for {len(self.channels)} "
                f"resolutions, got shape {x.shape}"
            )
        embedded = Conditioning(
            self.embedding, self.classes, self.num_frequencies, dtype=self.dtype
        )(t, label)
        block_type = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        number = 0

        def block(h: Array, width: int) -> Array:
            nonlocal number
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
            # Named, so that parameters are the same with and without remat.
            name = f"ResidualBlock_{number}"
            number += 1
            made = block_type(width, self.groups, self.dropout, self.dtype, name=name)
            return made(h, embedded, key)

        def attend(h: Array) -> Array:
            return Attention(self.head_dim, self.groups, self.dtype)(h)

        def block_and_attend(h: Array, width: int) -> Array:
            h = block(h, width)
            return attend(h) if h.shape[1] in self.attention else h

        h = Conv(self.channels[0], (3, 3), dtype=self.dtype)(x)
        kept = [h]
        for i, width in enumerate(self.channels):
            for _ in range(self.num_blocks):
                h = block_and_attend(h, width)
                kept.append(h)
            if i + 1 < len(self.channels):
                h = Conv(width, (3, 3), stride=2, dtype=self.dtype)(h)
                kept.append(h)
        h = block(attend(block(h, self.channels[-1])), self.channels[-1])
        for i, width in reversed(list(enumerate(self.channels))):
            for _ in range(self.num_blocks + 1):
                h = block_and_attend(jnp.concatenate([h, kept.pop()], axis=-1), width)
            if i:
                h = Conv(width, (3, 3), dtype=self.dtype)(_doubled(h))
        h = nn.silu(GroupNorm(self.groups)(h))
        return Conv(x.shape[-1], (3, 3), dtype=self.dtype, kernel_init=ZERO)(h)
