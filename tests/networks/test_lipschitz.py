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
    spectral_penalty,
)

FOLDER = Path(__file__).parents[1] / "references"
SPECTRAL = json.loads((FOLDER / "spectral_norm.json").read_text())
SORTING = json.loads((FOLDER / "groupsort_maxmin.json").read_text())


def array(x):
    return jnp.asarray(np.array(x, np.float64))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_power_iteration_meets_the_reference(x64, compiled):
    w, u0 = array(SPECTRAL["inputs"]["W"]), array(SPECTRAL["inputs"]["u0"])
    for row in SPECTRAL["expected"]["power_iteration"]:
        sigma, u = compiled(lambda w, u, n=row["iter"]: power_iteration(w, u, num_steps=n))(w, u0)
        np.testing.assert_allclose(sigma, row["sigma"], rtol=1e-10)
        np.testing.assert_allclose(u, row["u"], rtol=1e-9, atol=1e-11)


def test_spectral_normalisation_meets_the_reference_in_value_and_gradient(x64, compiled):
    """dW of sum(A * W / sigma) is (A - <A, W_sn> u v') / sigma."""
    expected = SPECTRAL["expected"]
    params = {
        "layer": {"kernel": array(np.transpose(SPECTRAL["inputs"]["W"])), "bias": array(np.ones(4))}
    }
    power = {"['layer']['kernel']": array(SPECTRAL["inputs"]["u0"])}
    a = array(SPECTRAL["inputs"]["A"])

    def normalised(params):
        return spectral_normalise(params, power, num_steps=200)[0]["layer"]["kernel"].T

    np.testing.assert_allclose(compiled(normalised)(params), expected["W_sn"], rtol=1e-9)
    slope = compiled(jax.grad(lambda p: jnp.sum(a * normalised(p))))(params)["layer"]
    np.testing.assert_allclose(slope["kernel"].T, expected["grad_sum_A_Wsn"], rtol=1e-8, atol=1e-10)
    assert np.all(np.asarray(slope["bias"]) == 0)


def test_convolution_kernels_are_taken_as_matrices(x64, key):
    kernel = np.array(SPECTRAL["inputs"]["kernel_OIHW"]).transpose(2, 3, 1, 0)
    params = {"conv": {"kernel": kernel}, "scale": {"kernel": np.ones(3)}}

    @jax.jit
    def run(params, key):
        power = init_power(params, key)
        normalised, new = spectral_normalise(params, power, num_steps=100)
        again = spectral_normalise(params, new, num_steps=1)[0]
        return power, normalised["conv"]["kernel"], new, again["conv"]["kernel"]

    power, normalised, new, again = run(params, key)
    assert set(power) == {"['conv']['kernel']"}
    sigma = kernel / np.asarray(normalised)
    np.testing.assert_allclose(sigma, SPECTRAL["expected"]["conv_reshaped_sigma"], rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(new["['conv']['kernel']"]), 1, rtol=1e-12)
    # One step from the state that was kept is as good as many from the start.
    np.testing.assert_allclose(again, normalised, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-3)])
def test_spectral_penalty_is_the_sum_of_singular_values(dtype, tolerance, key):
    """LAPACK's, of every kernel as a matrix; the gradient of each is u v'. The power vectors stay
    float32 where the weights are cast, as a train step in bfloat16 has them."""
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 12))
    conv = (u * [5.0, 2.0, 1.0, 0.5]) @ v[:4]  # [out, h w in]
    params = {
        "conv": {"kernel": jnp.asarray(conv.T.reshape(2, 2, 3, 4), dtype)},
        "dense": {"kernel": jnp.asarray([[0.0, -3.0], [1.0, 0.0]], dtype), "bias": jnp.ones(2)},
    }

    @jax.jit
    def run(params, key):
        power = init_power(jax.tree.map(lambda x: x.astype(jnp.float32), params), key)
        loss = lambda p: spectral_penalty(p, power, num_steps=40)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    (penalty, power), slope = run(params, key)
    exact = [np.linalg.svd(np.asarray(m, np.float64)) for m in
             (np.asarray(params["conv"]["kernel"], np.float64).reshape(12, 4).T,
              params["dense"]["kernel"].T)]  # fmt: skip
    np.testing.assert_allclose(penalty, sum(s[0] for _, s, _ in exact), rtol=1e-5)
    assert penalty.dtype == jnp.float32
    assert all(p.dtype == jnp.float32 for p in power.values())
    for name, (u, _, vt) in zip(("conv", "dense"), exact, strict=True):
        got = np.asarray(slope[name]["kernel"], np.float64)
        got = got.reshape(-1, got.shape[-1]).T
        np.testing.assert_allclose(got, np.outer(u[:, 0], vt[0]), atol=tolerance)
        assert slope[name]["kernel"].dtype == jnp.dtype(dtype)
    assert not np.asarray(slope["dense"]["bias"]).any()
    normalised, again = spectral_normalise(params, power)
    assert normalised["dense"]["kernel"].dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(
        normalised["dense"]["kernel"].astype(float), [[0, -1], [1 / 3, 0]], atol=tolerance
    )
    assert all(p.dtype == jnp.float32 for p in again.values())
    assert float(spectral_penalty({"bias": jnp.ones(2)}, {})[0]) == 0


