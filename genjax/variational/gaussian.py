"""Diagonal Gaussians: divergences and reparameterised samples.

A Gaussian is given by its mean and the logarithm of its variance, both `[batch, *event]`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import at_least_float32, exp_excess, sum_event
from genjax.typing import PRNGKey

__all__ = ["gaussian_kl", "gaussian_kl_between", "gaussian_sample"]


def gaussian_kl(
    mean: Float[Array, "batch *event"], log_var: Float[Array, "batch *event"]
) -> Float[Array, " batch"]:
    """KL divergence of a diagonal Gaussian from the standard normal, in nats.

    KL(N(m, s^2) || N(0, 1)) = 1/2 sum (m^2 + s^2 - 1 - log s^2), summed over the event: Kingma and
    Welling, "Auto-Encoding Variational Bayes", 2014, appendix B. The log enters with a minus.

    Raises ValueError where the shapes differ.

    >>> gaussian_kl(mean=jnp.array([[1.0, 0.0]]), log_var=jnp.zeros((1, 2)))
    Array([0.5], dtype=float32)
    """
    checks.same_shape(mean=mean, log_var=log_var)
    mean, log_var = at_least_float32(mean), at_least_float32(log_var)
    return 0.5 * sum_event(jnp.square(mean) + exp_excess(log_var))


def gaussian_kl_between(
    mean0: Float[Array, "batch *event"],
    log_var0: Float[Array, "batch *event"],
    mean1: Float[Array, "batch *event"],
    log_var1: Float[Array, "batch *event"],
) -> Float[Array, " batch"]:
    """KL divergence KL(N0 || N1) between diagonal Gaussians, in nats.

    1/2 sum [ log(s1^2 / s0^2) - 1 + (m1 - m0)^2 / s1^2 + s0^2 / s1^2 ], summed over the event.

    Raises ValueError where the shapes differ.

    >>> m, v = jnp.zeros((1, 2)), jnp.zeros((1, 2))
    >>> gaussian_kl_between(m, v, m + 1, v)
    Array([1.], dtype=float32)
    """
    checks.same_shape(mean0=mean0, log_var0=log_var0, mean1=mean1, log_var1=log_var1)
    mean0, log_var0 = at_least_float32(mean0), at_least_float32(log_var0)
    mean1, log_var1 = at_least_float32(mean1), at_least_float32(log_var1)
    log_ratio = log_var0 - log_var1
    # Scaled before it is squared: 1 / s1^2 alone would overflow twice as early.
    distance = jnp.square((mean0 - mean1) * jnp.exp(-0.5 * log_var1))
    return 0.5 * sum_event(distance + exp_excess(log_ratio))


def gaussian_sample(
    key: PRNGKey, mean: Float[Array, "*shape"], log_var: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Draw z = mean + exp(log_var / 2) * noise, differentiable in both parameters.

    The noise is drawn in float32 at least. Raises ValueError where the shapes differ.

    >>> gaussian_sample(jax.random.key(0), jnp.zeros((4, 2)), jnp.zeros((4, 2))).shape
    (4, 2)
    """
    checks.same_shape(mean=mean, log_var=log_var)
    mean, log_var = at_least_float32(mean), at_least_float32(log_var)
    return mean + jnp.exp(0.5 * log_var) * jax.random.normal(key, mean.shape, mean.dtype)
