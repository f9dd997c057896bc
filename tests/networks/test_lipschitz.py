"""Lipschitz layers against reference numbers, singular values, and exact Wasserstein distances."""

import json
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import wasserstein_distance

from genjax.networks import DCGANCritic
from genjax.networks.lipschitz import (
    LipschitzMLP,
    OrthonormalDense,
    bjorck,
    group_sort,
    init_power,
    max_min,
    power_iteration,
    spectral_normalise,
)

FOLDER = Path(__file__).parents[1] / "references"
SPECTRAL = json.loads((FOLDER / "spectral_norm.json").read_text())
SORTING = json.loads((FOLDER / "groupsort_maxmin.json").read_text())


def array(x):
    return jnp.array(x, jnp.float64)


def test_power_iteration_meets_the_reference(x64, compiled):
    w, u0 = array(SPECTRAL["inputs"]["W"]), array(SPECTRAL["inputs"]["u0"])
    for row in SPECTRAL["expected"]["power_iteration"]:
        sigma, u = compiled(lambda w, u, n=row["iter"]: power_iteration(w, u, num_steps=n))(w, u0)
        np.testing.assert_allclose(sigma, row["sigma"], rtol=1e-10)
        np.testing.assert_allclose(u, row["u"], rtol=1e-9, atol=1e-11)


def test_spectral_normalisation_meets_the_reference_in_value_and_gradient(x64, compiled):
    """dW of sum(A * W / sigma) is (A - <A, W_sn> u v') / sigma."""
    expected = SPECTRAL["expected"]
    params = {"layer": {"kernel": array(SPECTRAL["inputs"]["W"]).T, "bias": jnp.ones(4)}}
    power = {"['layer']['kernel']": array(SPECTRAL["inputs"]["u0"])}
    a = array(SPECTRAL["inputs"]["A"])

    def normalised(params):
        return spectral_normalise(params, power, num_steps=200)[0]["layer"]["kernel"].T

    np.testing.assert_allclose(compiled(normalised)(params), expected["W_sn"], rtol=1e-9)
    slope = compiled(jax.grad(lambda p: jnp.sum(a * normalised(p))))(params)["layer"]
    np.testing.assert_allclose(slope["kernel"].T, expected["grad_sum_A_Wsn"], rtol=1e-8, atol=1e-10)
    assert jnp.all(slope["bias"] == 0)


def test_convolution_kernels_are_taken_as_matrices(x64, key):
    kernel = array(SPECTRAL["inputs"]["kernel_OIHW"]).transpose(2, 3, 1, 0)
    params = {"conv": {"kernel": kernel}, "scale": {"kernel": jnp.ones(3)}}
    power = init_power(params, key)
    assert set(power) == {"['conv']['kernel']"}
    normalised, new = spectral_normalise(params, power, num_steps=100)
    sigma = kernel / normalised["conv"]["kernel"]
    np.testing.assert_allclose(sigma, SPECTRAL["expected"]["conv_reshaped_sigma"], rtol=1e-9)
    np.testing.assert_allclose(jnp.linalg.norm(new["['conv']['kernel']"]), 1, rtol=1e-12)
    # One step from the state that was kept is as good as many from the start.
    again = spectral_normalise(params, new, num_steps=1)[0]["conv"]["kernel"]
    np.testing.assert_allclose(again, normalised["conv"]["kernel"], rtol=1e-9)


def test_spectrally_normalised_network_is_lipschitz(key):
    module = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32), nn.relu, nn.Dense(1)])
    x, y = jax.random.normal(key, (2, 1000, 5))
    params = jax.tree.map(lambda w: 3 * w, jax.jit(module.init)(key, x))
    power = init_power(params, key)
    normalised, _ = jax.jit(partial(spectral_normalise, num_steps=60))(params, power)
    apply = jax.jit(module.apply)
    gap = jnp.abs(apply(normalised, x) - apply(normalised, y))[:, 0]
    assert jnp.max(gap / jnp.linalg.norm(x - y, axis=1)) <= 1 + 1e-4
    grads = jax.jit(jax.grad(lambda s: module.apply(spectral_normalise(params, s)[0], x).sum()))
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(grads(power)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_of_zeros_stays_zero_and_recovers(dtype, key):
    params = {"kernel": jnp.zeros((3, 2), dtype)}
    power = init_power(params, key)

    @jax.jit
    def step(params, power):
        normalised, new = spectral_normalise(params, power)
        slope = jax.grad(
            lambda p: jnp.sum(spectral_normalise(p, power)[0]["kernel"].astype(float))
        )(params)
        return normalised, new, slope

    normalised, new, slope = step(params, power)
    assert jnp.all(normalised["kernel"] == 0)
    np.testing.assert_array_equal(new["['kernel']"], power["['kernel']"])
    np.testing.assert_array_equal(slope["kernel"].astype(float), 1)  # divided by 1
    # Small and large weights: the squares would vanish or overflow.
    w = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype)
    for scale in (1e-15, 1.0, 1e15):
        state = new
        for _ in range(12):
            normalised, state, slope = step({"kernel": scale * w}, state)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(normalised["kernel"].astype(float), w / 2, atol=tolerance)
        assert jnp.all(jnp.isfinite(slope["kernel"].astype(float)))


