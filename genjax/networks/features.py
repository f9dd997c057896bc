"""A small convolutional classifier whose last hidden layer serves as features."""

from collections.abc import Callable, Sequence

import flax.linen as nn
from jaxtyping import Array, Float

from genjax.typing import PRNGKey

__all__ = ["FeatureNetwork"]


class FeatureNetwork(nn.Module):
    """Classify images; `embed` gives the last hidden layer, which the metrics take as features.

    3x3 convolutions, one for each entry of `channels`, the first of stride 1, the others of
    stride 2; then one hidden layer. width: size of the hidden layer, the features. dropout: on the
    features, where a key is given.
    """

    classes: int = 10
    width: int = 64
    channels: Sequence[int] = (16, 32, 32)
    activation: Callable[[Array], Array] = nn.silu
    dropout: float = 0.0

    def setup(self) -> None:
        self.convolutions = [
            nn.Conv(c, (3, 3), strides=(1, 1) if i == 0 else (2, 2))
            for i, c in enumerate(self.channels)
        ]
        self.hidden = nn.Dense(self.width)
        self.dropped = nn.Dropout(self.dropout)
        self.output = nn.Dense(self.classes)

    def embed(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch features"]:
        """Features of images in [-1, 1]."""
        x = self.maps(x)[-1]
        return self.activation(self.hidden(x.reshape(x.shape[0], -1)))

    def maps(self, x: Float[Array, "batch height width channels"]) -> list[Array]:
        """What each convolution gives of images in [-1, 1], for `perceptual_distance`."""
        found = []
        for convolution in self.convolutions:
            x = self.activation(convolution(x))
            found.append(x)
        return found

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        *,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch classes"]:
        """Logits of the classes."""
        features = self.embed(x)
        if dropout_key is not None:
            features = self.dropped(features, deterministic=False, rng=dropout_key)
        return self.output(features)
