"""Losses of pairs: a chosen and a rejected response, token log-probabilities in, one number a pair.

A pair whose mask hides a whole response teaches nothing: it has loss 0 and no gradient.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid
from jaxtyping import Array, Bool, Float

from genjax import checks
from genjax.alignment.log_probs import MAX_LOG_RATIO, Losses, Mask, Scalar, Tokens, per_row, prepare
from genjax.divergences import F_DIVERGENCES, FDivergence
from genjax.numerics import at_least_float32, masked_mean

__all__ = ["dpo", "f_dpo", "hinge", "ipo", "kto", "kto_reference_point", "orpo", "simpo"]

# One mask for both responses, or (mask of the chosen one, mask of the rejected one).
Where: TypeAlias = Mask | tuple[Mask | None, Mask | None] | None


class _Pairs(NamedTuple):
    """Of each pair: log pi/ref of either response (log pi without a reference); if it counts."""

    chosen: Array
    rejected: Array
    kept: Array

    def losses(self, losses: Array, beta: Scalar, **more: Array) -> Losses:
        """The losses with what every preference loss tells of itself."""
        reward_chosen, reward_rejected = beta * self.chosen, beta * self.rejected
        margin = reward_chosen - reward_rejected
        aux = {
            "reward_chosen": reward_chosen,
            "reward_rejected": reward_rejected,
            "margin": margin,
            "accuracy": (margin > 0).astype(margin.dtype),
            **more,
        }
        return jnp.where(self.kept, losses, 0), jax.lax.stop_gradient(aux)


def _pairs(
    policy_chosen: Array,
    policy_rejected: Array,
    reference_chosen: Array | None,
    reference_rejected: Array | None,
    where: Where,
    normalise: str = "sum",
) -> _Pairs:
    checks.one_of("normalise", normalise, ("sum", "mean"))
    checks.same_shape(policy_chosen=policy_chosen, policy_rejected=policy_rejected)
    masks = where if isinstance(where, tuple) else (where, where)
    found, kept = [], []
    sides = (("chosen", policy_chosen, reference_chosen, masks[0]),
             ("rejected", policy_rejected, reference_rejected, masks[1]))  # fmt: skip
    for side, policy, reference, mask in sides:
        arrays: dict[str, Any] = {f"policy_{side}": policy}
        if reference is not None:
            arrays[f"reference_{side}"] = reference
        mask, cleaned = prepare(mask, **arrays)
        difference = cleaned[0]
        if reference is not None:
            difference = difference - jax.lax.stop_gradient(cleaned[1])
        found.append(per_row(difference, mask, normalise))
        kept.append(jnp.any(mask, axis=1))
    return _Pairs(found[0], found[1], kept[0] & kept[1])


def dpo(
    policy_chosen: Tokens,
    policy_rejected: Tokens,
    reference_chosen: Tokens,
    reference_rejected: Tokens,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    robust: bool = False,
    where: Where = None,
) -> Losses:
    """Direct preference optimisation, -log sigma(beta h) in nats, h = log-ratio of the two.

        h = [log pi/ref](chosen) - [log pi/ref](rejected), summed over the tokens of each

    Its population minimiser under Bradley-Terry preferences of a reward r is the optimum
    ref exp(r / beta) / Z of E r - beta KL(pi || ref) (`optimal_policy`): Rafailov et al. 2023,
    eq. (7). label_smoothing e, the share of labels that are wrong: (1 - e) loss(h) + e loss(-h)
    (Mitchell 2023), or with `robust` the unbiased [(1 - e) loss(h) - e loss(-h)] / (1 - 2 e)
    (Chowdhury et al. 2024), which may be negative.

    Returns (losses [batch], aux [batch]: "reward_chosen", "reward_rejected" = beta log pi/ref,
    "margin", "accuracy"). No gradient flows to the reference. Raises ValueError where shapes
    differ, a log-probability is above 0, beta is not positive or e leaves [0, 1/2].

    >>> chosen, rejected = jnp.full((1, 3), -1.0), jnp.full((1, 3), -2.0)
    >>> losses, aux = dpo(chosen, rejected, chosen, chosen, beta=0.1)
    >>> losses.round(4), aux["margin"].round(4)
    (Array([0.5544], dtype=float32), Array([0.3], dtype=float32))
    """
    checks.positive("beta", beta)
    checks.between("label_smoothing", label_smoothing, 0, 0.5)
    if robust and label_smoothing == 0.5:
        raise ValueError("label_smoothing must be below 0.5 with robust: labels tell nothing there")
    pairs = _pairs(policy_chosen, policy_rejected, reference_chosen, reference_rejected, where)
    h = beta * (pairs.chosen - pairs.rejected)
    right, wrong = -log_sigmoid(h), -log_sigmoid(-h)
    if robust:
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (
            1 - 2 * label_smoothing
        )
    else:
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    return pairs.losses(losses, beta)


def ipo(
    policy_chosen: Tokens,
    policy_rejected: Tokens,
    reference_chosen: Tokens,
    reference_rejected: Tokens,
    *,
    beta: Scalar = 0.1,
    normalise: str = "sum",
    where: Where = None,
) -> Losses:
    """Identity preference optimisation, (h - 1 / (2 beta))^2, h as in `dpo`; in squared nats.

    Azar et al. 2023, eq. (17), whose h is a difference of sums. Common trainers take means over the
    tokens, which is another loss: normalise="mean". aux and errors as `dpo`'s.

    >>> chosen, rejected = jnp.full((1, 3), -1.0), jnp.full((1, 3), -2.0)
    >>> ipo(chosen, rejected, chosen, chosen, beta=0.1)[0].round(4)
    Array([4.], dtype=float32)
    """
    checks.positive("beta", beta)
    pairs = _pairs(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, where, normalise
    )
    return pairs.losses(jnp.square(pairs.chosen - pairs.rejected - 1 / (2 * beta)), beta)


def hinge(
    policy_chosen: Tokens,
    policy_rejected: Tokens,
    reference_chosen: Tokens,
    reference_rejected: Tokens,
    *,
    beta: Scalar = 0.1,
    where: Where = None,
) -> Losses:
    """Hinge on the margin, max(0, 1 - beta h), h = the log-ratio of `dpo` in nats; SLiC's form.

    Zhao et al. 2023; with a reference as Liu et al. 2023. aux and errors as `dpo`'s.

    >>> chosen, rejected = jnp.full((1, 3), -1.0), jnp.full((1, 3), -2.0)
    >>> hinge(chosen, rejected, chosen, chosen, beta=0.1)[0].round(4)
    Array([0.7], dtype=float32)
    """
    checks.positive("beta", beta)
    pairs = _pairs(policy_chosen, policy_rejected, reference_chosen, reference_rejected, where)
    return pairs.losses(jax.nn.relu(1 - beta * (pairs.chosen - pairs.rejected)), beta)


def simpo(
    policy_chosen: Tokens,
    policy_rejected: Tokens,
    *,
    beta: Scalar = 2.0,
    gamma: Scalar = 1.0,
    where: Where = None,
) -> Losses:
    """Without a reference: -log sigma(beta (a_chosen - a_rejected) - gamma) in nats.

    a = mean log-probability of the response's tokens, gamma the margin asked for. Meng et al. 2024,
    eq. (6). aux ("reward_..." = beta a) and errors as `dpo`'s.

    >>> chosen, rejected = jnp.full((1, 3), -1.0), jnp.full((1, 3), -2.0)
    >>> simpo(chosen, rejected)[0].round(4)
    Array([0.3133], dtype=float32)
    """
    checks.positive("beta", beta)
    pairs = _pairs(policy_chosen, policy_rejected, None, None, where, "mean")
    return pairs.losses(-log_sigmoid(beta * (pairs.chosen - pairs.rejected) - gamma), beta)


def orpo(
    policy_chosen: Tokens,
    policy_rejected: Tokens,
    *,
    weight: Scalar = 0.1,
    where: Where = None,
) -> Losses:
    """Supervised loss and odds ratio: -a_chosen - weight log sigma(z_chosen - z_rejected), in nats.

    a = mean log-probability of the response's tokens, z = log(p / (1 - p)) = a - log(-expm1 a) at
    p = e^a, with a kept below -1e-6 where the odds would be infinite. Hong et al. 2024, eqs (6) and
    (7). aux: as `dpo`'s with beta = 1, and "odds_ratio" (its log), "supervised". Raises ValueError
    where shapes differ, a log-probability is above 0 or weight is not positive.

    >>> chosen, rejected = jnp.full((1, 3), -1.0), jnp.full((1, 3), -2.0)
    >>> orpo(chosen, rejected)[0].shape
    (1,)
    """
    checks.positive("weight", weight)
    pairs = _pairs(policy_chosen, policy_rejected, None, None, where, "mean")
    log_odds = []
    for mean in (pairs.chosen, pairs.rejected):
        kept = jnp.minimum(mean, -1e-6)
        log_odds.append(kept - jnp.log(-jnp.expm1(kept)))
    odds_ratio = log_odds[0] - log_odds[1]
    losses = -pairs.chosen - weight * log_sigmoid(odds_ratio)
    return pairs.losses(losses, 1.0, odds_ratio=odds_ratio, supervised=-pairs.chosen)


def f_dpo(
    divergence: str | FDivergence,
    policy_chosen: Tokens,
    policy_rejected: Tokens,
    reference_chosen: Tokens,
    reference_rejected: Tokens,
    *,
    beta: Scalar = 0.1,
    where: Where = None,
) -> Losses:
    """DPO for another divergence: -log sigma(beta [f'(pi/ref)(chosen) - f'(pi/ref)(rejected)]).

    The population minimiser is the optimum of E r - beta D_f(pi || ref), D_f = E_ref f(pi/ref)
    (Wang et al. 2023), wherever all of the reference's support is kept: f'(0) = -infinity, which
    `pearson` (and total variation) lack. `divergence` is a key of `F_DIVERGENCES` or an entry of
    one's own with `slope_of_log`. "kl" is `dpo`: what RLHF calls the reverse KL, KL(pi || ref).

    f' is taken at the log-ratio of the responses (in nats, summed over tokens). Beyond +-20 it goes
    on along its tangent, so that nothing overflows; aux "saturated" counts how many of the two did.
    aux else, and errors, as `dpo`'s; ValueError for a divergence without a slope.

    >>> chosen, rejected = jnp.full((1, 3), -1.0), jnp.full((1, 3), -2.0)
    >>> losses, aux = f_dpo("jensen_shannon", chosen, rejected, chosen, chosen)
    >>> losses.shape
    (1,)
    """
    if isinstance(divergence, str):
        checks.one_of("divergence", divergence, F_DIVERGENCES)
        name, divergence = divergence, F_DIVERGENCES[divergence]
    else:
        name = "the divergence"
    if divergence.slope_of_log is None:
        usable = [key for key, entry in F_DIVERGENCES.items() if entry.slope_of_log is not None]
        raise ValueError(
            f"divergence must have a slope f' that tells ratios apart, which {name} has not: its "
            f"gradient vanishes wherever pi != ref; got no slope_of_log, choose one of {usable}"
        )
    checks.positive("beta", beta)
    slope = divergence.slope_of_log
    pairs = _pairs(policy_chosen, policy_rejected, reference_chosen, reference_rejected, where)

    def extended(log: Array) -> Array:
        inside = jnp.clip(log, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        value, rise = jax.jvp(slope, (inside,), (log - inside,))
        return value + rise

    losses = -log_sigmoid(beta * (extended(pairs.chosen) - extended(pairs.rejected)))
    both = jnp.abs(jnp.stack([pairs.chosen, pairs.rejected])) > MAX_LOG_RATIO
    saturated = jnp.sum(both, axis=0).astype(losses.dtype)
    return pairs.losses(losses, beta, saturated=saturated)


def kto_reference_point(
    log_ratios: Float[Array, " batch"], *, where: Bool[Array, " batch"] | None = None
) -> Float[Array, ""]:
    """KTO's z0 = max(0, mean log pi/ref of mismatched pairs) in nats: an estimate of KL(pi || ref).

    log_ratios are those of responses to other prompts, y_j at x_i. No gradient flows through it.
    Ethayarajh et al. 2024, section 4.1. Raises ValueError unless [batch].

    >>> float(kto_reference_point(jnp.array([1.0, -0.5])))
    0.25
    """
    checks.rank("log_ratios", log_ratios, 1)
    return jax.lax.stop_gradient(jnp.maximum(masked_mean(log_ratios, where), 0))


def kto(
    log_ratio: Float[Array, " batch"],
    desirable: Bool[Array, " batch"],
    reference_point: Scalar,
    *,
    beta: Scalar = 0.1,
    weights: tuple[Scalar, Scalar] = (1.0, 1.0),
) -> Losses:
    """Single responses, good or bad: w (1 - sigma(beta (l - z0))), or of z0 - l where undesirable.

    l = log pi/ref of the response in nats (`sequence_log_prob` of each), z0 = `reference_point`, a
    constant (see `kto_reference_point`): as an argument it keeps rows apart. weights: of desirable
    and of undesirable responses. Ethayarajh et al. 2024, eq. (8). aux: "reward" = beta l. Raises
    ValueError where shapes differ or beta is not positive.

    >>> log_ratio, desirable = jnp.array([1.0, -1.0]), jnp.array([True, False])
    >>> kto(log_ratio, desirable, kto_reference_point(log_ratio))[0].shape
    (2,)
    """
    checks.rank("log_ratio", log_ratio, 1)
    checks.positive("beta", beta)
    checks.same_shape(log_ratio=log_ratio, desirable=desirable)
    checks.rank("reference_point", reference_point, 0)
    log = at_least_float32(log_ratio)
    desirable = jnp.asarray(desirable, bool)
    above = beta * (log - jax.lax.stop_gradient(jnp.asarray(reference_point, log.dtype)))
    good, bad = weights
    # 1 - sigma(x) = sigma(-x), without cancellation.
    losses = jnp.where(desirable, good * jax.nn.sigmoid(-above), bad * jax.nn.sigmoid(above))
    return losses, {"reward": jax.lax.stop_gradient(beta * log)}
