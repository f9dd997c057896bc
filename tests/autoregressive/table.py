"""The models that obey the laws of the chapter, as functions of whole sequences and of steps.

A model reads tokens [batch, LENGTH], 0 .. VOCABULARY - 1, and gives logits for each of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax.networks import GPT, StateSpace

VOCABULARY, LENGTH = 3, 4


class Model(NamedTuple):
    """logits(params, tokens); empty_cache(params, batch); step(params, cache, token, position);
    prefill(params, cache, tokens) -> (logits, cache), None where there is none."""

    init: Callable[[Any], Any]
    logits: Callable[..., Any]
    empty_cache: Callable[..., Any]
    step: Callable[..., Any]
    prefill: Callable[..., Any] | None = None


def gpt(**fields: Any) -> Model:
    return methods(
        GPT(VOCABULARY, **{"depth": 2, "width": 8, "heads": 4, "max_length": 8, **fields})
    )


def methods(net: Any) -> Model:
    """The model of a network with a cache."""
    return Model(
        lambda key: net.init(key, jnp.zeros((1, LENGTH), jnp.int32)),
        net.apply,
        lambda params, batch: net.apply(
            params, batch, LENGTH, jax.tree.leaves(params)[0].dtype, method="empty_cache"
        ),
        functools.partial(net.apply, method="step"),
        functools.partial(net.apply, method="prefill"),
    )


MODERN = {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "kv_heads": 2, "use_bias": False}
MODELS = {
    "gpt2": gpt(),
    "llama": gpt(**MODERN, tied=False),
    "interleaved": gpt(**MODERN, rotary_layout="interleaved", qk_norm=True, remat=True),
    "mamba": methods(
        StateSpace(VOCABULARY, kind="mamba", depth=2, width=8, block_options=(("states", 4),))
    ),
}
