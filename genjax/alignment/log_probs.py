"""Log-probabilities of tokens and responses, and the differences that all objectives are made of.

Masked places never matter, whatever they hold: they are replaced before anything is computed.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from genjax import checks
from genjax.likelihoods import token_log_probs
from genjax.numerics import at_least_float32

__all__ = ["sequence_log_prob", "token_entropy", "token_log_probs"]

Tokens: TypeAlias = Float[Array, "batch time"]
Scalar: TypeAlias = float | int | Array
Mask: TypeAlias = Bool[Array, "batch time"]
Losses: TypeAlias = tuple[Float[Array, " batch"], dict[str, Array]]
# exp of more is an accident of a policy that has left its reference, and overflows soon after.
MAX_LOG_RATIO = 20.0


def prepare(
    where: Mask | None, *, nonpositive: bool = True, **arrays: Array
) -> tuple[Mask, list[Tokens]]:
    """The mask (all true for None), and the arrays [batch, time] as float32 with 0 where masked.

    Raises by name where shapes differ or a kept log-probability is above 0.
    """
    first = next(iter(arrays))
    for name, x in arrays.items():
        checks.rank(f"{name} [batch, time]", x, 2)
        checks.floating(name, x)
    checks.same_shape(**arrays)
    if where is None:
        where = jnp.ones(arrays[first].shape, bool)
    checks.shape("where", where, arrays[first].shape)
    cleaned = {name: jnp.where(where, at_least_float32(x), 0) for name, x in arrays.items()}
    if nonpositive:
        for name, x in cleaned.items():
            check_nonpositive(name, x)
    return where, list(cleaned.values())


def check_nonpositive(name: str, x: Array) -> None:
    """Raise ValueError where a concrete log-probability is above 0 by more than rounding."""
    if checks.is_concrete(x) and x.size and float(np.max(x)) > 1e-4:
        raise ValueError(
            f"{name} must hold log-probabilities, at most 0, got {float(np.max(x)):.4g}: "
            "are these logits or probabilities?"
        )


def log_ratio(log_p: Array, log_q: Array) -> Array:
    """log p/q; 0 where both probabilities are 0."""
    nothing = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    return jnp.where(nothing, 0, log_p) - jnp.where(nothing, 0, log_q)


def bounded_ratio(log_ratio: Array) -> Array:
    """exp of a log-ratio kept within +-`MAX_LOG_RATIO`, beyond which no gradient flows."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def per_row(values: Tokens, where: Mask, normalise: str = "sum") -> Float[Array, " batch"]:
    """Sum or mean over the kept places of each row; 0 for a row that keeps none."""
    total = jnp.sum(jnp.where(where, values, 0), axis=1)
    if normalise == "sum":
        return total
    return total / jnp.maximum(jnp.sum(where, axis=1), 1).astype(total.dtype)


def sequence_log_prob(
    log_probs: Tokens, *, where: Mask | None = None, normalise: str = "sum"
) -> Float[Array, " batch"]:
    """Log-probability of each response in nats: sum_t log p_t over the tokens that `where` keeps.

    normalise="mean" divides by their number, as SimPO's reward does (Meng et al. 2024, eq. 4). A
    row that keeps no token gives 0. Raises ValueError unless log_probs is [batch, time] and at
    most 0, and for an unknown normalise.

    >>> sequence_log_prob(jnp.log(jnp.array([[0.5, 0.5]])))  # log 1/4
    Array([-1.3863], dtype=float32)
    """
    checks.one_of("normalise", normalise, ("sum", "mean"))
    where, (log_probs,) = prepare(where, log_probs=log_probs)
    return per_row(log_probs, where, normalise)


def token_entropy(logits: Float[Array, "batch time vocabulary"]) -> Tokens:
    """Entropy in nats of each position's law, -sum_v p_v log p_v: the bonus of PPO's eq. (9).

    >>> token_entropy(jnp.zeros((1, 2, 4)))
    Array([[1.3863, 1.3863]], dtype=float32)
    """
    checks.rank("logits", logits, 3)
    log_p = jax.nn.log_softmax(at_least_float32(logits))
    p = jnp.exp(log_p)
    return -jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, log_p, 0), 0), axis=-1)
