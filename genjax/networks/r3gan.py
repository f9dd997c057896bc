"""R3GAN's pair: residual blocks with grouped convolutions, and no normalisation anywhere.

Huang, Gokaslan, Kuleshov, Tompkin 2024 (arXiv:2501.05441), section 4. Variance is kept at the start
by small first weights and a last weight of 0 in every branch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.networks.convolution import convolve
from genjax.networks.layers import labels_or_null, on_flat
from genjax.numerics import at_least_float32

__all__ = ["R3GANCritic", "R3GANGenerator", "grouped_convolve", "resample"]

SLOPE = 0.2
NARROW = 16  # channels that a product on CPU takes at least, where there are more groups
# He's initialisation for this leaky ReLU.
HE = nn.initializers.variance_scaling(2 / (1 + SLOPE**2), "fan_in", "normal")


def leaky(x: Array) -> Array:
    return nn.leaky_relu(x, SLOPE)


def grouped_convolve(
    x: Float[Array, "batch height width channels"],
    kernel: Float[Array, "rows columns inputs channels"],
) -> Float[Array, "batch height width channels"]:
    """Cross-correlate each group of channels with its own kernels, zeros beyond the border.

    Output channel o reads the group o // (channels / groups), where `inputs` = channels / groups
    and both sides have as many channels. On CPU a product of matrices for every few groups.

    >>> grouped_convolve(jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 2, 4))).shape
    (2, 8, 8, 4)
    """
    channels, inputs = x.shape[-1], kernel.shape[2]
    if channels % inputs or kernel.shape[3] != channels:
        raise ValueError(
            f"kernel must be [rows, columns, channels / groups, channels] for {channels} channels, "
            f"got shape {kernel.shape}"
        )
    groups = channels // inputs
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_by_products, groups=groups),
        default=partial(_by_convolution, groups=groups),
    )


def _by_convolution(x: Array, kernel: Array, groups: int) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


def _by_products(x: Array, kernel: Array, groups: int) -> Array:
    """A product for every few groups, together 16 channels or one group: the zeros between narrow
    groups cost less than taking each apart."""
    rows, columns, inputs, _ = kernel.shape
    most = max(NARROW // inputs, 1)
    joined = max(n for n in range(1, min(most, groups) + 1) if groups % n == 0)
    between = jnp.eye(joined, dtype=kernel.dtype)[None, None, :, None, :, None]
    parts = []
    for i in range(0, groups, joined):
        wide = slice(i * inputs, (i + joined) * inputs)
        part = kernel[..., wide].reshape(rows, columns, 1, inputs, joined, inputs) * between
        size = joined * inputs
        parts.append(convolve(x[..., wide], part.reshape(rows, columns, size, size)))
    return jnp.concatenate(parts, axis=-1)


def resample(x: Float[Array, "batch height width channels"], factor: int) -> Array:
    """Twice (factor 2) or half (-2) the height and width, by the filter [1, 3, 3, 1].

    Up: each new pixel is 3/4 of the nearer old one and 1/4 of the farther along either axis (the
    filter with gain 4). Down: its mean around each pair. Zeros beyond the border, as StyleGAN2.

    >>> resample(jnp.ones((2, 8, 8, 3)), 2).shape
    (2, 16, 16, 3)
    """
    checks.one_of("factor", factor, (2, -2))
    for axis in (1, 2):
        x = _upsampled(x, axis) if factor == 2 else _downsampled(x, axis)
    return x


def _moved(x: Array, axis: int) -> tuple[Array, Array]:
    """The neighbours before and after along an axis, 0 beyond the border."""
    pads = [[(0, 0)] * x.ndim for _ in range(2)]
    pads[0][axis], pads[1][axis] = (1, 0), (0, 1)
    n = x.shape[axis]
    before = jax.lax.slice_in_dim(jnp.pad(x, pads[0]), 0, n, axis=axis)
    return before, jax.lax.slice_in_dim(jnp.pad(x, pads[1]), 1, n + 1, axis=axis)


def _upsampled(x: Array, axis: int) -> Array:
    before, after = _moved(x, axis)
    both = jnp.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=axis + 1)
    return both.reshape(*x.shape[:axis], 2 * x.shape[axis], *x.shape[axis + 1 :])


def _downsampled(x: Array, axis: int) -> Array:
    n = x.shape[axis]
    if n % 2:
        raise ValueError(f"images must have even sides to be halved, got shape {x.shape}")
    pairs = x.reshape(*x.shape[:axis], n // 2, 2, *x.shape[axis + 1 :])
    first, second = (jax.lax.index_in_dim(pairs, i, axis + 1, False) for i in (0, 1))
    before, _ = _moved(second, axis)
    _, after = _moved(first, axis)
    return (before + 3 * first + 3 * second + after) / 8


def doublings(size: int, base: int) -> int:
    """How many times `base` doubles to reach `size`; raises ValueError where it never does."""
    count = 0
    while base << count < size:
        count += 1
    if base << count != size:
        raise ValueError(f"size must be base * 2^k with base = {base}, got {size}")
    return count


class ImageNetwork(nn.Module):
    """Fields of all generators and critics of square images of `size` = base * 2^k pixels.

    channels: of an image. base: side of the smallest feature map. classes: number of labels.
    dtype: of the computation; parameters are float32.
    """

    size: int = 32
    channels: int = 1
    base: int = 4
    classes: int | None = None
    dtype: Any = None

    def check_widths(self, widths: Sequence[int]) -> None:
        """Raise ValueError unless there is one width for each size from base up."""
        stages = doublings(self.size, self.base)
        if len(widths) != stages + 1:
            raise ValueError(
                f"widths must have one entry for each of the {stages + 1} sizes, "
                f"got {tuple(widths)}"
            )

    def score(self, out: Float[Array, "batch features"], label: Any) -> Float[Array, " batch"]:
        """The only feature; with classes the inner product with the label's embedding, over the
        root of their number (Miyato & Koyama 2018). Call it within a compact method."""
        if self.classes is None:
            return at_least_float32(out[:, 0])
        rows = nn.Embed(self.classes + 1, out.shape[-1], name="label")(label)
        return at_least_float32(jnp.sum(out * rows, axis=-1)) / out.shape[-1] ** 0.5


class Branch(nn.Module):
    """x + W3 leaky(group W2 leaky(W1 x)): 1x1 to `expansion` times as many channels, 3x3, 1x1.

    depth: blocks in the whole network, by which the first weights shrink (depth^-1/4 each).
    """

    groups: int
    depth: int
    expansion: int = 2
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        channels = x.shape[-1]
        inner, size = self.expansion * channels, self.depth**-0.25
        if inner % self.groups:
            raise ValueError(f"groups must divide {inner} channels, got {self.groups}")
        init = scaled(HE, size)
        h = on_flat(nn.Dense(inner, dtype=self.dtype, kernel_init=init, name="widen"), x)
        shape = (3, 3, inner // self.groups, inner)
        kernel = self.param("kernel", init, shape)
        bias = self.param("bias", nn.initializers.zeros, (inner,))
        h, kernel, bias = promote_dtype(leaky(h), kernel, bias, dtype=self.dtype)
        h = leaky(grouped_convolve(h, kernel) + bias.reshape(1, 1, 1, -1))
        last = nn.Dense(
            channels,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.zeros,
            name="narrow",
        )
        return x + on_flat(last, h)


def scaled(init: Callable[..., Array], size: float) -> Callable[..., Array]:
    return lambda key, shape, dtype=jnp.float32: size * init(key, shape, dtype)


class R3GANGenerator(ImageNetwork):
    """Noise [batch, latent] (and labels) -> images [batch, size, size, channels], not bounded.

    A learnt map of base x base pixels times a vector of the noise, then at every size `num_blocks`
    residual blocks. widths: channels at each size, from base up: log2(size / base) + 1 of them, all
    multiples of groups / 2. classes: number of labels, joined to the noise by an embedding.
    """

    widths: Sequence[int] = (128, 96, 64, 32)
    num_blocks: int = 1
    groups: int = 16

    @nn.compact
    def __call__(
        self, z: Float[Array, "batch latent"], label: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch size size channels"]:
        self.check_widths(self.widths)
        depth, dense = self.num_blocks * len(self.widths), partial(nn.Dense, dtype=self.dtype)
        label = labels_or_null(self.classes, label, len(z))
        if self.classes is not None:
            z = jnp.concatenate([z, nn.Embed(self.classes + 1, z.shape[-1])(label)], axis=-1)
        shape = (self.base, self.base, self.widths[0])
        basis = self.param("basis", nn.initializers.normal(1.0), shape)
        h = dense(self.widths[0], use_bias=False, name="latent")(z)
        h = basis.astype(h.dtype)[None] * h[:, None, None]
        for i, width in enumerate(self.widths):
            if i:
                h = resample(h, 2)
            if h.shape[-1] != width:
                h = on_flat(dense(width, use_bias=False, name=f"change_{i}"), h)
            for j in range(self.num_blocks):
                h = Branch(self.groups, depth, dtype=self.dtype, name=f"block_{i}_{j}")(h)
        return on_flat(dense(self.channels, use_bias=False, name="out"), h)


class R3GANCritic(ImageNetwork):
    """Images (and labels) -> scores [batch]: the generator the other way round.

    widths: channels at each size, from `size` down to base. With classes, the inner product of the
    features with the label's embedding is the score (Miyato & Koyama 2018). Each example is scored
    by itself.
    """

    widths: Sequence[int] = (32, 64, 96, 128)
    num_blocks: int = 1
    groups: int = 16

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch size size channels"],
        label: Int[Array, " batch"] | None = None,
    ) -> Float[Array, " batch"]:
        checks.shape("x", x, (None, self.size, self.size, self.channels))
        self.check_widths(self.widths)
        depth, dense = self.num_blocks * len(self.widths), partial(nn.Dense, dtype=self.dtype)
        label = labels_or_null(self.classes, label, len(x))
        h = x
        for i, width in enumerate(self.widths):
            if i:
                h = resample(h, -2)
            if h.shape[-1] != width:
                h = on_flat(dense(width, use_bias=i == 0, name=f"change_{i}"), h)
            for j in range(self.num_blocks):
                h = Branch(self.groups, depth, dtype=self.dtype, name=f"block_{i}_{j}")(h)
        # One weight per pixel and channel, summed over the pixels.
        basis = self.param("basis", nn.initializers.normal(1 / self.base), h.shape[1:])
        h = jnp.sum(h * basis.astype(h.dtype)[None], axis=(1, 2))
        out = dense(1 if self.classes is None else h.shape[-1], use_bias=False, name="out")(h)
        return self.score(out, label)
