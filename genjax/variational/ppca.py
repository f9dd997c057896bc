"""Probabilistic principal component analysis, exact: the linear Gaussian latent variable model.

p(z) = N(0, I), p(x|z) = N(W z + mu, s^2 I), so p(x) = N(mu, W W^T + s^2 I): Tipping and Bishop,
"Probabilistic Principal Component Analysis", 1999. With the exact posterior as its encoder the
evidence lower bound is the log-likelihood itself, which is what bounds are tested against.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import HIGHEST, LOG_2PI, at_least_float32

__all__ = ["PPCA", "ppca_fit", "ppca_log_likelihood", "ppca_posterior"]


class PPCA(NamedTuple):
    """The parameters: mean `[dim]`, weights W `[dim, latent]`, noise variance s^2."""

    mean: Float[Array, " dim"]
    weights: Float[Array, "dim latent"]
    noise_variance: Float[Array, ""]


def ppca_fit(x: Float[Array, "batch dim"], num_components: int, *, ddof: int = 0) -> PPCA:
    """Fit by maximum likelihood, in closed form.

    W = U_q (L_q - s^2 I)^{1/2} with the leading eigenvectors and eigenvalues of the covariance,
    s^2 the mean of the discarded eigenvalues: Tipping and Bishop 1999, eqs (7) and (8), rotation
    R = I, so that the columns of W are orthogonal and the posterior is diagonal. ddof = 0 divides
    the covariance by n, which is maximum likelihood; ddof = 1 by n - 1, as scikit-learn does.

    Raises ValueError unless 1 <= num_components < dim, for data with NaN, and where the data have
    no variance left for the noise.

    >>> x = jax.random.normal(jax.random.key(0), (100, 5))
    >>> ppca_fit(x, 2).weights.shape
    (5, 2)
    """
    checks.rank("x", x, 2)
    checks.floating("x", x)
    checks.finite("x", x)
    checks.integer("ddof", ddof, 0)
    checks.integer("num_components", num_components, 1)
    count, dim = x.shape
    if num_components >= dim:
        raise ValueError(f"num_components must be below the dimension {dim}, got {num_components}")
    if count <= max(ddof, num_components + 1):
        raise ValueError(
            f"x must hold more examples than num_components + 1 = {num_components + 1} (the mean "
            f"takes one) and ddof {ddof}, got shape {x.shape}"
        )
    x = at_least_float32(x)
    mean = jnp.mean(x, axis=0)
    _, singular, rows = jnp.linalg.svd(x - mean[None], full_matrices=False)
    # With fewer examples than dimensions the eigenvalues missing here are zero.
    eigenvalues = jnp.square(singular) / (count - ddof)
    noise = jnp.sum(eigenvalues[num_components:]) / (dim - num_components)
    # Without variance the discarded eigenvalues are of rounding, of x and of the decomposition.
    rounding = jnp.square(32 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x)))
    checks.positive(
        "the noise variance, the mean of the discarded eigenvalues,",
        jnp.where(noise > rounding, noise, 0),
    )
    scales = jnp.sqrt(jnp.maximum(eigenvalues[:num_components] - noise, 0))
    return PPCA(mean, rows[:num_components].T * scales[None], noise)


def ppca_posterior(
    model: PPCA, x: Float[Array, "batch dim"]
) -> tuple[Float[Array, "batch latent"], Float[Array, "latent latent"]]:
    """Return the mean of p(z|x) for each example and the covariance, the same for all.

    p(z|x) = N(M^{-1} W^T (x - mu), s^2 M^{-1}),  M = W^T W + s^2 I: Tipping and Bishop 1999.
    Raises ValueError where x does not have the model's dimension.

    >>> x = jax.random.normal(jax.random.key(0), (100, 5))
    >>> mean, covariance = ppca_posterior(ppca_fit(x, 2), x)
    >>> mean.shape, covariance.shape
    ((100, 2), (2, 2))
    """
    residual, factor = _centre(model, x)
    mean = _posterior_mean(model, residual, factor)
    identity = jnp.eye(model.weights.shape[1], dtype=mean.dtype)
    return mean, at_least_float32(model.noise_variance) * cho_solve(factor, identity)


def ppca_log_likelihood(model: PPCA, x: Float[Array, "batch dim"]) -> Float[Array, " batch"]:
    """Return log N(x; mu, W W^T + s^2 I) of each example, in nats.

    The determinant and the inverse are those of M = W^T W + s^2 I, latent by latent:
    log |C| = (dim - latent) log s^2 + log |M|, and r^T C^{-1} r = |r - W m|^2 / s^2 + |m|^2 with
    r = x - mu and m the posterior mean, a sum of squares, so that nothing cancels.
    Raises ValueError where x does not have the model's dimension.

    >>> x = jax.random.normal(jax.random.key(0), (100, 5))
    >>> ppca_log_likelihood(ppca_fit(x, 2), x).shape
    (100,)
    """
    residual, factor = _centre(model, x)
    dim, latent = model.weights.shape
    noise = at_least_float32(model.noise_variance)
    mean = _posterior_mean(model, residual, factor)
    unexplained = residual - jnp.matmul(mean, model.weights.T, precision=HIGHEST)
    distance = jnp.sum(jnp.square(unexplained), axis=1) / noise + jnp.sum(jnp.square(mean), axis=1)
    log_det = (dim - latent) * jnp.log(noise) + 2 * jnp.sum(jnp.log(jnp.diagonal(factor[0])))
    return -0.5 * (distance + log_det + dim * LOG_2PI)


def _centre(model: PPCA, x: Array) -> tuple[Array, tuple[Array, bool]]:
    """x - mu and the Cholesky factor of M = W^T W + s^2 I."""
    checks.shape("x", x, (None, model.weights.shape[0]))
    checks.floating("x", x)
    checks.positive("noise_variance", model.noise_variance)
    weights, noise = at_least_float32(model.weights), at_least_float32(model.noise_variance)
    gram = jnp.matmul(weights.T, weights, precision=HIGHEST)
    gram = gram + noise * jnp.eye(weights.shape[1], dtype=gram.dtype)
    return at_least_float32(x) - at_least_float32(model.mean)[None], cho_factor(gram, lower=True)


def _posterior_mean(model: PPCA, residual: Array, factor: tuple[Array, bool]) -> Array:
    projected = jnp.matmul(residual, model.weights, precision=HIGHEST)
    return cho_solve(factor, projected.T).T
