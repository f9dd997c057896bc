"""fsdp equals replicated equals one device; what a device holds; checkpoints across layouts."""

import functools
import logging

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from genjax import adversarial, variational
from genjax.networks import MLP, Block, UNet
from genjax.networks.transformer import apply_stack, stacked
from genjax.sharding import gathered, over, spec_of, split_batch
from genjax.training import (
    Checkpoints,
    data_mesh,
    init_saddle_state,
    init_sharded,
    init_state,
    make_saddle_step,
    make_train_step,
)

SGD = optax.sgd(0.05)
STEPS, BATCH = 5, 16


class Stack(nn.Module):
    """Three scanned transformer blocks."""

    @nn.compact
    def __call__(self, x):
        block = Block(2, causal=True, parent=None)
        params = stacked(self, "layers", block, 3, x[:1])
        return nn.Dense(8)(apply_stack(block, params, x, remat=True)[0])


def vae():
    encoder, decoder = MLP((32, 16)), MLP((32, 24))

    def init(key):
        keys = jax.random.split(key)
        return {
            "encoder": encoder.init(keys[0], jnp.zeros((1, 24))),
            "decoder": decoder.init(keys[1], jnp.zeros((1, 8))),
        }

    def loss(params, key, batch):
        def encode(x):
            return tuple(jnp.split(encoder.apply(params["encoder"], x), 2, axis=1))

        def log_likelihood(x, z):
            error = x - decoder.apply(params["decoder"], z)
            return -0.5 * jnp.sum(jnp.square(error), axis=1)

        return variational.elbo(encode, log_likelihood, key, batch["x"])

    return init, loss, (24,)


def regression(network, *event, time=False):
    """Squared error of a network that is given noisy inputs."""

    def given(x):
        return (x, jnp.full(len(x), 0.3)) if time else (x,)

    def init(key):
        params = network.init(key, *given(jnp.zeros((1, *event))))
        # Layers that start at 0 would hide those before them.
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        moved = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        return structure.unflatten(moved)

    def loss(params, key, batch):
        x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
        error = network.apply(params, *given(x)) - batch["x"]
        return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim))), {}

    return init, loss, event


MODELS = {
    "vae": vae,
    "transformer": lambda: regression(Stack(), 6, 8),
    "unet": lambda: regression(UNet((8, 16), num_blocks=1), 4, 4, 1, time=True),
}


def batch_of(event, step, leading=()):
    rng = np.random.default_rng(step)
    return {"x": rng.normal(size=(*leading, BATCH, *event)).astype(np.float32)}


def train(step, state, batches):
    for batch in batches:
        state, metrics = jax.block_until_ready(step(state, batch))
    return state, metrics


def close(a, b, tolerance=1e-6):
    chex.assert_trees_all_close(*jax.device_get((a, b)), rtol=tolerance, atol=tolerance)


def check_shards(state, devices=8):
    """Every leaf that the devices divide is held in parts, by the arrays themselves."""
    for x in jax.tree.leaves((state.params, state.ema)):
        held = x.addressable_shards[0].data.size
        divides = any(n % devices == 0 for n in x.shape)
        assert held * (devices if divides else 1) == x.size, (x.shape, x.sharding)


@pytest.mark.parametrize(
    "name",
    ["vae", *(pytest.param(name, marks=pytest.mark.slow) for name in ("transformer", "unet"))],
)
def test_fsdp_equals_replicated_equals_one_device(name, key):
    init, loss, event = MODELS[name]()
    batches = [batch_of(event, i) for i in range(STEPS)]

    def make(key):
        return init_state(init(key), SGD, key, ema_decays=(0.9,))

    start = jax.device_get(jax.jit(make)(key).params)
    one = train(make_train_step(loss, SGD, mesh=data_mesh(1)), jax.jit(make)(key), batches)
    whole = train(make_train_step(loss, SGD), jax.jit(make)(key), batches)
    step = make_train_step(loss, SGD, sharding="fsdp")
    first = init_sharded(data_mesh(), make, key)
    check_shards(first)
    close(first.params, start, 1e-7)
    parts = train(step, first, batches)
    check_shards(parts[0])
    moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), start, one[0].params)
    # All but biases that a norm takes away again.
    assert np.mean(np.array(jax.tree.leaves(moved)) > 0) > 0.8
    for other in (whole, parts):
        close((one[0].params, one[0].ema, one[1]), (other[0].params, other[0].ema, other[1]))
    # The compiled program's own arguments: the state's parts and the batch's.
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), parts[0]
    )
    placed = step.place(batches[0])
    used = step.compiled.lower(shapes, placed).compile().memory_analysis().argument_size_in_bytes
    state_bytes = sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(shapes_of(parts))
    )
    assert used <= 1.02 * (state_bytes + batches[0]["x"].nbytes / 8) + 256


def shapes_of(trained):
    return [
        x for x in jax.tree.leaves(trained[0]) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]


