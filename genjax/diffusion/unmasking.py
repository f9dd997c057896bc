"""Samples of masked diffusion: hidden tokens revealed step by step, in the samplers' scan."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from genjax import checks
from genjax.diffusion.masked import MaskingFn, PredictFn, first_places, masking, token_logits
from genjax.diffusion.samplers import scan_steps
from genjax.diffusion.steps import Move
from genjax.numerics import at_least_float32
from genjax.randomness import Index
from genjax.typing import PRNGKey

ORDERS = ("independent", "random", "confidence")


def unmask_step(
    predict: PredictFn,
    z: Int[Array, "batch time"],
    move: Move,
    /,
    *,
    vocabulary: int,
    by: str = "independent",
    temperature: float = 1.0,
) -> tuple[Int[Array, "batch time"], Int[Array, "batch time"]]:
    """Reveal hidden tokens from time t to s: (z at s, z with every hidden token drawn).

    A hidden token is revealed with probability r = (alpha_s - alpha_t) / (1 - alpha_t), and drawn
    from softmax(logits / temperature), or the largest at temperature 0. `move.process` is m(t).

    by: "independent", each place by its own chance (Sahoo et al. 2024); "random", of n hidden
    places so many that their mean is n r, rounded at random, anywhere; "confidence", as many, where
    the largest probability is highest (Chang et al. 2022; here of the law, not of what was drawn,
    which would change the law of the sample). Where one place is revealed at a time, "random" and
    "confidence" sample the law of an exact `predict` exactly; "independent" does so in the limit.
    """
    checks.one_of("by", by, ORDERS)
    checks.at_least("temperature", temperature, 0)
    hidden = z == vocabulary
    share = 1 - move.process(move.s) / move.process(move.t)
    logits = at_least_float32(token_logits(predict(z), z, vocabulary))
    if temperature == 0:
        drawn = jnp.argmax(logits, axis=-1)
    else:
        # In float32 the usual mode rounds small probabilities away, which cools the samples.
        pick = functools.partial(jax.random.categorical, mode="high")
        drawn = jax.vmap(pick)(move.row_keys(0, len(z)), logits / temperature)
    chance = jax.vmap(lambda k: jax.random.uniform(k, z.shape[1:]))(move.row_keys(1, len(z)))
    if by == "independent":
        revealed = hidden & (chance < share)
    else:
        rounding = jax.vmap(jax.random.uniform)(move.row_keys(2, len(z)))
        count = jnp.floor(jnp.sum(hidden, axis=1) * share + rounding).astype(jnp.int32)
        # At the end the rounding of float32 must not leave a token hidden.
        count = jnp.where(move.s > 0, count, z.shape[1])
        largest = jnp.max(jax.nn.log_softmax(logits), axis=-1)
        scores = largest if by == "confidence" else chance
        revealed = first_places(jnp.where(hidden, scores, -jnp.inf), count)
    estimate = jnp.where(hidden, drawn, z).astype(z.dtype)
    return jnp.where(revealed, estimate, z), estimate


def sample_masked(
    predict: PredictFn,
    key: PRNGKey,
    shape: Sequence[int],
    *,
    vocabulary: int,
    num_steps: int,
    schedule: str | MaskingFn = "linear",
    by: str = "random",
    temperature: float = 1.0,
    start: Int[Array, "batch time"] | None = None,
    first_index: Index = 0,
) -> Int[Array, "batch time"]:
    """Samples [batch, time] of masked diffusion: `unmask_step` over num_steps times from 1 to 0.

    The last step reveals all that is hidden. With num_steps = time, the linear schedule and
    "random" or "confidence", one token is revealed in each step, so that an exact `predict` is
    sampled exactly; with fewer, those of one step are drawn without knowing each other. start:
    tokens to keep, `vocabulary` where one is to be drawn (infilling). Sample i depends on (key,
    first_index + i) alone. Raises ValueError for a shape that is not (batch, time), a `start` of
    another one, an unknown order or schedule.

    >>> predict = lambda *given: jnp.zeros((2, 6, 4))
    >>> sample_masked(predict, jax.random.key(0), (2, 6), vocabulary=4, num_steps=3).shape
    (2, 6)
    """
    checks.integer("vocabulary", vocabulary, 2)
    checks.integer("num_steps", num_steps, 1)
    checks.one_of("by", by, ORDERS)
    checks.at_least("temperature", temperature, 0)
    shape = tuple(shape)
    if len(shape) != 2:
        raise ValueError(f"shape must be (batch, time), got {shape}")
    z = jnp.full(shape, vocabulary, jnp.int32) if start is None else jnp.asarray(start)
    checks.shape("start", z, shape)
    checks.between("start", z, 0, vocabulary)
    options = {"vocabulary": vocabulary, "by": by, "temperature": temperature}
    step = functools.partial(unmask_step, predict, **options)
    times = jnp.linspace(1.0, 0.0, num_steps + 1)
    return scan_steps(step, key, z, times, process=masking(schedule), first_index=first_index)
