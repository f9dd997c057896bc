import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.training import data_mesh, init_state, make_train_step, train_step
from genjax.training.update import first_bad_term, with_norm

from .problem import make_batch, make_params, noisy_loss, plain_loss, stack

SGD = optax.sgd(0.1)


def start(key, optimizer=SGD, **options):
    return init_state(make_params(), optimizer, key, **options)


def one_device(loss_fn=noisy_loss, optimizer=SGD, **options):
    return make_train_step(loss_fn, optimizer, mesh=data_mesh(1), **options)


def run(step, state, batches):
    for batch in batches:
        state, metrics = jax.block_until_ready(step(state, batch))
    return state, metrics


def close(a, b, tolerance):
    chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def test_step_is_gradient_descent_on_the_mean(compiled, key):
    state, batch = start(key), jax.tree.map(jnp.asarray, make_batch(0))

    def objective(params):
        return jnp.mean(noisy_loss(params, jax.random.fold_in(key, 0), batch)[0])

    value, grads = jax.value_and_grad(objective)(state.params)
    new, metrics = compiled(lambda s, b: train_step(noisy_loss, SGD, s, b))(state, batch)
    close(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads), 1e-6)
    close(metrics["loss"], value, 1e-6)
    close(metrics["grad_norm"], optax.tree.norm(grads), 1e-6)
    assert bool(metrics["finite"])
    assert int(new.step) == 1
    terms = noisy_loss(state.params, jax.random.fold_in(key, 0), batch)[1]
    close(metrics["absolute"], jnp.mean(terms["absolute"]), 1e-6)


def test_randomness_moves_with_the_step(key):
    state, batch = start(key, optax.set_to_zero()), make_batch(0)
    step = one_device(optimizer=optax.set_to_zero())
    state, first = step(state, batch)
    _, second = step(state, batch)
    assert first["loss"] != second["loss"]


def test_clipping_by_optax_and_the_norm_before_it(key):
    clipped = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    state = start(key, clipped)
    before = state.params
    state, metrics = train_step(
        plain_loss, clipped, state, jax.tree.map(jnp.asarray, make_batch(0))
    )
    moved = jax.tree.map(jnp.subtract, state.params, before)
    np.testing.assert_allclose(optax.tree.norm(moved), 1e-3, rtol=1e-3)
    assert metrics["grad_norm"] > 1e-2


@pytest.mark.parametrize("optimizer", [SGD, optax.adam(0.1)], ids=["sgd", "adam"])
def test_parameters_that_are_not_floating_stay_as_they_are(key, optimizer):
    """And complex ones descend: |c - 1 - 2j|^2 is 0 at 1 + 2j."""
    params = {"w": jnp.ones(2), "c": jnp.zeros(3, jnp.complex64), "table": jnp.array([2, 0, 1])}
    params |= {"none": None, "key": jax.random.key(5), "flag": np.array(True)}

    def loss_fn(params, key, batch):
        away = jnp.square(jnp.abs(params["c"] - 1 - 2j)).sum()
        taken = params["w"][params["table"]].sum() * jnp.where(params["flag"], 1.0, jnp.nan)
        return jnp.square(taken - batch["y"]) + away, {}

    state = init_state(params, optimizer, key, ema_decays=[0.5])
    step = jax.jit(lambda s, b: train_step(loss_fn, optimizer, s, b, accumulate=2))
    for _ in range(100):
        state, metrics = step(state, {"y": jnp.full(4, 6.0)})
    assert metrics["grad_norm"].dtype == jnp.float32
    new = state.params
    assert jax.tree.structure(new) == jax.tree.structure(params)
    np.testing.assert_array_equal(new["table"], params["table"])
    np.testing.assert_array_equal(state.ema_params(0.5)["table"], params["table"])
    assert new["key"] == params["key"]
    np.testing.assert_allclose(new["w"][params["table"]].sum(), 6, atol=0.05)
    np.testing.assert_allclose(new["c"], 1 + 2j, atol=0.05)


def test_the_norm_of_the_gradient_is_finite_where_float32_holds_it():
    def grads(size):
        real, empty = jnp.array([3.0, -1.0]) * size, jnp.zeros((0, 2))
        return [real.astype(jnp.bfloat16), jnp.array([[0.5 + 1j]]) * size, empty]

    def norm_and_slope(grads):
        # Where a scan discards the metric its cotangent is 0: no slope may make NaN of it.
        return jax.value_and_grad(lambda g: with_norm(g)[1])(grads)

    several = [grads(size) for size in (0.0, 3e-30, 1e-3, 2e19, 5e37)]
    one = jax.jit(norm_and_slope)
    mapped = jax.jit(jax.vmap(norm_and_slope))(stack(several))
    for i, leaves in enumerate(several):
        squares = [np.abs(np.asarray(x).astype(complex)) ** 2 for x in leaves]
        expected = np.sqrt(sum(x.sum() for x in squares))
        for norm, slope in (one(leaves), jax.tree.map(lambda x, i=i: x[i], mapped)):
            assert norm.dtype == jnp.float32
            np.testing.assert_allclose(norm, expected, rtol=2e-6)
            chex.assert_tree_all_finite(slope)
            if expected:
                np.testing.assert_allclose(slope[1], np.conj(leaves[1]) / expected, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_large_batch(key, accumulate):
    whole, small = one_device(plain_loss), one_device(plain_loss, accumulate=accumulate)
    batches = [make_batch(i) for i in range(3)]
    a, metrics_a = run(whole, start(key), batches)
    b, metrics_b = run(small, start(key), batches)
    close(a.params, b.params, 1e-6)
    close(metrics_a, metrics_b, 2e-6)


def test_several_steps_in_one_call(key):
    batches = [make_batch(i) for i in range(5)]
    singles, several = one_device(), one_device(steps_per_call=3)
    state, expected = start(key, ema_decays=[0.9]), []
    for batch in batches:
        state, metrics = singles(state, batch)
        expected.append(metrics)
    other, first = several(start(key, ema_decays=[0.9]), stack(batches[:3]))
    other, second = several(other, stack(batches[3:]))  # the last call may be shorter
    got = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, second)
    assert int(other.step) == 5
    close(other.params, state.params, 1e-6)
    close(other.ema, state.ema, 1e-6)
    close(got, stack(expected), 1e-6)


