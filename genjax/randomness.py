"""Random draws that families share: rows that depend on their index alone, signs, spread times.

Row i of an indexed draw is a function of (key, first_index + i): a batch, its chunks and its
shards agree.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from genjax import checks
from genjax.typing import PRNGKey

Index: TypeAlias = int | Int[Array, ""]


def indexed_keys(
    key: PRNGKey, num: int, first_index: Index = 0
) -> Key[Array, " num"] | UInt32[Array, "num 2"]:
    """One key for each of `num` rows: `fold_in(key, first_index + i)`.

    >>> keys = indexed_keys(jax.random.key(0), 3)
    >>> bool((keys[1:] == indexed_keys(jax.random.key(0), 2, first_index=1)).all())
    True
    """
    rows = jnp.asarray(first_index, jnp.uint32) + jnp.arange(num, dtype=jnp.uint32)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def indexed_normal(
    key: PRNGKey, shape: Sequence[int], first_index: Index = 0, dtype: Any = None
) -> Float[Array, "batch *event"]:
    """Standard normals [batch, *event]: row i depends on (key, first_index + i) alone.

    >>> small, large = (indexed_normal(jax.random.key(0), (n, 2)) for n in (2, 4))
    >>> bool((small == large[:2]).all())
    True
    """
    dtype = jnp.zeros(()).dtype if dtype is None else dtype
    keys = indexed_keys(key, shape[0], first_index)
    return jax.vmap(lambda k: jax.random.normal(k, tuple(shape[1:]), dtype))(keys)


def indexed_rademacher(
    key: PRNGKey, shape: Sequence[int], first_index: Index = 0, dtype: Any = None
) -> Float[Array, "batch *event"]:
    """Signs +-1 [batch, *event]: row i depends on (key, first_index + i) alone.

    >>> indexed_rademacher(jax.random.key(0), (4, 2)).shape
    (4, 2)
    """
    dtype = jnp.zeros(()).dtype if dtype is None else dtype
    keys = indexed_keys(key, shape[0], first_index)
    return jax.vmap(lambda k: jax.random.rademacher(k, tuple(shape[1:]), dtype))(keys)


def rademacher(key: PRNGKey, like: Float[Array, "batch *event"]) -> Float[Array, "batch *event"]:
    """Signs +-1 in the shape and dtype of `like`: the probe of least variance for a trace.

    >>> abs(rademacher(jax.random.key(0), jnp.zeros((2, 2))))
    Array([[1., 1.],
           [1., 1.]], dtype=float32)
    """
    return jax.random.rademacher(key, like.shape).astype(like.dtype)


def low_discrepancy(key: PRNGKey, num: int) -> Float[Array, " num"]:
    """num points (u + i / num) mod 1: each uniform on [0, 1), together evenly spread.

    One uniform shift serves the whole batch (Kingma et al. 2021, App. I), which cuts the variance
    of a loss over times.

    >>> jnp.sort(low_discrepancy(jax.random.key(0), 4) * 4).astype(int)
    Array([0, 1, 2, 3], dtype=int32)
    """
    checks.integer("num", num, 1)
    return (jax.random.uniform(key) + jnp.arange(num) / num) % 1.0
