"""What the metrics on features share: checks, precision, and pairwise work in blocks of rows.

No n x m matrix is ever held: a block of rows is at most 2^22 entries.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import HIGHEST

Features: TypeAlias = Float[Array, "n d"] | Float[np.ndarray, "n d"]
MoreFeatures: TypeAlias = Float[Array, "m d"] | Float[np.ndarray, "m d"]
Scalar: TypeAlias = Float[Array, ""] | Float[np.ndarray, ""]

_BLOCK_ENTRIES = 2**22


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
    """Give NaN where an input holds one: under `jax.jit` nothing can raise, and counts hide it."""
    total = sum(jnp.sum(x, dtype=jnp.float32) for x in inputs)
    return jnp.where(jnp.isfinite(total), value, jnp.nan)


def widest() -> Any:
    """The dtype to accumulate in: float64 where 64-bit types are on, else float32."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def in_float64(function: Callable) -> Callable:
    """Run with 64-bit types on where every argument is concrete; a traced call stays as it is.

    Where 64-bit types are off outside, the results are numpy arrays: jax refuses to compute with
    float64 arrays of its own then.
    """

    @functools.wraps(function)
    def wide(*args: Any, **kwargs: Any) -> Any:
        if not all(map(checks.is_concrete, jax.tree.leaves((args, kwargs)))):
            return function(*args, **kwargs)
        was_on = widest() == np.float64
        with jax.enable_x64(True):
            results = function(*args, **kwargs)
            return results if was_on else jax.tree.map(np.asarray, results)

    return wide


def squared_distances(x: Features, y: MoreFeatures) -> Float[Array, "n m"]:
    """|x_i - y_j|^2 as |x|^2 + |y|^2 - 2 x.y around the mean of y, never below 0.

    The shift changes no distance and keeps the digits that a common offset would cost.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    shift = jax.lax.stop_gradient(jnp.mean(y, axis=0, keepdims=True))
    x, y = x - shift, y - shift
    products = jnp.dot(x, y.T, precision=HIGHEST)
    squares = jnp.sum(x**2, axis=1)[:, None] + jnp.sum(y**2, axis=1)[None, :]
    return jnp.maximum(squares - 2 * products, 0)


def map_row_blocks(
    function: Callable[[Array, Array], Any], x: Array, width: int
) -> tuple[Any, Array]:
    """Apply `function(rows [b, d], index [b])` to blocks of x's rows of at most 2^22 / width.

    Returns its results stacked [blocks, ...] and `valid` [blocks, b]: the last block is filled up
    with rows of zeros, whose index is n or more.
    """
    size = x.shape[0]
    block = max(1, min(size, 1024, _BLOCK_ENTRIES // max(width, 1)))
    count = -(-size // block)
    rows = jnp.pad(x, ((0, count * block - size), (0, 0))).reshape(count, block, x.shape[1])
    index = jnp.arange(count * block).reshape(count, block)
    return jax.lax.map(lambda args: function(*args), (rows, index)), index < size


def kth_smallest(values: Float[Array, "n m"], k: int) -> Float[Array, " n"]:
    """The k-th smallest of each row, counting ties: k passes of running minima, no sort."""
    level = jnp.full(values.shape[:1], -jnp.inf, values.dtype)
    for _ in range(k):
        # The next value above the level, unless the level already has k values at or below it.
        above = jnp.min(jnp.where(values > level[:, None], values, jnp.inf), axis=1)
        enough = jnp.sum(values <= level[:, None], axis=1) >= k
        level = jnp.where(enough, level, above)
    return level
