"""The carry: what no gradient moves, the same through every way of running a step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.networks import init_power, spectral_normalise
from genjax.training import (
    CheckpointError,
    Checkpoints,
    data_mesh,
    init_saddle_state,
    init_state,
    make_saddle_step,
    make_train_step,
    saddle_step,
    train_step,
)

from .problem import make_batch, make_params, plain_loss, predict, stack

SGD = optax.sgd(0.1)
STEPS = 6
MODES = {
    "one": {"mesh": data_mesh(1)},
    "eight": {},
    "pmap": {"pmap": True},
    "accumulate": {"mesh": data_mesh(1), "accumulate": 4},
    "several": {"mesh": data_mesh(1), "steps_per_call": 3},
    "all": {"accumulate": 2, "steps_per_call": 3},
}


def close(a, b, tolerance=2e-6):
    a, b = jax.device_get((a, b))
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def run(step, state, batches, steps_per_call=1):
    for i in range(0, len(batches), steps_per_call):
        batch = batches[i] if steps_per_call == 1 else stack(batches[i : i + steps_per_call])
        state, metrics = jax.block_until_ready(step(state, batch))
    return state, metrics


def centred_loss(params, key, batch, carry):
    """Regression on what the running mean of y leaves, so that a late carry moves the gradient."""
    losses, aux = plain_loss(params, key, {**batch, "y": batch["y"] - carry["mean"]})
    return losses, aux, {"y": jnp.mean(batch["y"])}


def running_mean(carry, params, seen):
    count = carry["count"] + 1
    mean = carry["mean"] + (seen["y"] - carry["mean"]) / count
    return {"mean": mean, "count": count, "bias": params["out"]["b"]}


def start(carry=None):
    zero = {"mean": 0.0, "count": 0, "bias": jnp.zeros(1)}
    return init_state(make_params(), SGD, jax.random.key(0), carry=zero if carry is None else carry)


@functools.cache
def make_step(mode):
    return make_train_step(centred_loss, SGD, absorb=running_mean, **MODES[mode])


@functools.cache
def written_out():
    params, mean = make_params(), 0.0
    for i in range(STEPS):
        batch = make_batch(i)
        slope = jax.grad(
            lambda p, batch=batch, mean=mean: jnp.mean(
                jnp.square(predict(p, batch["x"]) - (batch["y"] - mean))
            )
        )
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, slope(params))
        mean = float(np.mean([make_batch(j)["y"] for j in range(i + 1)]))
    return params, {"mean": np.float32(mean), "count": np.int32(STEPS), "bias": params["out"]["b"]}


@pytest.mark.parametrize("mode", MODES)
def test_running_mean_is_the_mean_of_all_data(mode):
    batches = [make_batch(i) for i in range(STEPS)]
    calls = MODES[mode].get("steps_per_call", 1)
    state, metrics = run(make_step(mode), start(), batches, calls)
    close((state.params, state.carry), written_out())
    assert state.carry["count"].dtype == jnp.int32
    assert np.all(metrics["finite"])


def test_resumes_bit_for_bit(tmp_path):
    batches = [make_batch(i) for i in range(STEPS)]
    whole, _ = run(make_step("one"), start(), batches)
    half, _ = run(make_step("one"), start(), batches[:3])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, half)
    checkpoints.close()
    step, state = checkpoints.restore(start())
    assert step == int(state.carry["count"]) == 3
    resumed, _ = run(make_step("one"), state, batches[3:])
    chex.assert_trees_all_equal((whole.params, whole.carry), (resumed.params, resumed.carry))
    with pytest.raises(CheckpointError, match=r"it has no carry/other \(1 such\)"):
        checkpoints.restore(start({"other": 0.0}))


def test_by_default_what_was_seen_is_the_next_carry_and_none_keeps_it():
    def loss(params, key, batch, carry):
        return *plain_loss(params, key, batch), carry * 0.5 if batch["x"].shape[0] == 16 else None

    state = start(jnp.full(3, 8.0, jnp.bfloat16))
    step = jax.jit(functools.partial(train_step, loss, SGD))
    state, _ = step(state, make_batch(0))
    state, _ = step(state, make_batch(1))
    state, _ = step(state, make_batch(2, size=8))
    np.testing.assert_array_equal(state.carry, jnp.full(3, 2.0, jnp.bfloat16))
    assert state.carry.dtype == jnp.bfloat16


def test_a_frozen_reference_stays_to_the_bit():
    def towards(params, key, batch, reference):
        target = predict(reference, batch["x"])
        return jnp.square(predict(params, batch["x"]) - target - 1), {}, None

    reference = {**make_params(seed=1), "key": jax.random.key(5)}
    step = make_train_step(towards, SGD, mesh=data_mesh(1))
    state, first = step(start(reference), make_batch(0))
    for i in range(1, 20):
        state, metrics = step(state, make_batch(i))
    kept = {**state.carry, "key": jax.random.key_data(state.carry["key"])}
    chex.assert_trees_all_equal(kept, {**reference, "key": jax.random.key_data(reference["key"])})
    assert metrics["loss"] < first["loss"] / 3  # the parameters follow it


def test_low_precision_leaves_the_carry_alone():
    seen = {}

    def loss(params, key, batch, carry):
        seen["types"] = params["in"]["w"].dtype, carry.dtype
        return *plain_loss(params, key, batch), jnp.mean(batch["y"])

    step = make_train_step(loss, SGD, mesh=data_mesh(1), compute_dtype=jnp.bfloat16)
    state, _ = step(start(jnp.zeros(())), make_batch(0))
    assert seen["types"] == (jnp.bfloat16, jnp.float32)
    assert state.carry.dtype == jnp.float32
    np.testing.assert_allclose(state.carry, np.mean(make_batch(0)["y"]), atol=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: {**c, "new": c["mean"]},
            r"absorb returns must have the layout .* it has an unknown carry/new",
        ),
        (lambda c: {"mean": c["mean"], "count": c["count"]}, r"it has no carry/bias \(1 such\)"),
        (lambda c: {**c, "bias": c["mean"]}, r"carry/bias is float32 \[\], not float32 \[1\]"),
        (lambda c: {**c, "count": c["mean"]}, r"carry/count is float32 \[\], not int32 \[\]"),
        (lambda c: None, r"it has no carry/bias \(3 such\)"),
        (lambda c: tuple(c.values()), r"it has no carry/bias \(3 such\)"),
    ],
)
def test_a_carry_that_changes_is_refused_when_traced(change, message):
    step = make_train_step(centred_loss, SGD, absorb=lambda c, p, s: change(c), steps_per_call=2)
    with pytest.raises(ValueError, match=message):
        step(start(), stack([make_batch(0)] * 2))


def test_bad_input(unchecked):
    plain, batch = start().replace(carry=None), make_batch(0)
    with pytest.raises(ValueError, match=r"return \(losses, aux\) where state.carry is None, got "):
        train_step(lambda p, k, b: (b["y"], {}, None), SGD, plain, batch)
    with pytest.raises(ValueError, match=r"\(losses, aux, seen\) where state.carry is given, got "):
        train_step(lambda p, k, b, c: (b["y"], {}), SGD, start(), batch)
    with pytest.raises(ValueError, match="absorb needs a state with a carry"):
        train_step(plain_loss, SGD, plain, batch, absorb=running_mean)
    with pytest.raises(ValueError, match=r"seen\['n'\] must be floating.* got int32: keep counts"):
        train_step(lambda p, k, b, c: (b["y"], {}, {"n": 3}), SGD, start(), batch)
    with pytest.raises(
        ValueError, match=r"seen must have .*: carry is float32 \[16\], not float32 \["
    ):
        train_step(lambda p, k, b, c: (b["y"], {}, b["y"]), SGD, start(0.0), batch)
    with pytest.raises(TypeError, match="carry must be a tree of arrays, got a str in it"):
        init_state(make_params(), SGD, jax.random.key(0), carry={"name": "mean"})


# Two players: the critic's scores leave a mean behind, and both losses read it.


def score(critic, x):
    return jnp.tanh(x @ critic["w"])[:, 0]


def critic_loss(critic, generator, key, batch, carry):
    fake = score(critic, batch["z"] + generator["shift"][None])
    losses = (1 + carry["score"]) * fake - score(critic, batch["x"])
    return losses, {"fake": fake}, jnp.mean(fake)


def generator_loss(critic, generator, key, batch, carry):
    fake = score(critic, batch["z"] + generator["shift"][None])
    return -jnp.mean(fake) * (2 + carry["score"]), {}, jnp.mean(fake)


def after_critic(carry, critic, seen):
    return {**carry, "score": (carry["score"] + seen) / 2, "w": critic["w"], "n": carry["n"] + 1}


def after_generator(carry, generator, seen):
    return {**carry, "score": carry["score"] * seen, "shift": generator["shift"]}


def clip(critic):
    return jax.tree.map(lambda w: jnp.clip(w, -0.4, 0.4), critic)


def saddle_batch(step, size=16):
    rng = np.random.default_rng(step)
    return {name: rng.normal(size=(2, size, 2)).astype(np.float32) + 1 for name in "xz"}


def saddle_start():
    critic, generator = {"w": jnp.asarray([[0.3], [-0.2]])}, {"shift": jnp.zeros(2)}
    carry = {"score": 0.5, "w": critic["w"], "shift": generator["shift"], "n": 0}
    return init_saddle_state(critic, generator, SGD, SGD, jax.random.key(0), carry=carry)


PLAYERS = (critic_loss, generator_loss, SGD, SGD)
ABSORB = {"critic_absorb": after_critic, "generator_absorb": after_generator}


@functools.cache
def saddle_written_out(simultaneous):
    critic, generator = saddle_start().critic.params, saddle_start().generator.params
    carry = saddle_start().carry
    for step in range(STEPS):
        batch, before = saddle_batch(step), critic
        for part in (jax.tree.map(lambda x, i=i: x[i], batch) for i in range(2)):
            mean = lambda c, part=part: jnp.mean(critic_loss(c, generator, 0, part, carry)[0])  # noqa: B023, E731
            fake = critic_loss(critic, generator, 0, part, carry)[2]
            slope = jax.grad(mean)(critic)
            critic = clip(jax.tree.map(lambda p, g: p - 0.1 * g, critic, slope))
            carry = after_critic(carry, critic, fake)
        opponent = before if simultaneous else critic
        slope = jax.grad(lambda g: generator_loss(opponent, g, 0, part, carry)[0])(generator)  # noqa: B023
        fake = generator_loss(opponent, generator, 0, part, carry)[2]
        generator = jax.tree.map(lambda p, g: p - 0.1 * g, generator, slope)
        carry = after_generator(carry, generator, fake)
    return {"critic": critic, "generator": generator}, carry


@pytest.mark.parametrize(
    ("mode", "simultaneous"), [*[(mode, False) for mode in MODES], ("one", True), ("all", True)]
)
def test_two_players_pass_one_carry_on(mode, simultaneous):
    options = MODES[mode] | ABSORB | {"simultaneous": simultaneous}
    step = make_saddle_step(*PLAYERS, n_critic=2, project=clip, **options)
    batches = [saddle_batch(i) for i in range(STEPS)]
    state, metrics = run(step, saddle_start(), batches, options.get("steps_per_call", 1))
    close((state.params, state.carry), saddle_written_out(simultaneous))
    assert int(state.carry["n"]) == 2 * STEPS
    assert np.all(metrics["finite"])


def test_two_players_resume_bit_for_bit(tmp_path):
    step = make_saddle_step(*PLAYERS, n_critic=2, mesh=data_mesh(1), **ABSORB)
    batches = [saddle_batch(i) for i in range(4)]
    whole, _ = run(step, saddle_start(), batches)
    half, _ = run(step, saddle_start(), batches[:2])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, half)
    checkpoints.close()
    resumed, _ = run(step, checkpoints.restore(saddle_start())[1], batches[2:])
    chex.assert_trees_all_equal((whole.params, whole.carry), (resumed.params, resumed.carry))


def test_power_vectors_move_as_they_did_among_the_parameters():
    rng = np.random.default_rng(0)
    weights = {f"layer{i}": {"kernel": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32)}
               for i in range(2)}  # fmt: skip
    power = init_power(weights, jax.random.key(1))
    moved = lambda weights, power: spectral_normalise(weights, power)[1]  # noqa: E731

    def losses(weights, power, generator, batch):
        w, _ = spectral_normalise(weights, power)
        f = lambda x: jnp.tanh(x @ w["layer0"]["kernel"]) @ w["layer1"]["kernel"][:, 0]  # noqa: E731
        return f(batch["z"] + generator["shift"][None]) - f(batch["x"])

    def inside_critic(critic, generator, key, batch):
        return losses(critic["weights"], critic["power"], generator, batch), {}

    def inside_generator(critic, generator, key, batch):
        return -losses(critic["weights"], critic["power"], generator, batch), {}

    def carried_critic(critic, generator, key, batch, power):
        return losses(critic, power, generator, batch), {}, None

    def carried_generator(critic, generator, key, batch, power):
        return -losses(critic, power, generator, batch), {}, None

    def project(critic):
        return {**critic, "power": moved(critic["weights"], critic["power"])}

    adam, shift = optax.adam(0.05), {"shift": jnp.zeros(2)}
    inside = init_saddle_state(
        {"weights": weights, "power": power}, shift, adam, adam, jax.random.key(0)
    )
    carried = init_saddle_state(weights, shift, adam, adam, jax.random.key(0), carry=power)
    old = make_saddle_step(
        inside_critic, inside_generator, adam, adam, n_critic=2, project=project, mesh=data_mesh(1)
    )
    new = make_saddle_step(
        carried_critic,
        carried_generator,
        adam,
        adam,
        n_critic=2,
        critic_absorb=lambda power, weights, _: moved(weights, power),
        mesh=data_mesh(1),
    )
    batches = [saddle_batch(i) for i in range(3)]
    inside, before = run(old, inside, batches)
    carried, after = run(new, carried, batches)
    together = {"weights": carried.critic.params, "power": carried.carry}
    close(inside.params, {**carried.params, "critic": together}, 1e-6)
    close(before, after, 1e-6)
    drift = [np.abs(carried.carry[name] - power[name]).max() for name in power]
    assert min(drift) > 1e-3  # they did move


def test_two_players_accumulate_and_compute_in_low_precision():
    types = []

    def critic_loss_16(critic, generator, key, batch, carry):
        types.append((critic["w"].dtype, generator["shift"].dtype, batch["x"].dtype))
        return critic_loss(critic, generator, key, batch, carry)

    state, batch = saddle_start(), saddle_batch(0)
    exact, _ = jax.jit(functools.partial(saddle_step, *PLAYERS, n_critic=2, **ABSORB))(state, batch)
    low = functools.partial(saddle_step, critic_loss_16, *PLAYERS[1:], n_critic=2, accumulate=2)
    new, metrics = jax.jit(functools.partial(low, compute_dtype=jnp.bfloat16, **ABSORB))(
        state, batch
    )
    assert {dtype for given in types for dtype in given} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(lambda a, b: chex.assert_equal(a.dtype, b.dtype), new, state)
    close((new.params, new.carry), (exact.params, exact.carry), 0.01)
    assert metrics["critic/loss"].dtype == jnp.float32


def test_bad_input_of_two_players(unchecked):
    step = functools.partial(saddle_step, *PLAYERS, n_critic=2)
    with pytest.raises(ValueError, match=r"multiple of 3 .*accumulate 3\), got 16"):
        step(saddle_start(), saddle_batch(0), accumulate=3)
    with pytest.raises(ValueError, match="the layout of the carry: it has no carry/n"):
        step(saddle_start(), saddle_batch(0), generator_absorb=lambda carry, p, seen: seen)
    lacking = lambda *given: generator_loss(*given)[:2]  # noqa: E731
    with pytest.raises(ValueError, match=r"generator_loss must return \(losses, aux, seen\)"):
        saddle_step(
            critic_loss, lacking, SGD, SGD, saddle_start(), saddle_batch(0), n_critic=2, **ABSORB
        )
