"""One scan of steps, whatever the state holds: tokens here, and states of several parts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd

TRANSITIONS = np.array([[0.6, 0.3, 0.1], [0.05, 0.8, 0.15], [0.5, 0.0, 0.5]], np.float32)


def categorical_step(tokens, move):
    """Each token takes a step of a Markov chain; the second value is the tokens before it."""
    keys = move.row_keys(0, tokens.shape[0])
    return jax.vmap(jax.random.categorical)(keys, jnp.log(TRANSITIONS)[tokens]), tokens


def test_tokens_are_sampled_by_the_same_scan(compiled, key):
    """After N steps the law of a token is a row of the N-th power of the transition matrix."""
    times, start = np.linspace(1.0, 0.0, 4), np.zeros((4000, 5), np.int32)

    @compiled
    def run(key):
        return gd.scan_steps(categorical_step, key, jnp.asarray(start), jnp.float32(times))

    end = run(key)
    assert end.dtype == jnp.int32
    law = np.linalg.matrix_power(TRANSITIONS.astype(np.float64), 3)[0]
    error = np.bincount(np.asarray(end).ravel(), minlength=3) / end.size - law
    assert np.all(np.abs(error) < 4 * np.sqrt(law * (1 - law) / end.size))


def test_token_i_depends_on_the_key_and_i_alone(key):
    """In a batch of 64 and of 1; in a state of several parts; along the trajectory."""
    times = np.linspace(1.0, 0.0, 5, dtype=np.float32)
    start = np.random.default_rng(1).integers(0, 3, (64, 7))

    @jax.jit
    def run(start, first):
        return gd.scan_steps(categorical_step, key, start, jnp.asarray(times), first_index=first)

    whole = run(start, 0)
    for i in (0, 1, 37):
        np.testing.assert_array_equal(run(start[i : i + 1], i)[0], whole[i])
    assert np.unique(np.asarray(whole), axis=0).shape[0] > 50

    def step(state, move):
        tokens, _ = categorical_step(state["tokens"], move)
        moved = state["moved"] | (tokens != state["tokens"])
        return {"tokens": tokens, "moved": moved}, state

    @jax.jit
    def keep(start):
        parts = {"tokens": start, "moved": jnp.zeros((64, 7), bool)}
        return gd.scan_steps(step, key, parts, jnp.asarray(times), keep=True)

    states = keep(start)
    np.testing.assert_array_equal(states["tokens"][0], start)
    np.testing.assert_array_equal(states["tokens"][-1], whole)
    moved = np.any(np.diff(np.asarray(states["tokens"]), axis=0) != 0, axis=0)
    np.testing.assert_array_equal(states["moved"][-1], moved)


def test_a_step_is_given_the_second_value_of_the_one_before(key):
    """x' = x + (x before), from 1 and 0: the Fibonacci numbers."""

    def step(x, move):
        return x + move.denoised_before, x

    run = jax.jit(partial(gd.scan_steps, step, keep=True))
    states = run(key, np.ones((1, 1), int), np.linspace(1.0, 0.0, 8))
    np.testing.assert_array_equal(np.ravel(states), [1, 1, 2, 3, 5, 8, 13, 21])


def test_a_step_keeps_the_state_as_it_is(key):
    start, times = jnp.zeros((2, 3), jnp.int32), jnp.array([1.0, 0.0])
    for step in (lambda x, m: (x + 0.5, x), lambda x, m: (x, x[:, :2])):
        with pytest.raises(TypeError, match=r"carry.* type int32\[2,3\]"):
            gd.scan_steps(step, key, start, times)
