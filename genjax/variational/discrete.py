"""Discrete latents without a codebook: relaxed samples, exact divergences, score functions.

Logits have the categories on their last axis; axes between the first and the last are summed over.
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import at_least_float32, sum_event
from genjax.typing import PRNGKey

__all__ = ["categorical_kl", "concrete_log_prob", "gumbel_softmax", "score_function"]


def gumbel_softmax(
    key: PRNGKey,
    logits: Float[Array, "*batch categories"],
    *,
    temperature: float | Float[Array, ""],
    hard: bool = False,
) -> Float[Array, "*batch categories"]:
    """Draw a relaxed one-hot sample: softmax((logits + G) / temperature), G = -log(-log U).

    Jang, Gu and Poole, "Categorical Reparameterization with Gumbel-Softmax", 2017; Maddison, Mnih
    and Teh, "The Concrete Distribution", 2017. As the temperature falls to 0 the sample becomes
    one-hot and the gradient's variance grows. hard: the one-hot vector of the largest entry, whose
    argmax is an exact sample, with the gradient of the relaxed one, which is biased.

    The divergence of the relaxed sample's law is by `concrete_log_prob`: with the formula of
    categories (`categorical_kl`) the objective is no bound. Raises ValueError for a temperature
    that is not positive and finite.

    >>> y = gumbel_softmax(jax.random.key(0), jnp.zeros((3, 4)), temperature=0.5, hard=True)
    >>> y.sum(-1)
    Array([1., 1., 1.], dtype=float32)
    """
    checks.min_rank("logits", logits, 1)
    checks.floating("logits", logits)
    checks.positive("temperature", temperature)
    logits = at_least_float32(logits)
    # jax draws U from (0, 1), both ends excluded, so that no noise is infinite.
    return _relaxed(logits, jax.random.gumbel(key, logits.shape, logits.dtype), temperature, hard)


def _relaxed(logits: Array, gumbel: Array, temperature: float | Array, hard: bool) -> Array:
    soft = jax.nn.softmax((logits + gumbel) / temperature, axis=-1)
    if not hard:
        return soft
    one_hot = jax.nn.one_hot(jnp.argmax(soft, axis=-1), logits.shape[-1], dtype=soft.dtype)
    return soft + jax.lax.stop_gradient(one_hot - soft)


def concrete_log_prob(
    y: Float[Array, "batch *event categories"],
    logits: Float[Array, "batch *event categories"],
    *,
    temperature: float | Float[Array, ""],
) -> Float[Array, " batch"]:
    """Log density of the relaxed samples of `gumbel_softmax` on the simplex, in nats.

        log p(y) = log (K-1)! + (K-1) log t + sum_k [log pi_k - (t+1) log y_k]
                   - K log sum_k pi_k y_k^-t

    with pi = softmax(logits) and t the temperature: Maddison, Mnih and Teh 2017, eq. (10). Entries
    of y below the smallest normal number, where the density has no limit, count as that number.
    Raises ValueError where shapes differ and for a temperature that is not positive and finite.

    >>> y = gumbel_softmax(jax.random.key(0), jnp.zeros((3, 4)), temperature=0.5)
    >>> concrete_log_prob(y, jnp.zeros((3, 4)), temperature=0.5).shape
    (3,)
    """
    checks.min_rank("y", y, 2)
    checks.same_shape(y=y, logits=logits)
    checks.positive("temperature", temperature)
    y, logits = at_least_float32(y), at_least_float32(logits)
    num = y.shape[-1]
    log_y = jnp.log(jnp.maximum(y, jnp.finfo(y.dtype).tiny))
    log_pi = jax.nn.log_softmax(logits, axis=-1)
    log_sum = jax.nn.logsumexp(log_pi - temperature * log_y, axis=-1)
    total = jnp.sum(log_pi - (temperature + 1) * log_y, axis=-1) - num * log_sum
    return sum_event(total + gammaln(num) + (num - 1) * jnp.log(temperature))


def categorical_kl(
    logits: Float[Array, "batch *event categories"],
    prior_logits: Float[Array, "..."] | None = None,
) -> Float[Array, " batch"]:
    """KL divergence of categorical laws from a prior, exact, in nats, summed over the event.

    sum_k p_k (log p_k - log r_k) with p = softmax(logits) and r = softmax(prior_logits), which
    broadcasts to the logits; by default r is uniform: log K - H(p), between 0 and log K for each
    element of the event (Jang, Gu and Poole 2017). Raises ValueError where the prior does not
    broadcast.

    >>> categorical_kl(jnp.array([[0.0, 0.0], [90.0, 0.0]]))
    Array([0.       , 0.6931], dtype=float32)
    """
    checks.min_rank("logits", logits, 2)
    logits = at_least_float32(logits)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    if prior_logits is None:
        log_r = jnp.full_like(log_p, -math.log(logits.shape[-1]))
    else:
        try:
            prior = jnp.broadcast_to(at_least_float32(prior_logits), logits.shape)
        except ValueError:
            raise ValueError(
                f"prior_logits must broadcast to logits {logits.shape}, "
                f"got shape {jnp.shape(prior_logits)}"
            ) from None
        log_r = jax.nn.log_softmax(prior, axis=-1)
    p = jnp.exp(log_p)
    some = p > 0  # what has no probability adds nothing, whatever its logarithms
    return sum_event(jnp.where(some, p * jnp.where(some, log_p - log_r, 0), 0).sum(-1))


def score_function(
    log_prob: Float[Array, " batch"],
    reward: Float[Array, " batch"],
    baseline: float | Float[Array, ""] | Float[Array, " batch"] = 0.0,
) -> Float[Array, " batch"]:
    """Surrogate whose gradient estimates that of an expected reward: for samples of any law.

    log p(k) * stop_gradient(reward - baseline), k ~ p: the mean of its gradient is that of E[r(k)],
    without bias for every baseline that does not depend on k itself (Williams, "REINFORCE", 1992).
    Its value says nothing. A baseline near the mean reward lowers the variance: a running average,
    or the mean of the other samples of the same example. log_prob in nats. Where the reward itself
    has parameters, add it to the surrogate. Raises ValueError where shapes differ.

    >>> logits, choice = jnp.zeros(3), jnp.array([0, 2])
    >>> log_prob = jax.nn.log_softmax(logits)[choice]
    >>> score_function(log_prob, reward=jnp.array([1.0, 0.0]), baseline=0.5).shape
    (2,)
    """
    checks.rank("log_prob", log_prob, 1)
    checks.same_shape(log_prob=log_prob, reward=reward)
    if jnp.ndim(baseline) > 0:
        checks.same_shape(reward=reward, baseline=baseline)
    advantage = at_least_float32(reward) - at_least_float32(baseline)
    return at_least_float32(log_prob) * jax.lax.stop_gradient(advantage)
