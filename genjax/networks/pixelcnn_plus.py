"""PixelCNN++: gated resnets in a stack of rows and a stack of pixels, drawn with a cache."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.autoregressive.pixels import num_colour_params
from genjax.networks.layers import drop, labels_or_null, on_flat
from genjax.networks.pixelcnn import Levels, product, read_image, read_pixel, shifted, taps
from genjax.networks.transformer import stacked
from genjax.typing import Params, PRNGKey

__all__ = ["PixelCNNPlus"]


def concat_elu(x: Array) -> Array:
    """elu of x and of -x, on twice the channels; one exponential gives both."""
    positive = x > 0
    falling = jnp.expm1(jnp.where(positive, -x, x))
    parts = [jnp.where(positive, x, falling), jnp.where(positive, falling, -x)]
    return jnp.concatenate(parts, axis=-1)


# Columns left and right of a pixel that a convolution reads, in the pixel's row and the one above:
# three pixels of each row (down-shifted), or the pixel and its left neighbour (down-right-shifted).
ROWS, PIXELS = (1, 1), (1, 0)


class GatedResnet(nn.Module):
    """x + a sigmoid(b), (a, b) = conv(dropout(concat_elu(conv(concat_elu(x)) + 1x1(skip)))).

    inputs: pixels that a convolution reads. skip: channels of what comes from elsewhere, 0 for
    nothing. `begin` and `end` are the two convolutions, of `taps` unless another is given.
    """

    features: int
    inputs: int
    skip: int = 0
    classes: int | None = None
    dropout: float = 0.0

    def setup(self) -> None:
        wide, start = 2 * self.features, nn.initializers.lecun_normal()
        small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        zeros = nn.initializers.zeros
        self.one = self.param("first", start, (self.inputs * wide, self.features))
        self.one_bias = self.param("first_bias", zeros, (self.features,))
        self.two = self.param("second", small, (self.inputs * wide, wide))
        self.two_bias = self.param("second_bias", zeros, (wide,))
        if self.skip:
            self.side = self.param("skip", start, (2 * self.skip, self.features))
        if self.classes is not None:
            shape = (self.classes + 1, wide)
            self.labels = self.param("label", nn.initializers.normal(0.1), shape)

    def begin(
        self,
        e: Array,
        skip: Array | None,
        dropout_key: PRNGKey | None = None,
        convolution: Callable[[Array, Array], Array] = product,
    ) -> Array:
        """From concat_elu(x) to what the second convolution reads."""
        c = _affine(e, self.one, self.one_bias, convolution)
        if skip is not None:
            c = c + product(concat_elu(skip), self.side)
        return drop(concat_elu(c), self.dropout, dropout_key, 0)

    def end(
        self,
        c: Array,
        x: Array,
        label: Any,
        convolution: Callable[[Array, Array], Array] = product,
    ) -> Array:
        """From what `begin` gives, and x, to the resnet's result."""
        c = _affine(c, self.two, self.two_bias, convolution)
        if self.classes is not None:
            rows = jnp.take(self.labels, label, axis=0)
            c = c + rows.reshape(len(x), *(1,) * (x.ndim - 2), -1)
        a, b = jnp.split(c, 2, axis=-1)
        return x + a * nn.sigmoid(b)

    def __call__(
        self,
        columns: tuple[int, int],
        x: Array,
        skip: Array | None = None,
        label: Array | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Array:
        """Whole images; columns: ROWS or PIXELS."""
        convolution = partial(shifted, rows=2, columns=columns)
        c = self.begin(concat_elu(x), skip, dropout_key, convolution)
        return self.end(c, x, label, convolution)


def _affine(x: Array, kernel: Any, bias: Array, convolution: Any = product) -> Array:
    return convolution(x, kernel) + bias.reshape(*(1,) * (x.ndim - 1), -1)


class PlusCache(NamedTuple):
    """What drawing keeps, batch first. image: the row being drawn so far, after the two above it.
    rows: what the convolutions of the rows' stack read of the row above. features: that stack's
    row, after each resnet. first: the row above as the pixels' stack begins with it. pixels: what
    the convolutions of the pixels' stack read, of the row above and of this one so far."""

    image: Float[Array, "batch 3 width inputs"]
    rows: Float[Array, "batch resnets 2 width channels"]
    features: Float[Array, "batch resnets width features"]
    first: Float[Array, "batch width features"]
    pixels: Float[Array, "batch resnets 2 2 width channels"]


class PixelCNNPlus(nn.Module):
    """Numbers of `colour_logistic_mixture` [batch, height, width, numbers], at one resolution.

    Salimans et al. 2017, "PixelCNN++": a stack of rows reads the rows above, a stack of pixels
    reads those and, at its own row, the pixels to the left; `resnets` gated resnets on the way
    up and as many down, each of which also sees the one opposite. The paper's images of 32 x 32
    are halved twice on the way; here they are not, and weights have no norm of their own. classes:
    as in `GatedPixelCNN`. `step` gives the same numbers pixel by pixel.
    """

    levels: int
    colours: int = 3
    components: int = 10
    features: int = 160
    resnets: int = 5
    classes: int | None = None
    dropout: float = 0.5

    def setup(self) -> None:
        for name in ("features", "resnets"):
            checks.integer(name, getattr(self, name), 1)
        wide, inputs = self.features, self.colours + 1
        start, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
        sizes = {"rows": 6, "above": 3, "left": 2}
        self.kernels = {k: self.param(k, start, (n * inputs, wide)) for k, n in sizes.items()}
        self.biases = {k: self.param(f"{k}_bias", zeros, (wide,)) for k in sizes}
        nets, params = {}, {}
        label = labels_or_null(self.classes, None, 1)
        x = jnp.zeros((1, 1, 1, wide))
        for name, columns, inputs, skip in (
            ("rows_up", ROWS, 6, 0),
            ("pixels_up", PIXELS, 4, 1),
            ("rows_down", ROWS, 6, 1),
            ("pixels_down", PIXELS, 4, 2),
        ):
            net = GatedResnet(wide, inputs, skip * wide, self.classes, self.dropout, parent=None)
            side = jnp.zeros((1, 1, 1, skip * wide)) if skip else None
            nets[name] = net
            params[name] = stacked(self, name, net, self.resnets, columns, x, side, label)
        self.nets, self.params = nets, params
        numbers = num_colour_params(self.colours, self.components)
        self.last = nn.Dense(numbers, kernel_init=nn.initializers.normal(0.01))

    def __call__(
        self,
        x: Levels,
        *,
        label: Int[Array, " batch"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch height width numbers"]:
        """The numbers of every pixel; raises ValueError for levels or labels that do not fit."""
        y, label = read_image(self, x, label)
        left = jnp.pad(y, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]
        rows = self._enter("rows", taps(y, 2, (1, 1), 1))
        pixels = self._enter("above", taps(y, 1, (1, 1), 1))
        pixels = pixels + self._enter("left", taps(left, 2, (0, 0), 0))

        def run(name: str, params: Params, columns: Any, x: Array, skip: Any, i: Any) -> Array:
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            net = self.nets[name]
            return net.apply({"params": params}, columns, x, skip, label, key)

        def up(carry: tuple[Array, Array], scanned: tuple) -> tuple:
            (rows, pixels), (p, q, i) = carry, scanned
            after = run("rows_up", p, ROWS, rows, None, 4 * i)
            new = run("pixels_up", q, PIXELS, pixels, after, 4 * i + 1)
            return (after, new), (rows, pixels)

        def down(carry: tuple[Array, Array], scanned: tuple) -> tuple:
            (rows, pixels), (p, q, (skip, side), i) = carry, scanned
            rows = run("rows_down", p, ROWS, rows, skip, 4 * i + 2)
            side = jnp.concatenate([rows, side], axis=-1)
            return (rows, run("pixels_down", q, PIXELS, pixels, side, 4 * i + 3)), None

        each = jnp.arange(self.resnets)
        ups = (self.params["rows_up"], self.params["pixels_up"], each)
        carry, before = jax.lax.scan(up, (rows, pixels), ups)
        # The last on the way up is seen first on the way down.
        skips = jax.tree.map(lambda z: z[::-1], before)
        downs = (self.params["rows_down"], self.params["pixels_down"], skips, each)
        (_, pixels), _ = jax.lax.scan(down, carry, downs)
        return on_flat(self.last, nn.elu(pixels))

    def _enter(self, name: str, read: Array) -> Array:
        return _affine(read, self.kernels[name], self.biases[name])

    def empty_cache(self, batch: int, width: int, dtype: Any = jnp.float32) -> PlusCache:
        """The cache of images of that width, before their first pixel."""
        wide, n = self.features, 2 * self.resnets
        zeros = lambda *shape: jnp.zeros((batch, *shape), dtype)  # noqa: E731
        return PlusCache(
            zeros(3, width, self.colours + 1),
            zeros(n, 2, width, 2 * wide),
            zeros(n + 1, width, wide),
            zeros(width, wide),
            zeros(n, 2, 2, width, 2 * wide),
        )

    def step(
        self,
        cache: PlusCache,
        pixel: Int[Array, "batch colours"],
        position: Int[Array, ""],
        *,
        label: Int[Array, " batch"] | None = None,
    ) -> tuple[Float[Array, "batch numbers"], PlusCache]:
        """Numbers of the pixel at `position` in raster order; `pixel` is the one before it."""
        value, label = read_pixel(self, pixel, position, label)
        width = cache.image.shape[2]
        column = position % width
        image = cache.image.at[:, 2, (position - 1) % width].set(value)
        cache = cache._replace(image=image)
        cache = jax.lax.cond(column == 0, lambda c: self._begin_row(c, label), lambda c: c, cache)
        at = lambda z, axis: jax.lax.dynamic_index_in_dim(z, column, axis, False)  # noqa: E731
        before = jnp.where(column > 0, cache.image[:, 1:, jnp.maximum(column - 1, 0)], 0)
        x = at(cache.first, 1) + self._enter("left", before.reshape(len(before), -1))
        rows = jnp.moveaxis(at(cache.features, 2), 1, 0)[1:]
        windows, n = jnp.moveaxis(cache.pixels, 1, 0), self.resnets

        def run(name: str, params: Params, x: Array, skip: Array, window: Array) -> tuple:
            """One resnet at one pixel; window [batch, convolution, row, width, channels]."""
            apply, kept = self.nets[name].apply, []

            def read(i: int, value: Array) -> Array:
                kept.append(jax.lax.dynamic_update_index_in_dim(window[:, i, 1], value, column, 1))
                both = jnp.stack([window[:, i, 0], kept[i]], axis=1)
                left = jnp.where(column > 0, both[:, :, jnp.maximum(column - 1, 0)], 0)
                return jnp.stack([left, at(both, 2)], axis=2).reshape(len(value), -1)

            c = apply({"params": params}, read(0, concat_elu(x)), skip, method="begin")
            x = apply({"params": params}, read(1, c), x, label, method="end")
            return x, jnp.stack([window[:, :, 0], jnp.stack(kept, axis=1)], axis=2)

        def up(x: Array, scanned: tuple) -> tuple[Array, tuple[Array, Array]]:
            params, row, window = scanned
            after, window = run("pixels_up", params, x, row, window)
            return after, (x, window)

        def down(x: Array, scanned: tuple) -> tuple[Array, Array]:
            params, row, skip, window = scanned
            side = jnp.concatenate([row, skip], axis=-1)
            return run("pixels_down", params, x, side, window)

        x, (skips, ups) = jax.lax.scan(up, x, (self.params["pixels_up"], rows[:n], windows[:n]))
        downs = (self.params["pixels_down"], rows[n:], skips[::-1], windows[n:])
        x, downs = jax.lax.scan(down, x, downs)
        windows = jnp.moveaxis(jnp.concatenate([ups, downs]), 0, 1)
        return on_flat(self.last, nn.elu(x)), cache._replace(pixels=windows)

    def _begin_row(self, cache: PlusCache, label: Array | None) -> PlusCache:
        """Run the rows' stack for the row that begins, once the row above is whole."""
        image = jnp.pad(cache.image[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
        x = self._enter("rows", taps(image[:, :2], 2, (1, 1), 0)[:, -1])
        first = self._enter("above", taps(image[:, 1:2], 1, (1, 1), 0)[:, -1])
        rows, n = jnp.moveaxis(cache.rows, 1, 0), self.resnets

        def run(name: str, params: Params, x: Array, skip: Any, above: Array) -> tuple:
            """One resnet at one row; above [batch, convolution, width, channels]."""
            apply = self.nets[name].apply

            def read(i: int, value: Array) -> Array:
                return taps(jnp.stack([above[:, i], value], axis=1), 2, ROWS, 0)[:, -1]

            e = concat_elu(x)
            c = apply({"params": params}, read(0, e), skip, method="begin")
            x = apply({"params": params}, read(1, c), x, label, method="end")
            return x, jnp.stack([e, c], axis=1)

        def up(x: Array, scanned: tuple) -> tuple[Array, tuple]:
            params, above = scanned
            after, above = run("rows_up", params, x, None, above)
            return after, (x, after, above)

        def down(x: Array, scanned: tuple) -> tuple[Array, tuple]:
            params, skip, above = scanned
            x, above = run("rows_down", params, x, skip, above)
            return x, (x, above)

        top, (skips, ups, kept) = jax.lax.scan(up, x, (self.params["rows_up"], rows[:n]))
        scanned = (self.params["rows_down"], skips[::-1], rows[n:])
        _, (downs, kept_down) = jax.lax.scan(down, top, scanned)
        # This row's pixels become those of the row above.
        pixels = cache.pixels[:, :, :, 1:]
        return PlusCache(
            image,
            jnp.moveaxis(jnp.concatenate([kept, kept_down]), 0, 1),
            jnp.moveaxis(jnp.concatenate([x[None], ups, downs]), 0, 1),
            first,
            jnp.concatenate([pixels, jnp.zeros_like(pixels)], axis=3),
        )