def test_spectrally_normalised_network_is_lipschitz(key):
    module = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(32), nn.relu, nn.Dense(1)])
    x, y = normal(2, 1000, 5)

    @jax.jit
    def run(key, x, y):
        params = jax.tree.map(lambda w: 3 * w, module.init(key, x))
        power = init_power(params, key)
        normalised, _ = spectral_normalise(params, power, num_steps=60)
        grads = jax.grad(lambda s: module.apply(spectral_normalise(params, s)[0], x).sum())
        return module.apply(normalised, x) - module.apply(normalised, y), grads(power)

    gap, grads = jax.device_get(run(key, x, y))
    assert np.max(np.abs(gap[:, 0]) / np.linalg.norm(x - y, axis=1)) <= 1 + 1e-4
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_of_zeros_stays_zero_and_recovers(dtype, key):
    params = {"kernel": jnp.asarray(np.zeros((3, 2)).astype(jnp.dtype(dtype)))}
    power = jax.jit(init_power)(params, key)

    @jax.jit
    def step(params, power):
        normalised, new = spectral_normalise(params, power)
        slope = jax.grad(
            lambda p: jnp.sum(spectral_normalise(p, power)[0]["kernel"].astype(float))
        )(params)
        return normalised["kernel"].astype(float), new, slope["kernel"].astype(float)

    normalised, new, slope = step(params, power)
    assert np.all(np.asarray(normalised) == 0)
    np.testing.assert_array_equal(new["['kernel']"], power["['kernel']"])
    np.testing.assert_array_equal(slope, 1)  # divided by 1
    # Small and large weights: the squares would vanish or overflow.
    w = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    for scale in (1e-15, 1.0, 1e15):
        state = new
        for _ in range(12):
            normalised, state, slope = step({"kernel": (scale * w).astype(jnp.dtype(dtype))}, state)
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(normalised, w / 2, atol=tolerance)
        assert np.all(np.isfinite(slope))


def test_embeddings_of_a_projection_critic_are_normalised(key):
    critic = DCGANCritic(size=8, channels=1, width=8, base=4, classes=3)
    x, label = np.zeros((1, 8, 8, 1), np.float32), np.zeros(1, np.int32)

    @jax.jit
    def run(key):
        params = critic.init(key, jnp.asarray(x), jnp.asarray(label))
        table = params["params"]["Embed_0"]["embedding"]
        params["params"]["Embed_0"]["embedding"] = 5 * jax.random.normal(key, table.shape)
        normalised, _ = spectral_normalise(params, init_power(params, key), num_steps=50)
        return normalised["params"]["Embed_0"]["embedding"]

    singular = np.linalg.svd(run(key), compute_uv=False)
    np.testing.assert_allclose(singular[0], 1, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4), (4, 1)])
def test_bjorck_at_zero_has_a_finite_gradient(shape):
    run = jax.jit(jax.value_and_grad(lambda w: jnp.sum(bjorck(w, num_steps=3))))
    with jax.debug_nans(True):
        value, slope = run(np.zeros(shape, np.float32))
    assert value == 0
    assert np.all(np.isfinite(slope))
    assert np.max(np.abs(slope)) < 100


def test_bjorck_does_not_depend_on_the_scale():
    w = normal(3, 5)
    run = jax.jit(jax.value_and_grad(lambda w: jnp.sum(jnp.sin(bjorck(w)))))
    value, slope = run(w)
    for scale in np.float32([1e-25, 1e-3, 1e3, 1e25]):
        scaled, its_slope = run(scale * w)
        np.testing.assert_allclose(scaled, value, rtol=1e-5)
        np.testing.assert_allclose(scale * np.asarray(its_slope), slope, rtol=1e-3, atol=1e-5)


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

    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(net)))(array(inputs["z"]))
    np.testing.assert_allclose(values, expected["net_values"], rtol=1e-12)
    np.testing.assert_allclose(slopes, expected["net_grad"], rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(slopes, axis=1), 1, rtol=1e-12)


