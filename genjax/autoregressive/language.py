"""The loss of a language model: the next token's cross-entropy, and bits per byte.

A network is a callable tokens [batch, length] -> logits [batch, length, vocabulary]: position t
predicts token t and sees the tokens before it alone. The shift by one is inside the network.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from genjax import checks
from genjax.numerics import at_least_float32
from genjax.typing import Params

__all__ = ["bits_per_byte", "dynamic_evaluation", "next_token"]

Tokens = Int[Array, "batch length"] | UInt[Array, "batch length"]


def next_token(
    logits_fn: Callable[[Array], Array],
    tokens: Tokens,
    *,
    where: Bool[Array, "batch length"] | None = None,
    z_loss: float | int = 0.0,
    label_smoothing: float | int = 0.0,
    divisor: float | int | Float[Array, ""] | None = None,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """Cross-entropy of a row's tokens in nats, of those that `where` keeps.

    losses[b] = 1/divisor sum_t where[b, t] [ (1 - s) CE_t + s mean_v(log Z_t - logits_tv)
    + z_loss (log Z_t)^2 ], CE_t = log Z_t - logits_t[token t], Z the sum of exp(logits), s the
    smoothing to the uniform law (Szegedy et al. 2016); z_loss keeps Z near 1 (PaLM, Chowdhery et
    al. 2022: 1e-4). divisor None gives the sum, -log p(tokens) of a row; kept tokens / rows gives
    a mean over rows that is the mean over tokens, also where batches are accumulated or sharded.

    What `where` hides may hold any token and any logit: hidden tokens are still read by a network
    (a prompt that is given, not learnt), but for those after a row's last kept one, which are
    replaced by 0. aux: tokens, correct (greedy), log_z (the mean over kept tokens) of each row.
    Raises TypeError unless tokens are integers, ValueError where shapes do not fit, where a
    kept token lies outside the vocabulary, or where `where` hides everything.

        losses, aux = next_token(lambda x: net.apply(params, x), tokens, where=tokens != pad)

    >>> logits_fn = lambda tokens: jnp.zeros((*tokens.shape, 4))
    >>> losses, aux = next_token(logits_fn, jnp.array([[0, 1, 2]]))
    >>> losses / 3
    Array([1.3863], dtype=float32)
    """
    checks.rank("tokens", tokens, 2)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers [batch, length], got dtype {tokens.dtype}")
    checks.between("label_smoothing", label_smoothing, 0, 1)
    checks.at_least("z_loss", z_loss, 0)
    if divisor is not None:
        checks.positive("divisor", divisor)
    tokens = tokens.astype(jnp.int32)
    if where is None:
        kept, given = jnp.ones(tokens.shape, bool), tokens
    else:
        checks.same_shape(tokens=tokens, where=where)
        if where.dtype != jnp.bool_:
            raise TypeError(f"where must be boolean, got dtype {where.dtype}")
        if checks.is_concrete(where) and not np.asarray(where).any():
            raise ValueError(f"where must keep a token, got {where.shape} of False")
        kept = where
        given = jnp.where(_and_before(where), tokens, 0)
    logits = logits_fn(given)
    checks.shape("logits", logits, (*tokens.shape, None))
    vocabulary = logits.shape[-1]
    if checks.is_concrete(tokens) and checks.is_concrete(kept):
        checks.between("tokens", np.asarray(tokens)[np.asarray(kept)], 0, vocabulary - 1)
    logits = jnp.where(kept[..., None], at_least_float32(logits), 0)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # Hidden tokens may be anything; a kept one outside the vocabulary gives NaN, as jnp's gather
    # does, but for negative ones, which would count from the end.
    index = jnp.where(kept, jnp.where(tokens < 0, vocabulary, tokens), 0)[..., None]
    chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    terms = log_z - chosen
    if label_smoothing:
        even = log_z - jnp.mean(logits, axis=-1)
        terms = (1 - label_smoothing) * terms + label_smoothing * even
    if z_loss:
        terms = terms + z_loss * jnp.square(log_z)
    losses = jnp.sum(jnp.where(kept, terms, 0), axis=1)
    count = jnp.sum(kept, axis=1)
    aux = {
        "tokens": count,
        "correct": jnp.sum(kept & (jnp.argmax(logits, axis=-1) == tokens), axis=1),
        "log_z": jnp.sum(jnp.where(kept, log_z, 0), axis=1) / jnp.maximum(count, 1),
    }
    return losses if divisor is None else losses / divisor, aux


def _and_before(where: Array) -> Array:
    """True up to a row's last True."""
    return jax.lax.cummax(where.astype(jnp.int8), axis=1, reverse=True) > 0


def dynamic_evaluation(
    logits_fn: Callable[[Params, Array], Array],
    params: Params,
    windows: Int[Array, "windows length"],
    where: Bool[Array, "windows length"],
    *,
    rate: float | Float[Array, ""],
) -> tuple[Float[Array, " windows"], Params]:
    """-log p of each window's kept tokens in nats by a model that learns from the windows before.

    losses[i] = -log p_theta_i(kept tokens of window i), then
    theta_i+1 = theta_i - rate * gradient of the mean -log p_theta_i over all its tokens,

    so that every token is scored before it is learnt: the losses add up to the length of a code, as
    a compressor's that adapts (Krause et al. 2018, arXiv:1709.07432, eq. (3) to (5), plain steps).
    windows: consecutive pieces of one text, as of `data.scored_windows`, in order. A rate of 0 is
    `next_token` window by window. Returns (losses, the last parameters). One scan. Raises
    ValueError for a negative rate, and as `next_token`.

    >>> logits_fn = lambda params, tokens: jnp.broadcast_to(params, (*tokens.shape, 2))
    >>> windows, where = jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 4), bool)
    >>> losses, _ = dynamic_evaluation(logits_fn, jnp.zeros(2), windows, where, rate=1.0)
    >>> [round(float(loss), 3) for loss in losses]
    [2.773, 1.253, 0.778]
    """
    checks.at_least("rate", rate, 0)
    checks.same_shape(windows=windows, where=where)

    def mean_loss(params: Params, window: Array) -> Array:
        losses, _ = next_token(lambda x: logits_fn(params, x), window[None], divisor=len(window))
        return losses[0]

    def one(params: Params, given: tuple[Array, Array]) -> tuple[Params, Array]:
        window, kept = given
        losses, _ = next_token(lambda x: logits_fn(params, x), window[None], where=kept[None])
        slope = jax.grad(mean_loss)(params, window)
        return jax.tree.map(lambda p, g: p - (rate * g).astype(p.dtype), params, slope), losses[0]

    params, losses = jax.lax.scan(one, params, (windows, where))
    return losses, params


def bits_per_byte(
    nats: Float[Array, "..."] | float | int, num_bytes: int | float | Int[Array, "..."]
) -> Float[Array, "..."]:
    """nats / (num_bytes log 2): what a text's -log p costs, whatever its tokens are.

    Raises ValueError unless num_bytes is positive.

    >>> float(bits_per_byte(nats=69.3147, num_bytes=50))
    2.0
    """
    checks.positive("num_bytes", num_bytes)
    return at_least_float32(jnp.asarray(nats)) / (num_bytes * math.log(2))
