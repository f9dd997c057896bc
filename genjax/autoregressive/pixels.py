"""Pixels in raster order: masks of convolutions, the colour mixture, drawing with a cache."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from genjax import checks
from genjax.likelihoods import MIN_LOG_SCALE, log_bins
from genjax.numerics import at_least_float32, sum_event
from genjax.randomness import indexed_keys
from genjax.typing import PRNGKey

__all__ = [
    "colour_logistic_mixture",
    "draw_colours",
    "num_colour_params",
    "pixel_mask",
    "recomputing_pixel_step",
    "sample_pixels",
]

Levels = Int[Array, "batch height width colours"] | UInt[Array, "batch height width colours"]


def pixel_mask(
    kernel: int | tuple[int, int],
    in_groups: Sequence[int],
    out_groups: Sequence[int],
    kind: str,
) -> np.ndarray:
    """Mask of 0 and 1 in the layout HWIO for a convolution that reads earlier pixels alone.

    in_groups, out_groups: the colour, 0, 1, ..., of each channel. At the centre an output of colour
    o reads inputs of the colours i < o in a mask of kind "A", for the first layer, and i <= o in
    kind "B", for those after it: van den Oord, Kalchbrenner, Kavukcuoglu 2016, section 3.4. Layers
    of such masks have a blind spot, to the right above. Raises ValueError for an even kernel.

    >>> pixel_mask(3, (1,), (1,), "A")[..., 0, 0]
    array([[1., 1., 1.],
           [1., 0., 0.],
           [0., 0., 0.]])
    """
    checks.one_of("kind", kind, ("A", "B"))
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    for side in (height, width):
        checks.integer("kernel", side, 1)
        if side % 2 == 0:
            raise ValueError(f"kernel must be odd, to have a centre, got {kernel}")
    inside, out = np.asarray(in_groups), np.asarray(out_groups)
    for name, groups in (("in_groups", inside), ("out_groups", out)):
        checks.rank(name, groups, 1)
        checks.at_least(name, groups, 0)
    mask = np.zeros((height, width, len(inside), len(out)))
    mask[: height // 2] = 1
    mask[height // 2, : width // 2] = 1
    earlier = inside[:, None] < out[None] if kind == "A" else inside[:, None] <= out[None]
    mask[height // 2, width // 2] = earlier
    return mask


def num_colour_params(colours: int, components: int) -> int:
    """Numbers that `colour_logistic_mixture` takes for a pixel: components * (1 + 2 c + c (c-1)/2).

    Raises ValueError unless both are at least 1.

    >>> num_colour_params(colours=3, components=10)
    100
    """
    checks.integer("colours", colours, 1)
    checks.integer("components", components, 1)
    return components * (1 + 2 * colours + colours * (colours - 1) // 2)


def colour_logistic_mixture(
    x: Levels, params: Float[Array, "batch height width numbers"], *, levels: int
) -> Float[Array, " batch"]:
    """Log probability in nats of whole colours under a mixture of discretised logistics per pixel.

    log p(x) = sum over pixels of log sum_k pi_k prod_c P_kc(x_c), P a discretised logistic as in
    `logistic_log_likelihood`, of mean mu_kc = m_kc + sum_{b < c} tanh(a_kbc) x_b: a component is
    chosen for the whole pixel, and a colour's mean follows the pixel's true earlier colours, in
    units of [-1, 1] (Salimans et al. 2017, "PixelCNN++", section 2.2). params of a pixel, K for
    each: logits, then m and log s colour by colour, then a of (0, 1), (0, 2), (1, 2), ... Raises
    ValueError where the numbers do not fit the colours, or levels lie outside 0 .. levels - 1.

    >>> x = jnp.zeros((2, 4, 4, 3), jnp.int32)
    >>> params = jnp.zeros((2, 4, 4, num_colour_params(3, 5)))
    >>> colour_logistic_mixture(x, params, levels=256).shape
    (2,)
    """
    checks.rank("x", x, 4)
    checks.rank("params", params, 4)
    checks.same_shape(**{"x": x[..., 0], "params without the last axis": params[..., 0]})
    checks.integer("levels", levels, 2)
    colours = x.shape[-1]
    logits, means, log_scales, follow = _parts(params, colours)
    values = x.astype(means.dtype) * (2 / (levels - 1)) - 1
    log_probs = jax.nn.log_softmax(logits)
    for c in range(colours):
        mean = _mean(means[..., c, :], follow, values, c)
        level = jnp.broadcast_to(x[..., c, None], mean.shape)
        log_probs = log_probs + log_bins(level, mean, log_scales[..., c, :], levels)
    return sum_event(jax.nn.logsumexp(log_probs, axis=-1))


def draw_colours(
    key: PRNGKey, params: Float[Array, " numbers"], *, colours: int, levels: int
) -> Int[Array, " colours"]:
    """Draw one pixel from the law of `colour_logistic_mixture`: a component, then colour by colour.

    A colour's mean follows the earlier ones as they were drawn, clipped to the levels.

    >>> params = jnp.zeros(num_colour_params(3, 5))
    >>> draw_colours(jax.random.key(0), params, colours=3, levels=256).shape
    (3,)
    """
    logits, means, log_scales, follow = _parts(params, colours)
    key_u, key_k = jax.random.split(key)
    k = jax.random.categorical(key_k, logits, mode="high")
    means, log_scales = means[:, k], jnp.maximum(log_scales[:, k], MIN_LOG_SCALE)
    uniform = jax.random.uniform(key_u, (colours,), means.dtype, minval=1e-7, maxval=1 - 1e-7)
    noise = jnp.exp(log_scales) * (jnp.log(uniform) - jnp.log1p(-uniform))
    drawn, values = [], jnp.zeros(colours, means.dtype)
    for c in range(colours):
        mean = _mean(means[c], follow[:, k], values, c)
        level = jnp.clip(jnp.round((mean + noise[c] + 1) * (levels - 1) / 2), 0, levels - 1)
        values = values.at[c].set(level * (2 / (levels - 1)) - 1)
        drawn.append(level.astype(jnp.int32))
    return jnp.stack(drawn)


def _parts(params: Array, colours: int) -> tuple[Array, Array, Array, Array]:
    """logits [..., K], means and log-scales [..., colours, K], coefficients [..., pairs, K]."""
    each = num_colour_params(colours, 1)
    if params.shape[-1] % each:
        raise ValueError(
            f"params must be a multiple of {each} numbers for {colours} colours, "
            f"got shape {params.shape}"
        )
    split = at_least_float32(params).reshape(*params.shape[:-1], each, -1)
    logits, means, log_scales, follow = jnp.split(split, [1, 1 + colours, 1 + 2 * colours], axis=-2)
    return logits[..., 0, :], means, log_scales, jnp.tanh(follow)


def _mean(mean: Array, follow: Array, values: Array, c: int) -> Array:
    """The mean of colour c, [..., K] or of one component, given the values of those before."""
    first = c * (c - 1) // 2
    for b in range(c):
        value = values[..., b, None] if follow.ndim > 1 else values[b]
        mean = (
            mean + follow[..., first + b, :] * value
            if follow.ndim > 1
            else (mean + follow[first + b] * value)
        )
    return mean


def sample_pixels(
    step: Callable[[Any, Array, Array], tuple[Array, Any]],
    cache: Any,
    key: PRNGKey,
    shape: tuple[int, int, int, int],
    *,
    draw: Callable[[PRNGKey, Array], Array],
    first_index: int | Int[Array, ""] = 0,
) -> Int[Array, "batch height width colours"]:
    """Draw images of `shape`, one pixel after another in one scan, from an empty cache.

    step(cache, pixel [batch, colours], position) -> (params [batch, numbers], cache) reads the
    pixel before `position` (raster order; at position 0 its value is not used) and gives the
    parameters of the one at it; draw(key, params [numbers]) -> [colours]. With activations of rows
    and pixels in the cache (Ramachandran et al. 2017) a pixel costs one pixel. Pixel t of image i
    has the key fold_in(fold_in(key, first_index + i), t): an image is the same in any batch.

    >>> step = recomputing_pixel_step(lambda x: jnp.zeros((*x.shape, 17)))
    >>> cache, options = jnp.zeros((2, 4, 4, 1), jnp.int32), dict(draw=jax.random.categorical)
    >>> sample_pixels(step, cache, jax.random.key(0), (2, 4, 4, 1), **options).shape
    (2, 4, 4, 1)
    """
    batch, height, width, colours = shape
    keys = indexed_keys(key, batch, first_index)

    def one(carry: tuple[Any, Array], t: Array) -> tuple[tuple[Any, Array], Array]:
        cache, pixel = carry
        params, cache = step(cache, pixel, t)
        drawn = jax.vmap(lambda k, p: draw(jax.random.fold_in(k, t), p))(keys, params)
        drawn = drawn.astype(jnp.int32)
        return (cache, drawn), drawn

    start = jnp.zeros((batch, colours), jnp.int32)
    _, pixels = jax.lax.scan(one, (cache, start), jnp.arange(height * width))
    return jnp.moveaxis(pixels, 0, 1).reshape(shape)


def recomputing_pixel_step(
    params_fn: Callable[[Array], Array],
) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    """The step of a network without a cache: the whole image is read again for every pixel.

    params_fn: images int32 [batch, height, width, colours] -> [batch, height, width, numbers]; the
    cache is the image so far, of any values at the start.

    >>> step = recomputing_pixel_step(lambda x: jnp.zeros((*x.shape, 17)))
    >>> cache, options = jnp.zeros((2, 4, 4, 1), jnp.int32), dict(draw=jax.random.categorical)
    >>> sample_pixels(step, cache, jax.random.key(0), (2, 4, 4, 1), **options).shape
    (2, 4, 4, 1)
    """

    def step(cache: Array, pixel: Array, position: Array) -> tuple[Array, Array]:
        width = cache.shape[2]
        before = position - 1
        row, column = before // width, before % width
        written = cache.at[:, row, column].set(pixel)
        cache = jnp.where(position > 0, written, cache)
        return params_fn(cache)[:, position // width, position % width], cache

    return step
