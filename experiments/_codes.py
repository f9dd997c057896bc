"""Quantisers of an autoencoder's latents under one shape: vq, residual, fsq, lfq.

`Quantiser.apply` takes latents [batch, *grid, dim] and what is carried (the codebooks' averages, or
None); codes are [batch, places, stages]. `absorb` is what a train step does after its update.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments._code_prior import CodePrior
from genjax import checks
from genjax.networks import GPT
from genjax.variational import (
    categorical_log_likelihood,
    code_totals,
    codebook_state,
    ema_absorb,
    finite_scalar_codes,
    finite_scalar_quantise,
    kmeans,
    lookup_free_codes,
    lookup_free_quantise,
    reset_dead_codes,
    residual_quantise,
)

Kind = Literal["vq", "residual", "fsq", "lfq"]


class Coded(NamedTuple):
    """values [batch, *grid, dim], codes [batch, places, stages], penalty [batch] to be added to the
    loss, and what `absorb` takes; latents: what was quantised, where the caller keeps it."""

    values: jax.Array
    codes: jax.Array
    penalty: jax.Array
    seen: Any
    latents: Any = None


class Quantiser(NamedTuple):
    """num_codes: of one place and stage. dim: features of a latent."""

    num_codes: int
    stages: int
    dim: int
    start: Callable[..., Any]  # (key, z) -> carried
    apply: Callable[..., Coded]  # (key, z, carried)
    values: Callable[..., jax.Array]  # (codes, carried) -> [batch, places, dim]
    absorb: Callable[..., Any]  # (carried, seen, batch size) -> carried


def make_quantiser(
    kind: Kind,
    *,
    num_codes: int,
    dim: int,
    stages: int,
    levels: tuple[int, ...],
    decay: float,
    commitment: float,
    reset: float,
) -> Quantiser:
    """commitment: its weight, of lfq that of the entropies. reset: share of the mean use below
    which a code counts as dead."""
    checks.one_of("quantiser", kind, ("vq", "residual", "fsq", "lfq"))
    if kind == "fsq":
        return _finite(tuple(levels))
    if kind == "lfq":
        return _lookup(num_codes, commitment)
    checks.at_least("reset", reset, 0)
    return _codebooks(num_codes, dim, stages if kind == "residual" else 1, decay, commitment, reset)


def _codebooks(
    num_codes: int, dim: int, stages: int, decay: float, commitment: float, reset: float
) -> Quantiser:
    def start(key: jax.Array, z: jax.Array) -> Any:
        residual, states = z.reshape(-1, dim), []
        count = len(residual) / num_codes
        for stage in range(stages):
            codebook = kmeans(jax.random.fold_in(key, stage), residual, num_codes)
            states.append(codebook_state(codebook, count=count))
            residual = residual - residual_quantise(residual, [codebook]).values
        return states

    def apply(key: jax.Array, z: jax.Array, carried: Any) -> Coded:
        found = residual_quantise(z, [state.codebook for state in carried])
        residual, seen, rows = z.reshape(-1, dim), [], num_codes
        for stage, state in enumerate(carried):
            index = found.index[..., stage].reshape(-1)
            # Means over the batch, so that devices and parts of it may be averaged; latents to put
            # in the place of dead codes, some of which are the same where there are too few.
            totals = jax.tree.map(lambda x: x / len(z), code_totals(residual, index, num_codes))
            order = jax.random.permutation(jax.random.fold_in(key, stage), len(residual))
            spare = residual[jnp.resize(order, (rows,))]
            seen.append((*totals, jax.lax.stop_gradient(spare)))
            residual = residual - jax.lax.stop_gradient(state.codebook)[index]
        return Coded(
            found.values, _places(found.index, stages), commitment * found.commitment, seen
        )

    def absorb(carried: Any, seen: Any, batch_size: int) -> Any:
        states = []
        for stage, (state, (counts, sums, spare)) in enumerate(zip(carried, seen, strict=True)):
            state = ema_absorb(state, counts * batch_size, sums * batch_size, decay=decay)
            if reset:
                threshold = reset * jnp.mean(state.counts)
                # The latents are in random order already.
                state = reset_dead_codes(jax.random.key(stage), state, spare, threshold=threshold)
            states.append(state)
        return states

    def values(codes: jax.Array, carried: Any) -> jax.Array:
        return sum(state.codebook[codes[..., i]] for i, state in enumerate(carried))

    return Quantiser(num_codes, stages, dim, start, apply, values, absorb)


def _finite(levels: tuple[int, ...]) -> Quantiser:
    def apply(key: jax.Array, z: jax.Array, carried: Any) -> Coded:
        found = finite_scalar_quantise(z, levels)
        return Coded(found.values, _places(found.index[..., None], 1), jnp.zeros(len(z)), None)

    def values(codes: jax.Array, carried: Any) -> jax.Array:
        return finite_scalar_codes(codes[..., 0], levels)

    return Quantiser(math.prod(levels), 1, len(levels), _nothing, apply, values, _nothing)


def _lookup(num_codes: int, weight: float) -> Quantiser:
    bits = num_codes.bit_length() - 1
    if 2**bits != num_codes or bits < 1:
        raise ValueError(f"codes must be a power of two for lfq, got {num_codes}")

    def apply(key: jax.Array, z: jax.Array, carried: Any) -> Coded:
        found = lookup_free_quantise(z)
        penalty = weight * (found.entropy - found.usage_entropy)
        return Coded(found.values, _places(found.index[..., None], 1), penalty, None)

    def values(codes: jax.Array, carried: Any) -> jax.Array:
        return lookup_free_codes(codes[..., 0], bits)

    return Quantiser(num_codes, 1, bits, _nothing, apply, values, _nothing)


def _nothing(*given: Any) -> None:
    """What has no codebook carries nothing."""


def _places(index: jax.Array, stages: int) -> jax.Array:
    return index.reshape(len(index), -1, stages)


def nearest_tuples(z: jax.Array, codebook: jax.Array, most: int) -> jax.Array:
    """Every choice among the nearest codes of each place: [tuples, batch, places], of latents
    [batch, *grid, dim]; as many codes a place as make at most `most` tuples, the nearest first."""
    z = z.reshape(len(z), -1, z.shape[-1])
    places, count = z.shape[1], 1
    while count < len(codebook) and (count + 1) ** places <= most:
        count += 1
    square = jnp.sum(jnp.square(z[:, :, None] - codebook[None, None]), axis=-1)
    _, nearest = jax.lax.top_k(-square, count)
    choices = jnp.stack(jnp.unravel_index(jnp.arange(count**places), (count,) * places), axis=-1)
    take = lambda chosen: jnp.take_along_axis(nearest, chosen[None, :, None], axis=2)  # noqa: E731
    return jax.vmap(take)(choices)[..., 0]


def code_prior(
    prior: GPT, num_codes: int, total: int, null: int | None
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """(params, tokens, label, key) -> nats, and (params, key, label, n) -> tokens [n, total].

    null: the label that stands for none, where labels go before the codes.
    """

    def labelled(tokens: jax.Array, label: Any) -> jax.Array:
        """With the label before them, where the prior takes one; its number is above the codes'."""
        if null is None:
            return tokens
        first = num_codes + (jnp.full(len(tokens), null) if label is None else label)
        return jnp.concatenate([first[:, None], tokens], axis=1)

    def log_codes(params: Any, tokens: jax.Array, label: Any, key: Any) -> jax.Array:
        logits: Any = prior.apply(params, labelled(tokens, label), dropout_key=key)
        return categorical_log_likelihood(tokens, logits[:, -tokens.shape[1] :, :num_codes])

    def draw_codes(params: Any, key: jax.Array, label: Any, n: int) -> jax.Array:
        given = labelled(jnp.zeros((n, 0), int), label)
        first, apart = given.shape[1], prior.unstacked(params)

        def step(state: Any, position: jax.Array) -> Any:
            cache, token = state
            places = jnp.full(n, position)
            logits, cache = prior.apply(apart, cache, token, places, method="step")
            drawn = jax.random.fold_in(key, position)
            token = jax.random.categorical(drawn, logits[:, :num_codes])
            token = jnp.where(position < first, given[:, 0], token) if first else token
            return (cache, token), token

        length = first + total
        begin = prior.empty_cache(n, length), jnp.zeros(n, int)
        return jax.lax.scan(step, begin, jnp.arange(length))[1].T[:, first:]

    return log_codes, draw_codes


