"""Drawing tokens one after another, and the search for the most probable ones.

A step continues sequences: `step(cache, token [batch], position [batch]) -> (logits [batch,
vocabulary], cache)` reads the token before `position` (at position 0 the start token, whose number
is the vocabulary's size) and predicts the one at it. A cache is a pytree of fixed shape, batch
first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from genjax import checks
from genjax.numerics import at_least_float32
from genjax.randomness import indexed_keys
from genjax.typing import PRNGKey

__all__ = ["Beams", "Generated", "beam_search", "generate", "recomputing_step", "select"]

StepFn = Callable[[Any, Array, Array], tuple[Array, Any]]


def select(
    logits: Float[Array, "*batch vocabulary"],
    *,
    temperature: float | int = 1.0,
    top_k: int = 0,
    top_p: float | int = 1.0,
    min_p: float | int = 0.0,
) -> Float[Array, "*batch vocabulary"]:
    """Log-probabilities in nats of the tokens that may be drawn, -inf for the others.

    In this order: logits / temperature (0: the most probable token alone); the `top_k` largest
    (0: all); the smallest set of most probable ones whose sum reaches `top_p`, the token that
    crosses it included (nucleus, Holtzman et al. 2020); those with p >= min_p max p (Nguyen et al.
    2024). Each step renormalises; the smaller index goes first where logits are equal. Raises
    ValueError for options out of range.

    >>> jnp.isfinite(select(jnp.array([3.0, 2.0, 1.0]), top_k=2))
    Array([ True,  True, False], dtype=bool)
    """
    checks.min_rank("logits", logits, 1)
    checks.at_least("temperature", temperature, 0)
    checks.integer("top_k", top_k, 0)
    checks.between("top_p", top_p, 0, 1)
    checks.between("min_p", min_p, 0, 1)
    logits = at_least_float32(logits)
    if temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        places = jnp.arange(logits.shape[-1]).reshape(*(1,) * (logits.ndim - 1), -1)
        return jnp.where(places == best, 0.0, -jnp.inf).astype(logits.dtype)
    # The largest is 0 before the division, which may overflow: what is left then has probability 0.
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    log_probs = jax.nn.log_softmax((logits - largest) / temperature)
    if top_k or top_p < 1:
        # Sorting is stable, so that of equal ones the smaller index comes first.
        order = jnp.argsort(-log_probs, axis=-1)
        rank = jnp.argsort(order, axis=-1)
        if top_k:
            log_probs = _keep(log_probs, rank < top_k)
        if top_p < 1:
            falling = jnp.exp(jnp.take_along_axis(log_probs, order, axis=-1))
            before = jnp.cumsum(falling, axis=-1) - falling
            enough = jnp.take_along_axis(before < top_p, rank, axis=-1)
            log_probs = _keep(log_probs, enough | (rank == 0))
    if min_p:
        largest = jnp.max(log_probs, axis=-1, keepdims=True)
        log_probs = _keep(log_probs, log_probs >= largest + np.log(min_p))
    return log_probs


def _keep(log_probs: Array, kept: Array) -> Array:
    return jax.nn.log_softmax(jnp.where(kept, log_probs, -jnp.inf))


class Generated(NamedTuple):
    """tokens: after the prompt, `pad` after the stop token. log_probs: nats under the model as it
    is, whatever was selected from; 0 after the stop token. mask: True up to the stop token, that
    one included."""

    tokens: Int[Array, "batch num"]
    log_probs: Float[Array, "batch num"]
    mask: Bool[Array, "batch num"]


def generate(
    step: StepFn,
    cache: Any,
    key: PRNGKey,
    prompt: Int[Array, "batch length"],
    *,
    num_tokens: int,
    where_prompt: Bool[Array, "batch length"] | None = None,
    select: Callable[[Array], Array] = jax.nn.log_softmax,
    stop: int | None = None,
    pad: int = 0,
    first_index: int | Int[Array, ""] = 0,
) -> Generated:
    """Draw `num_tokens` tokens after each prompt, in one scan from an empty cache.

    Token t of row i, counted from the row's first, is drawn from select(logits) with the key
    fold_in(fold_in(key, first_index + i), t): a row is the same in any batch, and however its
    prompt is padded. where_prompt: which tokens of the prompt are the row's own; what is padded,
    on either side, counts for nothing. stop: the token that ends a row. Raises ValueError for
    tokens outside the vocabulary, and where the sequence would go on beyond the cache.

        generate(step, cache, key, prompt, num_tokens=100, select=partial(select, top_p=0.9))

    >>> step = recomputing_step(lambda tokens: jnp.zeros((*tokens.shape, 4)))
    >>> cache, prompt = jnp.zeros((1, 6), jnp.int32), jnp.array([[1]])
    >>> generate(step, cache, jax.random.key(0), prompt, num_tokens=3).tokens.shape
    (1, 3)
    """
    checks.rank("prompt", prompt, 2)
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"prompt must be integers [batch, length], got dtype {prompt.dtype}")
    checks.integer("num_tokens", num_tokens, 1)
    batch, length = prompt.shape
    own = jnp.ones(prompt.shape, bool) if where_prompt is None else where_prompt
    checks.same_shape(prompt=prompt, where_prompt=own)
    total = length + num_tokens
    vocabulary = _logits_of(step, cache, batch, total).shape[1]
    if checks.is_concrete(prompt) and checks.is_concrete(own):
        checks.between("prompt", np.asarray(prompt)[np.asarray(own)], 0, vocabulary - 1)
    if stop is not None:
        checks.between("stop", stop, 0, vocabulary - 1)
    # A row's own tokens first, in their order.
    order = jnp.argsort(~own, axis=1)
    given = jnp.take_along_axis(prompt.astype(jnp.int32), order, axis=1)
    lengths = jnp.sum(own, axis=1)
    keys = indexed_keys(key, batch, first_index)

    def one(carry: tuple, t: Array) -> tuple[tuple, tuple]:
        cache, token, done = carry
        logits, cache = step(cache, token, jnp.full(batch, t))
        logits = at_least_float32(logits)
        drawn = jax.vmap(_draw, (0, 0, None))(keys, select(logits), t)
        prompted = t < lengths
        if length:
            drawn = jnp.where(prompted, given[:, jnp.minimum(t, length - 1)], drawn)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], axis=1)[:, 0]
        token = jnp.where(done, pad, drawn)
        log_prob, alive = jnp.where(done, 0, log_prob), ~done
        if stop is not None:
            done = done | (~prompted & (token == stop))
        # A finished row goes on reading a token that is in the vocabulary.
        return (cache, jnp.where(done, 0, token), done), (token, log_prob, alive)

    start = jnp.full(batch, vocabulary, jnp.int32)
    initial = (cache, start, jnp.zeros(batch, bool))
    _, found = jax.lax.scan(one, initial, jnp.arange(total, dtype=jnp.int32))
    places = lengths[:, None] + jnp.arange(num_tokens)[None]
    return Generated(*(jnp.take_along_axis(z.T, places, axis=1) for z in found))


def _draw(key: PRNGKey, log_probs: Array, t: Array) -> Array:
    # In mode "low" float32 never draws what is less probable than 1e-7.
    drawn = jax.random.categorical(jax.random.fold_in(key, t), log_probs, mode="high")
    return drawn.astype(jnp.int32)


def _logits_of(step: StepFn, cache: Any, batch: int, total: int) -> jax.ShapeDtypeStruct:
    """Shape and type of the logits. A step that is given the last position as a number refuses it
    where the cache is too short."""
    with jax.ensure_compile_time_eval():
        last = jnp.full(batch, total - 1)
    token = jax.ShapeDtypeStruct((batch,), jnp.int32)
    logits, _ = jax.eval_shape(lambda cache, token: step(cache, token, last), cache, token)
    checks.shape("logits of step", logits, (batch, None))
    return logits


class Beams(NamedTuple):
    """The best continuations of each row, best first. tokens: `pad` after the stop token.
    log_probs: nats of the continuation. scores: log_probs / ((5 + length) / 6)^alpha."""

    tokens: Int[Array, "batch width num"]
    log_probs: Float[Array, "batch width"]
    scores: Float[Array, "batch width"]


def beam_search(
    step: StepFn,
    cache: Any,
    prompt: Int[Array, "batch length"],
    *,
    num_tokens: int,
    width: int = 4,
    alpha: float | int = 0.6,
    stop: int | None = None,
    pad: int = 0,
) -> Beams:
    """Search for the continuations of largest log p / ((5 + length) / 6)^alpha, in one scan.

    The length counts the stop token (Wu et al. 2016, eq. (14), without its coverage). `width`
    continuations are kept that go on and as many that have ended; both compete at the end. With a
    width of all strings it is exhaustive. Log-probabilities are in nats. Raises ValueError as
    `generate` does.

    >>> step = recomputing_step(lambda tokens: jnp.zeros((*tokens.shape, 4)))
    >>> cache, prompt = jnp.zeros((1, 6), jnp.int32), jnp.array([[1]])
    >>> beam_search(step, cache, prompt, num_tokens=3, width=2).tokens.shape
    (1, 2, 3)
    """
    checks.rank("prompt", prompt, 2)
    checks.integer("num_tokens", num_tokens, 1)
    checks.integer("width", width, 1)
    batch, length = prompt.shape
    logits_like = _logits_of(step, cache, batch, length + num_tokens)
    vocabulary = logits_like.shape[1]
    if stop is not None:
        checks.between("stop", stop, 0, vocabulary - 1)
    if checks.is_concrete(prompt):
        checks.between("prompt", prompt, 0, vocabulary - 1)
    given = jnp.concatenate(
        [jnp.full((batch, 1), vocabulary, jnp.int32), prompt.astype(jnp.int32)], axis=1
    )

    def read(cache: Any, t: Array) -> tuple[Any, None]:
        return step(cache, given[:, t], jnp.full(batch, t))[1], None

    cache, _ = jax.lax.scan(read, cache, jnp.arange(length))
    # Beams of a row lie beside each other: [batch, width, ...] as [batch * width, ...] for steps.
    cache = jax.tree.map(lambda z: jnp.repeat(z, width, axis=0), cache)

    def one(carry: tuple, n: Array) -> tuple[tuple, None]:
        cache, token, live, log_probs, ended, ended_log_probs, scores = carry
        logits, cache = step(cache, token.reshape(-1), jnp.full(batch * width, length + n))
        new = jax.nn.log_softmax(at_least_float32(logits)).reshape(batch, width, vocabulary)
        new = new + log_probs[..., None]
        if stop is not None:
            over = new[..., stop]
            strings = jnp.concatenate([ended, live.at[..., n].set(stop)], axis=1)
            together = jnp.concatenate([ended_log_probs, over], axis=1)
            ranked = jnp.concatenate([scores, over / ((6 + n) / 6) ** alpha], axis=1)
            scores, best = jax.lax.top_k(ranked, width)
            ended, ended_log_probs = pick((strings, together), best)
            new = new.at[..., stop].set(-jnp.inf)
        log_probs, best = jax.lax.top_k(new.reshape(batch, -1), width)
        beam, token = best // vocabulary, (best % vocabulary).astype(jnp.int32)
        cache = jax.tree.map(lambda z: z.reshape(batch, width, *z.shape[1:]), cache)
        cache = jax.tree.map(lambda z: z.reshape(-1, *z.shape[2:]), pick(cache, beam))
        live = pick(live, beam).at[..., n].set(token)
        return (cache, token, live, log_probs, ended, ended_log_probs, scores), None

    empty = jnp.full((batch, width, num_tokens), pad, jnp.int32)
    # One beam at the start: all others are as improbable as can be.
    dtype = jnp.promote_types(logits_like.dtype, jnp.float32)
    never = jnp.full((batch, width), -jnp.inf, dtype)
    first = never.at[:, 0].set(0)
    token = jnp.repeat(given[:, -1:], width, axis=1)
    carry = (cache, token, empty, first, empty, never, never)
    carry, _ = jax.lax.scan(one, carry, jnp.arange(num_tokens))
    _, _, live, log_probs, ended, ended_log_probs, scores = carry
    ranked = jnp.concatenate([scores, log_probs / ((5 + num_tokens) / 6) ** alpha], axis=1)
    strings = jnp.concatenate([ended, live], axis=1)
    together = jnp.concatenate([ended_log_probs, log_probs], axis=1)
    scores, best = jax.lax.top_k(ranked, width)
    strings, together = pick((strings, together), best)
    return Beams(strings, together, scores)


def pick(tree: Any, index: Array) -> Any:
    """Entry index[b, w] of the second axis of every leaf."""
    at = lambda z: index.reshape(*index.shape, *(1,) * (z.ndim - 2))  # noqa: E731
    return jax.tree.map(lambda z: jnp.take_along_axis(z, at(z), axis=1), tree)


def recomputing_step(logits_fn: Callable[[Array], Array]) -> StepFn:
    """The step of a network without a cache: the whole sequence is read again for every token.

    The cache is the tokens so far, int32 [batch, length], at the start of any value; what
    `logits_fn` [batch, length] -> [batch, length, vocabulary] gives at a position is the step's
    result. Raises ValueError for a known position beyond the length.

        step, cache = recomputing_step(logits_fn), jnp.zeros((batch, length), jnp.int32)

    >>> step = recomputing_step(lambda tokens: jnp.zeros((*tokens.shape, 4)))
    >>> logits, cache = step(jnp.zeros((1, 6), jnp.int32), jnp.array([3]), jnp.array([0]))
    >>> logits.shape
    (1, 4)
    """

    def step(cache: Array, token: Array, position: Array) -> tuple[Array, Array]:
        rows, length = jnp.arange(len(cache)), cache.shape[1]
        checks.between("position", position, 0, length - 1)
        # Before position 0 there is the start token, which no network is given.
        before = jnp.where(position > 0, position - 1, length)
        cache = cache.at[rows, before].set(token, mode="drop")
        return logits_fn(cache)[rows, position], cache

    return step
