"""Rewards: models of preferences, the price of leaving the reference, and the optimum it has."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.alignment.log_probs import (
    Losses,
    Mask,
    Scalar,
    Tokens,
    bounded_ratio,
    log_ratio,
    prepare,
)
from genjax.numerics import at_least_float32, exp_excess

__all__ = [
    "adapt_beta",
    "bradley_terry",
    "kl_estimate",
    "kl_rewards",
    "optimal_policy",
    "plackett_luce",
    "ranked_bradley_terry",
]

KL_ESTIMATES = ("k1", "k2", "k3")


def bradley_terry(
    chosen: Float[Array, " batch"],
    rejected: Float[Array, " batch"],
    *,
    margin: Scalar = 0.0,
) -> Losses:
    """Loss of a reward model on pairs, -log sigma(r_chosen - r_rejected - margin), in nats.

    Bradley & Terry 1952; Ouyang et al. 2022, eq. (1); a margin for pairs that differ much as in
    Llama 2 (Touvron et al. 2023). The reward is known up to a constant. aux: "accuracy" (1 where
    the chosen one has the larger reward), "difference" (r_chosen - r_rejected). Raises ValueError
    unless both are [batch] and of one shape.

    >>> losses, aux = bradley_terry(jnp.array([2.0, 0.0]), jnp.array([0.0, 0.0]))
    >>> losses.round(4)
    Array([0.1269, 0.6931], dtype=float32)
    """
    checks.rank("chosen", chosen, 1)
    checks.same_shape(chosen=chosen, rejected=rejected)
    difference = at_least_float32(chosen) - at_least_float32(rejected)
    losses = -log_sigmoid(difference - _per_row("margin", margin, difference))
    accuracy = (difference > 0).astype(difference.dtype)
    return losses, {"accuracy": accuracy, "difference": difference}


def _per_row(name: str, value: Scalar, like: Array) -> Array:
    value = jnp.asarray(value, like.dtype)
    if value.ndim:
        checks.shape(name, value, like.shape)
    return value


def _in_order(rewards: Array, ranking: Array) -> Array:
    """Rewards [batch, K] from the best to the worst."""
    checks.rank("rewards", rewards, 2)
    checks.same_shape(rewards=rewards, ranking=ranking)
    checks.integer("number of ranked responses", rewards.shape[1], 2)
    if not jnp.issubdtype(ranking.dtype, jnp.integer):
        raise TypeError(f"ranking must hold integers, got {ranking.dtype}")
    if checks.is_concrete(ranking):
        orders = np.sort(np.asarray(ranking), axis=1)
        if not (orders == np.arange(ranking.shape[1])[None]).all():
            raise ValueError(
                f"each row of ranking must be a permutation of 0 .. {ranking.shape[1] - 1}, the "
                f"best first, got {np.asarray(ranking).tolist()}"
            )
    return jnp.take_along_axis(at_least_float32(rewards), ranking, axis=1)


def plackett_luce(
    rewards: Float[Array, "batch K"], ranking: Int[Array, "batch K"]
) -> Float[Array, " batch"]:
    """-log P(ranking) in nats, with P = prod_i exp(r_i) / sum_{j >= i} exp(r_j), i best to worst.

    `ranking[b]` lists the indices of row b's responses, the best first. With K = 2 it is
    `bradley_terry`. Plackett 1975; Luce 1959. Raises ValueError unless each row of ranking is a
    permutation.

    >>> plackett_luce(jnp.zeros((1, 3)), jnp.array([[2, 0, 1]])).round(4)
    Array([1.7918], dtype=float32)
    """
    ordered = _in_order(rewards, ranking)
    tails = jax.lax.cumlogsumexp(ordered, axis=1, reverse=True)
    return jnp.sum(tails - ordered, axis=1)


def ranked_bradley_terry(
    rewards: Float[Array, "batch K"], ranking: Int[Array, "batch K"]
) -> Float[Array, " batch"]:
    """Mean of -log sigma(r_i - r_j) in nats over the K (K - 1) / 2 pairs with i ranked above j.

    All pairs of one prompt in one loss, as Ouyang et al. 2022, eq. (1) has it: pairs spread over
    batches as if they were independent overfit. Raises as `plackett_luce` does.

    >>> ranked_bradley_terry(jnp.zeros((1, 3)), jnp.array([[2, 0, 1]])).round(4)
    Array([0.6931], dtype=float32)
    """
    ordered = _in_order(rewards, ranking)
    better, worse = np.triu_indices(ordered.shape[1], 1)
    return jnp.mean(-log_sigmoid(ordered[:, better] - ordered[:, worse]), axis=1)


def kl_estimate(log_p: Tokens, log_ref: Tokens, kind: str = "k3") -> Tokens:
    """Estimates of KL(p || ref) in nats at samples of p, with l = log p - log ref.

        k1 = l            k2 = l^2 / 2            k3 = exp(-l) - 1 + l

    k1 and k3 are unbiased, k3 is never negative, k2 is biased by the third order of l (Schulman
    2020). As a loss on own samples, without the gradient of the sampling itself, they are not the
    same: the expected gradient of k1 is 0, that of k2 is the gradient of KL(p || ref), that of k3
    the gradient of KL(ref || p). KL(p || ref) belongs into the reward (`kl_rewards`), where k1 is
    exact. The ratio exp(-l) is kept within exp(+-20). Raises ValueError for another kind or other
    shapes.

    >>> kl_estimate(jnp.array([[-1.0]]), jnp.array([[-2.0]]), "k2")
    Array([[0.5]], dtype=float32)
    """
    checks.one_of("kind", kind, KL_ESTIMATES)
    checks.same_shape(log_p=log_p, log_ref=log_ref)
    log = log_ratio(at_least_float32(log_p), at_least_float32(log_ref))
    if kind == "k1":
        return log
    if kind == "k2":
        return 0.5 * jnp.square(log)
    near = jnp.abs(log) < 1
    return jnp.where(near, exp_excess(jnp.where(near, -log, 0)), bounded_ratio(-log) - 1 + log)


def kl_rewards(
    log_p: Tokens,
    log_ref: Tokens,
    score: Float[Array, " batch"],
    *,
    beta: Scalar,
    where: Mask | None = None,
) -> Tokens:
    """Reward of each token: -beta (log p - log ref), and the score at the last token of its row.

    The sum over a row is score - beta log p/ref, in units of the score, whose mean PPO makes large
    (Ziegler et al. 2019; Ouyang et al. 2022, eq. (2)). No gradient flows through it. Masked tokens
    get 0; of a row without tokens the score is lost. Raises ValueError where shapes differ, a
    log-probability is above 0, or beta is not positive.

    >>> log_p, log_ref = jnp.array([[-1.0, -1.0]]), jnp.array([[-2.0, -1.0]])
    >>> kl_rewards(log_p, log_ref, jnp.array([1.0]), beta=0.1)
    Array([[-0.1,  1. ]], dtype=float32)
    """
    checks.positive("beta", beta)
    where, (log_p, log_ref) = prepare(where, log_p=log_p, log_ref=log_ref)
    checks.shape("score", score, log_p.shape[:1])
    later = jnp.cumsum(where[:, ::-1], axis=1)[:, ::-1]  # tokens from here on, this one too
    last = where & (later == 1)
    price = beta * log_ratio(log_p, log_ref)
    rewards = jnp.where(last, at_least_float32(score)[:, None], 0) - jnp.where(where, price, 0)
    return jax.lax.stop_gradient(rewards)


def optimal_policy(
    log_ref: Float[Array, " strings"], rewards: Float[Array, " strings"], *, beta: Scalar
) -> tuple[Float[Array, " strings"], Float[Array, ""]]:
    """Optimum of E r - beta KL(p || ref) over all laws p: (log p*, its value beta log Z).

        p* = ref exp(r / beta) / Z,        Z = sum ref exp(r / beta)

    over strings that can be listed; the value has the units of the reward. Where the reference is
    0 the optimum is 0. Rafailov et al. 2023, eq. (4); Korbak et al. 2022. Raises ValueError unless
    both are [strings], one at least, and beta is positive.

    >>> log_p, value = optimal_policy(jnp.log(jnp.full(4, 0.25)), jnp.arange(4.0), beta=0.5)
    """
    checks.rank("log_ref", log_ref, 1)
    checks.same_shape(log_ref=log_ref, rewards=rewards)
    checks.not_empty("log_ref", log_ref)
    checks.positive("beta", beta)
    tilted = at_least_float32(log_ref) + at_least_float32(rewards) / beta
    log_total = jax.nn.logsumexp(tilted)
    return tilted - log_total, beta * (log_total - jax.nn.logsumexp(at_least_float32(log_ref)))


def adapt_beta(beta: Scalar, kl: Scalar, *, target: Scalar) -> Float[Array, ""]:
    """Double beta where the KL is above 1.5 times its target, halve it below target / 1.5.

    The bound on steps of Schulman et al. 2017, section 4, kl and target in nats. Raises ValueError
    where beta or target is not positive.

    >>> float(adapt_beta(0.25, kl=10.0, target=6.0))
    0.5
    """
    checks.positive("beta", beta)
    checks.positive("target", target)
    factor = jnp.where(kl > 1.5 * target, 2.0, jnp.where(kl < target / 1.5, 0.5, 1.0))
    return jnp.asarray(beta) * factor
