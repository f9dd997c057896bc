"""Distances between two samples of features: Frechet, sliced Wasserstein, Sinkhorn."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from genjax.metrics._pairs import (
    Features,
    MoreFeatures,
    Scalar,
    check_features,
    in_float64,
    widest,
)
from genjax.numerics import HIGHEST, at_least_float32, safe_sqrt
from genjax.typing import PRNGKey

Vector: TypeAlias = Float[Array, " d"] | Float[np.ndarray, " d"]
Matrix: TypeAlias = Float[Array, "d d"] | Float[np.ndarray, "d d"]


class Moments(NamedTuple):
    """Mean [d] and unbiased covariance [d, d] of features."""

    mean: Vector
    covariance: Matrix


@in_float64
def feature_moments(x: Features) -> Moments:
    """Mean and covariance (divided by n - 1) of features [n, d], accumulated in blocks of rows.

    In float64 where the call is not traced. Raises ValueError on NaN or fewer than 2 samples.

    >>> feature_moments(jnp.array([[0.0], [2.0]])).mean
    array([1.])
    """
    check_features(2, " for a covariance", x=x)
    x = jnp.asarray(x)
    mean = jnp.mean(x, axis=0, dtype=widest())

    size, width = x.shape

    def add(total: Array, block: tuple[Array, Array]) -> tuple[Array, None]:
        rows, index = block
        shifted = jnp.where((index < size)[:, None], rows - mean[None], 0)
        return total + jnp.dot(shifted.T, shifted, precision=HIGHEST), None

    rows_per_block = min(size, 1024)
    count = -(-size // rows_per_block)
    rows = jnp.pad(x, ((0, count * rows_per_block - size), (0, 0)))
    blocks = (rows.reshape(count, -1, width), jnp.arange(count * rows_per_block).reshape(count, -1))
    total, _ = jax.lax.scan(add, jnp.zeros((width, width), mean.dtype), blocks)
    return Moments(mean, total / (size - 1))


@in_float64
def frechet_distance(real: Features | Moments, fake: MoreFeatures | Moments) -> Scalar:
    """Squared Frechet distance of the Gaussians fitted to features [n, d], or of their moments.

        |m0 - m1|^2 + tr C0 + tr C1 - 2 tr (C0^1/2 C1 C0^1/2)^1/2

    Never negative, 0 for equal sets (under jit to rounding). In float64 on the CPU where the call
    is not traced: the last trace is then the sum of the roots of the eigenvalues of L^T C1 L with
    C0 = L L^T, as long as these are above rounding. Elsewhere
    `genjax.transport.gaussian_wasserstein`, whose derivatives are finite for singular covariances
    too. Heusel et al. 2017, equation (6).

    Warns where a sample has no more members than dimensions: the covariance is singular and the
    distance biased upwards. Raises ValueError on NaN, different widths, fewer than 2 samples.

    >>> x = jax.random.normal(jax.random.key(0), (500, 2))
    >>> round(float(frechet_distance(x, x + 1)), 3)
    2.0
    """
    from genjax.transport import gaussian_wasserstein

    checked = [_moments_of("real", real), _moments_of("fake", fake)]
    (mean0, cov0), (mean1, cov1) = checked
    if mean0.shape != mean1.shape:
        widths = f"real {mean0.shape[0]} and fake {mean1.shape[0]}"
        raise ValueError(f"features must have one width, got {widths}")
    if checks.is_concrete(cov0) and checks.is_concrete(cov1):
        same = np.array_equal(cov0, cov1)
        cross = jnp.trace(cov0) if same else _cross_trace(cov0, cov1)
        if cross is not None:
            rest = jnp.trace(cov0) + jnp.trace(cov1)
            return jnp.sum((mean0 - mean1) ** 2) + jnp.maximum(rest - 2 * cross, 0)
    return jax.jit(gaussian_wasserstein)(mean0, cov0, mean1, cov1)


def _moments_of(name: str, given: Features | Moments) -> tuple[Array, Array]:
    """Moments in the widest dtype, of features or as given; on the CPU where not traced."""
    if isinstance(given, Moments):
        moments = given
    else:
        check_features(2, " for a covariance", **{name: given})
        size, width = given.shape
        if size <= width:
            warnings.warn(
                f"{name} has {size} samples in {width} dimensions: its covariance is singular and "
                "the Frechet distance biased",
                stacklevel=4,
            )
        moments = feature_moments(given)
    checks.rank(f"{name} mean", moments.mean, 1)
    checks.shape(f"{name} covariance", moments.covariance, (moments.mean.shape[0],) * 2)
    checks.finite(f"{name} mean", moments.mean)
    checks.finite(f"{name} covariance", moments.covariance)
    mean, covariance = (jnp.asarray(part, widest()) for part in moments)
    if checks.is_concrete(mean) and checks.is_concrete(covariance):
        # Accelerators are slow at float64 and at symmetric eigenvalues.
        cpu = jax.local_devices(backend="cpu")[0]
        return jax.device_put(mean, cpu), jax.device_put(covariance, cpu)
    return mean, covariance


def _cross_trace(cov0: Array, cov1: Array) -> Array | None:
    """tr (C0 C1)^1/2 by the eigenvalues of L^T C1 L, C0 = L L^T; None where they are too small.

    Their rounding is eps of the largest, so that 0 becomes 1e-8 in the root of float64.
    """
    try:
        factor = np.linalg.cholesky(cov0)
    except np.linalg.LinAlgError:
        return None
    values = jnp.linalg.eigvalsh(jnp.dot(factor.T, jnp.dot(cov1, factor)))
    rounding = jnp.finfo(values.dtype).eps * jnp.max(values)
    roots = jnp.sqrt(jnp.maximum(values, rounding))
    resolved = rounding * jnp.sum(1 / roots) <= 1e-10 * jnp.sum(roots)
    return jnp.sum(roots) if resolved else None


def sliced_wasserstein(
    key: PRNGKey,
    x: Features,
    y: MoreFeatures,
    *,
    num_projections: int = 256,
    p: int = 2,
    directions: Float[Array, "k d"] | Float[np.ndarray, "k d"] | None = None,
) -> Float[Array, ""]:
    """(mean over directions of W_p^p of the projections)^(1/p), exact in one dimension.

    Directions are uniform on the sphere, or those given (`key` is then not used). Sizes may differ:
    the quantile functions are compared over the merged steps i/n and j/m. Its gradient at equal
    samples is 0. Bonneel et al. 2015; Deshpande et al. 2018.

    Raises ValueError on NaN, different widths, p < 1.

    >>> x = jax.random.normal(jax.random.key(0), (64, 2))
    >>> sliced_wasserstein(jax.random.key(1), x, x)
    Array(0., dtype=float32)
    """
    checks.integer("p", p, least=1)
    checks.integer("num_projections", num_projections, least=1)
    check_features(1, x=x, y=y)
    x, y = (at_least_float32(jnp.asarray(v)) for v in (x, y))
    if directions is None:
        directions = jax.random.normal(key, (num_projections, x.shape[1]), x.dtype)
        directions /= jnp.sqrt(jnp.sum(directions**2, axis=1, keepdims=True))
    directions = jnp.asarray(directions, x.dtype)
    checks.shape("directions", directions, (None, x.shape[1]))
    of_x, of_y, weights = _merged_steps(x.shape[0], y.shape[0])

    def one_direction(direction: Array) -> Array:
        px = jnp.sort(jnp.dot(x, direction, precision=HIGHEST))[of_x]
        py = jnp.sort(jnp.dot(y, direction, precision=HIGHEST))[of_y]
        return jnp.sum(jnp.asarray(weights, px.dtype) * jnp.abs(px - py) ** p)

    mean = jnp.mean(jax.lax.map(one_direction, directions, batch_size=16))
    if p == 1:
        return mean
    if p == 2:
        return safe_sqrt(mean)
    return jnp.where(mean > 0, jnp.where(mean > 0, mean, 1) ** (1 / p), mean)


def _merged_steps(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The steps of two empirical quantile functions: positions in either, and their widths."""
    if n == m:
        return np.arange(n), np.arange(n), np.full(n, 1 / n)
    # In units of 1 / (n m), so that equal steps meet exactly.
    steps = np.union1d(np.arange(0, n + 1) * m, np.arange(0, m + 1) * n)
    left, widths = steps[:-1], np.diff(steps)
    return left // m, left // n, widths / (n * m)


