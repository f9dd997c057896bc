"""Optimal transport between Gaussians in closed form, with and without entropy.

Both costs depend on the covariances A, B through the spectrum w of A^{1/2} B A^{1/2}. Their
derivatives are taken from the transport maps, not through the eigenvectors, so that repeated and
zero eigenvalues give finite gradients.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import HIGHEST, at_least_float32


def _product(*factors: Array) -> Array:
    return jnp.linalg.multi_dot(factors, precision=HIGHEST)


def _root(matrix: Array) -> Array:
    """Symmetric square root of a positive semi-definite matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return _product(vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :], vectors.T)


def _spectral(w: Array, s2: Array) -> tuple[Array, Array, Array]:
    """h(w), dh/dw and dh/ds2, where 2 s2 = epsilon (Janati et al. 2020, theorem 1).

    With D = (4 w + s2^2)^{1/2}: h = s2 - D + s2 log((D + s2) / (2 s2)), -2 w^{1/2} for s2 = 0.
    """
    zero = (w <= 0) & (s2 <= 0)
    d = jnp.sqrt(4 * w + s2 * s2)
    excess = jnp.where(zero, 0, 4 * w / jnp.where(zero, 1, d + s2))  # D - s2, without cancelling
    log = jnp.where(s2 > 0, jnp.log1p(excess / (2 * jnp.where(s2 > 0, s2, 1))), 0)
    slope = jnp.where(zero, 0, -2 / jnp.where(zero, 1, d + s2))
    return s2 * log - excess, slope, log


def _spectrum(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """A^{1/2}, and the eigenvalues and vectors of A^{1/2} B A^{1/2}; rounding is cut to 0."""
    root = _root(a)
    values, vectors = jnp.linalg.eigh(_product(root, b, root))
    floor = values.shape[0] * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    return root, jnp.where(values > floor, values, 0), vectors


@jax.custom_jvp
def _covariance_term(a: Array, b: Array, s2: Array) -> Array:
    """tr A + tr B + sum h(w): the Bures distance for s2 = 0."""
    h = _spectral(_spectrum(a, b)[1], s2)[0]
    total = jnp.trace(a) + jnp.trace(b) + jnp.sum(h)
    # Squared Bures distances are not negative; rounding could make them so.
    return jnp.where(s2 > 0, total, jnp.maximum(total, 0))


@_covariance_term.defjvp
def _covariance_term_jvp(primals, tangents):
    a, b, s2 = primals
    da, db, ds2 = tangents

    def gradient_of_second(a, b):
        root, w, vectors = _spectrum(a, b)
        half = _product(root, vectors)
        return _product(half * _spectral(w, s2)[1][None, :], half.T)

    eye = jnp.eye(a.shape[0], dtype=a.dtype)
    change = jnp.sum((eye + gradient_of_second(b, a)) * da)
    change = change + jnp.sum((eye + gradient_of_second(a, b)) * db)
    change = change + jnp.sum(_spectral(_spectrum(a, b)[1], s2)[2]) * ds2
    return _covariance_term(a, b, s2), change


def _prepare(mean0, cov0, mean1, cov1) -> tuple[Array, Array, Array, Array]:
    checks.rank("mean0", mean0, 1)
    d = mean0.shape[0]
    checks.shape("mean1", mean1, (d,))
    checks.shape("cov0", cov0, (d, d))
    checks.shape("cov1", cov1, (d, d))
    mean0, cov0, mean1, cov1 = (at_least_float32(z) for z in (mean0, cov0, mean1, cov1))

    def symmetric(cov: Array) -> Array:
        # Not finite anywhere: nowhere, or the sums over the spectrum would pass over it.
        return jnp.where(jnp.all(jnp.isfinite(cov)), (cov + cov.T) / 2, jnp.nan)

    return mean0, symmetric(cov0), mean1, symmetric(cov1)


def gaussian_wasserstein(
    mean0: Float[Array, " d"],
    cov0: Float[Array, "d d"],
    mean1: Float[Array, " d"],
    cov1: Float[Array, "d d"],
) -> Float[Array, ""]:
    """Squared 2-Wasserstein distance between two Gaussians.

    |m0 - m1|^2 + tr(A + B - 2 (A^{1/2} B A^{1/2})^{1/2}) (Dowson and Landau 1982). Covariances may
    be singular; first derivatives are finite there too. Raises ValueError where shapes do not fit.
    """
    mean0, cov0, mean1, cov1 = _prepare(mean0, cov0, mean1, cov1)
    zero = jnp.zeros((), cov0.dtype)
    return jnp.sum(jnp.square(mean0 - mean1)) + _covariance_term(cov0, cov1, zero)


def gaussian_entropic_ot(
    mean0: Float[Array, " d"],
    cov0: Float[Array, "d d"],
    mean1: Float[Array, " d"],
    cov1: Float[Array, "d d"],
    *,
    epsilon: ArrayLike,
) -> Float[Array, ""]:
    """`sinkhorn(...).value` between two Gaussians, for the squared Euclidean cost.

    min_P E_P |x - y|^2 + epsilon KL(P | N0 x N1) (Janati, Muzellec, Peyre and Cuturi 2020, theorem
    1, with epsilon = 2 sigma^2). Raises ValueError where shapes do not fit or epsilon <= 0.
    """
    checks.rank("epsilon", epsilon, 0)
    checks.positive("epsilon", epsilon)
    mean0, cov0, mean1, cov1 = _prepare(mean0, cov0, mean1, cov1)
    s2 = jnp.asarray(epsilon).astype(cov0.dtype) / 2
    s2 = jnp.where(s2 > 0, s2, jnp.nan)  # a traced one is not checked
    return jnp.sum(jnp.square(mean0 - mean1)) + _covariance_term(cov0, cov1, s2)
