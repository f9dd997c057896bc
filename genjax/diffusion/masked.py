"""Masked diffusion: tokens hidden with a chance that grows with time, and its bounds on -log p(x).

At time t each token is hidden, independently, with probability m(t) = 1 - alpha(t), from 0 at t = 0
to 1 at t = 1; the hidden token is the number `vocabulary`, one above the tokens themselves. A
network predicts what is hidden: predict(z [batch, time]) -> logits [batch, time, vocabulary]. It
needs no time, which tells nothing of the tokens (Ou et al. 2024). A further column of logits, for
the hidden token, is dropped; visible tokens are taken as they are (SUBS, Sahoo et al. 2024).
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from genjax import checks
from genjax.diffusion.schedules import derivative
from genjax.diffusion.times import TimesFn
from genjax.likelihoods import token_log_probs
from genjax.numerics import at_least_float32
from genjax.randomness import Index, indexed_keys, low_discrepancy
from genjax.typing import PRNGKey

Tokens: TypeAlias = Int[Array, "batch time"] | UInt[Array, "batch time"]
Mask: TypeAlias = Bool[Array, "batch time"]
# z [batch, time] -> logits [batch, time, vocabulary]
PredictFn: TypeAlias = Callable[[Array], Array]
# t -> the share m(t) of hidden tokens
MaskingFn: TypeAlias = Callable[[Array], Array]
Bound: TypeAlias = tuple[Float[Array, " batch"], dict[str, Array]]

MASKING_SCHEDULES: dict[str, MaskingFn] = {
    "linear": lambda t: t,
    "cosine": lambda t: jnp.sin(0.5 * math.pi * t),
    "quadratic": jnp.square,
}


# t -> alpha(t) = 1 - m(t), without the cancellation near t = 1.
_REMAINING: dict[str, MaskingFn] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 2 * jnp.square(jnp.sin(0.25 * math.pi * (1 - t))),
    "quadratic": lambda t: (1 - t) * (1 + t),
}


def masking(schedule: str | MaskingFn) -> MaskingFn:
    """The share m(t) of a schedule by name, or of one's own; raises unless m(0) = 0, m(1) = 1."""
    if not callable(schedule):
        checks.one_of("schedule", schedule, MASKING_SCHEDULES)
        return MASKING_SCHEDULES[schedule]
    ends = schedule(jnp.array([0.0, 1.0]))
    if checks.is_concrete(ends) and not np.allclose(ends, [0, 1], atol=1e-6):
        raise ValueError(f"schedule must rise from 0 at t = 0 to 1 at t = 1, got {ends} there")
    return schedule


def masked_cross_entropy(
    predict: PredictFn,
    x: Tokens,
    hidden: Mask,
    *,
    vocabulary: int,
    where: Mask | None = None,
) -> Float[Array, " batch"]:
    """Cross-entropy in nats of what is hidden: sum over hidden i of -log p(x_i | the rest of x).

    The one number that all bounds weigh (Austin et al. 2021). where: False at padding, which is
    never counted and comes to `predict` as hidden tokens, whatever it holds. Raises ValueError
    where shapes differ, a concrete token is not below `vocabulary`, or `predict` has other columns.

    >>> predict = lambda *given: jnp.zeros((2, 6, 4))
    >>> x, hidden = jnp.zeros((2, 6), jnp.int32), jnp.arange(12).reshape(2, 6) < 3
    >>> masked_cross_entropy(predict, x, hidden, vocabulary=4)[0].round(3)
    Array(4.159, dtype=float32)
    """
    x, where = _check(x, vocabulary, where)
    checks.shape("hidden", hidden, x.shape)
    hidden = hidden & where
    z = jnp.where(hidden | ~where, vocabulary, x)
    logits = token_logits(predict(z), x, vocabulary)
    log_p = token_log_probs(jnp.where(hidden[..., None], logits, 0), x)
    return -jnp.sum(jnp.where(hidden, log_p, 0), axis=1)


def _check(x: Array, vocabulary: int, where: Array | None) -> tuple[Array, Array]:
    """x as int32 with 0 at padding, and the mask."""
    checks.integer("vocabulary", vocabulary, 2)
    checks.rank("x [batch, time]", x, 2)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"x must hold integer tokens, got dtype {x.dtype}")
    where = jnp.ones(x.shape, bool) if where is None else jnp.asarray(where)
    checks.shape("where", where, x.shape)
    x = jnp.where(where, x, 0).astype(jnp.int32)
    checks.between("x", x, 0, vocabulary - 1)
    return x, where


def token_logits(
    logits: Float[Array, "batch time columns"], x: Tokens, vocabulary: int
) -> Float[Array, "batch time vocabulary"]:
    """What `predict` returned for x, without a column for the hidden token."""
    checks.rank("what predict returns", logits, 3)
    checks.shape("what predict returns", logits, (*x.shape, None))
    if logits.shape[-1] not in (vocabulary, vocabulary + 1):
        raise ValueError(
            f"what predict returns must have {vocabulary} columns, or {vocabulary + 1} with the "
            f"hidden token's, got shape {logits.shape}"
        )
    return logits[..., :vocabulary]


