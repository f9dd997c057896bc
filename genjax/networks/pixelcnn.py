"""PixelCNN with masks, and with gates in two stacks that leave no blind spot.

Images are whole levels [batch, height, width, colours]; a pixel's outputs depend on the pixels
before it in raster order alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from genjax import checks
from genjax.autoregressive.pixels import num_colour_params, pixel_mask
from genjax.networks.convolution import convolve
from genjax.networks.layers import drop, labels_or_null, on_flat
from genjax.networks.transformer import stacked
from genjax.sharding import split_batch
from genjax.typing import PRNGKey

__all__ = ["GatedPixelCNN", "PixelCNN"]

Levels = Int[Array, "batch height width colours"] | UInt[Array, "batch height width colours"]


def with_ones(x: Array, levels: int) -> Array:
    """Levels as numbers in [-1, 1] and a channel of ones, which tells an image from its padding."""
    checks.integer("levels", levels, 2)
    checks.between("x", x, 0, levels - 1)
    y = x.astype(jnp.float32) * (2 / (levels - 1)) - 1
    return jnp.concatenate([y, jnp.ones_like(y[..., :1])], axis=-1)


def read_image(net: Any, x: Array, label: Any) -> tuple[Array, Array | None]:
    """`with_ones` of the levels a network is given, and its labels, the null class without any."""
    checks.shape("x", x, (None, None, None, net.colours))
    return with_ones(x, net.levels), labels_or_null(net.classes, label, len(x))


def read_pixel(net: Any, pixel: Array, position: Array, label: Any) -> tuple[Array, Array | None]:
    """The same of one pixel [batch, colours], the one before `position`: 0 before the first."""
    value = with_ones(pixel[:, None, None], net.levels)[:, 0, 0]
    return jnp.where(position > 0, value, 0), labels_or_null(net.classes, label, len(pixel))


class MaskedConv(nn.Module):
    """Convolution whose kernel is multiplied by `pixel_mask`."""

    out_groups: tuple[int, ...]
    in_groups: tuple[int, ...]
    kernel: int
    kind: Literal["A", "B"]

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width inputs"]) -> Array:
        mask = pixel_mask(self.kernel, self.in_groups, self.out_groups, self.kind)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), mask.shape)
        bias = self.param("bias", nn.initializers.zeros, (mask.shape[-1],))
        y = convolve(x, kernel * jnp.asarray(mask, kernel.dtype))
        return y + bias.reshape(1, 1, 1, -1)


class PixelCNN(nn.Module):
    """Logits [batch, height, width, colours, levels]: masked convolutions in residual blocks.

    van den Oord, Kalchbrenner, Kavukcuoglu 2016, table 1: a first convolution with mask A, blocks
    of 1x1, k x k and 1x1 with mask B around half the features, two 1x1 layers. Channels are dealt
    to the colours in groups; a colour sees the earlier ones of its pixel. Pixels to the right above
    are in the blind spot.
    """

    levels: int
    colours: int = 1
    features: int = 48
    layers: int = 5
    first_kernel: int = 7
    kernel: int = 3
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Levels, *, dropout_key: PRNGKey | None = None
    ) -> Float[Array, "batch height width colours levels"]:
        checks.shape("x", x, (None, None, None, self.colours))
        groups = tuple(range(self.colours))

        def dealt(each: int) -> tuple[int, ...]:
            return tuple(g for g in groups for _ in range(each))

        wide, half = dealt(self.features // self.colours), dealt(self.features // self.colours // 2)
        # The channel of ones may be read everywhere, as a bias that ends at the border.
        y = with_ones(x, self.levels)
        ones = MaskedConv(wide, (0,), self.first_kernel, "B", name="ones")(y[..., -1:])
        h = ones + MaskedConv(wide, groups, self.first_kernel, "A", name="first")(y[..., :-1])
        for i in range(self.layers):
            r = MaskedConv(half, wide, 1, "B", name=f"in_{i}")(nn.relu(h))
            r = MaskedConv(half, half, self.kernel, "B", name=f"middle_{i}")(nn.relu(r))
            r = MaskedConv(wide, half, 1, "B", name=f"out_{i}")(nn.relu(r))
            h = h + drop(r, self.dropout, dropout_key, i)
        h = MaskedConv(wide, wide, 1, "B", name="head")(nn.relu(h))
        h = MaskedConv(dealt(self.levels), wide, 1, "B", name="logits")(nn.relu(h))
        return h.reshape(*x.shape, self.levels)


def taps(x: Array, rows: int, columns: tuple[int, int], below: int) -> Array:
    """What a shifted convolution reads: [batch, height, width, rows * (sum of columns + 1) * C].

    `rows` rows that end `below` rows above the pixel, each from columns[0] to the left of the pixel
    to columns[1] to its right, zeros beyond the border.
    """
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (rows - 1 + below, 0), columns, (0, 0)))
    parts = [
        x[:, i : i + height, j : j + width] for i in range(rows) for j in range(sum(columns) + 1)
    ]
    return jnp.concatenate(parts, axis=-1)


def product(x: Array, kernel: Any) -> Array:
    """x @ kernel over the last axis: a shifted convolution, where `taps` gave x."""
    return on_flat(lambda x: x @ kernel, x)


def shifted(x: Array, kernel: Any, rows: int, columns: tuple[int, int], below: int = 0) -> Array:
    """product(taps(x, rows, columns, below), kernel), by `convolve`, which copies less."""
    size = (rows, sum(columns) + 1)
    x = split_batch(x[:, : x.shape[1] - below])
    kernel = jnp.asarray(kernel).reshape(*size, x.shape[-1], -1)
    return convolve(x, kernel, padding=((rows - 1 + below, 0), columns))


def gate(x: Array) -> Array:
    """tanh(first half) * sigmoid(second half) of the channels: eq. (2)."""
    f, g = jnp.split(x, 2, axis=-1)
    return jnp.tanh(f) * nn.sigmoid(g)


class GatedLayer(nn.Module):
    """One layer of the two stacks, van den Oord et al. 2016b, figure 2.

    The vertical stack reads the rows above (and in later layers its own row, which there holds rows
    above alone); the horizontal one pixels to the left (and in later layers its own) and, by a 1x1
    layer, the vertical stack before its gate. first: neither sees its own row or pixel, and there
    is no residual. The two halves are methods, so that drawing can run a row, or a pixel, at once.
    """

    inputs: int
    features: int
    kernel: int = 3
    first: bool = False
    classes: int | None = None
    dropout: float = 0.0

    def setup(self) -> None:
        wide, start = 2 * self.features, nn.initializers.lecun_normal()
        shapes = {
            "vertical": (self.rows * (2 * (self.kernel // 2) + 1) * self.inputs, wide),
            "horizontal": (self.pixels * self.inputs, wide),
            "link": (wide, wide),
            "out": (self.features, self.features),
        }
        self.kernels = {name: self.param(name, start, shape) for name, shape in shapes.items()}
        zeros = nn.initializers.zeros
        both = ("vertical", "horizontal")
        self.biases = {name: self.param(f"{name}_bias", zeros, (wide,)) for name in both}
        if self.classes is not None:
            shape, small = (self.classes + 1, wide), nn.initializers.normal(0.1)
            self.labels = {name: self.param(f"{name}_label", small, shape) for name in both}

    @property
    def rows(self) -> int:
        """Rows that the vertical stack reads."""
        return self.kernel // 2 + int(not self.first)

    @property
    def pixels(self) -> int:
        """Pixels that the horizontal stack reads."""
        return self.kernel // 2 + int(not self.first)

    def __call__(
        self,
        v: Float[Array, "batch height width inputs"],
        h: Float[Array, "batch height width inputs"],
        label: Int[Array, " batch"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[Array, Array]:
        """Both stacks of whole images."""
        side, below = self.kernel // 2, int(self.first)
        up = partial(shifted, rows=self.rows, columns=(side, side), below=below)
        along = partial(shifted, rows=1, columns=(self.pixels - 1, 0))
        left = jnp.pad(h, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1] if self.first else h
        link, v = self.vertical(v, label, dropout_key, up)
        return v, self.horizontal(left, link, h, label, dropout_key, along)

    def vertical(
        self,
        above: Array,
        label: Array | None = None,
        dropout_key: PRNGKey | None = None,
        convolution: Callable[[Array, Array], Array] = product,
    ) -> tuple[Array, Array]:
        """From `taps` of the rows above: what the horizontal stack gets, and v."""
        before = self._affine("vertical", above, label, convolution)
        link = product(before, self.kernels["link"])
        return link, drop(gate(before), self.dropout, dropout_key, 0)

    def horizontal(
        self,
        left: Array,
        link: Array,
        h: Array,
        label: Array | None = None,
        dropout_key: PRNGKey | None = None,
        convolution: Callable[[Array, Array], Array] = product,
    ) -> Array:
        """From `taps` of the pixels to the left, the link, and h, to which the result is added."""
        gated = gate(self._affine("horizontal", left, label, convolution) + link)
        out = product(gated, self.kernels["out"])
        out = drop(out, self.dropout, dropout_key, 1)
        return out if self.first else h + out

    def _affine(self, name: str, x: Array, label: Any, convolution: Any) -> Array:
        y = convolution(x, self.kernels[name])
        y = y + self.biases[name].reshape(*(1,) * (x.ndim - 1), -1)
        if self.classes is None:
            return y
        rows = jnp.take(self.labels[name], label, axis=0)
        return y + rows.reshape(len(x), *(1,) * (x.ndim - 2), -1)


class PixelCache(NamedTuple):
    """What drawing keeps, batch first: of the row being drawn the pixels so far; of the vertical
    stack the last rows that each layer reads; the links of this row; of the horizontal stack the
    last pixels that each layer reads. The first layer's inputs are numbers of the image."""

    row: Float[Array, "batch width inputs"]
    first_rows: Float[Array, "batch rows width inputs"]
    rows: Float[Array, "batch layers rows width features"]
    links: Float[Array, "batch layers width features"]
    first_pixels: Float[Array, "batch pixels inputs"]
    pixels: Float[Array, "batch layers pixels features"]


