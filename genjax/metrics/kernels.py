"""Kernel distances between two samples of features: MMD with a choice of kernels, and KID."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.metrics._pairs import (
    Features,
    MoreFeatures,
    Scalar,
    block_pairs,
    check_features,
    in_float64,
    map_row_blocks,
    widest,
)
from genjax.numerics import HIGHEST, at_least_float32, safe_sqrt, squared_distances
from genjax.typing import PRNGKey

# (x [n, d], y [m, d]) -> k(x_i, y_j) [n, m]
KernelFn: TypeAlias = Callable[[Array, Array], Array]


class KID(NamedTuple):
    """Mean and standard deviation over the subsets; the mean is unbiased and may be negative."""

    mean: Scalar
    std: Scalar


@in_float64
def kid(
    key: PRNGKey,
    real: Features,
    fake: MoreFeatures,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
) -> KID:
    """Kernel distance: unbiased squared MMD with (x.y / d + 1)^3, averaged over random subsets.

    Each subset takes `subset_size` of each sample without replacement. While the whole Gram
    matrices cost less than those of the subsets, they are formed once, in blocks, and every
    subset's sum is read off them; the value is the same. Sums are taken in float64 where the call
    is not traced. Binkowski et al. 2018, section 4.

    Raises ValueError on NaN, different widths, fewer samples than `subset_size`.

    >>> x, y = jax.random.normal(jax.random.key(0), (2, 64, 4))
    >>> kid(jax.random.key(1), x, y, num_subsets=4, subset_size=32).mean.shape
    ()
    """
    checks.integer("num_subsets", num_subsets, least=1)
    checks.integer("subset_size", subset_size, least=2)
    check_features(subset_size, " for a subset", real=real, fake=fake)
    x, y = (at_least_float32(jnp.asarray(v)) for v in (real, fake))
    keys = [jax.random.split(k, num_subsets) for k in jax.random.split(key)]
    chosen = [
        jax.vmap(lambda k, n=v.shape[0]: jax.random.permutation(k, n)[:subset_size])(ks)
        for ks, v in zip(keys, (x, y), strict=True)
    ]
    kernel = polynomial_kernel()
    n, m = x.shape[0], y.shape[0]
    if gram_is_cheaper(n, m, num_subsets, subset_size):
        members = [
            jnp.zeros((num_subsets, v.shape[0]), widest())
            .at[jnp.arange(num_subsets)[:, None], rows]
            .set(1)
            for v, rows in zip((x, y), chosen, strict=True)
        ]
        xx, yy = (_symmetric_subset_sums(kernel, *of) for of in zip((x, y), members, strict=True))
        xy = _subset_sums(kernel, x, y, members[0], members[1])
        values = _unbiased(xx, yy, xy, subset_size, subset_size)
    else:
        values = jax.lax.map(
            lambda rows: mmd(x[rows[0]], y[rows[1]], kernel=kernel), (chosen[0], chosen[1])
        )
    if num_subsets == 1:
        return KID(jnp.mean(values), jnp.full_like(values[0], jnp.nan))
    # Equal subsets have no spread, and its gradient there is 0.
    return KID(jnp.mean(values), safe_sqrt(jnp.var(values, ddof=1)))


@in_float64
def mmd(
    x: Features,
    y: MoreFeatures,
    *,
    kernel: str | KernelFn = "gaussian",
    bandwidth: float | int | Float[Array, ""] | None = None,
    unbiased: bool = True,
) -> Scalar:
    """Squared maximum mean discrepancy E k(x, x') + E k(y, y') - 2 E k(x, y).

    `kernel` is one of `KERNELS` with the `bandwidth` (default: the median distance of at most 1,000
    points of either sample, taken evenly), or a callable (x [n, d], y [m, d]) -> [n, m]. Unbiased:
    pairs i = i' are left out, and the value may be negative; biased: it is at least 0. Summed in
    blocks of rows, in float64 where the call is not traced. Gretton et al. 2012, Lemma 6.

    Raises ValueError on NaN, different widths, an unknown kernel, fewer than 2 samples.

    >>> x, y = jax.random.normal(jax.random.key(0), (2, 64, 4))
    >>> bool(mmd(x, y + 1) > mmd(x, y))
    True
    """
    check_features(2, x=x, y=y)
    x, y = (at_least_float32(jnp.asarray(v)) for v in (x, y))
    if isinstance(kernel, str):
        checks.one_of("kernel", kernel, KERNELS)
        if bandwidth is None:
            bandwidth = median_distance(x, y)
        checks.positive("bandwidth", bandwidth)
        kernel = KERNELS[kernel](bandwidth)
    n, m = x.shape[0], y.shape[0]
    xx, yy = (_kernel_sum(kernel, v, v, True) for v in (x, y))
    xy = _kernel_sum(kernel, x, y, False)
    if unbiased:
        return _unbiased(xx, yy, xy, n, m)
    # k(x_i, x_i) is computed apart: among all pairs |x_i - x_i|^2 is a rounding error, and the
    # Laplacian kernel takes its root.
    xx, yy = xx + _diagonal_sum(kernel, x), yy + _diagonal_sum(kernel, y)
    return xx / float(n**2) + yy / float(m**2) - 2 * xy / float(n * m)


def _diagonal_sum(kernel: KernelFn, x: Array) -> Array:
    """Sum of k(x_i, x_i)."""
    return jnp.sum(jax.vmap(lambda row: kernel(row[None], row[None])[0, 0])(x).astype(widest()))


def median_distance(x: Array, y: Array) -> Array:
    """Median Euclidean distance between points that differ, of at most 1,000 of either sample.

    1 where no points differ: every kernel is then 1 at all pairs, whatever its width.
    """
    few = [v[:: -(-v.shape[0] // 1000)] for v in (x, y)]
    pooled = jnp.concatenate(few)
    rows, columns = jnp.triu_indices(pooled.shape[0], 1)
    squared = squared_distances(pooled, pooled)[rows, columns]
    median = jnp.nanmedian(jnp.where(squared > 0, safe_sqrt(squared), jnp.nan))
    return jnp.where(jnp.any(squared > 0), median, 1)


def _kernel_sum(kernel: KernelFn, x: Array, y: Array, off_diagonal: bool) -> Array:
    """Sum of k(x_i, y_j) over all i and j, without i = j where asked."""

    def block(rows: Array, index: Array) -> Array:
        values = kernel(rows, y).astype(widest())
        keep = jnp.broadcast_to((index < x.shape[0])[:, None], values.shape)
        if off_diagonal:
            keep &= index[:, None] != jnp.arange(y.shape[0])[None]
        return jnp.sum(jnp.where(keep, values, 0))

    return jnp.sum(map_row_blocks(block, x, y.shape[0])[0])


def gram_is_cheaper(n: int, m: int, num_subsets: int, subset_size: int) -> bool:
    """Whether three whole Gram matrices have fewer entries than those of the subsets."""
    return n * n + m * m + n * m <= 3 * num_subsets * subset_size**2


def _subset_sums(kernel: KernelFn, x: Array, y: Array, in_x: Array, in_y: Array) -> Array:
    """Sum of k(x_i, y_j) over i and j in each subset [s], from 0/1 memberships [s, n], [s, m]."""

    def block(rows: Array, index: Array) -> Array:
        # Padding rows have an index beyond the last one and belong to no subset.
        member = in_x.at[:, index].get(mode="fill", fill_value=0)
        return _sums(kernel(rows, y).astype(in_x.dtype), member, in_y)

    return jnp.sum(map_row_blocks(block, x, y.shape[0])[0], axis=0)


def _symmetric_subset_sums(kernel: KernelFn, x: Array, member: Array) -> Array:
    """Sum of k(x_i, x_j) over i != j in each subset [s]; every pair is formed once."""
    blocks, pairs = block_pairs(x)
    count, block, _ = blocks.shape
    itself = jnp.eye(block, dtype=bool)
    # Padding rows belong to no subset.
    member = jnp.pad(member, ((0, 0), (0, count * block - x.shape[0])))
    member = jnp.moveaxis(member.reshape(-1, count, block), 1, 0)

    def sums(pair: tuple[Array, Array]) -> Array:
        i, j = pair
        values = kernel(blocks[i], blocks[j]).astype(member.dtype)
        values = jnp.where((i == j) & itself, 0, values)
        return jnp.where(i == j, 1, 2) * _sums(values, member[i], member[j])

    return jnp.sum(jax.lax.map(sums, pairs), axis=0)


def _sums(values: Array, in_rows: Array, in_columns: Array) -> Array:
    """Sum of the values [b, m] over each subset's rows and columns, [s]."""
    return jnp.sum(jnp.dot(in_rows, values, precision=HIGHEST) * in_columns, axis=1)