def test_embeddings_of_a_projection_critic_are_normalised(key):
    critic = DCGANCritic(size=8, channels=1, width=8, base=4, classes=3)
    x, label = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1, jnp.int32)
    params = jax.jit(critic.init)(key, x, label)
    table = params["params"]["Embed_0"]["embedding"]
    params["params"]["Embed_0"]["embedding"] = 5 * jax.random.normal(key, table.shape)
    normalised, _ = spectral_normalise(params, init_power(params, key), num_steps=50)
    singular = np.linalg.svd(normalised["params"]["Embed_0"]["embedding"], compute_uv=False)
    np.testing.assert_allclose(singular[0], 1, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4), (4, 1)])
def test_bjorck_at_zero_has_a_finite_gradient(shape):
    with jax.debug_nans(True):
        value, slope = jax.value_and_grad(lambda w: jnp.sum(bjorck(w, num_steps=3)))(
            jnp.zeros(shape)
        )
    assert value == 0
    assert jnp.all(jnp.isfinite(slope))
    assert jnp.max(jnp.abs(slope)) < 100


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1e3, 1e25])
def test_bjorck_does_not_depend_on_the_scale(scale, key):
    w = jax.random.normal(key, (3, 5))
    run = jax.jit(jax.value_and_grad(lambda w: jnp.sum(jnp.sin(bjorck(w)))))
    (value, slope), (scaled, its_slope) = run(w), run(scale * w)
    np.testing.assert_allclose(scaled, value, rtol=1e-5)
    np.testing.assert_allclose(scale * its_slope, slope, rtol=1e-3, atol=1e-5)


def test_group_sort_meets_the_reference(x64, compiled):
    x = array(SORTING["inputs"]["x"])
    for size, expected in SORTING["expected"]["groupsort_ascending"].items():
        np.testing.assert_array_equal(
            compiled(lambda x, s=int(size): group_sort(x, s))(x), expected
        )
    expected = SORTING["expected"]["maxmin_interleaved_max_first"]
    np.testing.assert_array_equal(compiled(max_min)(x), expected)


def test_orthonormal_net_meets_the_reference(x64):
    """The reference's net by hand: values, gradients, and gradient norm 1 everywhere."""
    inputs, expected = SORTING["inputs"], SORTING["expected"]

    def net(z):
        for q, b in zip(inputs["Q"], inputs["b"], strict=True):
            z = group_sort(z @ array(q) + array(b), 2)
        return z @ array(inputs["q"])

    z = array(inputs["z"])
    np.testing.assert_allclose([net(row) for row in z], expected["net_values"], rtol=1e-12)
    slopes = jnp.stack([jax.grad(net)(row) for row in z])
    np.testing.assert_allclose(slopes, expected["net_grad"], rtol=1e-12)
    np.testing.assert_allclose(jnp.linalg.norm(slopes, axis=1), 1, rtol=1e-12)


def test_ties_do_not_split_the_gradient():
    slope = jax.jacobian(lambda x: group_sort(x, 2))(jnp.array([1.0, 1.0]))
    np.testing.assert_array_equal(jnp.sort(slope, axis=0), [[0, 0], [1, 1]])


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (3, 8), (5, 1)])
@pytest.mark.parametrize("order", [1, 2])
def test_bjorck_converges_to_the_polar_factor(shape, order, x64, key):
    w = jax.random.normal(key, shape, jnp.float64)
    u, _, vt = np.linalg.svd(np.asarray(w), full_matrices=False)
    got = jax.jit(lambda w: bjorck(w, num_steps=60, order=order))(w)
    np.testing.assert_allclose(got, u @ vt, atol=1e-10)
    # Never above norm 1 on the way, whatever the scale and the number of steps.
    for steps in (1, 8):
        short = jax.jit(lambda w, n=steps: bjorck(w, num_steps=n, order=order))
        for scale in (1e-6, 1.0, 1e6):
            assert np.linalg.norm(short(scale * w), 2) <= 1 + 1e-12
    # An orthonormal matrix is its own factor, and stays.
    np.testing.assert_allclose(bjorck(got, num_steps=1, order=order), got, atol=1e-10)
    slope = jax.jit(jax.grad(lambda w: bjorck(w, num_steps=5, order=order)[0, 0]))(w)
    assert jnp.all(jnp.isfinite(slope))


