"""The aggregated posterior q(z) = 1/N sum_j q(z|x_j), and what a divergence is made of.

Give all N posteriors of a data set: over a minibatch in its place the sums need other weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.likelihoods import gaussian_log_prob, standard_normal_log_prob
from genjax.numerics import LOG_2PI, at_least_float32, log_mean_exp
from genjax.typing import LogProbFn
from genjax.variational.priors import BLOCK, mixture_log_prob

__all__ = ["KLDecomposition", "active_units", "aggregated_log_prob", "kl_decomposition"]

ROWS = 64  # samples at once


class KLDecomposition(NamedTuple):
    """Three terms of each sample, in nats; their sum is log q(z|x) - log p(z)."""

    mutual_information: Float[Array, " batch"]
    total_correlation: Float[Array, " batch"]
    dimension_wise: Float[Array, " batch"]


def aggregated_log_prob(
    z: Float[Array, "batch *latent"],
    mean: Float[Array, "examples *latent"],
    log_var: Float[Array, "examples *latent"],
    *,
    block: int = BLOCK,
) -> Float[Array, " batch"]:
    """Log density of the aggregated posterior, in nats: log 1/N sum_j q(z|x_j).

    The best prior that there is for these posteriors: Hoffman and Johnson, "ELBO surgery", 2016;
    Tomczak and Welling 2018, eq. (7). mean, log_var: of all N examples. Raises ValueError as
    `mixture_log_prob` does.

    >>> mean, log_var = jnp.array([[-1.0], [1.0]]), jnp.zeros((2, 1))
    >>> aggregated_log_prob(jnp.zeros((1, 1)), mean, log_var).round(3)
    Array([-1.419], dtype=float32)
    """
    return mixture_log_prob(z, mean, log_var, block=block)


def kl_decomposition(
    z: Float[Array, "batch latent"],
    mean: Float[Array, "batch latent"],
    log_var: Float[Array, "batch latent"],
    *,
    prior: LogProbFn | None = None,
) -> KLDecomposition:
    """Split the divergence of each posterior from the prior into three, by one sample z_i of each.

    mutual information    log q(z|x) - log q(z)            its mean is at most log N
    total correlation     log q(z) - sum_d log q(z_d)
    dimension-wise        sum_d log q(z_d) - log p(z)

    in nats, with q(z) and its margins q(z_d) aggregated over all the examples given: Hoffman and
    Johnson 2016; Chen et al., "Isolating Sources of Disentanglement", 2018, eq. (2). The terms of a
    sample may be negative; their means estimate the three divergences. prior: its log-density, by
    default that of N(0, I); where it does not factorise, what its own dimensions share is in the
    last term. Raises ValueError where shapes differ and for concrete values that are not finite.

    >>> mean = jax.random.normal(jax.random.key(0), (64, 2))
    >>> terms = kl_decomposition(mean, mean, jnp.zeros((64, 2)))
    >>> terms.total_correlation.shape
    (64,)
    """
    checks.rank("z", z, 2)
    checks.same_shape(z=z, mean=mean, log_var=log_var)
    checks.not_empty("z", z)
    for name, x in {"z": z, "mean": mean, "log_var": log_var}.items():
        checks.finite(name, x)
    z, mean, log_var = (at_least_float32(x) for x in (z, mean, log_var))

    def one(z: Array) -> tuple[Array, Array]:
        distance = jnp.square((z[None] - mean) * jnp.exp(-0.5 * log_var))
        each = -0.5 * (distance + log_var + LOG_2PI)  # log q(z_d|x_j) [examples, latent]
        return log_mean_exp(jnp.sum(each, axis=1)), jnp.sum(log_mean_exp(each, axis=0))

    log_q, log_margins = jax.lax.map(one, z, batch_size=ROWS)
    log_p = standard_normal_log_prob(z) if prior is None else prior(z)
    checks.shape("prior(z)", log_p, (len(z),))
    return KLDecomposition(
        gaussian_log_prob(z, mean, log_var) - log_q, log_q - log_margins, log_margins - log_p
    )


def active_units(mean: Float[Array, "examples *latent"], threshold: float = 0.01) -> Int[Array, ""]:
    """Count the latent dimensions that depend on the data: Var_x E[z_d|x] above the threshold.

    The variance over the examples is that of the posterior means, divided by their number: Burda,
    Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2016, section 5.1.2. Raises
    ValueError for a negative threshold, means that are not finite, and no examples.

    >>> mean = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> int(active_units(mean))
    1
    """
    checks.min_rank("mean", mean, 1)
    checks.not_empty("mean", mean)
    checks.finite("mean", mean)
    checks.at_least("threshold", threshold, 0)
    return jnp.sum(jnp.var(at_least_float32(mean), axis=0) > threshold)
