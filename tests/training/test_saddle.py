import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.training import (
    critic_batches,
    data_mesh,
    init_saddle_state,
    make_saddle_step,
    saddle_step,
    train_scan,
)

CRITIC, GENERATOR = optax.sgd(0.05), optax.sgd(0.02)
LIMIT = 0.25


def score(critic, x):
    return jnp.tanh(x @ critic["w"] + critic["b"][None])[:, 0]


def generate(generator, key, n):
    return generator["shift"][None] + jax.random.normal(key, (n, 2)) * generator["scale"][None]


def critic_loss(critic, generator, key, batch):
    fake = generate(generator, key, batch["x"].shape[0])
    losses = score(critic, fake) - score(critic, batch["x"])
    return losses, {"fake": score(critic, fake)}


def generator_loss(critic, generator, key, batch):
    return -jnp.mean(score(critic, generate(generator, key, batch["x"].shape[0]))), {}


def clip(params):
    return jax.tree.map(lambda w: jnp.clip(w, -LIMIT, LIMIT), params)


def players():
    w = jnp.asarray([[0.5], [-0.2]], jnp.float32)
    return {"w": w, "b": jnp.zeros(1)}, {"shift": jnp.zeros(2), "scale": jnp.ones(2)}


def start(key=None, optimizers=(CRITIC, GENERATOR)):
    key = jax.random.key(0) if key is None else key
    return init_saddle_state(*players(), *optimizers, key, ema_decays=[0.5])


def make_batch(step, n_critic=1, size=16):
    rng = np.random.default_rng(step)
    return {"x": (rng.normal(size=(n_critic, size, 2)) + 2).astype(np.float32)}


def step_of(**options):
    return functools.partial(saddle_step, critic_loss, generator_loss, CRITIC, GENERATOR, **options)


def close(a, b, tolerance=1e-6):
    a, b = jax.device_get((a, b))
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n_critic", [1, 3])
@pytest.mark.parametrize("project", [None, clip])
@pytest.mark.parametrize(("simultaneous", "unroll"), [(False, True), (True, False)])
def test_step_written_out(n_critic, project, simultaneous, unroll):
    state, batch = start(), jax.tree.map(jnp.asarray, make_batch(0, n_critic))
    options = {"n_critic": n_critic, "project": project}
    options |= {"simultaneous": simultaneous, "unroll": unroll}
    new, metrics = jax.jit(step_of(**options))(state, batch)

    critic, generator = players()
    key = jax.random.fold_in(state.key, 0)
    losses = []
    for i in range(n_critic):
        part = {"x": batch["x"][i]}

        def mean(c, i=i, part=part):
            return jnp.mean(critic_loss(c, generator, jax.random.fold_in(key, i), part)[0])

        value, grads = jax.value_and_grad(mean)(critic)
        losses.append(value)
        critic = jax.tree.map(lambda p, g: p - 0.05 * g, critic, grads)
        critic = project(critic) if project else critic
    opponent = players()[0] if simultaneous else critic
    last = {"x": batch["x"][-1]}
    grads = jax.grad(
        lambda g: generator_loss(opponent, g, jax.random.fold_in(key, n_critic), last)[0]
    )(generator)
    generator = jax.tree.map(lambda p, g: p - 0.02 * g, generator, grads)

    close(new.critic.params, critic)
    close(new.generator.params, generator)
    close(new.ema_params(0.5), generator)  # the mean of one
    close(metrics["critic/loss"], jnp.mean(jnp.stack(losses)))
    close(metrics["generator/grad_norm"], optax.tree.norm(grads))
    assert bool(metrics["finite"])
    assert {"critic/fake", "critic/grad_norm", "generator/loss"} < metrics.keys()
    assert project is None or float(jnp.abs(new.critic.params["w"]).max()) <= LIMIT