def _unbiased(xx: Array, yy: Array, xy: Array, n: int, m: int) -> Array:
    # Floats: the numbers of pairs overflow 32-bit integers.
    return xx / float(n * (n - 1)) + yy / float(m * (m - 1)) - 2 * xy / float(n * m)


def polynomial_kernel(degree: int = 3, offset: float | int = 1.0) -> KernelFn:
    """(x.y / d + offset)^degree, less offset^degree, which cancels in every MMD.

    Without the constant, which would be most of the value, float32 rounds less of the rest. Raises
    ValueError unless the degree is a whole number of at least 1.

    >>> polynomial_kernel()(jnp.ones((1, 2)), jnp.ones((1, 2)))
    Array([[7.]], dtype=float32)
    """
    checks.integer("degree", degree, 1)

    def kernel(x: Array, y: Array) -> Array:
        inner = jnp.dot(x, y.T, precision=HIGHEST) / x.shape[1]
        value = jnp.zeros_like(inner)
        # Horner's rule for the sum over j >= 1 of binom(degree, j) inner^j offset^(degree - j).
        for j in range(degree, 0, -1):
            value = (value + math.comb(degree, j) * offset ** (degree - j)) * inner
        return value

    return kernel


def gaussian_kernel(bandwidth: float | int | Float[Array, ""]) -> KernelFn:
    """exp(-|x - y|^2 / (2 bandwidth^2)).

    >>> gaussian_kernel(1.0)(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    Array([[1.]], dtype=float32)
    """
    return lambda x, y: jnp.exp(-squared_distances(x, y) / (2 * bandwidth**2))


def laplacian_kernel(bandwidth: float | int | Float[Array, ""]) -> KernelFn:
    """exp(-|x - y| / bandwidth), Euclidean norm.

    >>> laplacian_kernel(1.0)(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    Array([[1.]], dtype=float32)
    """
    return lambda x, y: jnp.exp(-safe_sqrt(squared_distances(x, y)) / bandwidth)


def rational_quadratic_kernel(
    bandwidth: float | int | Float[Array, ""], alpha: float | int = 1.0
) -> KernelFn:
    """(1 + |x - y|^2 / (2 alpha bandwidth^2))^-alpha.

    >>> rational_quadratic_kernel(1.0)(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    Array([[1.]], dtype=float32)
    """
    return lambda x, y: (1 + squared_distances(x, y) / (2 * alpha * bandwidth**2)) ** -alpha


KERNELS: dict[str, Callable[..., KernelFn]] = {
    "gaussian": gaussian_kernel,
    "laplacian": laplacian_kernel,
    "rational_quadratic": rational_quadratic_kernel,
}
