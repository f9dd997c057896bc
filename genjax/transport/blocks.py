"""A cost between two clouds, seen one block of rows at a time.

Every pass over the n x m pairs goes through here. A block fits a cache: what is formed from it
(the cost, the exponentials) is read again from there, and nothing of size n m is kept unless a
pass asks for it. With `chunk_size` nothing ever is, forward or backward.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax.numerics import HIGHEST

# Matrices up to this many entries are one block: below it the second pass reads from cache.
SINGLE = 1 << 21
BLOCK = 1 << 19
# Of exponents: only columns of zero weight reach the ceiling. Below the floor nothing has mass, but
# a column that is empty all over must still say how far it has to rise.
FLOOR, CEILING = -80.0, 60.0


class Blocks(NamedTuple):
    """Rows in blocks: `arrays` is (x, y, ...) for points or (cost,) for a matrix.

    cost_fn is None for a matrix, otherwise cost_fn(x, y, ...) -> [rows, m].
    """

    arrays: tuple[Array, ...]
    cost_fn: Callable | None
    n: int
    m: int
    count: int
    size: int

    def split(self, z: Array, fill: float | None = None) -> Array:
        """[n, ...] -> [blocks, rows, ...]; the last row, or `fill`, pads the last block."""
        short = self.count * self.size - self.n
        if short:
            last = z[-1:] if fill is None else jnp.full_like(z[-1:], fill)
            z = jnp.concatenate([z, jnp.repeat(last, short, axis=0)])
        return z.reshape(self.count, self.size, *z.shape[1:])

    def join(self, z: Array) -> Array:
        """[blocks, rows, ...] -> [n, ...]."""
        return z.reshape(self.count * self.size, *z.shape[2:])[: self.n]

    def rows(self) -> Array:
        return self.split(self.arrays[0])

    def cost(self, rows: Array) -> Array:
        """The cost [rows, m] of one block."""
        return rows if self.cost_fn is None else self.cost_fn(rows, *self.arrays[1:])


def rows(n: int, m: int, chunk_size: int | None) -> int:
    """The number of rows in a block: such that it fits the cache, and at most `chunk_size`."""
    size = max(BLOCK // m, 8)
    if chunk_size is not None:
        size = min(size, chunk_size)
    elif n * m <= SINGLE:
        size = n
    return math.ceil(n / math.ceil(n / min(n, size)))


def make(arrays: tuple[Array, ...], cost_fn: Callable | None, chunk_size: int | None) -> Blocks:
    """Cut the rows into blocks of nearly equal size."""
    n = arrays[0].shape[0]
    m = arrays[0].shape[1] if cost_fn is None else arrays[1].shape[0]
    size = rows(n, m, chunk_size)
    return Blocks(arrays, cost_fn, n, m, math.ceil(n / size), size)


def scan(body: Callable, carry: Any, xs: Any, count: int) -> tuple[Any, Any]:
    """lax.scan, without the loop when there is one block."""
    if count > 1:
        return jax.lax.scan(body, carry, xs)
    carry, y = body(carry, jax.tree.map(lambda z: z[0], xs))
    return carry, jax.tree.map(lambda z: z[None], y)


def sums(weights: Array, *vectors: Array) -> Array:
    """<weights, vector> of each, as one product of a matrix.

    A product compiles to the call of a library, a sum to a long program of its own.
    """
    return jnp.matmul(jnp.stack(vectors), weights, precision=HIGHEST)


def row_peak(cost: Array, base: Array, b: Array) -> Array:
    """max_j (base_j - C_ij) over the columns that have weight: a constant of every gradient."""
    z = jnp.where(b > 0, base, -jnp.inf)[None, :] - cost
    return jax.lax.stop_gradient(jnp.max(z, axis=1))


def exponentials(s: Array, large: Array) -> Array:
    """exp(s), and exp(s) - 1 without cancellation where epsilon is `large`: s is small then.

    epsilon times the rounding of a sum near 1 would spoil potentials and value.
    """
    terms = 4 if s.dtype == jnp.float32 else 9
    series = jnp.ones_like(s)
    for k in range(terms, 1, -1):
        series = 1 + s * series / k
    exact = jnp.exp(s) - large.astype(s.dtype)
    return jnp.where(large & (jnp.abs(s) < 0.05), s * series, exact)


def log_sum(total: Array, large: Array) -> Array:
    """log of a sum of exponentials with weights of sum 1, as `exponentials` gives them."""
    terms = 6 if total.dtype == jnp.float32 else 11
    series = jnp.zeros_like(total)  # of log(1 + t) / t
    for k in range(terms, 0, -1):
        series = 1 / k - total * series
    plain = jnp.log(jnp.where(large, 1 + total, total))
    return jnp.where(large & (jnp.abs(total) < 0.03), total * series, plain)


def row_exponentials(
    cost: Array, base: Array, gain: Array | float, b: Array, epsilon: Array, large: Array
) -> tuple[Array, Array]:
    """`exponentials` of (g_j - C_ij - p_i) / epsilon for g = base + gain, and the peaks p.

    The differences are taken in units of the cost, before the division, and a small gain is added
    after them: where the plan has mass they lose nothing.
    """
    peak = row_peak(cost, base, b)
    s = (base[None, :] - cost) - peak[:, None] + jnp.broadcast_to(gain, base.shape)[None, :]
    return exponentials(jnp.clip(s / epsilon, FLOOR, CEILING), large), peak


def row_update(blocks: Blocks, g: Array, b: Array, epsilon: Array, large: Array) -> Array:
    """f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon): the rows of P then sum to a."""

    def body(_, rows):
        w, peak = row_exponentials(blocks.cost(rows), g, 0.0, b, epsilon, large)
        total = jnp.matmul(w, b, precision=HIGHEST)
        return None, -(peak + epsilon * log_sum(total, large))

    return blocks.join(scan(body, None, blocks.rows(), blocks.count)[1])


def col_peak(blocks: Blocks, f: Array) -> Array:
    """max_i (f_i - C_ij), for rows of -inf nothing: a constant of every gradient."""

    def body(top, block):
        rows, f = block
        return jnp.maximum(top, jnp.max(f[:, None] - blocks.cost(rows), axis=0)), None

    xs = (blocks.rows(), blocks.split(f, -jnp.inf))
    start = jnp.full((blocks.m,), -jnp.inf, f.dtype)
    return jax.lax.stop_gradient(scan(body, start, xs, blocks.count)[0])


def col_update(blocks: Blocks, f: Array, a: Array, epsilon: Array, large: Array) -> Array:
    """g_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon): the columns of P then sum to b."""
    peak = col_peak(blocks, jnp.where(a > 0, f, -jnp.inf))

    def body(total, block):
        rows, f, a = block
        s = (f[:, None] - blocks.cost(rows)) - peak[None, :]
        w = exponentials(jnp.minimum(s / epsilon, CEILING), large)
        return total + jnp.matmul(a, w, precision=HIGHEST), None

    xs = (blocks.rows(), blocks.split(f), blocks.split(a, 0.0))
    total = scan(body, jnp.zeros_like(peak), xs, blocks.count)[0]
    return -(peak + epsilon * log_sum(total, large))
