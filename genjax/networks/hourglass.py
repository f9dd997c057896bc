"""Hourglass of convolutions: the untrained network of the deep image prior."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax.networks.convolution import Conv
from genjax.networks.layers import GroupNorm

__all__ = ["Hourglass"]


class Hourglass(nn.Module):
    """Strided convolutions down, bilinear resizing and convolutions up, with narrow short cuts.

    The untrained prior of Ulyanov, Vedaldi & Lempitsky 2018: image [batch, height, width, out] in
    (0, 1) of noise of the same height and width. channels: one entry per halving. short: channels
    of the short cuts.
    """

    out: int
    channels: Sequence[int] = (16, 32, 32)
    short: int = 4

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width out"]:
        def layer(x: Array, width: int, stride: int = 1) -> Array:
            x = Conv(width, (3, 3), stride)(x)
            # Each channel over the image: what batch normalisation is for a batch of one.
            return nn.leaky_relu(GroupNorm(groups=width)(x), 0.1)

        h, kept = z, []
        for width in self.channels:
            kept.append(layer(h, self.short))
            h = layer(layer(h, width, 2), width)
        for width, short in zip(reversed(self.channels), reversed(kept), strict=True):
            h = jax.image.resize(h, (*short.shape[:3], h.shape[-1]), "bilinear")
            h = layer(layer(jnp.concatenate([h, short], axis=-1), width), width)
        return nn.sigmoid(Conv(self.out, (3, 3))(h))
