"""Variational bounds on the log-likelihood of a latent variable model.

`encode(x)` gives the mean and log variance of q(z|x), both `[batch, latent]` (or with more axes,
all of them latent); `log_likelihood(x, z)` gives log p(x|z) `[batch]` for one sample z of that
shape per example; `prior(z)` gives log p(z) `[batch]` in nats, by default that of N(0, I).
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from genjax import checks
from genjax.likelihoods import gaussian_log_prob, standard_normal_log_prob
from genjax.numerics import at_least_float32, log_mean_exp
from genjax.typing import EncoderFn, LogLikelihoodFn, LogProbFn, PRNGKey
from genjax.variational.gaussian import gaussian_kl, gaussian_sample

__all__ = ["elbo", "iwae"]

Bound = tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]
DIVERGENCES = ("exact", "sampled")
ESTIMATORS = ("plain", "dreg", "stl")


def elbo(
    encode: EncoderFn,
    log_likelihood: LogLikelihoodFn,
    key: PRNGKey,
    x: Shaped[Array, "batch *event"],
    *,
    num_samples: int = 1,
    beta: float | int | Float[Array, ""] = 1.0,
    divergence: Literal["exact", "sampled"] | None = None,
    prior: LogProbFn | None = None,
) -> Bound:
    """Return minus the evidence lower bound of each example, in nats.

    loss = -( E_q log p(x|z) - beta KL(q(z|x) || p(z)) )

    The expectation is the mean over `num_samples` reparameterised samples. Without a `prior`, p(z)
    is N(0, I) and the divergence is exact: Kingma and Welling 2014, eq. (10). It is "sampled" on
    request, and always with a prior: the mean of log q(z|x) - log p(z) over the same samples,
    eq. (6), which is noisier for a poor encoder, but without any noise at the exact posterior,
    where every sample gives log p(x). Gradients reach whatever the prior closes over. With beta
    other than 1 it is the objective of Higgins et al., "beta-VAE", 2017, eq. (4), a lower bound
    only where beta >= 1. aux: `reconstruction` = E_q log p(x|z) and `kl`, unweighted.

    Raises ValueError for num_samples < 1, beta < 0, an unknown divergence, an exact one of a given
    prior, concrete data with NaN, and wrong shapes from a callable.

    >>> encode = lambda x: (x[:, :2], jnp.zeros((len(x), 2)))
    >>> log_likelihood = lambda x, z: gaussian_log_likelihood(x, jnp.tile(z, 2))
    >>> losses, aux = elbo(encode, log_likelihood, jax.random.key(0), jnp.ones((8, 4)))
    >>> losses.shape, sorted(aux)
    ((8,), ['kl', 'reconstruction'])
    """
    checks.at_least("beta", beta, 0)
    if divergence is None:
        divergence = "exact" if prior is None else "sampled"
    checks.one_of("divergence", divergence, DIVERGENCES)
    if prior is not None and divergence == "exact":
        raise ValueError("divergence must be 'sampled' with a prior of one's own, got 'exact'")
    mean, log_var = _posterior(encode, x, num_samples)
    z = _samples(key, mean, log_var, num_samples)
    reconstruction = jnp.mean(_log_likelihoods(log_likelihood, x, z), axis=0)
    if divergence == "exact":
        kl = gaussian_kl(mean, log_var)
    else:
        kl = jnp.mean(_log_ratios(z, mean, log_var, prior), axis=0)
    return beta * kl - reconstruction, {"reconstruction": reconstruction, "kl": kl}


def iwae(
    encode: EncoderFn,
    log_likelihood: LogLikelihoodFn,
    key: PRNGKey,
    x: Shaped[Array, "batch *event"],
    *,
    num_samples: int,
    estimator: Literal["plain", "dreg", "stl"] = "plain",
    prior: LogProbFn | None = None,
) -> Bound:
    """Return minus the importance weighted bound of each example, in nats.

    loss = -log( 1/K sum_k w_k ),  w_k = p(x|z_k) p(z_k) / q(z_k|x),  z_k ~ q(z|x)

    Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2016, eq. (8): its mean
    rises with K = `num_samples` towards log p(x). The estimators have the same value and differ in
    the encoder's gradient (the decoder's and the prior's is sum_k v_k grad log w_k in all three,
    v_k = w_k / sum w):

    - `plain`: the gradient of the bound; its signal-to-noise falls like 1 / sqrt(K).
    - `dreg`: doubly reparameterised, sum_k v_k^2 dlog w_k/dz_k dz_k/dphi: Tucker et al., "Doubly
      Reparameterized Gradient Estimators", 2019, eq. (8). Unbiased; its noise falls with K.
    - `stl`: the score of q is dropped: Roeder et al., "Sticking the Landing", 2017. Without noise
      at the exact posterior, unbiased for K = 1, biased for larger K.

    aux: `reconstruction` = mean_k log p(x|z_k), `kl` (exact without a `prior`, with one the mean of
    log q(z_k|x) - log p(z_k)), and `effective_samples` = 1 / sum_k v_k^2, between 1 and K. A weight
    on the divergence would give no bound: there is no beta. Raises ValueError as `elbo` does, and
    for an unknown estimator.

    >>> encode = lambda x: (x[:, :2], jnp.zeros((len(x), 2)))
    >>> log_likelihood = lambda x, z: gaussian_log_likelihood(x, jnp.tile(z, 2))
    >>> x, key = jnp.ones((8, 4)), jax.random.key(0)
    >>> losses, aux = iwae(encode, log_likelihood, key, x, num_samples=5, estimator="dreg")
    >>> losses.shape, sorted(aux)
    ((8,), ['effective_samples', 'kl', 'reconstruction'])
    """
    checks.one_of("estimator", estimator, ESTIMATORS)
    mean, log_var = _posterior(encode, x, num_samples)
    z = _samples(key, mean, log_var, num_samples)
    # Without the score of q only the path through z reaches the encoder.
    q = (mean, log_var) if estimator == "plain" else jax.lax.stop_gradient((mean, log_var))

    def terms(z: Array) -> tuple[Array, Array, Array]:
        reconstruction, log_ratio = (
            _log_likelihoods(log_likelihood, x, z),
            _log_ratios(z, *q, prior),
        )
        return reconstruction - log_ratio, reconstruction, log_ratio

    if estimator == "dreg":
        # Both calls compute the same numbers; compiled, the first costs nothing.
        weights = jax.nn.softmax(jax.lax.stop_gradient(terms(z)[0]), axis=0)
        weights = weights.reshape(weights.shape + (1,) * (z.ndim - 2))
        z = _scale_tangent(z, jnp.broadcast_to(weights, z.shape))
    log_weights, reconstruction, log_ratio = terms(z)
    weights = jax.nn.softmax(jax.lax.stop_gradient(log_weights), axis=0)
    aux = {
        "reconstruction": jnp.mean(reconstruction, axis=0),
        "kl": gaussian_kl(mean, log_var) if prior is None else jnp.mean(log_ratio, axis=0),
        "effective_samples": 1 / jnp.sum(jnp.square(weights), axis=0),
    }
    return -log_mean_exp(log_weights, axis=0), aux


def _posterior(encode: EncoderFn, x: Array, num_samples: int) -> tuple[Array, Array]:
    """Check the arguments of a bound, call the encoder and check what it returned."""
    checks.integer("num_samples", num_samples, 1)
    checks.min_rank("x", x, 1)
    checks.not_empty("x", x)
    checks.finite("x", x)
    mean, log_var = encode(x)
    checks.floating("encode(x)[0], the mean,", mean)
    checks.floating("encode(x)[1], the log variance,", log_var)
    checks.min_rank("encode(x)[0], the mean,", mean, 2)
    checks.same_shape(**{"mean": mean, "log variance": log_var})
    checks.same_batch(**{"x": x, "encode(x)": mean})
    return at_least_float32(mean), at_least_float32(log_var)


def _samples(key: PRNGKey, mean: Array, log_var: Array, num_samples: int) -> Array:
    """Draw z `[num_samples, batch, latent]`."""
    shape = (num_samples, *mean.shape)
    return gaussian_sample(key, jnp.broadcast_to(mean, shape), jnp.broadcast_to(log_var, shape))


def _log_likelihoods(log_likelihood: LogLikelihoodFn, x: Array, z: Array) -> Array:
    """log p(x|z_k) `[num_samples, batch]`."""
    return _over_samples("log_likelihood(x, z)", lambda zk: log_likelihood(x, zk), z)


def _log_ratios(z: Array, mean: Array, log_var: Array, prior: LogProbFn | None) -> Array:
    """log q(z_k|x) - log p(z_k) `[num_samples, batch]`."""
    log_q = jax.vmap(lambda zk: gaussian_log_prob(zk, mean, log_var))(z)
    if prior is None:
        return log_q - jax.vmap(standard_normal_log_prob)(z)
    return log_q - _over_samples("prior(z)", prior, z)


def _over_samples(name: str, function: LogProbFn, z: Array) -> Array:
    """function(z_k) `[num_samples, batch]`."""

    def one(zk: Array) -> Array:
        value = function(zk)
        checks.shape(name, value, zk.shape[:1])
        return at_least_float32(value)

    # A single sample needs no vmap, so that callables which do not batch can be used.
    return one(z[0])[None] if len(z) == 1 else jax.vmap(one)(z)


@jax.custom_jvp
def _scale_tangent(z: Array, scale: Array) -> Array:
    """z, with its derivative multiplied by `scale`."""
    return z


@_scale_tangent.defjvp
def _(primals, tangents):
    z, scale = primals
    return _scale_tangent(z, scale), scale * tangents[0]
