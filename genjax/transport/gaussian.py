"""Optimal transport between Gaussians in closed form, with and without entropy.

Both costs depend on the covariances through the singular values s of L_B^T L_A, with A = L_A L_A^T
and B = L_B L_B^T. They are s = w^{1/2} for the eigenvalues w of A^{1/2} B A^{1/2}, but keep the
digits that rounding of w loses. First and second derivatives come from the transport maps, not
through the eigenvectors, so that repeated and zero eigenvalues give finite ones.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import HIGHEST, at_least_float32


def _product(*factors: Array) -> Array:
    return jnp.linalg.multi_dot(factors, precision=HIGHEST)


def _above_rounding(values: Array) -> Array:
    """Positive values; what rounding leaves of a zero, at d^{1/2} eps of the largest, is 0."""
    floor = values.shape[0] ** 0.5 * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    return jnp.where(values <= floor, 0, values)


def _inverse(values: Array) -> Array:
    """1 / values, 0 at 0."""
    return jnp.where(values == 0, 0, 1 / jnp.where(values == 0, 1, values))


def _factor(cov: Array) -> Array:
    """L with L L^T = cov, of the correlations: rounding is relative to each variance."""
    variances = jnp.diagonal(cov)
    scale = jnp.sqrt(jnp.where(variances <= 0, 1, variances))
    values, vectors = jnp.linalg.eigh(cov / scale[:, None] / scale[None, :])
    return scale[:, None] * vectors * jnp.sqrt(_above_rounding(values))[None, :]


def _factors(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """L, K and s with L L^T = A, K K^T = B and L^T K = diag(s)."""
    of_a, of_b = _factor(a), _factor(b)
    left, s, right = jnp.linalg.svd(_product(of_a.T, of_b))
    return _product(of_a, left), _product(of_b, right.T), _above_rounding(s)


def _log_term(s: Array, s2: Array) -> tuple[Array, Array]:
    """D = (4 s^2 + s2^2)^{1/2} and log((D + s2) / (2 s2)), 0 for s2 = 0, where 2 s2 = epsilon."""
    d = 2 * s * jnp.sqrt(1 + jnp.square(s2 / 2 * _inverse(s)))
    d = jnp.where(s == 0, s2, d)
    excess = 4 * s * (s * _inverse(d + s2))  # D - s2, without cancelling
    return d, jnp.log1p(excess / 2 * _inverse(s2))


@jax.custom_jvp
def _covariance_term(a: Array, b: Array, s2: Array) -> Array:
    """|L - K|^2 + sum of 2 s + s2 - D + s2 log((D + s2) / (2 s2)).

    tr A + tr B - 2 sum s = |L - K|^2 is the Bures distance; the sum, 0 for s2 = 0, is what entropy
    adds (Janati et al. 2020, theorem 1). No term is negative, and none cancels another.
    """
    left, right, s = _factors(a, b)
    d, log = _log_term(s, s2)
    added = 2 * s * (s2 * _inverse(d + s2)) * (1 + s2 * _inverse(d + 2 * s)) + s2 * log
    bures = jnp.where(jnp.all(a == b), 0, jnp.sum(jnp.square(left - right)))
    return bures + jnp.sum(added)


@_covariance_term.defjvp
def _covariance_term_jvp(primals, tangents):
    da, db, ds2 = tangents
    of_a, of_b, log = _slopes(*primals)
    return _covariance_term(*primals), jnp.sum(of_a * da) + jnp.sum(of_b * db) + log * ds2


@jax.custom_jvp
def _slopes(a: Array, b: Array, s2: Array) -> tuple[Array, Array, Array]:
    """Derivatives I - T, I - T' and sum log((D + s2) / (2 s2)) of the term.

    T = K t K^T solves T A T + s2 T = B, with t = 2 / (D + s2), and T' = L t L^T does with A and B
    changing places: for s2 = 0 the transport maps.
    """
    left, right, s = _factors(a, b)
    d, log = _log_term(s, s2)
    t = 2 * _inverse(d + s2)[None, :]
    eye = jnp.eye(a.shape[0], dtype=a.dtype)
    return eye - _product(right * t, right.T), eye - _product(left * t, left.T), jnp.sum(log)


@_slopes.defjvp
def _slopes_jvp(primals, tangents):
    a, b, s2 = primals
    da, db, ds2 = tangents
    left, right, s = _factors(a, b)
    d, _ = _log_term(s, s2)
    t = 2 * _inverse(d + s2)
    of_s2 = jnp.sum(jnp.where(s == 0, 0, _inverse(d) - _inverse(s2)))
    of_a, of_b = (_product(half * (t * _inverse(d))[None, :], half.T) for half in (right, left))
    dlog = jnp.sum(of_a * da) + jnp.sum(of_b * db) + of_s2 * ds2
    da, db = (da + da.T) / 2, (db + db.T) / 2

    def change_of_map(left: Array, right: Array, da: Array, db: Array) -> Array:
        """dT from dT (A T) + (T A) dT + s2 dT = R; T A = K (s t) L^T has the eigenvalues s^2 t."""
        this = _product(right * t[None, :], right.T)
        rest = db - _product(this, da, this) - ds2 * this
        left = left * _inverse(s)[None, :]
        pick = _product(right, left.T)
        outside = jnp.eye(s.shape[0], dtype=s.dtype) - pick
        values = s * s * t
        inner = _product(left.T, rest, left)
        inner = inner * _inverse(values[:, None] + values[None, :] + s2)
        inner = _product(right, inner, right.T)
        mixed = _product(right * _inverse(values + s2)[None, :], left.T, rest, outside.T)
        return inner + mixed + mixed.T + _product(outside, rest, outside.T) * _inverse(s2)

    d_of_a = -change_of_map(left, right, da, db)
    d_of_b = -change_of_map(right, left, db, da)
    return _slopes(a, b, s2), (d_of_a, d_of_b, dlog)


def _prepare(mean0, cov0, mean1, cov1) -> tuple[Array, Array, Array, Array]:
    checks.rank("mean0", mean0, 1)
    d = mean0.shape[0]
    checks.shape("mean1", mean1, (d,))
    checks.shape("cov0", cov0, (d, d))
    checks.shape("cov1", cov1, (d, d))
    mean0, cov0, mean1, cov1 = (at_least_float32(z) for z in (mean0, cov0, mean1, cov1))

    def symmetric(cov: Array) -> Array:
        # Not finite anywhere: NaN everywhere, or the sums over the spectrum would pass over it.
        return (cov + cov.T) / 2 + jnp.sum(0 * cov)

    return mean0, symmetric(cov0), mean1, symmetric(cov1)


def gaussian_wasserstein(
    mean0: Float[Array, " d"],
    cov0: Float[Array, "d d"],
    mean1: Float[Array, " d"],
    cov1: Float[Array, "d d"],
) -> Float[Array, ""]:
    """Squared 2-Wasserstein distance between two Gaussians.

    |m0 - m1|^2 + tr(A + B - 2 (A^{1/2} B A^{1/2})^{1/2}) (Dowson and Landau 1982), never negative,
    0 for equal arguments. Covariances may be singular; first derivatives are finite there too,
    second ones also where eigenvalues repeat. Raises ValueError where shapes do not fit.

    >>> mean, eye = jnp.zeros(2), jnp.eye(2)
    >>> round(float(gaussian_wasserstein(mean, eye, mean + 1, 4 * eye)), 3)
    4.0
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

    >>> mean, eye = jnp.zeros(2), jnp.eye(2)
    >>> gaussian_entropic_ot(mean, eye, mean + 1, 4 * eye, epsilon=0.1).shape
    ()
    """
    checks.rank("epsilon", epsilon, 0)
    checks.positive("epsilon", epsilon)
    mean0, cov0, mean1, cov1 = _prepare(mean0, cov0, mean1, cov1)
    s2 = jnp.asarray(epsilon).astype(cov0.dtype) / 2
    s2 = s2 + 0 * jnp.log(s2)  # a traced one is not checked: NaN unless it is positive
    return jnp.sum(jnp.square(mean0 - mean1)) + _covariance_term(cov0, cov1, s2)
