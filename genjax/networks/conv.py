"""Small convolutional encoder and decoder for images of 8x8 to 64x64."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
from jaxtyping import Array, Float

from genjax.networks.convolution import Conv
from genjax.networks.layers import drop
from genjax.typing import PRNGKey

__all__ = ["ConvDecoder", "ConvEncoder"]


class ConvEncoder(nn.Module):
    """3x3 convolutions of stride 2, one for each entry of `channels`, then one linear map.

    features: size of the output. dropout: on the flattened image features where a key is given.
    """

    features: int
    channels: Sequence[int] = (32, 64)
    activation: Callable[[Array], Array] = nn.silu
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch features"]:
        for width in self.channels:
            x = self.activation(Conv(width, (3, 3), stride=2)(x))
        x = drop(x.reshape(x.shape[0], -1), self.dropout, dropout_key, 0)
        return nn.Dense(self.features)(x)


class ConvDecoder(nn.Module):
    """The encoder turned round: a linear map, then for each entry of `channels` a doubling.

    shape: (height, width, channels) of the output; height and width must be multiples of
    2 ** len(channels), or ValueError is raised. A doubling is a 2x2 transposed convolution of
    stride 2, whose patches do not overlap, and a 3x3 convolution closes the seams.
    """

    shape: Sequence[int]
    channels: Sequence[int] = (64, 32)
    activation: Callable[[Array], Array] = nn.silu
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch latent"], *, dropout_key: PRNGKey | None = None
    ) -> Float[Array, "batch height width channels"]:
        height, width, out = self.shape
        factor = 2 ** len(self.channels)
        if height % factor or width % factor:
            raise ValueError(
                f"shape {tuple(self.shape)} must have sides that are multiples of {factor}, "
                f"2 for each of the {len(self.channels)} entries of channels"
            )
        small = (height // factor, width // factor, self.channels[0])
        h = self.activation(nn.Dense(math.prod(small))(z))
        h = drop(h, self.dropout, dropout_key, 0).reshape(-1, *small)
        for channels in self.channels:
            h = self.activation(nn.ConvTranspose(channels, (2, 2), strides=(2, 2))(h))
        return Conv(out, (3, 3))(h)