def test_one_device_and_eight(key):
    ends = []
    for mesh in (data_mesh(1), data_mesh()):
        step = make_saddle_step(
            critic_loss, generator_loss, CRITIC, GENERATOR, n_critic=2, mesh=mesh
        )
        state = start()
        for i in range(5):
            state, metrics = jax.block_until_ready(step(state, make_batch(i, 2)))
        ends.append((state.params, state.ema, metrics))
    close(*ends)


def test_several_steps_in_one_call():
    single = make_saddle_step(critic_loss, generator_loss, CRITIC, GENERATOR, mesh=data_mesh(1))
    pair = make_saddle_step(
        critic_loss, generator_loss, CRITIC, GENERATOR, mesh=data_mesh(1), steps_per_call=2
    )
    state, other = start(), start()
    for i in range(2):
        state, _ = single(state, make_batch(i))
    stacked = jax.tree.map(lambda *x: np.stack(x), make_batch(0), make_batch(1))
    other, metrics = pair(other, stacked)
    close(state.params, other.params)
    assert metrics["generator/loss"].shape == (2,)


@pytest.mark.slow
def test_sixty_four_seeds_in_one_call():
    # A run is a function of its key; the mean of the generator goes to that of the data.
    optimizers = optax.adam(0.02), optax.adam(0.01)
    step = functools.partial(
        saddle_step, critic_loss, generator_loss, *optimizers, n_critic=2, project=clip
    )

    def run(key):
        return train_scan(
            step,
            start(key, optimizers),
            lambda key: {"x": 2 + jax.random.normal(key, (2, 32, 2))},
            num_steps=60,
        )

    keys = jax.random.split(jax.random.key(1), 64)
    states, metrics = jax.jit(jax.vmap(run))(keys)
    assert metrics["generator/loss"].shape == (64, 60)
    shifts = np.asarray(states.generator.params["shift"])
    assert len(np.unique(shifts[:, 0])) == 64
    assert (np.abs(shifts - 2) < np.abs(0 - 2)).all()
    alone, _ = jax.jit(run)(keys[5])
    np.testing.assert_allclose(alone.generator.params["shift"], shifts[5], atol=1e-4)


def test_data_and_noise_of_a_scan_differ():
    # The same numbers for both would make the two players agree by accident.
    def loss(critic, generator, key, batch):
        noise = jax.random.normal(key, batch["x"].shape)
        return jnp.sum(critic["w"]) + jnp.mean(jnp.abs(noise - batch["x"])), {}

    step = functools.partial(saddle_step, loss, generator_loss, CRITIC, GENERATOR)
    sample = lambda key: {"x": jax.random.normal(key, (1, 16, 2))}  # noqa: E731
    _, metrics = train_scan(step, start(), sample, num_steps=3)
    distance = np.asarray(metrics["critic/loss"])
    assert (distance > 0.5).all()
    assert len(np.unique(distance)) == 3


def test_critic_batches_uses_each_batch_once():
    stacked = critic_batches(lambda step: {"x": np.full((4, 1), step)}, 3)
    assert stacked(2)["x"].shape == (3, 4, 1)
    np.testing.assert_array_equal(stacked(2)["x"][:, 0, 0], [6, 7, 8])


def test_bad_input(unchecked):
    state = start()
    with pytest.raises(ValueError, match="n_critic must be at least 1, got 0"):
        step_of(n_critic=0)(state, make_batch(0))
    message = r"batch\['x'\] must be \[n_critic, batch, ...\] with n_critic = 2, got shape \(1, 16"
    with pytest.raises(ValueError, match=message):
        step_of(n_critic=2)(state, make_batch(0))
    with pytest.raises(TypeError, match="generator_optimizer must be an optax"):
        init_saddle_state(*players(), CRITIC, None, jax.random.key(0))
    step = make_saddle_step(critic_loss, generator_loss, CRITIC, GENERATOR)
    with pytest.raises(ValueError, match=r"multiple of 8 .*got 12"):
        step(state, make_batch(0, size=12))