def _hide(key: PRNGKey, share: Array, where: Array, first_index: Index) -> Array:
    """Each kept token hidden with the chance of its row; row i depends on its index alone."""
    keys = indexed_keys(key, len(share), first_index)
    chance = jax.vmap(lambda k: jax.random.uniform(k, where.shape[1:]))(keys)
    return where & (chance < share[:, None])


def _times(times: TimesFn | Array | None, key: PRNGKey, batch: int) -> Array:
    """Times in (0, 1], evenly spread over the batch by default."""
    if times is None:
        return 1 - low_discrepancy(key, batch)
    t = at_least_float32(times(key, batch) if callable(times) else times)
    checks.shape("times", t, (batch,))
    checks.between("times", t, 0, 1)
    return t


def _weighted(
    cross_entropy: Array, weight: Array, hidden: Array, **more: Array
) -> tuple[Array, dict[str, Array]]:
    """The weighted losses with their terms; where nothing is hidden the weight may be infinite."""
    count = jnp.sum(hidden, axis=1).astype(cross_entropy.dtype)
    losses = jnp.where(count > 0, weight, 0).astype(cross_entropy.dtype) * cross_entropy
    mean = jax.lax.stop_gradient(cross_entropy) / jnp.maximum(count, 1)
    return losses, {"masked": count, "cross_entropy": mean, **more}


def masked_bound(
    predict: PredictFn,
    key: PRNGKey,
    x: Tokens,
    *,
    vocabulary: int,
    schedule: str | MaskingFn = "linear",
    times: TimesFn | Float[Array, " batch"] | None = None,
    where: Mask | None = None,
    first_index: Index = 0,
) -> Bound:
    """One draw of the bound on -log p(x) in nats, at a random time and a random mask of it.

        E over t of -alpha'(t) / (1 - alpha(t)) sum over hidden i of -log p(x_i | z_t)

    (Sahoo et al. 2024, MDLM, eq. (10)); the weight is d log m(t) / dt, 1 / t for "linear". In the
    mean no schedule gives another number (`order_bound` needs none), but another variance. It is a
    weighted sum: a mean over the hidden places is no bound.

    schedule: one of `MASKING_SCHEDULES` or m(t). times: (0, 1], uniform and evenly spread by
    default. where: False at padding. Returns (losses [batch], aux [batch]: "masked", how many were
    hidden; "cross_entropy", nats for each of them; "time"). Raises as `masked_cross_entropy` does,
    and for times outside [0, 1].

    >>> predict = lambda *given: jnp.zeros((2, 6, 4))
    >>> x = jnp.zeros((2, 6), jnp.int32)
    >>> losses, aux = masked_bound(predict, jax.random.key(0), x, vocabulary=4)
    >>> losses.shape, sorted(aux)
    ((2,), ['cross_entropy', 'masked', 'time'])
    """
    share = masking(schedule)
    x, where = _check(x, vocabulary, where)
    key_time, key_mask = jax.random.split(key)
    t = _times(times, key_time, len(x))
    hidden = _hide(key_mask, share(t), where, first_index)
    weight = derivative(lambda t: jnp.log(share(t)), jnp.maximum(t, jnp.finfo(t.dtype).tiny))
    cross_entropy = masked_cross_entropy(predict, x, hidden, vocabulary=vocabulary, where=where)
    return _weighted(cross_entropy, weight, hidden, time=t)


def order_bound(
    predict: PredictFn,
    key: PRNGKey,
    x: Tokens,
    *,
    vocabulary: int,
    where: Mask | None = None,
    first_index: Index = 0,
) -> Bound:
    """One draw of the same bound without a schedule: (T / n) sum over n hidden i of -log p(x_i).

    n is uniform in 1 .. T, evenly spread over the batch, and the n places are uniform: the mean
    over all orders of autoregressive codes of x in nats (Uria et al. 2014; Hoogeboom et al. 2022,
    eq. (6)). T counts the row's own tokens. It varies less than `masked_bound`, which is why
    evaluation takes it. aux and errors as there, without "time".

    >>> predict = lambda *given: jnp.zeros((2, 6, 4))
    >>> x = jnp.zeros((2, 6), jnp.int32)
    >>> losses, aux = order_bound(predict, jax.random.key(0), x, vocabulary=4)
    >>> losses.shape, sorted(aux)
    ((2,), ['cross_entropy', 'masked'])
    """
    x, where = _check(x, vocabulary, where)
    key_count, key_order = jax.random.split(key)
    length = jnp.sum(where, axis=1)
    drawn = jnp.floor(low_discrepancy(key_count, len(x)) * length).astype(length.dtype)
    count = 1 + jnp.minimum(drawn, jnp.maximum(length - 1, 0))
    hidden = first_places(random_scores(key_order, where, first_index), count)
    cross_entropy = masked_cross_entropy(predict, x, hidden, vocabulary=vocabulary, where=where)
    return _weighted(cross_entropy, length / count, hidden)


