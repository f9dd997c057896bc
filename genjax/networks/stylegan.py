"""StyleGAN2: a mapping to styles, convolutions that styles modulate, a critic of residual blocks.

Karras et al. 2020 (arXiv:1912.04958). Weights are N(0, 1) numbers times gain / sqrt(fan_in) at run
time, so that Adam moves all of them at one rate (Karras et al. 2018, section 4.1).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.networks.convolution import convolve
from genjax.networks.layers import labels_or_null, on_flat
from genjax.networks.r3gan import ImageNetwork, doublings, resample
from genjax.numerics import at_least_float32
from genjax.typing import PRNGKey

__all__ = ["StyleCritic", "StyleGenerator", "minibatch_stddev", "modulated_convolve"]

GAIN = 2**0.5  # of the leaky ReLU, which keeps the variance


def leaky(x: Array) -> Array:
    return GAIN * nn.leaky_relu(x, 0.2)


def modulated_convolve(
    x: Float[Array, "batch height width inputs"],
    kernel: Float[Array, "rows columns inputs outputs"],
    style: Float[Array, "batch inputs"],
    *,
    demodulate: bool = True,
    epsilon: float = 1e-8,
) -> Float[Array, "batch height width outputs"]:
    """Convolve each example with its own weights w''_{kio} = s_i w_{kio} / norm_o.

        norm_o = sqrt(sum_{k, i} (s_i w_{kio})^2 + epsilon), or 1 without `demodulate`

    Computed as one shared convolution between a scaled input and a scaled output, which is the same
    number (Karras et al. 2020, eqs. 1 to 3 and section 2.2). The norm is taken after the style and
    in float32 at least, of styles divided by their largest: it loses nothing in narrow types.

    >>> x, kernel, style = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), jnp.ones((2, 3))
    >>> modulated_convolve(x, kernel, style).shape
    (2, 8, 8, 5)
    """
    checks.rank("x", x, 4)
    checks.shape("style", style, (x.shape[0], x.shape[-1]))
    checks.shape("kernel", kernel, (None, None, x.shape[-1], None))
    largest = stop_gradient(jnp.max(jnp.abs(style), axis=1, keepdims=True))
    largest = jnp.where(largest > 0, largest, 1)
    if not demodulate:
        return convolve(x * style[:, None, None].astype(x.dtype), kernel.astype(x.dtype))
    scaled = style / largest
    y = convolve(x * scaled[:, None, None].astype(x.dtype), kernel.astype(x.dtype))
    squares = jnp.sum(jnp.square(at_least_float32(kernel)), axis=(0, 1))
    total = jnp.square(at_least_float32(scaled)) @ squares
    norm = jnp.sqrt(total + epsilon / jnp.square(at_least_float32(largest)))
    return y * (1 / norm)[:, None, None].astype(y.dtype)


def minibatch_stddev(
    x: Float[Array, "batch height width channels"], *, group: int, features: int = 1
) -> Float[Array, "batch height width more"]:
    """Append how much the examples of a group differ: one number per group and feature.

    Groups of `group` examples are taken with stride batch / group; the deviation over the group
    (sqrt(var + 1e-8)) is averaged over pixels and over the channels of each of `features` parts,
    and stands at every pixel (Karras et al. 2018, section 3). It couples the examples of a batch:
    a per-example gradient penalty is then of the sum of the scores. Raises ValueError where groups
    do not divide the batch, or features the channels.

    >>> minibatch_stddev(jnp.ones((4, 8, 8, 3)), group=4).shape
    (4, 8, 8, 4)
    """
    checks.rank("x", x, 4)
    batch, height, width, channels = x.shape
    checks.integer("group", group, 1)
    if batch % group or channels % features:
        raise ValueError(
            f"group must divide the batch and features the channels, got {group} and {features} "
            f"for shape {x.shape}"
        )
    parts = at_least_float32(x).reshape(group, batch // group, height, width, features, -1)
    centred = parts - jnp.mean(parts, axis=0, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(centred), axis=0) + 1e-8)
    deviation = jnp.mean(deviation, axis=(1, 2, 4)).astype(x.dtype)
    planes = jnp.broadcast_to(
        jnp.tile(deviation, (group, 1))[:, None, None], (batch, height, width, features)
    )
    return jnp.concatenate([x, planes], axis=-1)


class EqualDense(nn.Module):
    """x W gain / sqrt(fan_in) + b, both learnt at `rate` times the optimiser's rate."""

    features: int
    bias: float = 0.0
    rate: float = 1.0
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        init = nn.initializers.normal(1 / self.rate)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        dtype = self.dtype or x.dtype
        scale = self.rate / x.shape[-1] ** 0.5
        y = on_flat(lambda x: x @ (scale * kernel).astype(dtype), x.astype(dtype))
        if not self.use_bias:
            return y
        start = nn.initializers.constant(self.bias / self.rate)
        bias = self.rate * self.param("bias", start, (self.features,))
        return y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))


