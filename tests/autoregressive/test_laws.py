"""The five laws of the chapter, over one table of models.

1. position t does not depend on tokens t and later; 2. steps with a cache equal the full pass;
3. what is masked does not matter; 4. a row depends on itself alone, whatever it is padded to;
5. the probabilities of all strings sum to 1.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.autoregressive import generate, next_token, recomputing_step
from tests.autoregressive.table import LENGTH, MODELS, VOCABULARY

STRINGS = jnp.asarray(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
TOKENS = STRINGS[jnp.array([5, 40, 77])]
KEY = jax.random.key(0)


@pytest.fixture(params=["float32", pytest.param("float64", marks=pytest.mark.slow)])
def dtype(request):
    if request.param == "float32":
        yield jnp.float32
    else:
        with jax.enable_x64(True):
            yield jnp.float64


def filled(model, dtype):
    """Parameters away from the start, without running `init`."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY)
    return jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), dtype), shapes)


# Each is of a kind that another one of the table has too; mamba's block is held to its formula in
# tests/networks/test_state_space.
SLOW = ("plus", "interleaved", "llama", "mamba", "pixelcnn")
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MODELS]


@pytest.mark.parametrize("name", NAMES)
def test_laws(name, dtype, compiled):
    model = MODELS[name]
    params = filled(model, dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == jnp.float32 else {"rtol": 1e-9, "atol": 1e-10}

    @compiled
    def run(params):
        full = model.logits(params, TOKENS)
        others = [TOKENS.at[:, t].set((TOKENS[:, t] + 1) % VOCABULARY) for t in range(LENGTH)]
        changed = jax.lax.map(partial(model.logits, params), jnp.stack(others))
        step = partial(model.step, params)

        def one(cache, t):
            logits, cache = step(cache, before(TOKENS, t), jnp.full(3, t))
            return cache, logits

        cache = model.empty_cache(params, 3)
        _, steps = jax.lax.scan(one, cache, jnp.arange(LENGTH))
        filled_steps = None
        if model.prefill is not None:
            first, cache = model.prefill(params, cache, TOKENS[:, :2])
            _, rest = jax.lax.scan(one, cache, jnp.arange(2, LENGTH))
            filled_steps = jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)
        # Rows: the middle one alone, and with its last token dropped.
        alone = model.logits(params, TOKENS[1:2])
        losses = lambda p, tokens, where: next_token(  # noqa: E731
            partial(model.logits, p), tokens, where=where
        )[0]
        where = jnp.array([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0]], bool)
        poisoned = jnp.where(jnp.array([[0, 0, 0, 1], [0] * 4, [0, 0, 1, 1]], bool), 99, TOKENS)
        of_masked = lambda tokens: jax.value_and_grad(  # noqa: E731
            lambda p: losses(p, tokens, where).sum()
        )(params)
        masked = jax.lax.map(of_masked, jnp.stack([TOKENS, poisoned]))
        nats = losses(params, STRINGS, jnp.ones(STRINGS.shape, bool))
        return full, changed, steps, filled_steps, alone, masked, nats

    full, changed, steps, filled_steps, alone, masked, nats = run(params)
    for t in range(LENGTH):
        np.testing.assert_allclose(changed[t][:, : t + 1], full[:, : t + 1], rtol=1e-6, atol=1e-6)
        assert t == LENGTH - 1 or np.abs(changed[t] - full)[:, t + 1 :].max() > 1e-3
    np.testing.assert_allclose(np.swapaxes(steps, 0, 1), full, **close)
    if filled_steps is not None:
        np.testing.assert_allclose(filled_steps, full, **close)
    np.testing.assert_allclose(alone[0], full[1], **close)
    jax.tree.map(lambda pair: np.testing.assert_array_equal(*pair), masked)
    np.testing.assert_allclose(np.exp(-np.asarray(nats, np.float64)).sum(), 1, rtol=1e-5)


def before(tokens, t):
    """The token that a step at position t is given."""
    return jnp.where(t > 0, tokens[:, jnp.maximum(t - 1, 0)], VOCABULARY)


@pytest.mark.parametrize("name", NAMES)
def test_cached_draws_are_those_of_recomputation(name):
    """Bit for bit, and a row's are the same in a batch of one."""
    model = MODELS[name]
    params, prompt = filled(model, jnp.float32), jnp.array([[0], [2], [1]])

    @jax.jit
    def run(params):
        cached = generate(
            partial(model.step, params), model.empty_cache(params, 3), KEY, prompt, num_tokens=3
        )
        step = recomputing_step(partial(model.logits, params))
        again = generate(step, jnp.zeros((3, LENGTH), jnp.int32), KEY, prompt, num_tokens=3)
        alone = generate(
            partial(model.step, params), model.empty_cache(params, 1), KEY, prompt[:1], num_tokens=3
        )
        return cached, again, alone

    cached, again, alone = run(params)
    np.testing.assert_array_equal(cached.tokens, again.tokens)
    np.testing.assert_allclose(cached.log_probs, again.log_probs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(cached.tokens[:1], alone.tokens)