@pytest.fixture
def critic(key):
    """A critic whose weights have moved far from where they started."""
    module = LipschitzMLP((64, 64, 64))
    params = jax.jit(module.init)(key, jnp.zeros((1, 6)))
    noise = jax.random.normal(key, (64,))
    return module, jax.tree.map(lambda w: 2 * w + 0.3 * jnp.resize(noise, w.shape), params)


def test_lipschitz_over_random_pairs(critic, key):
    """Acceptance: the largest ratio over 1e5 random pairs, near and far."""
    module, params = critic
    keys = jax.random.split(key, 3)
    x = 3 * jax.random.normal(keys[0], (100_000, 6))
    step = jax.random.normal(keys[1], x.shape)
    y = x + step * jnp.exp(jax.random.uniform(keys[2], (100_000, 1), minval=-2, maxval=2))
    apply = jax.jit(module.apply)
    gap = jnp.abs(apply(params, x) - apply(params, y))
    ratio = gap / jnp.linalg.norm(x - y, axis=1)
    assert ratio.max() <= 1 + 1e-4
    assert ratio.max() > 0.3  # and not by being flat


@pytest.mark.slow
def test_gradient_norm_is_one_at_the_start(key):
    module = LipschitzMLP((16, 16, 16), group=4)
    x = jax.random.normal(key, (20, 5))

    @partial(jax.jit, static_argnums=0)
    def slopes_of(module, x):
        return jax.grad(lambda x: module.apply(module.init(key, x), x).sum())(x)

    assert jnp.all(jnp.linalg.norm(slopes_of(module, x), axis=1) <= 1 + 1e-5)
    x = jax.random.normal(key, (20, 16))
    slopes = slopes_of(LipschitzMLP((16, 16)), x)
    np.testing.assert_allclose(jnp.linalg.norm(slopes, axis=1), 1, rtol=1e-5)
    # Where no layer widens it is 1; a layer that widens projects.
    narrowing = slopes_of(LipschitzMLP((12, 8, 4)), x)
    np.testing.assert_allclose(jnp.linalg.norm(narrowing, axis=1), 1, rtol=1e-5)
    widening = slopes_of(LipschitzMLP((16, 16)), x[:, :2])
    assert jnp.mean(jnp.linalg.norm(widening, axis=1)) < 0.7


@pytest.mark.slow
def test_estimates_the_wasserstein_distance_in_one_dimension(key):
    """Acceptance: within 5% of the exact W1 between two samples, never above it."""
    keys = jax.random.split(key, 3)
    x = 0.5 + 1.5 * jax.random.normal(keys[0], (256, 1))
    y = jnp.where(jnp.arange(256)[:, None] % 3 == 0, -2.0, 1.0)
    y = y + 0.5 * jax.random.normal(keys[1], (256, 1))
    exact = wasserstein_distance(np.asarray(x[:, 0]), np.asarray(y[:, 0]))
    module, optimizer = LipschitzMLP((32, 32, 32), num_steps=8), optax.adam(5e-3)
    params = module.init(keys[2], x)

    def bound(params):
        return module.apply(params, x).mean() - module.apply(params, y).mean()

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: -bound(p))(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), -value

    start = (params, optimizer.init(params))
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=300))(start)
    assert 0.95 * exact <= bound(params) <= exact * (1 + 1e-4)


def test_dense_layer_takes_any_leading_axes(key):
    module = OrthonormalDense(3, use_bias=False)
    x = jax.random.normal(key, (2, 4, 5))
    params = module.init(key, x)
    assert module.apply(params, x).shape == (2, 4, 3)


def test_bad_input(unchecked, key):
    with pytest.raises(ValueError, match="divide the 5 features"):
        group_sort(jnp.zeros((2, 5)), 2)
    with pytest.raises(ValueError, match="order"):
        bjorck(jnp.eye(3), order=3)
    with pytest.raises(ValueError, match="rank 2"):
        bjorck(jnp.ones(3))
    with pytest.raises(ValueError, match="init_power"):
        spectral_normalise({"kernel": jnp.eye(3)}, {})
    with pytest.raises(ValueError, match="steps"):
        power_iteration(jnp.eye(3), jnp.ones(3), num_steps=0)
