"""The models that obey the laws of the chapter, as functions of whole sequences and of steps.

A model reads tokens [batch, LENGTH], 0 .. VOCABULARY - 1, and gives logits for each of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax.autoregressive import colour_logistic_mixture, recomputing_pixel_step
from genjax.networks import GPT, GatedPixelCNN, PixelCNN, PixelCNNPlus, StateSpace

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


def pixels(net: Any, cached: bool) -> Model:
    """A network of 2 x 2 images as one of strings; its step is told one position for all rows."""
    image = lambda tokens: tokens.reshape(-1, 2, 2, 1)  # noqa: E731

    def logits(params: Any, tokens: Any) -> Any:
        # What is masked may be anything; the network takes levels.
        found = net.apply(params, jnp.clip(image(tokens), 0, VOCABULARY - 1))
        return law(found.reshape(*tokens.shape, -1))

    def law(numbers: Any) -> Any:
        if not isinstance(net, PixelCNNPlus):
            return numbers
        each = numbers.reshape(-1, 1, 1, numbers.shape[-1])
        level = lambda v: colour_logistic_mixture(  # noqa: E731
            jnp.full((len(each), 1, 1, 1), v), each, levels=VOCABULARY
        )
        found = jnp.stack([level(v) for v in range(VOCABULARY)], axis=-1)
        return found.reshape(*numbers.shape[:-1], VOCABULARY)

    def empty_cache(params: Any, batch: int) -> Any:
        if cached:
            dtype = jax.tree.leaves(params)[0].dtype
            return net.apply(params, batch, 2, dtype, method="empty_cache")
        return jnp.zeros((batch, 2, 2, 1), jnp.int32)

    def step(params: Any, cache: Any, token: Any, position: Any) -> Any:
        pixel = jnp.where(token < VOCABULARY, token, 0)[:, None]
        if cached:
            found, cache = net.apply(params, cache, pixel, position[0], method="step")
            return law(found), cache
        whole = recomputing_pixel_step(
            lambda x: logits(params, x.reshape(-1, 4)).reshape(-1, 2, 2, VOCABULARY)
        )
        found, cache = whole(cache, pixel, position[0])
        return found, cache

    start = lambda key: net.init(key, jnp.zeros((1, 2, 2, 1), jnp.int32))  # noqa: E731
    return Model(start, logits, empty_cache, step)


MODERN = {"norm": "rms", "mlp": "swiglu", "positions": "rotary", "kv_heads": 2, "use_bias": False}
MODELS = {
    "gpt2": gpt(),
    "llama": gpt(**MODERN, tied=False),
    "pixelcnn": pixels(PixelCNN(VOCABULARY, features=8, layers=1, first_kernel=3), False),
    "gated": pixels(GatedPixelCNN(VOCABULARY, features=8, layers=3, first_kernel=5), True),
    "plus": pixels(PixelCNNPlus(VOCABULARY, 1, 2, features=4, resnets=2), True),
    "interleaved": gpt(**MODERN, rotary_layout="interleaved", qk_norm=True, remat=True),
    "mamba": methods(
        StateSpace(VOCABULARY, kind="mamba", depth=2, width=8, block_options=(("states", 4),))
    ),
}
