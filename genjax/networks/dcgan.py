"""DCGAN generator and critic, sizes by field, for images from 8x8 to 64x64; labels by option.

Radford, Metz, Chintala 2016 (arXiv:1511.06434), without what depends on the batch in the critic.
"""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.networks.convolution import Conv
from genjax.networks.layers import unpatchify

__all__ = ["DCGANCritic", "DCGANGenerator"]

Norm = Literal["none", "layer", "batch"]
Condition = Literal["projection", "concat"]
HE = nn.initializers.he_normal()


class Upscale(nn.Module):
    """Double the resolution: a convolution to four times the channels, dealt out to 2x2 pixels.

    kernel 1 is the transposed convolution of size 2 and stride 2; kernel 3 holds those of size 4.
    """

    features: int
    kernel: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width inputs"]) -> Array:
        b, h, w, _ = x.shape
        y = Conv(4 * self.features, (self.kernel, self.kernel), kernel_init=HE)(x)
        return unpatchify(y.reshape(b, h * w, -1), 2, (2 * h, 2 * w, self.features))


class DCGANGenerator(nn.Module):
    """Noise [batch, latent] (and labels [batch]) -> images in [-1, 1].

    A dense layer to base x base, then doublings to `size` with width * 2^i channels, tanh at the
    end. norm "batch" uses the batch's own statistics, also when sampling: a sample then depends on
    those drawn with it; "layer" normalises each example by itself. With `classes`, an embedding of
    the label is concatenated to the noise; there is no null class.
    """

    size: int = 32
    channels: int = 3
    width: int = 64
    base: int = 4
    kernel: int = 3
    norm: Norm = "layer"
    classes: int | None = None
    embedding: int = 32

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch latent"], label: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch size size channels"]:
        stages = _stages(self.size, self.base)
        _check_label(self.classes, label)
        if self.classes is not None:
            z = jnp.concatenate([z, nn.Embed(self.classes, self.embedding)(label)], axis=-1)
        widths = [self.width * 2**i for i in range(stages)][::-1]
        h = nn.Dense(self.base**2 * widths[0])(z)
        h = h.reshape(-1, self.base, self.base, widths[0])
        for i, width in enumerate([*widths[1:], self.channels]):
            h = nn.relu(_normalise(self.norm, h, i))
            h = Upscale(width, self.kernel)(h)
        return jnp.tanh(h)


class DCGANCritic(nn.Module):
    """Images [batch, size, size, channels] (and labels [batch]) -> scores [batch].

    Strided convolutions with width * 2^i channels down to base x base, leaky ReLU, a dense layer.
    There is no normalisation over the batch, so that each example is scored by itself. With
    `classes`, condition "projection" adds <embedding(label), features> to the score (Miyato &
    Koyama 2018); "concat" appends the label's embedding to the image as a channel (Mirza &
    Osindero 2014).
    """

    size: int = 32
    channels: int = 3
    width: int = 64
    base: int = 4
    kernel: int = 4
    norm: Literal["none", "layer"] = "none"
    classes: int | None = None
    condition: Condition = "projection"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch size size channels"],
        label: Int[Array, " batch"] | None = None,
    ) -> Float[Array, " batch"]:
        stages = _stages(self.size, self.base)
        checks.shape("x", x, (None, self.size, self.size, self.channels))
        checks.one_of("norm", self.norm, ("none", "layer"))
        checks.one_of("condition", self.condition, ("projection", "concat"))
        _check_label(self.classes, label)
        if self.classes is not None and self.condition == "concat":
            plane = nn.Embed(self.classes, self.size**2)(label)
            x = jnp.concatenate([x, plane.reshape(-1, self.size, self.size, 1)], axis=-1)
        h = x
        for i in range(stages):
            kernel = (self.kernel, self.kernel)
            h = Conv(self.width * 2**i, kernel, stride=2, kernel_init=HE)(h)
            h = nn.leaky_relu(_normalise(self.norm if i else "none", h, i), 0.2)
        h = h.reshape(h.shape[0], -1)
        score = nn.Dense(1)(h)[:, 0]
        if self.classes is not None and self.condition == "projection":
            init = nn.initializers.normal(h.shape[-1] ** -0.5)
            embedded = nn.Embed(self.classes, h.shape[-1], embedding_init=init)(label)
            score = score + jnp.sum(embedded * h, axis=-1)
        return score


def _normalise(norm: Norm, h: Array, i: int) -> Array:
    checks.one_of("norm", norm, ("none", "layer", "batch"))
    if norm == "none":
        return h
    if norm == "layer":
        return nn.LayerNorm(reduction_axes=(1, 2, 3), feature_axes=-1)(h)
    # Each channel by the mean and variance of the batch and the image.
    batch = nn.LayerNorm(
        1e-5, reduction_axes=(0, 1, 2), use_fast_variance=False, name=f"BatchStatistics_{i}"
    )
    return batch(h)


def _stages(size: int, base: int) -> int:
    """Count the doublings from base to size."""
    stages = (size // base).bit_length() - 1
    if stages < 1 or base * 2**stages != size:
        raise ValueError(f"size must be base * 2^k with k >= 1, got size {size} and base {base}")
    return stages


def _check_label(classes: int | None, label: Array | None) -> None:
    if (classes is None) != (label is None):
        raise ValueError(
            f"label must be given exactly where classes is set, got classes={classes} and "
            f"{'no label' if label is None else 'a label'}"
        )
