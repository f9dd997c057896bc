"""Convolutional encoder and decoder between images and grids of latents."""

from collections.abc import Sequence

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from genjax import checks
from genjax.networks.convolution import Conv
from genjax.networks.layers import drop, on_flat, patchify, unpatchify
from genjax.typing import PRNGKey

__all__ = ["GridDecoder", "GridEncoder"]


class ConvBlock(nn.Module):
    """x + dropout(W2 silu(W1 silu(x))), W1 3x3 and W2 1x1."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, dropout_key: PRNGKey | None, number: int) -> Array:
        h = nn.silu(Conv(x.shape[-1], (3, 3))(nn.silu(x)))
        h = drop(h, self.dropout, dropout_key, number)
        return x + on_flat(nn.Dense(x.shape[-1]), h)


class GridEncoder(nn.Module):
    """Image [batch, height, width, c] -> latents [batch, height / f, width / f, features].

    channels: of the image's own resolution, then of each halving, so that f = 2^(len - 1).
    num_blocks: residual blocks of each resolution. dropout: on hidden units where a key is given.
    Raises ValueError for sides that are not multiples of f.
    """

    features: int
    channels: Sequence[int] = (32, 64)
    num_blocks: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch rows columns features"]:
        checks.rank("x", x, 4)
        factor = 2 ** (len(self.channels) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"x must have sides that are multiples of {factor}, got {x.shape}")
        number = 0
        for i, width in enumerate(self.channels):
            if i:
                # Halved: 2x2 patches become channels, and a linear map of them follows.
                size = (len(x), x.shape[1] // 2, x.shape[2] // 2, -1)
                x = on_flat(nn.Dense(width), patchify(x, 2).reshape(size))
            else:
                x = Conv(width, (3, 3))(x)
            for _ in range(self.num_blocks):
                x = ConvBlock(self.dropout)(x, dropout_key, number)
                number += 1
        return on_flat(nn.Dense(self.features), nn.silu(x))


class GridDecoder(nn.Module):
    """The encoder turned round: [batch, rows, columns, d] -> [batch, rows f, columns f, features].

    channels: of the latents' resolution first, then of each doubling, a linear map to 2x2 pixels.
    """

    features: int
    channels: Sequence[int] = (64, 32)
    num_blocks: int = 1
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch rows columns dim"], *, dropout_key: PRNGKey | None = None
    ) -> Float[Array, "batch height width features"]:
        checks.rank("z", z, 4)
        x, number = Conv(self.channels[0], (3, 3))(z), 0
        # Numbers that are not the encoder's, so that one key may serve both.
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        for i, width in enumerate(self.channels):
            if i:
                batch, rows, columns, _ = x.shape
                tokens = on_flat(nn.Dense(4 * width), x).reshape(batch, rows * columns, 4 * width)
                x = unpatchify(tokens, 2, (2 * rows, 2 * columns, width))
            for _ in range(self.num_blocks):
                x = ConvBlock(self.dropout)(x, key, number)
                number += 1
        return Conv(self.features, (3, 3))(nn.silu(x))
