"""What the metrics on features share: checks, precision, and pairwise work in blocks of rows.

No n x m matrix is ever held: a block of rows is at most 2^22 entries.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import DIRECT_DIMS, at_least_float32, squared_distances

Features: TypeAlias = Float[Array, "n d"] | Float[np.ndarray, "n d"]
MoreFeatures: TypeAlias = Float[Array, "m d"] | Float[np.ndarray, "m d"]
Scalar: TypeAlias = Float[Array, ""] | Float[np.ndarray, ""]

_BLOCK_ENTRIES = 2**22
# Not 1,024: where rows lie a power of two bytes apart, reading down a column misses the cache.
_MOST_ROWS = 1000
# Columns compared at once: several vector registers, while k rows of them stay in the cache.
_LANES = 50


def check_features(least: int, why: str = "", **features: Any) -> None:
    """Raise unless all are finite [n, d] of one width d and have at least `least` rows."""
    for name, x in features.items():
        checks.rank(name, x, 2)
        checks.floating(name, x)
        if x.shape[0] < least:
            raise ValueError(f"{name} must have at least {least} samples{why}, got {x.shape[0]}")
        if x.shape[1] < 1:
            raise ValueError(f"{name} must have at least one feature, got shape {x.shape}")
        # A sum needs no copy; the full check then says how many and where.
        if checks.is_concrete(x) and not np.isfinite(np.sum(np.asarray(x), dtype=np.float64)):
            checks.finite(name, x)
    checks.same_event(**features)


def nan_unless_finite(value: Array, *inputs: Array) -> Array:
    """Give NaN where an input holds one: under `jax.jit` nothing raises, and counts stay finite."""
    # 0 times what is not finite is NaN.
    return value + sum(jnp.sum(0 * x, dtype=value.dtype) for x in inputs)


def widest() -> Any:
    """The dtype to accumulate in: float64 where 64-bit types are on, else float32."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def in_float64(function: Callable) -> Callable:
    """Run with 64-bit types on where every argument is concrete; a traced call stays as it is.

    Where 64-bit types are off outside, the results are numpy arrays: jax refuses to compute with
    float64 arrays of its own then. Beside an accelerator, which has no fast float64 or none, the
    call runs on the CPU.
    """

    @functools.wraps(function)
    def wide(*args: Any, **kwargs: Any) -> Any:
        # Inside jit what is made of constants is traced too, as this zero.
        leaves = [*jax.tree.leaves((args, kwargs)), jnp.zeros(())]
        if not all(map(checks.is_concrete, leaves)):
            return function(*args, **kwargs)
        was_on, cpu = widest() == np.float64, jax.local_devices(backend="cpu")[0]
        if jax.default_backend() != "cpu":
            move = lambda x: jax.device_put(x, cpu) if isinstance(x, jax.Array) else x  # noqa: E731
            args, kwargs = jax.tree.map(move, (args, kwargs))
        with jax.enable_x64(True), jax.default_device(cpu):
            results = function(*args, **kwargs)
            return results if was_on else jax.tree.map(np.asarray, results)

    return wide


def squared_norms(x: Features) -> Float[Array, " n"]:
    """|x_i|^2."""
    return jnp.sum(jnp.asarray(x) ** 2, axis=1)


def around_medoid(*points: ArrayLike) -> tuple[Array, ...]:
    """Subtract the row of the first that is nearest to its mean from all, in float32 at least.

    Integers stay integers, whose distances are exact, and one outlier does not move the centre.
    """
    arrays = [at_least_float32(x) for x in points]
    centre = jnp.argmin(squared_norms(arrays[0] - jnp.mean(arrays[0], axis=0, keepdims=True)))
    return tuple(x - jax.lax.stop_gradient(arrays[0][centre])[None] for x in arrays)


def pair_distances(
    x: Array, y: Array, norms: tuple[Array, Array], *, least: bool = False
) -> Float[Array, "n m"]:
    """|x_i - y_j|^2 of centred points: differences up to 8 dimensions, above a product.

    `norms` are the squared norms, infinite for padding rows. `least` takes rounding off, so that a
    tie with a distance that another program rounded is never missed.
    """
    eps = jnp.finfo(x.dtype).eps * least
    if x.shape[1] <= DIRECT_DIMS:
        far_x, far_y = (jnp.where(jnp.isinf(n), n, 0) for n in norms)
        direct = squared_distances(x, y) * (1 - x.shape[1] * eps)
        return direct + (far_x[:, None] + far_y[None, :])
    share = 1 - x.shape[1] ** 0.5 / 2 * eps
    return squared_distances(x, y, norms=(share * norms[0], share * norms[1]))