def test_bfloat16_compute_keeps_float32_parameters(key):
    adam, seen = optax.adam(0.01), {}

    def loss_fn(params, key, batch):
        seen.update(params=params["in"]["w"].dtype, x=batch["x"].dtype, label=batch["label"].dtype)
        seen.update(bias=params["out"]["b"].dtype)
        return plain_loss(params, key, batch)

    step = one_device(loss_fn, adam, compute_dtype=jnp.bfloat16, uncast=["b"])
    batch = {**make_batch(0), "label": np.arange(16, dtype=np.int32)}
    state, metrics = step(start(key, adam, ema_decays=[0.9]), batch)
    cast, label, kept = jnp.bfloat16, jnp.int32, jnp.float32
    assert seen == {"params": cast, "x": cast, "label": label, "bias": kept}
    kept = (state.params, state.opt_state, state.ema, metrics)
    floats = [x for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype(jnp.float32)}
    _, exact = one_device(plain_loss, adam)(start(key, adam), make_batch(0))
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=0.03)


@pytest.mark.parametrize(
    "options",
    [{"mesh": data_mesh(1)}, {"mesh": data_mesh(1), "steps_per_call": 2}, {}, {"pmap": True}],
    ids=["one", "several", "eight", "pmap"],
)
def test_second_call_does_not_trace_again(key, options):
    chex.clear_trace_counter()
    adam, counted = optax.adam(0.01), chex.assert_max_traces(noisy_loss, n=1)
    step = make_train_step(counted, adam, **options)
    state = start(key, adam, ema_decays=[0.9])
    for i in range(3):
        batch = stack([make_batch(i)] * 2) if "steps_per_call" in options else make_batch(i)
        state, _ = jax.block_until_ready(step(state, batch))
    assert int(state.step) in (3, 6)


def test_first_bad_term_is_named(key):
    def loss_fn(params, key, batch):
        losses, _ = plain_loss(params, key, batch)
        return losses + jnp.log(batch["y"]), {"fit": losses, "log_y": jnp.log(batch["y"])}

    batch = {**make_batch(0), "y": np.ones(16, np.float32)}
    step = one_device(loss_fn)
    state, metrics = step(start(key), batch)
    assert bool(metrics["finite"])
    assert first_bad_term(metrics) is None
    batch["y"][3] = 0
    _, metrics = step(state, batch)
    assert not bool(metrics["finite"])
    assert first_bad_term(metrics) == "log_y"


def test_bad_input(key, unchecked):
    state = start(key)
    with pytest.raises(ValueError, match=r"multiple of 8 \(devices 8 x accumulate 1\), got 12"):
        make_train_step(noisy_loss, SGD)(state, make_batch(0, size=12))
    with pytest.raises(ValueError, match=r"multiple of 3 .*accumulate 3\), got 16"):
        one_device(accumulate=3)(state, make_batch(0))
    with pytest.raises(ValueError, match=r"one batch size, got sizes \[3, 16\]"):
        one_device()(state, {**make_batch(0), "y": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=r"batch\['y'\] must have rank at least 1, got shape \(\)"):
        one_device()(state, {**make_batch(0), "y": np.float32(3)})
    with pytest.raises(ValueError, match="got 0"):
        one_device()(state, make_batch(0, size=0))
    with pytest.raises(ValueError, match="one loss per example"):
        one_device(lambda p, k, b: (jnp.mean(b["x"]), {}))(state, make_batch(0))
    with pytest.raises(ValueError, match="must not use the name 'loss'"):
        one_device(lambda p, k, b: (b["y"], {"loss": b["y"]}))(state, make_batch(0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'acumulate'"):
        make_train_step(noisy_loss, SGD, acumulate=2)
    with pytest.raises(ValueError, match="sequence of names, got the string 'b'"):
        one_device(compute_dtype=jnp.bfloat16, uncast="b")(state, make_batch(0))
    with pytest.raises(ValueError, match="steps_per_call must be at least 1, got 0"):
        make_train_step(noisy_loss, SGD, steps_per_call=0)
    with pytest.raises(ValueError, match=r"devices must lie in \[1, 8\]"):
        data_mesh(9)
