import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax.training import init_state
from genjax.training.state import ema_init, ema_read, ema_update


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
@pytest.mark.parametrize("updates", [1, 2, 7])
def test_ema_closed_form(compiled, decay, updates):
    # The mean of p_1..p_n with weights d^(n - i), normalised.
    values = np.random.default_rng(0).normal(size=(updates, 3)) + 5
    weights = decay ** np.arange(updates - 1, -1, -1.0)
    expected = (weights[:, None] * values).sum(0) / weights.sum()
    params = {"w": jnp.asarray(values[0], jnp.float32)}
    ema = ema_init(params, [decay, 0.5])
    for n, value in enumerate(values, 1):
        params = {"w": jnp.asarray(value, jnp.float32)}
        ema = compiled(ema_update)(ema, params, n)
    np.testing.assert_allclose(ema_read(ema, decay)["w"], expected, rtol=1e-6)


def run_ema(values, decay):
    """The average after one update for each of the values, in one scan."""

    def body(ema, given):
        value, n = given
        return ema_update(ema, {"w": value}, n), None

    start = ema_init({"w": jnp.zeros_like(values[0])}, [decay])
    ema, _ = jax.jit(lambda v: jax.lax.scan(body, start, (v, 1 + jnp.arange(len(v)))))(values)
    return ema_read(ema, decay)["w"]


@pytest.mark.parametrize("decay", [0.997, 0.9999, 0.999999])
def test_ema_of_a_constant_is_the_constant(decay):
    # In any float format; d m + (1 - d) p in float32 leaves .986 of it at d = .999999.
    constant = jnp.array([1.0, -0.3, 7e8, 1e-20])
    values = jnp.broadcast_to(constant, (3000, 4))
    np.testing.assert_array_equal(run_ema(values, decay), constant)
    # The start is forgotten by the first update, and nothing else than a mean of what is seen.
    seen = np.random.default_rng(1).normal(size=(3000, 4)) + 3 - 1j
    weights = decay ** np.arange(2999, -1, -1.0)[:, None]
    expected = (weights * seen).sum(0) / weights.sum()
    got = run_ema(jnp.asarray(seen, jnp.complex64), decay)
    np.testing.assert_allclose(got, expected, rtol=3e-6)


def test_ema_before_the_first_update_is_the_parameters(key):
    state = init_state({"w": jnp.arange(3.0)}, optax.sgd(0.1), key, ema_decays=[0.99])
    np.testing.assert_array_equal(state.ema_params(0.99)["w"], np.arange(3.0))


def test_ema_is_float32_over_bfloat16_parameters():
    # In bfloat16, 0.999 m + 0.001 p would not move at all.
    params = {"w": jnp.full(2, 3.0, jnp.bfloat16), "count": jnp.array(4)}
    ema = ema_init(params, [0.999])
    for n in range(1, 11):
        ema = ema_update(ema, params, n)
    mean = ema_read(ema, 0.999)
    assert mean["w"].dtype == jnp.float32
    np.testing.assert_array_equal(mean["w"], 3.0)
    assert mean["count"] == 4


def test_state_is_a_pytree_and_owns_its_arrays(key):
    params = {"w": jnp.ones(3)}
    state = init_state(params, optax.adam(0.1), key, ema_decays=(0.9,))
    assert state.step.dtype == jnp.int32
    leaves, tree = jax.tree.flatten(state)
    assert all(isinstance(x, jax.Array) for x in leaves)
    assert not any(getattr(x, "weak_type", False) for x in leaves)
    again = jax.tree.unflatten(tree, leaves)
    assert type(again) is type(state)
    jax.jit(lambda s: jax.tree.map(lambda x: x, s), donate_argnums=0)(state)
    np.testing.assert_array_equal(params["w"], 1)  # not donated with the state
    with pytest.raises(AttributeError):
        again.step = 3


def test_bad_input(key, unchecked):
    params, sgd = {"w": jnp.ones(3)}, optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"ema_decays must lie in \[0, 1\), got 1.0"):
        init_state(params, sgd, key, ema_decays=[1.0])
    with pytest.raises(TypeError, match=r"optimizer must be an optax transformation.*got float"):
        init_state(params, 0.1, key)
    with pytest.raises(ValueError, match="at least one array of floats"):
        init_state({}, sgd, key)
    with pytest.raises(ValueError, match=r"at least one array of floats, got \['int32'\]"):
        init_state({"n": jnp.ones(3, jnp.int32)}, sgd, key)
    with pytest.raises(TypeError, match="tree of arrays, got a str"):
        init_state({"w": "weights"}, sgd, key)
    state = init_state(params, sgd, key, ema_decays=[0.99])
    with pytest.raises(ValueError, match=r"decay must be one of \['0.99'\], got '0.999'"):
        state.ema_params(0.999)
