"""Policy gradients with clipped ratios: PPO, GRPO, Dr. GRPO, DAPO and GSPO by level and divisor."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from genjax.alignment.log_probs import (
    MAX_LOG_RATIO,
    Losses,
    Mask,
    Scalar,
    Tokens,
    bounded_ratio,
    log_ratio,
    per_row,
    prepare,
)
from genjax.alignment.rewards import kl_estimate
from genjax.numerics import at_least_float32

__all__ = ["policy_loss", "value_loss"]


def policy_loss(
    log_p: Tokens,
    old: Tokens,
    advantages: Float[Array, " batch"] | Float[Array, "batch time"],
    *,
    where: Mask | None = None,
    clip: tuple[Scalar, Scalar] = (0.2, 0.2),
    ref: Tokens | None = None,
    beta: Scalar = 0.0,
    kl: str = "k3",
    level: str = "token",
    divisor: str | Scalar | None = None,
) -> Losses:
    """Clipped surrogate -min(w A, clip(w, 1 - low, 1 + high) A) + beta KL of each response.

    log_p are the policy's log-probabilities in nats of the tokens drawn, old those of the policy
    that drew them, ratio w = exp(log_p - old); A is one number a response or a token and carries no
    gradient. Densities of continuous actions may be above 0. Schulman et al. 2017, eq. (7).

    level: "token", a ratio for each token, or "sequence", w = exp(mean over the tokens of
    log_p - old) for the response, A [batch] (GSPO, Zheng et al. 2025; clip about 3e-4).
    divisor of the sum over tokens: "length", the response's own number (GRPO, Shao et al. 2024); a
    number such as the longest length (Dr. GRPO, Liu et al. 2025); all tokens / rows, after which
    the batch mean is the mean over tokens (DAPO, Yu et al. 2025, clip (.2, .28)); None, the sum.
    At the level of sequences it divides the KL term alone.
    ref, beta, kl: adds beta times `kl_estimate` of that kind at each token, whose gradient that
    docstring tells; KL in the reward (`kl_rewards`) is the exact way, both is once too often.

    Returns (losses [batch], aux [batch]: "kl" mean of k3 over the response's tokens against ref (or
    old), "clip_fraction" share of them where the clip binds, "ratio" their mean, "saturated" how
    many log-ratios left +-20, where the ratio is held). A response without tokens gives 0. Raises
    ValueError where shapes differ, an option is unknown, or beta > 0 comes without ref.

    >>> log_p = jnp.array([[-1.0, -1.0], [-2.0, -2.0]])
    >>> losses, aux = policy_loss(log_p, log_p, jnp.array([1.0, -1.0]), divisor="length")
    >>> losses
    Array([-1.,  1.], dtype=float32)
    """
    _check_options(clip, ref, beta, level)
    others = {} if ref is None else {"ref": ref}
    where, cleaned = prepare(where, nonpositive=False, log_p=log_p, old=old, **others)
    log_p, old = cleaned[0], jax.lax.stop_gradient(cleaned[1])
    reference = old if ref is None else jax.lax.stop_gradient(cleaned[2])
    advantages = jax.lax.stop_gradient(_spread(advantages, where, level))
    log = log_ratio(log_p, old)
    ratio = bounded_ratio(log if level == "token" else per_row(log, where, "mean")[:, None])
    low, high = clip
    held = jnp.clip(ratio, 1 - low, 1 + high)
    surrogate = -jnp.minimum(ratio * advantages, held * advantages)
    binds = (held * advantages < ratio * advantages).astype(log.dtype)
    if level == "token":
        losses = _divide(surrogate, where, divisor)
        share, mean_ratio = per_row(binds, where, "mean"), per_row(ratio, where, "mean")
    else:
        losses = jnp.where(jnp.any(where, axis=1), surrogate[:, 0], 0)
        share, mean_ratio = binds[:, 0], ratio[:, 0]
    price = jnp.where(where, kl_estimate(log_p, reference, "k3"), 0)
    if ref is not None:
        term = price if kl == "k3" else kl_estimate(log_p, reference, kl)
        losses = losses + beta * _divide(term, where, divisor)
    saturated = jnp.sum((jnp.abs(log) > MAX_LOG_RATIO) & where, axis=1).astype(log.dtype)
    aux = {
        "kl": per_row(price, where, "mean"),
        "clip_fraction": share,
        "ratio": mean_ratio,
        "saturated": saturated,
    }
    return losses, jax.lax.stop_gradient(aux)


def _check_options(
    clip: tuple[Scalar, Scalar], ref: Array | None, beta: Scalar, level: str
) -> None:
    checks.one_of("level", level, ("token", "sequence"))
    checks.at_least("beta", beta, 0)
    for name, bound in zip(("low", "high"), clip, strict=True):
        checks.at_least(f"clip's {name} bound", bound, 0)
    if ref is None and checks.is_concrete(beta) and np.any(np.asarray(beta) > 0):
        raise ValueError(f"beta = {beta} needs ref, the log-probabilities of a reference, got None")


def _spread(advantages: Array, where: Mask, level: str) -> Array:
    """Advantages [batch, time] or [batch, 1], 0 where masked."""
    wide = at_least_float32(advantages)
    if wide.ndim == 1 or level == "sequence":
        checks.shape("advantages", wide, where.shape[:1])
        return jnp.where(jnp.any(where, axis=1), wide, 0)[:, None]
    checks.shape("advantages", wide, where.shape)
    return jnp.where(where, wide, 0)


def _divide(values: Array, where: Mask, divisor: str | Scalar | None) -> Array:
    if isinstance(divisor, str):
        checks.one_of("divisor", divisor, ("length",))
        return per_row(values, where, "mean")
    total = per_row(values, where)
    if divisor is None:
        return total
    checks.positive("divisor", divisor)
    return total / jnp.asarray(divisor, total.dtype)


def value_loss(
    values: Tokens,
    returns: Tokens,
    *,
    old: Tokens | None = None,
    clip: Scalar | None = None,
    where: Mask | None = None,
    divisor: str | Scalar | None = None,
) -> Losses:
    """Squared error of the values, sum_t (V - R)^2 over a response, in squared units of the reward.

    With clip, max((V - R)^2, (V_held - R)^2), V_held the value kept within `clip` of `old`: a value
    that has gone further than that gets no gradient onwards. c1 of Schulman et al. 2017, eq. (9),
    is the caller's. divisor: as in `policy_loss`. aux [batch]: "clip_fraction". Raises ValueError
    where shapes differ or clip comes without old.

    >>> losses, aux = value_loss(jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 1.0]]))
    >>> losses
    Array([1.], dtype=float32)
    """
    if clip is not None:
        checks.positive("clip", clip)
        if old is None:
            raise ValueError(f"clip = {clip} needs old, the values that were held, got None")
    others = {} if old is None else {"old": old}
    where, cleaned = prepare(where, nonpositive=False, values=values, returns=returns, **others)
    values, returns = cleaned[0], jax.lax.stop_gradient(cleaned[1])
    error = jnp.square(values - returns)
    binds = jnp.zeros_like(error)
    if clip is not None:
        before = jax.lax.stop_gradient(cleaned[2])
        held = jnp.square(before + jnp.clip(values - before, -clip, clip) - returns)
        binds = (held > error).astype(error.dtype)
        error = jnp.maximum(error, held)
    return _divide(error, where, divisor), {"clip_fraction": per_row(binds, where, "mean")}
