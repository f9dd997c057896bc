"""One device, jit over eight, pmap over eight: the same SGD parameters (Adam hides a factor)."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.training import data_mesh, init_state, make_train_step, shard_batch, train_step

from .training.problem import make_batch, make_params, noisy_loss, plain_loss, stack

SGD = optax.sgd(0.1)
STEPS = 5


def train(step, key, batches):
    state = init_state(make_params(), SGD, key, ema_decays=[0.9])
    for batch in batches:  # blocked: emulated devices abort when calls pile up
        state, metrics = jax.block_until_ready(step(state, batch))
    return state, metrics


def close(a, b, tolerance=1e-6):
    a, b = jax.device_get((a, b))
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def moved(state):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, state.params, make_params())))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}])
def test_jit_over_eight_devices_equals_one(key, options):
    batches = [make_batch(i) for i in range(STEPS)]
    one = train(make_train_step(noisy_loss, SGD, mesh=data_mesh(1), **options), key, batches)
    eight = train(make_train_step(noisy_loss, SGD, **options), key, batches)
    assert len(eight[0].params["in"]["w"].sharding.device_set) == 8
    assert moved(one[0]) > 0.1
    close((one[0].params, one[0].ema, one[1]), (eight[0].params, eight[0].ema, eight[1]))


def test_several_steps_over_eight_devices(key):
    batches = [make_batch(i) for i in range(4)]
    one = train(make_train_step(noisy_loss, SGD, mesh=data_mesh(1)), key, batches)
    pairs = [stack(batches[:2]), stack(batches[2:])]
    eight = train(make_train_step(noisy_loss, SGD, steps_per_call=2), key, pairs)
    close(one[0].params, eight[0].params)


@pytest.mark.parametrize("several", [False, True])
def test_pmap_equals_vmap_under_the_same_axis(key, several):
    batches = [make_batch(i) for i in range(4 if several else STEPS)]
    step = functools.partial(train_step, noisy_loss, SGD, axis_name="data")
    by_vmap = jax.jit(jax.vmap(step, axis_name="data", in_axes=(None, 0)))

    def vmapped(state, batch):
        out = by_vmap(state, jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch))
        for leaf in jax.tree.leaves(out[0].params) + jax.tree.leaves(out[1]):
            np.testing.assert_allclose(leaf, np.broadcast_to(leaf[:1], leaf.shape), rtol=1e-6)
        return jax.tree.map(lambda x: x[0], out)

    expected = train(vmapped, key, batches)
    given = [stack(batches[:2]), stack(batches[2:])] if several else batches
    step = make_train_step(noisy_loss, SGD, pmap=True, steps_per_call=2 if several else 1)
    got = train(step, key, given)
    assert moved(got[0]) > 0.1
    close((got[0].params, got[0].ema), (expected[0].params, expected[0].ema))


def test_pmap_equals_one_device_without_randomness(key):
    batches = [make_batch(i) for i in range(STEPS)]
    one = train(make_train_step(plain_loss, SGD, mesh=data_mesh(1)), key, batches)
    eight = train(make_train_step(plain_loss, SGD, pmap=True), key, batches)
    close((one[0].params, one[0].ema, one[1]), (eight[0].params, eight[0].ema, eight[1]))


def test_shard_batch_splits_over_the_devices():
    batch = shard_batch(data_mesh(), make_batch(0))
    assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(2, 5)}
    np.testing.assert_array_equal(batch["x"], make_batch(0)["x"])
    with pytest.raises(ValueError, match="got 12"):
        shard_batch(data_mesh(), make_batch(0, size=12))
