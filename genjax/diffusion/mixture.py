"""The exact denoiser of a Gaussian mixture: the model that every sampler is tested with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.diffusion.denoising import check_times
from genjax.diffusion.schedules import Process
from genjax.numerics import HIGHEST, LOG_2PI
from genjax.typing import DenoiserFn


class GaussianMixture(NamedTuple):
    """sum_k weights_k N(means_k, covariances_k)."""

    weights: Float[Array, " k"]
    means: Float[Array, "k d"]
    covariances: Float[Array, "k d d"]


def _components(
    mixture: GaussianMixture, spectra: tuple[Array, Array], x: Array, t: Array, process: Process
) -> tuple[Array, Array]:
    """log(w_k N(x; alpha m_k, alpha^2 C_k + sigma^2 I)) [batch, k], E[x_0 | x, k] [batch, k, d]."""
    checks.rank("x", x, 2)
    checks.shape("t", t, x.shape[:1])
    check_times(t, process)
    values, vectors = spectra
    alpha, variance = process.alpha(t)[:, None, None], process.variance(t)[:, None, None]
    offset = x[:, None, :] - alpha * mixture.means[None]
    offset = jnp.einsum("kij,bki->bkj", vectors, offset, precision=HIGHEST)
    spread = alpha**2 * values[None] + variance
    log_prob = -0.5 * jnp.sum(offset**2 / spread + jnp.log(spread) + LOG_2PI, axis=-1)
    moved = alpha * values[None] / spread * offset
    means = mixture.means[None] + jnp.einsum("kij,bkj->bki", vectors, moved, precision=HIGHEST)
    return log_prob + jnp.log(mixture.weights)[None], means


def _spectra(mixture: GaussianMixture) -> tuple[Array, Array]:
    k, d = mixture.means.shape
    checks.shape("weights", mixture.weights, (k,))
    checks.shape("covariances", mixture.covariances, (k, d, d))
    checks.positive("weights", mixture.weights)
    values, vectors = jnp.linalg.eigh(mixture.covariances)
    return values, vectors


def mixture_log_prob(
    mixture: GaussianMixture,
    x: Float[Array, "batch d"],
    t: Float[Array, " batch"],
    *,
    process: Process,
) -> Float[Array, " batch"]:
    """Log density in nats of x_t where x_0 is drawn from the mixture.

    log sum_k w_k N(x; alpha m_k, alpha^2 C_k + sigma^2 I), in the log domain. Raises ValueError
    for wrong shapes, weights that are not positive, or times outside the process' range.

    >>> mixture = GaussianMixture(jnp.ones(1), jnp.zeros((1, 2)), jnp.eye(2)[None])
    >>> mixture_log_prob(mixture, jnp.zeros((1, 2)), jnp.zeros(1), process=EDM()).round(4)
    Array([-1.8379], dtype=float32)
    """
    log_prob, _ = _components(mixture, _spectra(mixture), x, t, process)
    return jax.nn.logsumexp(log_prob, axis=-1)


def mixture_denoiser(mixture: GaussianMixture, *, process: Process) -> DenoiserFn:
    """E[x_0 | x_t] = sum_k r_k(x_t) E[x_0 | x_t, k], exact; equals Tweedie's formula.

    Tweedie: E[x_0 | x_t] = (x_t + sigma^2 grad log p_t(x_t)) / alpha (Efron 2011).

    >>> mixture = GaussianMixture(jnp.ones(1), jnp.zeros((1, 2)), jnp.eye(2)[None])
    >>> mixture_denoiser(mixture, process=EDM())(jnp.ones((1, 2)), jnp.ones(1))
    Array([[0.5, 0.5]], dtype=float32)
    """
    spectra = _spectra(mixture)  # once, not at every call

    def denoise(x: Array, t: Array) -> Array:
        log_prob, means = _components(mixture, spectra, x, t, process)
        return jnp.sum(jax.nn.softmax(log_prob, axis=-1)[..., None] * means, axis=1)

    return denoise