def test_ties_do_not_split_the_gradient():
    slope = jax.jit(jax.jacobian(lambda x: group_sort(x, 2)))(jnp.array([1.0, 1.0]))
    np.testing.assert_array_equal(np.sort(slope, axis=0), [[0, 0], [1, 1]])


@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (3, 8), (5, 1)])
@pytest.mark.parametrize("order", [1, 2])
def test_bjorck_converges_to_the_polar_factor(shape, order, x64):
    w = normal(*shape).astype(np.float64)
    u, _, vt = np.linalg.svd(w, full_matrices=False)

    @jax.jit
    def run(w):
        slope = jax.grad(lambda w: bjorck(w, num_steps=5, order=order)[0, 0])(w)
        return {n: bjorck(w, num_steps=n, order=order) for n in (1, 8, 60)}, slope

    found, slope = run(w)
    np.testing.assert_allclose(found[60], u @ vt, atol=1e-10)
    assert np.all(np.isfinite(slope))
    # Never above norm 1 on the way, whatever the scale and the number of steps.
    for scale in (1e-6, 1.0, 1e6):
        for n in (1, 8):
            assert np.linalg.norm(run(scale * w)[0][n], 2) <= 1 + 1e-12
    # An orthonormal matrix is its own factor, and stays.
    np.testing.assert_allclose(run(found[60])[0][1], found[60], atol=1e-10)


def test_lipschitz_over_random_pairs(key):
    """Acceptance: the largest ratio over 1e5 random pairs, near and far.

    Of a critic whose weights have moved far from where they started.
    """
    module, noise = LipschitzMLP((64, 64, 64)), normal(64, seed=1)
    params = jax.device_get(module.init(key, jnp.zeros((1, 6))))
    params = jax.tree.map(lambda w: 2 * w + np.float32(0.3) * np.resize(noise, w.shape), params)
    rng = np.random.default_rng(0)
    x = 3 * normal(100_000, 6)
    far = np.exp(rng.uniform(-2, 2, (100_000, 1)))
    y = (x + far * rng.normal(size=x.shape)).astype(np.float32)
    apply = jax.jit(module.apply)
    gap = np.abs(np.asarray(apply(params, x)) - np.asarray(apply(params, y)))
    ratio = gap / np.linalg.norm(x - y, axis=1)
    assert ratio.max() <= 1 + 1e-4
    assert ratio.max() > 0.3  # and not by being flat


@pytest.mark.slow
def test_gradient_norm_is_one_at_the_start(key):
    module = LipschitzMLP((16, 16, 16), group=4)
    x = normal(20, 5)

    @partial(jax.jit, static_argnums=0)
    def slopes_of(module, x):
        return jax.grad(lambda x: module.apply(module.init(key, x), x).sum())(x)

    assert np.all(np.linalg.norm(slopes_of(module, x), axis=1) <= 1 + 1e-5)
    x = normal(20, 16)
    slopes = slopes_of(LipschitzMLP((16, 16)), x)
    np.testing.assert_allclose(np.linalg.norm(slopes, axis=1), 1, rtol=1e-5)
    # Where no layer widens it is 1; a layer that widens projects.
    narrowing = slopes_of(LipschitzMLP((12, 8, 4)), x)
    np.testing.assert_allclose(np.linalg.norm(narrowing, axis=1), 1, rtol=1e-5)
    widening = slopes_of(LipschitzMLP((16, 16)), x[:, :2])
    assert np.mean(np.linalg.norm(widening, axis=1)) < 0.7


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
    y, _ = jax.eval_shape(module.init_with_output, key, jnp.asarray(normal(2, 4, 5)))
    assert y.shape == (2, 4, 3)


def test_bad_input(unchecked, key):
    with pytest.raises(ValueError, match="divide the 5 features"):
        group_sort(jnp.zeros((2, 5)), 2)
    with pytest.raises(ValueError, match="order"):
        bjorck(jnp.eye(3), order=3)
    with pytest.raises(ValueError, match="rank 2"):
        bjorck(jnp.ones(3))
    with pytest.raises(ValueError, match="init_power"):
        spectral_normalise({"kernel": jnp.eye(3)}, {})
    with pytest.raises(ValueError, match="init_power"):
        spectral_penalty({"kernel": jnp.eye(3)}, {})
    with pytest.raises(ValueError, match="steps"):
        power_iteration(jnp.eye(3), jnp.ones(3), num_steps=0)
