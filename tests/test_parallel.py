"""One device, jit over eight, pmap over eight: the same SGD parameters (Adam hides a factor)."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.training import (
    Checkpoints,
    data_mesh,
    init_state,
    initialize_distributed,
    make_train_step,
    shard_batch,
    train_step,
)

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


@pytest.mark.parametrize("several", [pytest.param(False, marks=pytest.mark.slow), True])
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_two_processes_equal_one_device(layout, key, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    root = Path(__file__).parents[1]
    running = []
    for index in range(2):
        environment = {
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        given = [str(tmp_path), str(STEPS), layout]
        command = [sys.executable, "-m", "tests.training.process", *given]
        running.append(
            subprocess.Popen(
                command,
                cwd=root,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        texts = [process.communicate(timeout=120)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], texts

    batches = [make_batch(i) for i in range(STEPS)]
    one, _ = train(make_train_step(noisy_loss, SGD, mesh=data_mesh(1)), key, batches)
    expected = jax.tree.leaves((one.params, one.ema))
    for index in range(2):
        with np.load(tmp_path / f"end-{index}.npz") as end:
            assert (int(end["processes"]), int(end["devices"])) == (2, 4)
            for i, value in enumerate(expected):
                np.testing.assert_allclose(end[f"arr_{i}"], value, rtol=1e-6, atol=1e-6)
    # What two processes wrote, one reads.
    step, state = Checkpoints(tmp_path / "checkpoints").restore(one)
    assert step == STEPS
    close(state.params, one.params)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == STEPS  # by the first process alone


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, {}, r"give all three or none: coordinator \(JAX_COORD"),
        ({"JAX_NUM_PROCESSES": "two"}, {}, "JAX_NUM_PROCESSES must be a whole number, got 'two'"),
        ({}, {"coordinator": "a:1", "processes": 2, "process": 2}, r"in \[0, 1\], got 2"),
    ],
)
def test_distributed_arguments(monkeypatch, unchecked, environment, arguments, message):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        initialize_distributed(**arguments)
