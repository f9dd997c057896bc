"""Advantages: how much better than expected a token, or a response of a group, has been."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from genjax import checks
from genjax.alignment.log_probs import Mask, Scalar, Tokens, prepare
from genjax.numerics import at_least_float32

__all__ = ["Advantages", "gae", "group_advantages", "leave_one_out", "whiten"]


class Advantages(NamedTuple):
    """Advantages of tokens, and the returns = advantages + values that a value function learns."""

    advantages: Float[Array, "batch time"]
    returns: Float[Array, "batch time"]


def gae(
    rewards: Tokens,
    values: Tokens,
    dones: Bool[Array, "batch time"] | Float[Array, "batch time"],
    *,
    bootstrap: Float[Array, " batch"] | None = None,
    discount: Scalar = 1.0,
    decay: Scalar = 0.95,
    where: Mask | None = None,
) -> Advantages:
    """Generalised advantages, A_t = delta_t + discount decay (1 - done_t) A_{t+1}.

    delta_t = r_t + discount (1 - done_t) V_{t+1} - V_t, in units of the reward. done_t: the episode
    ended after step t, so neither V_{t+1} nor A_{t+1} belongs to it. `bootstrap` is the value after
    the last step (0 by default). Masked steps are as if they were dropped: they get 0, and the step
    before them is followed by the one after. No gradient flows through either result. decay = 1
    gives returns minus values, 0 the error of one step. Schulman et al. 2016, eq. (16). Raises
    ValueError where shapes differ or discount or decay leave [0, 1].

    >>> rewards, values = jnp.array([[0.0, 0.0, 1.0]]), jnp.zeros((1, 3))
    >>> gae(rewards, values, jnp.array([[False, False, True]]), decay=0.5).advantages
    Array([[0.25, 0.5 , 1.  ]], dtype=float32)
    """
    checks.between("discount", discount, 0, 1)
    checks.between("decay", decay, 0, 1)
    checks.same_shape(rewards=rewards, dones=dones)
    where, (rewards, values) = prepare(where, nonpositive=False, rewards=rewards, values=values)
    batch = len(rewards)
    dtype = jnp.promote_types(rewards.dtype, values.dtype)
    last = jnp.zeros(batch, dtype) if bootstrap is None else at_least_float32(bootstrap)
    checks.shape("bootstrap", last, (batch,))
    going = jnp.where(where, 1 - jnp.asarray(dones, dtype), 0)

    def step(after: tuple[Array, Array], now: tuple[Array, ...]) -> tuple:
        next_value, next_advantage = after
        reward, value, going, kept = now
        ahead = discount * going
        # Where nothing goes on, what lies ahead may be anything, NaN too.
        next_value, next_advantage = (
            jnp.where(going == 0, 0, x) for x in (next_value, next_advantage)
        )
        advantage = reward + ahead * next_value - value + decay * ahead * next_advantage
        after = jnp.where(kept, value, after[0]), jnp.where(kept, advantage, after[1])
        return after, advantage

    start = last.astype(dtype), jnp.zeros(batch, dtype)
    steps = (rewards.astype(dtype).T, values.astype(dtype).T, going.T, where.T)
    advantages = jax.lax.scan(step, start, steps, reverse=True)[1].T
    advantages = jax.lax.stop_gradient(jnp.where(where, advantages, 0))
    return Advantages(advantages, advantages + jax.lax.stop_gradient(values))


def whiten(x: Tokens, *, where: Mask | None = None) -> Tokens:
    """(x - mean) / std over all kept entries of the batch, masked ones 0; std of the population.

    Entries that are all equal give 0. Rows depend on each other by it, so it is a step of its own:
    returns are made before it. Raises ValueError where shapes differ.

    >>> whiten(jnp.array([[1.0, 3.0]]))
    Array([[-1.,  1.]], dtype=float32)
    """
    x = at_least_float32(x)
    where = jnp.ones(x.shape, bool) if where is None else where
    checks.shape("where", where, x.shape)
    x = jnp.where(where, x, 0)
    count = jnp.maximum(jnp.sum(where), 1).astype(x.dtype)
    centred = jnp.where(where, x - jnp.sum(x) / count, 0)
    variance = jnp.sum(jnp.square(centred)) / count
    # Equal entries differ from their mean by rounding.
    rounding = jnp.square(8 * jnp.finfo(x.dtype).eps * jnp.max(jnp.abs(x), initial=0.0))
    spread = variance > rounding
    return jnp.where(spread, centred / jnp.sqrt(jnp.where(spread, variance, 1)), 0)


def _groups(rewards: Array) -> Array:
    checks.rank("rewards [groups, n]", rewards, 2)
    if rewards.shape[1] < 2:
        raise ValueError(
            f"a group must have at least 2 responses, got rewards of shape {rewards.shape}: alone "
            "a response has no other to be compared with"
        )
    return at_least_float32(rewards)


def group_advantages(
    rewards: Float[Array, "groups n"], *, scale: str = "std", epsilon: float = 1e-6
) -> Float[Array, "groups n"]:
    """Advantages within groups of responses to one prompt: r - mean, over std with scale="std".

    "std": divided by the sample's standard deviation (n - 1) + epsilon, GRPO (Shao et al. 2024);
    it gives questions that are nearly always or nearly never answered more weight. "none": Dr. GRPO
    (Liu et al. 2025). A group of equal rewards has advantage 0. Raises ValueError unless rewards
    is [groups, n] with n at least 2, and for another scale.

    >>> group_advantages(jnp.array([[1.0, 0.0, 0.0, 1.0]])).round(3)
    Array([[ 0.866, -0.866, -0.866,  0.866]], dtype=float32)
    """
    checks.one_of("scale", scale, ("std", "none"))
    rewards = _groups(rewards)
    # The mean of equal rewards differs from them by rounding, which over its own std is of order 1.
    equal = jnp.all(rewards == rewards[:, :1], axis=1, keepdims=True)
    centred = jnp.where(equal, 0, rewards - jnp.mean(rewards, axis=1, keepdims=True))
    if scale == "none":
        return centred
    variance = jnp.sum(jnp.square(centred), axis=1, keepdims=True) / (rewards.shape[1] - 1)
    positive = variance > 0
    std = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)
    return centred / (std + epsilon)


def leave_one_out(rewards: Float[Array, "groups n"]) -> Float[Array, "groups n"]:
    """r_i - mean of the other rewards of its group = n / (n - 1) (r_i - mean): RLOO.

    The baseline does not depend on the response itself, so the policy gradient is unbiased
    (Kool et al. 2019; Ahmadian et al. 2024). Raises ValueError unless rewards is [groups, n] with
    n at least 2.

    >>> leave_one_out(jnp.array([[1.0, 0.0, 0.0]])).round(3)
    Array([[ 1. , -0.5, -0.5]], dtype=float32)
    """
    n = rewards.shape[-1] if rewards.ndim else 0
    return group_advantages(rewards, scale="none") * (n / max(n - 1, 1))