def grid_prior(
    prior: CodePrior, null: int | None, guidance: float
) -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """As `code_prior`, of the prior that sees neighbours.

    guidance: g of the logits l(c | none) + g (l(c | label) - l(c | none)) that labelled codes are
    drawn by; 1 are those of the label.
    """

    def log_codes(params: Any, tokens: jax.Array, label: Any, key: Any) -> jax.Array:
        logits: Any = prior.apply(params, tokens, label, dropout_key=key)
        return categorical_log_likelihood(tokens, logits)

    def draw_codes(params: Any, key: jax.Array, label: Any, n: int) -> jax.Array:
        guided = guidance != 1 and label is not None
        if guided:  # the same images without their label below
            label = jnp.concatenate([jnp.asarray(label), jnp.full(n, null or 0)])

        def step(state: Any, position: jax.Array) -> Any:
            cache, tokens = state
            given = jnp.tile(tokens, (2, 1)) if guided else tokens
            logits, cache = prior.apply(params, cache, given, label, position, method="step")
            if guided:
                of_label, of_none = jnp.split(logits, 2)
                logits = of_none + guidance * (of_label - of_none)
            drawn = jax.random.categorical(jax.random.fold_in(key, position), logits)
            return (cache, tokens.at[:, position].set(drawn)), None

        total = len(prior.neighbours)
        begin = prior.empty_cache(n * (1 + guided)), jnp.zeros((n, total), int)
        return jax.lax.scan(step, begin, jnp.arange(total))[0][1]

    return log_codes, draw_codes