class GatedPixelCNN(nn.Module):
    """Parameters of each pixel's law [batch, height, width, numbers] from the pixels before it.

    van den Oord et al. 2016b, "Conditional Image Generation with PixelCNN Decoders": two stacks of
    gated layers without a blind spot, then two 1x1 layers. components None: logits of the levels,
    of images with one colour; else the numbers of `colour_logistic_mixture`. classes: with labels
    [batch], a vector of the label enters every gate; the label `classes`, and no label, stand for
    none. `step` gives the same numbers pixel by pixel with a cache of activations.
    """

    levels: int
    colours: int = 1
    components: int | None = None
    features: int = 48
    layers: int = 5
    kernel: int = 3
    first_kernel: int = 7
    head: int | None = None
    classes: int | None = None
    dropout: float = 0.0

    def setup(self) -> None:
        for name in ("features", "kernel", "first_kernel"):
            checks.integer(name, getattr(self, name), 1)
        checks.integer("layers", self.layers, 2)
        for name in ("kernel", "first_kernel"):
            if getattr(self, name) % 2 == 0 or getattr(self, name) < 3:
                raise ValueError(f"{name} must be odd and at least 3, got {getattr(self, name)}")
        if self.components is None and self.colours > 1:
            raise ValueError(f"{self.colours} colours need components, got None")
        shared = {"classes": self.classes, "dropout": self.dropout}
        wide = self.features
        self.first = GatedLayer(self.colours + 1, wide, self.first_kernel, True, **shared)
        self.inner = GatedLayer(wide, wide, self.kernel, parent=None, **shared)
        x = jnp.zeros((1, 1, 1, wide))
        label = labels_or_null(self.classes, None, 1)
        self.blocks = stacked(self, "blocks", self.inner, self.layers - 1, x, x, label)
        self.hidden = nn.Dense(self.head or 2 * wide)
        numbers = self.levels
        if self.components is not None:
            numbers = num_colour_params(self.colours, self.components)
        self.last = nn.Dense(numbers, kernel_init=nn.initializers.zeros)

    def __call__(
        self,
        x: Levels,
        *,
        label: Int[Array, " batch"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch height width numbers"]:
        """The numbers of every pixel; raises ValueError for levels or labels that do not fit."""
        y, label = read_image(self, x, label)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, self.layers)
        v, h = self.first(y, y, label, key)

        def layer(carry: tuple[Array, Array], scanned: tuple) -> tuple[tuple[Array, Array], None]:
            params, i = scanned
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            new: Any = self.inner.apply({"params": params}, *carry, label, key)
            return new, None

        scanned = (self.blocks, jnp.arange(self.layers - 1))
        (_, h), _ = jax.lax.scan(layer, (v, h), scanned)
        return self._head(h)

    def _head(self, h: Array) -> Array:
        return on_flat(self.last, nn.relu(on_flat(self.hidden, nn.relu(h))))

    def empty_cache(self, batch: int, width: int, dtype: Any = jnp.float32) -> PixelCache:
        """The cache of images of that width, before their first pixel."""
        inputs, wide, inner = self.colours + 1, self.features, self.layers - 1
        side, first = self.kernel // 2, self.first_kernel // 2
        zeros = lambda *shape: jnp.zeros((batch, *shape), dtype)  # noqa: E731
        return PixelCache(
            zeros(width, inputs),
            zeros(first, width, inputs),
            zeros(inner, side + 1, width, wide),
            zeros(inner + 1, width, 2 * wide),
            zeros(first, inputs),
            zeros(inner, side + 1, wide),
        )

    def step(
        self,
        cache: PixelCache,
        pixel: Int[Array, "batch colours"],
        position: Int[Array, ""],
        *,
        label: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch numbers"], PixelCache]:
        """Numbers of the pixel at `position` in raster order; `pixel` is the one before it."""
        value, label = read_pixel(self, pixel, position, label)
        value = value.astype(cache.row.dtype)
        width = cache.row.shape[1]
        column, begins = position % width, position % width == 0
        row = jax.lax.dynamic_update_index_in_dim(cache.row, value, (position - 1) % width, 1)
        cache = cache._replace(row=row)
        cache = jax.lax.cond(begins, lambda c: self._begin_row(c, label), lambda c: c, cache)
        first = jnp.concatenate([cache.first_pixels[:, 1:], value[:, None]], axis=1)
        first = jnp.where(begins, 0, first)
        links = jax.lax.dynamic_index_in_dim(cache.links, column, 2, False)
        h = self.first.horizontal(first.reshape(len(first), -1), links[:, 0], value, label)

        def layer(h: Array, scanned: tuple) -> tuple[Array, Array]:
            params, pixels, link = scanned
            pixels = jnp.where(begins, 0, pixels)
            pixels = jnp.concatenate([pixels[:, 1:], h[:, None]], axis=1)
            flat = pixels.reshape(len(pixels), -1)
            new: Any = self.inner.apply(
                {"params": params}, flat, link, h, label, method="horizontal"
            )
            return new, pixels

        layers = (jnp.moveaxis(cache.pixels, 1, 0), jnp.moveaxis(links[:, 1:], 1, 0))
        h, pixels = jax.lax.scan(layer, h, (self.blocks, *layers))
        cache = cache._replace(first_pixels=first, pixels=jnp.moveaxis(pixels, 0, 1))
        return self._head(h), cache

    def _begin_row(self, cache: PixelCache, label: Array | None) -> PixelCache:
        """Run the vertical stack of the row that begins, once the row above is whole."""
        width = cache.row.shape[1]

        def above(rows: Array, kernel: int) -> Array:
            side = kernel // 2
            read = taps(rows, rows.shape[1], (side, side), 0)
            return read[:, -1]

        first_rows = jnp.concatenate([cache.first_rows[:, 1:], cache.row[:, None]], axis=1)
        link, v = self.first.vertical(above(first_rows, self.first_kernel), label)

        def layer(v: Array, scanned: tuple) -> tuple[Array, tuple[Array, Array]]:
            params, rows = scanned
            rows = jnp.concatenate([rows[:, 1:], v[:, None]], axis=1)
            read = above(rows, self.kernel)
            both: Any = self.inner.apply({"params": params}, read, label, method="vertical")
            return both[1], (rows, both[0])

        rows = jnp.moveaxis(cache.rows, 1, 0)
        _, (rows, links) = jax.lax.scan(layer, v, (self.blocks, rows))
        links = jnp.concatenate([link[None], links])
        return cache._replace(
            row=jnp.zeros_like(cache.row[:, :width]),
            first_rows=first_rows,
            rows=jnp.moveaxis(rows, 0, 1),
            links=jnp.moveaxis(links, 0, 1),
        )