def _even_blocks(size: int, most: int) -> tuple[int, int]:
    """Number and length of equal blocks of at most `most` rows, with little padding."""
    count = -(-size // most)
    return count, -(-size // count)


def map_row_blocks(
    function: Callable[[Array, Array], Any], x: Array, width: int
) -> tuple[Any, Array]:
    """Apply `function(rows [b, d], index [b])` to blocks of x's rows of at most 2^22 / width.

    Returns its results stacked [blocks, ...] and `valid` [blocks, b]: the last block is padded
    with copies of the last row, whose index is n or more.
    """
    size = x.shape[0]
    count, block = _even_blocks(size, max(1, min(_MOST_ROWS, _BLOCK_ENTRIES // max(width, 1))))
    rows = jnp.pad(x, ((0, count * block - size), (0, 0)), mode="edge")
    rows = rows.reshape(count, block, x.shape[1])
    index = jnp.arange(count * block).reshape(count, block)
    return jax.lax.map(lambda args: function(*args), (rows, index)), index < size


def k_smallest(values: Float[Array, "n m"], k: int, axis: int = 1) -> Array:
    """The k smallest along an axis in order, ties counted, as [the other axis, k]; no sort."""
    size = values.shape[axis]
    lanes = max(_LANES, -(-size // _LANES))
    if size > 2 * k * lanes:
        # One pass: the axis in pieces, laid on each other, and the k smallest kept in every place.
        best = [jnp.full_like(jax.lax.slice_in_dim(values, 0, lanes, axis=axis), jnp.inf)] * k
        for start in range(0, size, lanes):
            piece = jax.lax.slice_in_dim(values, start, min(start + lanes, size), axis=axis)
            width = ((0, 0), (0, lanes - piece.shape[axis]))
            piece = jnp.pad(piece, width[:: 1 if axis else -1], constant_values=jnp.inf)
            for i in range(k):
                best[i], piece = jnp.minimum(best[i], piece), jnp.maximum(best[i], piece)
        values = jnp.concatenate(best, axis=axis)
    values = values if axis else values.T
    # The k smallest distinct values, one pass each.
    level = jnp.full(values.shape[:1], -jnp.inf, values.dtype)
    levels, counts = [], []
    for _ in range(k):
        level = jnp.min(jnp.where(values > level[:, None], values, jnp.inf), axis=1)
        levels.append(level)
        counts.append(jnp.sum(values <= level[:, None], axis=1))
    # The j-th smallest is the lowest level with at least j values at or below it.
    reached = jnp.stack(counts, axis=1)[:, None, :] >= jnp.arange(1, k + 1)[None, :, None]
    return jnp.min(jnp.where(reached, jnp.stack(levels, axis=1)[:, None, :], jnp.inf), axis=2)


def block_pairs(x: Array) -> tuple[Array, tuple[Array, Array]]:
    """x's rows in equal blocks [blocks, b, d], padded with zeros, and all pairs i <= j of them.

    A symmetric function of two rows needs no other pairs.
    """
    count, block = _even_blocks(x.shape[0], _MOST_ROWS)
    blocks = jnp.pad(x, ((0, count * block - x.shape[0]), (0, 0)))
    first, second = np.triu_indices(count)
    return blocks.reshape(count, block, -1), (jnp.asarray(first), jnp.asarray(second))


def kth_neighbour(x: Float[Array, "n d"], k: int) -> Float[Array, " n"]:
    """Squared distance of each point to its k-th nearest other point.

    Accurate for centred points: rounding grows with |x|^2. Distances between two blocks are
    computed once and serve both blocks' points.
    """
    size = x.shape[0]
    blocks, pairs = block_pairs(x)
    count, block, _ = blocks.shape
    # A padding row is infinitely far from all.
    norms = jnp.pad(squared_norms(x), (0, count * block - size), constant_values=jnp.inf)
    norms = norms.reshape(count, block)
    itself = jnp.eye(block, dtype=bool)

    def merge(best: Array, i: Array, distances: Array, axis: int) -> Array:
        found = k_smallest(distances, k, axis)
        return best.at[i].set(k_smallest(jnp.concatenate([best[i], found], axis=1), k))

    def update(best: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        i, j = pair
        distances = pair_distances(blocks[i], blocks[j], (norms[i], norms[j]))
        distances = jnp.where((i == j) & itself, jnp.inf, distances)
        best = merge(best, i, distances, 1)
        return merge(best, j, jnp.where(i == j, jnp.inf, distances), 0), None

    best = jnp.full((count, block, k), jnp.inf, x.dtype)
    best, _ = jax.lax.scan(update, best, pairs)
    return best[..., k - 1].reshape(-1)[:size]