class EqualConv(nn.Module):
    """A convolution of equalised rate, with a bias where asked for."""

    features: int
    size: int = 3
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = _kernel(self, self.size, x.shape[-1], self.features)
        dtype = self.dtype or x.dtype
        y = convolve(x.astype(dtype), kernel.astype(dtype))
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + bias.astype(dtype).reshape(1, 1, 1, -1)


def _kernel(owner: nn.Module, size: int, inputs: int, features: int) -> Array:
    kernel = owner.param("kernel", nn.initializers.normal(1.0), (size, size, inputs, features))
    return kernel / (size * size * inputs) ** 0.5


class StyleLayer(nn.Module):
    """Modulated 3x3 convolution, noise times a learnt number that starts at 0, leaky ReLU."""

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, w: Array, noise: Array | None) -> Array:
        kernel = _kernel(self, 3, x.shape[-1], self.features)
        style = EqualDense(x.shape[-1], bias=1.0, name="style")(w)
        y = modulated_convolve(x, kernel, style)
        strength = self.param("noise", nn.initializers.zeros, ())
        if noise is not None:
            y = y + strength.astype(y.dtype) * noise[..., None].astype(y.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return leaky(y + bias.astype(y.dtype).reshape(1, 1, 1, -1))


class ToImage(nn.Module):
    """Modulated 1x1 convolution to the image's channels, not demodulated."""

    channels: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, w: Array) -> Array:
        kernel = _kernel(self, 1, x.shape[-1], self.channels)
        style = EqualDense(x.shape[-1], bias=1.0, name="style")(w)
        y = modulated_convolve(x, kernel, style, demodulate=False)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        return at_least_float32(y) + bias.reshape(1, 1, 1, -1)


