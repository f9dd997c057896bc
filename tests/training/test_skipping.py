"""Updates left out by the running median of gradient norms, beside the loop written by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.training import (
    data_mesh,
    init_sharded,
    init_state,
    make_train_step,
    skip_above_median,
    train_step,
)

from .problem import make_batch, make_params, plain_loss


def by_hand(norms, multiple, window):
    """Which of the updates are taken, in float64; inf stands where there was no norm yet."""
    seen, taken = [np.inf] * window, []
    for norm in norms:
        median = np.median(seen)
        taken.append(bool(np.isfinite(norm) and (norm <= multiple * median or median == 0)))
        if np.isfinite(norm):
            seen = [*seen[1:], norm]
    return taken


def gradients(count, seed=0):
    """Gradients of norms about 1, every seventh forty times as large, one of them not finite."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(count, 3)) * np.exp(0.2 * rng.normal(size=(count, 1)))
    found /= np.sqrt(3)
    found[6::7] *= 40
    found[count // 2] = np.nan
    return found.astype(np.float32)


@pytest.mark.parametrize("window", [1, 6, 7])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimiser_sees_what_is_taken_and_nothing_else(window, dtype):
    given = gradients(40).astype(jnp.dtype(dtype))
    optimizer = skip_above_median(optax.adam(0.1), 8.0, window=window)
    update = jax.jit(optimizer.update)
    params = {"a": jnp.zeros(2, dtype), "b": jnp.zeros(1, dtype)}
    split = lambda g: {"a": jnp.asarray(g[:2]), "b": jnp.asarray(g[2:])}  # noqa: E731
    state, taken, moved = optimizer.init(params), [], []
    for g in given:
        before = state
        updates, state = update(split(g), state, params)
        taken.append(int(state.skipped) == int(before.skipped))
        moved.append(np.concatenate([updates["a"], updates["b"]]).astype(np.float32))
        if not taken[-1]:
            assert not moved[-1].any()
            chex.assert_trees_all_equal(state.inner, before.inner)
    assert update._cache_size() == 1
    norms = np.linalg.norm(given.astype(np.float64), axis=1)
    assert taken == by_hand(norms, 8.0, window)
    assert 0 < taken.count(False) < len(taken)
    # Adam alone over the gradients that are taken.
    plain = optax.adam(0.1)
    alone, plain_state = [], plain.init(params)
    for g in given[np.asarray(taken)]:
        updates, plain_state = plain.update(split(g), plain_state, params)
        alone.append(np.concatenate([updates["a"], updates["b"]]).astype(np.float32))
    tolerance = 1e-6 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(np.asarray(moved)[taken], alone, rtol=tolerance, atol=tolerance)


def test_it_follows_norms_that_rise_for_good():
    """With a threshold in numbers nothing would be taken again."""
    window = 10
    optimizer = skip_above_median(optax.sgd(1.0), 5.0, window=window)
    state, taken = optimizer.init(jnp.zeros(())), []
    for norm in [1.0] * 20 + [1000.0] * 20:
        update, state = optimizer.update(jnp.float32(norm), state)
        taken.append(float(update) != 0)
    assert taken == by_hand([1.0] * 20 + [1000.0] * 20, 5.0, window)
    assert all(taken[:20])
    assert all(taken[20 + window // 2 + 1 :])
    assert taken.count(False) == window // 2 == int(state.skipped)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_scales_zeros_and_starts(scale):
    optimizer = skip_above_median(optax.sgd(1.0), 3.0, window=4)
    state, taken = optimizer.init(jnp.zeros(2)), []
    for norm in (50.0, 1.0, 1.0, 1.0, 1.0, 4.0, 0.0, 0.0, 0.0, 0.0, 7.0):
        update, state = optimizer.update(jnp.array([scale * norm, 0.0]), state)
        taken.append(bool(update[0] != 0) or norm == 0)
    # The first have nothing before them, and beside zeros there is nothing to compare with.
    assert taken == [True] * 5 + [False] + [True] * 5


def test_it_is_an_optimiser_of_the_train_step():
    """One device or eight with sharded parameters; clipping inside sees what is taken alone."""
    optimizer = skip_above_median(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)), 4.0, window=4
    )
    start = lambda key: init_state(make_params(), optimizer, key)  # noqa: E731
    batches = [make_batch(i) for i in range(8)]
    batches[6]["y"] = batches[6]["y"] + np.float32(1e3)
    state = start(jax.random.key(0))
    for i, batch in enumerate(batches):
        before = state.params
        state, metrics = train_step(plain_loss, optimizer, state, batch)
        assert bool(metrics["finite"])
        same = jax.tree.map(lambda a, b: bool((a == b).all()), before, state.params)
        assert all(jax.tree.leaves(same)) == (i == 6)
    mesh = data_mesh()
    step = make_train_step(plain_loss, optimizer, mesh=mesh, sharding="fsdp")
    parts = init_sharded(mesh, start, jax.random.key(0))
    for batch in batches:
        parts, _ = step(parts, batch)
    assert int(state.opt_state.skipped) == int(parts.opt_state.skipped) == 1
    chex.assert_trees_all_close(parts.params, state.params, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("multiple", "options", "message"),
    [
        (1.0, {}, "multiple must be over 1, got 1.0"),
        (float("nan"), {}, "multiple must be positive"),
        (2.0, {"window": 0}, "window"),
        (2.0, {"window": 1.5}, "window"),
    ],
)
def test_numbers_that_make_no_threshold_are_refused(multiple, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        skip_above_median(optax.sgd(1.0), multiple, **options)
