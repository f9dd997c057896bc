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
from genjax.transport.log_domain import density_exponent, log_weights

# Matrices up to this many entries are one block: below it the second pass reads from cache.
SINGLE = 1 << 21
BLOCK = 1 << 19


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


def row_kernel(cost: Array, h: Array, epsilon: Array) -> tuple[Array, Array]:
    """exp((h_j - C_ij - p_i) / epsilon) with p_i the row's maximum, and p.

    The differences are taken in units of the cost, before the division: where the kernel has mass
    they are small and lose nothing.
    """
    z = h[None, :] - cost
    peak = jnp.max(z, axis=1)
    return jnp.exp((z - peak[:, None]) / epsilon), peak


def build(blocks: Blocks, h: Array, epsilon: Array) -> tuple[Array, Array]:
    """The kernel of all blocks, [blocks, rows, m], and its row maxima in units of the cost."""

    def body(_, rows):
        return None, row_kernel(blocks.cost(rows), h, epsilon)

    return scan(body, None, blocks.rows(), blocks.count)[1]


def row_update(blocks: Blocks, g: Array, b: Array, epsilon: Array) -> Array:
    """f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon), block by block."""
    h = g + epsilon * log_weights(b)

    def body(_, rows):
        kernel, peak = row_kernel(blocks.cost(rows), h, epsilon)
        return None, -(peak + epsilon * jnp.log(jnp.sum(kernel, axis=1)))

    return blocks.join(scan(body, None, blocks.rows(), blocks.count)[1])


def col_update(blocks: Blocks, f: Array, a: Array, epsilon: Array) -> Array:
    """g_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon), by a running maximum."""
    h = f + epsilon * log_weights(a)

    def body(carry, block):
        top, total = carry
        rows, h = block
        z = h[:, None] - blocks.cost(rows)
        new = jnp.maximum(top, jnp.max(z, axis=0))
        safe = jnp.where(jnp.isfinite(new), new, 0)  # blocks of padding or zero weight: -inf
        part = jnp.sum(jnp.exp((z - safe[None, :]) / epsilon), axis=0)
        return (new, total * jnp.exp((top - safe) / epsilon) + part), None

    start = (jnp.full((blocks.m,), -jnp.inf, f.dtype), jnp.zeros((blocks.m,), f.dtype))
    xs = (blocks.rows(), blocks.split(h, -jnp.inf))
    top, total = scan(body, start, xs, blocks.count)[0]
    return -(top + epsilon * jnp.log(total))


class Reading(NamedTuple):
    """What one pass over the plan of given potentials yields."""

    row_sums: Array
    col_sums: Array
    total: Array  # <P, C>
    gradient: tuple[Array | None, ...]  # of <P, C> at fixed P, for each of blocks.arrays


def _identity(p: Array) -> tuple[Any, ...]:
    return (p,)


def read(
    blocks: Blocks,
    f: Array,
    g: Array,
    a: Array,
    b: Array,
    epsilon: Array,
    wanted: tuple[bool, ...] = (),
) -> Reading:
    """Marginals and cost of the plan, and the gradients that are wanted, in one pass."""
    others = blocks.arrays[1:]
    wanted = wanted or tuple(False for _ in blocks.arrays)
    log_b = log_weights(b)

    def body(carry, block):
        cols, total, grads = carry
        rows, f, log_a = block
        if blocks.cost_fn is None:
            cost, pull = rows, _identity
        else:
            cost, pull = jax.vjp(blocks.cost_fn, rows, *others)
        z = density_exponent(cost, f, g, epsilon) + (log_a[:, None] + log_b[None, :])
        p = jnp.exp(z)
        pulled: tuple[Any, ...] = pull(p) if any(wanted) else ()
        out = (jnp.sum(p, axis=1), next(iter(pulled), None) if wanted[0] else None)
        grads = tuple(
            acc + new if want else None
            for acc, new, want in zip(grads, pulled[1:] or grads, wanted[1:], strict=True)
        )
        return (cols + jnp.sum(p, axis=0), total + jnp.sum(p * cost), grads), out

    grads = tuple(jnp.zeros_like(z) if w else None for z, w in zip(others, wanted[1:], strict=True))
    start = (jnp.zeros((blocks.m,), f.dtype), jnp.zeros((), f.dtype), grads)
    xs = (blocks.rows(), blocks.split(f), blocks.split(log_weights(a), -jnp.inf))
    (cols, total, grads), (row_sums, first) = scan(body, start, xs, blocks.count)
    head = blocks.join(first) if wanted[0] else None
    return Reading(blocks.join(row_sums), cols, total, (head, *grads))


def kernel_products(
    kernel: Array, a: Array, u: Array, v: Array, relaxation: Array
) -> tuple[Array, Array]:
    """Relax u towards 1 / (K v) and return it with K^T (a u): one pass over the kernel."""

    def body(cols, block):
        kernel, a, u = block
        u = relaxed(u, jnp.matmul(kernel, v, precision=HIGHEST) * u, relaxation)
        return cols + jnp.matmul(a * u, kernel, precision=HIGHEST), u

    cols, u = scan(body, jnp.zeros_like(v), (kernel, a, u), kernel.shape[0])
    return u, cols


def relaxed(z: Array, ratio: Array, relaxation: Array) -> Array:
    """z / ratio^relaxation."""
    return z * jnp.exp(-relaxation * jnp.log(ratio))