class StyleGenerator(ImageNetwork):
    """z -> w by `mapping`, w (of every layer) and noise -> image by `synthesis`; a call is both.

    widths: channels at each size, from base up: log2(size / base) + 1 of them. An image is the sum
    of what every size adds, resampled by [1, 3, 3, 1] (the skip generator). Noise is an argument,
    one plane [batch, side, side] for each layer as `draw_noise` makes them; without it there is
    none. classes: number of labels, joined to z by an embedding. Images are not bounded.
    """

    widths: Sequence[int] = (128, 128, 64, 32)
    latent: int = 64
    depth: int = 8

    def setup(self) -> None:
        self.check_widths(self.widths)
        self.maps = [EqualDense(self.latent, rate=0.01) for _ in range(self.depth)]
        if self.classes is not None:
            self.label = nn.Embed(self.classes + 1, self.latent)
        shape = (self.base, self.base, self.widths[0])
        self.start = self.param("start", nn.initializers.normal(1.0), shape)
        wide = [self.widths[0], *(width for w in self.widths[1:] for width in (w, w))]
        self.layers = [StyleLayer(width, self.dtype) for width in wide]
        self.images = [ToImage(self.channels, self.dtype) for _ in self.widths]

    @property
    def num_layers(self) -> int:
        """Styles that an image takes: one for each convolution, the last image layer's too."""
        return 2 * len(self.widths)

    def mapping(
        self, z: Float[Array, "batch latent"], label: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch latent"]:
        """z / rms(z), then `depth` dense layers at a hundredth of the rate."""
        checks.shape("z", z, (None, self.latent))
        label = labels_or_null(self.classes, label, len(z))
        h = z / jnp.sqrt(jnp.mean(jnp.square(z), axis=-1, keepdims=True) + 1e-8)
        if self.classes is not None:
            rows = self.label(label)
            rows = rows / jnp.sqrt(jnp.mean(jnp.square(rows), axis=-1, keepdims=True) + 1e-8)
            h = jnp.concatenate([h, rows], axis=-1)
        for layer in self.maps:
            h = leaky(layer(h))
        return h

    def synthesis(
        self,
        w: Float[Array, "batch layers latent"],
        noise: Sequence[Float[Array, "rows _ _"]] | None = None,
    ) -> Float[Array, "batch size size channels"]:
        """The image of styles: convolution k reads style k, the image of a size the next one."""
        checks.shape("w", w, (None, self.num_layers, self.latent))
        if noise is not None and len(noise) != len(self.layers):
            raise ValueError(f"noise must be {len(self.layers)} planes, got {len(noise)}")
        planes = [None] * len(self.layers) if noise is None else noise
        h = jnp.broadcast_to(self.start[None], (len(w), *self.start.shape))
        h = h.astype(self.dtype or w.dtype)
        h = self.layers[0](h, w[:, 0], planes[0])
        image = self.images[0](h, w[:, 1])
        for i in range(1, len(self.widths)):
            k = 2 * i - 1
            h = self.layers[k](resample(h, 2), w[:, k], planes[k])
            h = self.layers[k + 1](h, w[:, k + 1], planes[k + 1])
            image = resample(image, 2) + self.images[i](h, w[:, k + 2])
        return image

    def __call__(
        self,
        z: Float[Array, "batch latent"],
        label: Int[Array, " batch"] | None = None,
        noise: Sequence[Float[Array, "rows _ _"]] | None = None,
    ) -> Float[Array, "batch size size channels"]:
        w = self.mapping(z, label)
        return self.synthesis(jnp.repeat(w[:, None], self.num_layers, axis=1), noise)

    def draw_noise(self, key: PRNGKey, batch: int) -> list[Float[Array, "batch _ _"]]:
        """Standard normal planes for every layer."""
        stages = doublings(self.size, self.base)
        sides = [self.base, *(self.base << i for i in range(1, stages + 1) for _ in range(2))]
        keys = jax.random.split(key, len(sides))
        return [
            jax.random.normal(k, (batch, side, side)) for k, side in zip(keys, sides, strict=True)
        ]


class StyleCritic(ImageNetwork):
    """Images (and labels) -> scores [batch] by residual blocks, (skip + branch) / sqrt 2.

    widths: channels at each size, from `size` down to base. group: of `minibatch_stddev` (0: none,
    each example is then scored by itself). With classes, the inner product of the features with the
    label's embedding is the score (Miyato & Koyama 2018).
    """

    widths: Sequence[int] = (32, 64, 128, 128)
    group: int = 4

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch size size channels"],
        label: Int[Array, " batch"] | None = None,
    ) -> Float[Array, " batch"]:
        checks.shape("x", x, (None, self.size, self.size, self.channels))
        self.check_widths(self.widths)
        label = labels_or_null(self.classes, label, len(x))
        h = leaky(EqualConv(self.widths[0], 1, dtype=self.dtype, name="from_image")(x))
        for i, width in enumerate(self.widths[1:]):
            y = leaky(EqualConv(h.shape[-1], dtype=self.dtype, name=f"first_{i}")(h))
            y = EqualConv(width, dtype=self.dtype, name=f"second_{i}")(resample(y, -2))
            skip = EqualConv(width, 1, use_bias=False, dtype=self.dtype, name=f"skip_{i}")
            h = (leaky(y) + skip(resample(h, -2))) / 2**0.5
        if self.group:
            h = minibatch_stddev(h, group=self.group)
        h = leaky(EqualConv(self.widths[-1], dtype=self.dtype, name="last")(h))
        h = leaky(EqualDense(self.widths[-1], name="features")(h.reshape(len(x), -1)))
        out = EqualDense(1 if self.classes is None else self.widths[-1], name="out")(h)
        return self.score(out, label)