@pytest.mark.slow
def test_a_pair_in_shards_equals_one_device(key):
    critic, generator = MLP((16, 1)), MLP((16, 8))

    def fake(params, key):
        return generator.apply(params, jax.random.normal(key, (BATCH, 4)))

    def critic_loss(critic_params, generator_params, key, batch):
        def score(x):
            return critic.apply(critic_params, x)[:, 0]

        losses = adversarial.gan(score(batch["x"]), score(fake(generator_params, key)))
        return losses.critic, {}

    def generator_loss(critic_params, generator_params, key, batch):
        scores = critic.apply(critic_params, fake(generator_params, key))[:, 0]
        return adversarial.gan(scores, scores).generator, {}

    def make(key):
        keys = jax.random.split(key)
        players = (
            critic.init(keys[0], jnp.zeros((1, 8))),
            generator.init(keys[1], jnp.zeros((1, 4))),
        )
        return init_saddle_state(*players, optax.adam(1e-2), SGD, key, ema_decays=(0.9,))

    batches = [batch_of((8,), i, (2,)) for i in range(STEPS)]
    given = (critic_loss, generator_loss, optax.adam(1e-2), SGD)
    one = train(make_saddle_step(*given, mesh=data_mesh(1), n_critic=2), make(key), batches)
    step = make_saddle_step(*given, n_critic=2, sharding="fsdp")
    state = init_sharded(data_mesh(), make, key)
    held = [x.addressable_shards[0].data.size * 8 for x in jax.tree.leaves(state.critic.opt_state)]
    assert sum(held) < 1.2 * sum(x.size for x in jax.tree.leaves(state.critic.opt_state)) + 50
    parts = train(step, state, batches)
    check_shards(parts[0])
    # Adam divides by the root of its second moment, which magnifies rounding.
    close((one[0].params, one[0].ema, one[1]), (parts[0].params, parts[0].ema, parts[1]), 1e-5)


@pytest.mark.slow
def test_accumulated_parts_and_several_steps_in_shards(key):
    init, loss, event = vae()

    def start():  # each is donated
        return init_state(init(key), SGD, key)

    batches = [batch_of(event, i) for i in range(4)]
    one = train(make_train_step(loss, SGD, mesh=data_mesh(1), accumulate=2), start(), batches)
    step = make_train_step(loss, SGD, accumulate=2, steps_per_call=2, sharding="fsdp")
    pairs = [jax.tree.map(lambda *x: np.stack(x), *batches[i : i + 2]) for i in (0, 2)]
    parts = train(step, start(), pairs)
    close(one[0].params, parts[0].params)


@pytest.mark.slow
def test_checkpoints_cross_devices_and_layouts(key, tmp_path):
    init, loss, event = vae()

    def make(key):
        return init_state(init(key), optax.adam(1e-2), key, ema_decays=(0.9,))

    def new(devices, layout):
        mesh = data_mesh(devices)
        step = make_train_step(loss, optax.adam(1e-2), mesh=mesh, sharding=layout)
        state = init_sharded(mesh, make, key) if layout == "fsdp" else jax.jit(make)(key)
        return step, state

    layouts = [(8, "fsdp"), (1, "replicated"), (2, "fsdp"), (8, "replicated"), (8, "fsdp")]
    before = None
    for i, (devices, layout) in enumerate(layouts):
        step, state = new(devices, layout)
        if before is not None:
            checkpoints = Checkpoints(tmp_path / "c")
            at, state = checkpoints.restore(state)
            checkpoints.close()
            assert at == i
            close((state.params, state.opt_state, state.ema), before, 0)
            if layout == "fsdp":
                check_shards(state, devices)
        state, _ = jax.block_until_ready(step(state, batch_of(event, i)))
        checkpoints = Checkpoints(tmp_path / "c")
        checkpoints.save(i + 1, state)
        checkpoints.close()
        before = jax.device_get((state.params, state.opt_state, state.ema))


def test_what_no_axis_divides_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, "genjax"):
        state = init_sharded(data_mesh(), lambda: {"a": jnp.zeros((3, 5)), "b": jnp.zeros((16, 8))})
    assert "no axis of 1 leaves (15 numbers in all, the largest a) is divided" in caplog.text
    assert state["a"].sharding.spec == P()
    assert state["b"].sharding.spec == P("data")


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((), P()),
        ((7,), P()),
        ((16,), P("data")),
        ((8, 16), P(None, "data")),
        ((16, 16, 3), P(None, "data")),
        ((0, 8), P(None, "data")),
        ((24, 15), P("data")),
    ],
)
def test_the_largest_axis_is_split(shape, spec):
    assert spec_of(shape, 8) == spec
    assert spec_of(shape, 1) == P()


def test_hooks_do_nothing_without_a_mesh_and_keep_values_with_one():
    x = jnp.arange(16.0).reshape(8, 2)
    assert gathered(x) is x
    assert split_batch(x) is x

    def f(x):
        return jnp.sum(jnp.square(split_batch(gathered(x))) * x)

    def placed(x):
        with over(data_mesh()):
            return f(x)

    for g in (lambda f: f, jax.grad, lambda f: jax.vmap(f)):
        np.testing.assert_allclose(jax.jit(g(placed))(x), g(f)(x), rtol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_bad_layouts(key):
    loss = functools.partial(vae)()[1]
    with pytest.raises(ValueError, match=r"sharding must be one of .*did you mean 'fsdp'"):
        make_train_step(loss, SGD, sharding="fdsp")
    with pytest.raises(ValueError, match="sharding must be 'replicated' with pmap, got 'fsdp'"):
        make_train_step(loss, SGD, sharding="fsdp", pmap=True)