def sinkhorn_distance(
    x: Features,
    y: MoreFeatures,
    *,
    epsilon: float | int | Float[Array, ""] | None = None,
    divergence: Callable[..., Any] | None = None,
) -> Float[Array, ""]:
    """Debiased entropic transport OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2, squared Euclidean cost.

    `divergence(x, y, *, epsilon)` returns a scalar, or a tuple with a `value` and a `converged`; by
    default it is `genjax.transport.sinkhorn_divergence`, which holds n x m matrices. `epsilon` is
    in units of the cost, by default a twentieth of the mean of |x_i - y_j|^2. Feydy et al. 2019,
    equation (3). Raises ValueError on NaN and different widths, warns where it has not converged.

    >>> x, y = jax.random.normal(jax.random.key(0), (2, 64, 2))
    >>> bool(sinkhorn_distance(x, y + 1) > sinkhorn_distance(x, y))
    True
    """
    check_features(1, x=x, y=y)
    x, y = (at_least_float32(jnp.asarray(v)) for v in (x, y))
    if divergence is None:
        from genjax.transport import sinkhorn_divergence as divergence
    if epsilon is None:
        of_means = jnp.sum((jnp.mean(x, axis=0) - jnp.mean(y, axis=0)) ** 2)
        epsilon = 0.05 * (of_means + jnp.sum(jnp.var(x, axis=0)) + jnp.sum(jnp.var(y, axis=0)))
        epsilon = jnp.where(epsilon > 0, epsilon, 1)  # all points are one, and so are their costs
    result = divergence(x, y, epsilon=epsilon)
    converged = getattr(result, "converged", True)
    if checks.is_concrete(converged) and not converged:
        warnings.warn("the Sinkhorn divergence has not converged", stacklevel=2)
    return getattr(result, "value", result)