def random_scores(key: PRNGKey, where: Mask, first_index: Index) -> Float[Array, "batch time"]:
    """Uniform scores of the kept places, -infinity elsewhere; row i depends on its index alone."""
    keys = indexed_keys(key, len(where), first_index)
    scores = jax.vmap(lambda k: jax.random.uniform(k, where.shape[1:]))(keys)
    return jnp.where(where, scores, -jnp.inf)


def first_places(scores: Float[Array, "batch time"], count: Int[Array, " batch"]) -> Mask:
    """The `count` places of each row with the largest scores above -infinity."""
    ranks = jnp.argsort(jnp.argsort(-scores, axis=1), axis=1)
    return (ranks < count[:, None]) & (scores > -jnp.inf)


def step_bound(
    predict: PredictFn,
    key: PRNGKey,
    x: Tokens,
    *,
    vocabulary: int,
    num_steps: int,
    schedule: str | MaskingFn = "linear",
    where: Mask | None = None,
    first_index: Index = 0,
) -> Bound:
    """One draw of the bound in nats of the chain of `num_steps` steps, at times i / num_steps.

        sum over i of (alpha_s - alpha_t) / (1 - alpha_t) sum over hidden of -log p(x_i | z_t),

    s = t - 1 / num_steps (Austin et al. 2021, absorbing), of which one step is drawn, evenly
    spread over the batch, times `num_steps`. Of an exact network at least the continuous one in
    value, for what is hidden costs more the later it is; it depends on the schedule, and has
    `masked_bound` as its limit. aux and errors as there.

    >>> predict = lambda *given: jnp.zeros((2, 6, 4))
    >>> x, options = jnp.zeros((2, 6), jnp.int32), dict(vocabulary=4, num_steps=8)
    >>> losses, aux = step_bound(predict, jax.random.key(0), x, **options)
    >>> losses.shape
    (2,)
    """
    checks.integer("num_steps", num_steps, 1)
    share = masking(schedule)
    x, where = _check(x, vocabulary, where)
    key_time, key_mask = jax.random.split(key)
    number = 1 + jnp.floor(low_discrepancy(key_time, len(x)) * num_steps)
    number = jnp.minimum(number, num_steps)
    before, now = share((number - 1) / num_steps), share(number / num_steps)
    hidden = _hide(key_mask, now, where, first_index)
    cross_entropy = masked_cross_entropy(predict, x, hidden, vocabulary=vocabulary, where=where)
    weight = num_steps * (now - before) / now
    return _weighted(cross_entropy, weight, hidden, time=number / num_steps)


def score_entropy(
    log_score: Callable[[Array, Array], Array],
    key: PRNGKey,
    x: Tokens,
    *,
    vocabulary: int,
    schedule: str | MaskingFn = "linear",
    times: TimesFn | Float[Array, " batch"] | None = None,
    where: Mask | None = None,
    first_index: Index = 0,
) -> Bound:
    """Denoising score entropy of ratios s_y = q(z with y at i) / q(z), a bound on -log p(x), nats.

        d log m / dt sum over hidden i of [ sum_y u_y - log u_{x_i} - 1 ],  u = s m / alpha

    log_score(z [batch, time], t [batch]) gives log s [batch, time, vocabulary]. The true ratios are
    s_y = alpha / (1 - alpha) p(y | z), with which this is the integrand of `masked_bound`: Lou,
    Meng, Ermon 2024 (SEDD), eq. (10) with the absorbing rates. Times are kept below 1 - 1e-5: at 1
    alpha, and so every ratio, is 0. aux and errors as `masked_bound`'s, "cross_entropy" the bracket
    for each hidden token.

    >>> log_score = lambda z, t: jnp.zeros((2, 6, 4))
    >>> x = jnp.zeros((2, 6), jnp.int32)
    >>> losses, aux = score_entropy(log_score, jax.random.key(0), x, vocabulary=4)
    >>> losses.shape
    (2,)
    """
    share = masking(schedule)
    x, where = _check(x, vocabulary, where)
    key_time, key_mask = jax.random.split(key)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    t = jnp.clip(_times(times, key_time, len(x)), tiny, 1 - 1e-5)
    hidden = _hide(key_mask, share(t), where, first_index)
    z = jnp.where(hidden | ~where, vocabulary, x)
    log_s = token_logits(at_least_float32(log_score(z, t)), x, vocabulary)
    if callable(schedule):
        remaining = jnp.maximum(1 - share(t), 0.5 * jnp.finfo(t.dtype).eps)
    else:
        remaining = _REMAINING[schedule](t)
    log_u = log_s + (jnp.log(share(t)) - jnp.log(remaining))[:, None, None]
    log_u = jnp.where(hidden[..., None], log_u, 0)
    chosen = jnp.take_along_axis(log_u, x[..., None], axis=-1)[..., 0]
    terms = jnp.sum(jnp.exp(log_u), axis=-1) - chosen - 1
    bracket = jnp.sum(jnp.where(hidden, terms, 0), axis=1)
    weight = derivative(lambda t: jnp.log(share(t)), t)
    return _weighted(bracket, weight, hidden, time=t)
