"""Flows as modules: invertible, with the determinant of their Jacobian, and simple at the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import flows
from genjax.networks.coupling import (
    ConvConditioner,
    Glow,
    MLPConditioner,
    PlanarFlow,
    RealNVP,
    SplineFlow,
)

KEY = jax.random.key(0)
SPLINE = flows.rational_quadratic(4, 0.0, 1.0)
FLOWS = {
    "realnvp": (RealNVP(3, (8,)), (4,)),
    "spline": (SplineFlow(3, (8,), SPLINE), (4,)),
    "glow": (Glow(2, 2, 6), (4, 4, 1)),
    "planar": (PlanarFlow(3), (4,)),
}


def shaken(params, scale=0.2):
    """Parameters off their start, where last layers are 0 and everything is the identity."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [p + scale * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def flat(z):
    parts = [part.reshape(len(part), -1) for part in jax.tree.leaves(z)]
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ("spline", "glow") else []) for n in FLOWS],
)
def test_flow_laws(name):
    module, shape = FLOWS[name]
    x = jax.random.uniform(KEY, (4, *shape), minval=0.05, maxval=0.95)

    @jax.jit
    def everything(params):
        z, log_det = module.apply(params, x)
        back, log_det_back = module.apply(params, z, inverse=True)
        jacobian = jax.vmap(jax.jacfwd(lambda e: flat(module.apply(params, e[None])[0])[0]))(x)
        size = x[0].size
        exact = jnp.linalg.slogdet(jacobian.reshape(4, size, size))[1]
        return z, log_det, back, log_det_back, exact

    params = shaken(jax.jit(module.init)(KEY, x))
    z, log_det, back, log_det_back, exact = everything(params)
    assert log_det.shape == (4,)
    np.testing.assert_allclose(back, x, atol=2e-5)
    np.testing.assert_allclose(log_det, exact, atol=2e-4)
    np.testing.assert_allclose(log_det, -log_det_back, atol=2e-4)
    assert np.all(np.isfinite(flat(z)))


def test_couplings_start_as_the_identity_and_keep_volume():
    x = jax.random.uniform(KEY, (4, 4))
    z, log_det = jax.jit(RealNVP(3, (8,)).init_with_output)(KEY, x)[0]
    np.testing.assert_array_equal(z, x)
    np.testing.assert_array_equal(log_det, 0)
    z, log_det = jax.jit(SplineFlow(3, (8,), SPLINE).init_with_output)(KEY, x)[0]
    np.testing.assert_allclose(np.sort(z), np.sort(x), atol=1e-6)
    np.testing.assert_allclose(log_det, 0, atol=1e-5)


def test_realnvp_equals_float64_numpy():
    module, x = RealNVP(4, (8, 8), activation=jnp.tanh), jax.random.normal(KEY, (5, 6))
    params = shaken(jax.jit(module.init)(KEY, x), 0.3)
    z, log_det = jax.jit(module.apply)(params, x)
    y, total = np.asarray(x, np.float64), np.zeros(5)
    for i in range(4):
        net = params["params"][f"conditioner_{i}"]
        w = [np.asarray(net[f"Dense_{j}"]["kernel"], np.float64) for j in range(3)]
        b = [np.asarray(net[f"Dense_{j}"]["bias"], np.float64) for j in range(3)]
        kept, moved = (y[:, 3:], y[:, :3]) if i % 2 else (y[:, :3], y[:, 3:])
        h = np.tanh(kept @ w[0] + b[0])
        h = h + np.tanh(h @ w[1] + b[1])
        raw = h @ w[2] + b[2]
        s = 2 * np.tanh(raw[:, :3] / 2)
        moved = moved * np.exp(s) + raw[:, 3:]
        total += s.sum(1)
        y = np.concatenate([moved, kept] if i % 2 else [kept, moved], axis=1)
    np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(log_det, total, rtol=1e-5, atol=1e-5)


def test_glow_whitens_its_first_batch_and_names_its_scales():
    module, x = Glow(2, 1, 4), 5 + 2 * jax.random.normal(KEY, (32, 4, 4, 1))
    (z, _), params = jax.jit(module.init_with_output)(KEY, x)
    assert [part.shape[1:] for part in z] == module.shapes((4, 4, 1)) == [(2, 2, 2), (1, 1, 8)]
    np.testing.assert_allclose(np.mean(z[0], (0, 1, 2)), 0, atol=1e-4)
    # The 1x1 map is a rotation and the coupling starts as the identity: variance stays 1.
    np.testing.assert_allclose(np.std(np.asarray(flat(z)), 0).mean(), 1, atol=0.1)
    base = flows.normal(module.shapes((4, 4, 1)))
    assert base.log_prob(z).shape == (32,)
    assert set(params["params"]) >= {"actnorm_0", "plu_0", "conditioner_0"}


def test_conditioners_start_at_zero_and_drop_with_a_key_only():
    for module, x in (
        (MLPConditioner(3, (8, 8), dropout=0.5), jnp.ones((2, 4))),
        (ConvConditioner(3, 8, dropout=0.5), jnp.ones((2, 4, 4, 2))),
    ):
        out, params = jax.jit(module.init_with_output)(KEY, x)
        np.testing.assert_array_equal(out, 0)
        params = shaken(params)
        run = jax.jit(lambda p, x, k, m=module: m.apply(p, x, dropout_key=k))
        noisy = [run(params, x, jax.random.key(i)) for i in range(2)]
        assert not np.allclose(noisy[0], noisy[1])
        clean = run(params, x, None)
        assert np.all(np.isfinite(clean))
        assert not np.allclose(clean, noisy[0])


def test_conv_conditioner_is_the_convolution():
    x = jax.random.normal(KEY, (2, 5, 4, 3))
    module = ConvConditioner(2, 6)
    params = shaken(jax.jit(module.init)(KEY, x))["params"]

    def conv(x, layer, size):
        kernel = layer["kernel"].reshape(size, size, x.shape[-1], -1)
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        return y + layer["bias"].reshape(1, 1, 1, -1)

    @jax.jit
    def both(params):
        h = jax.nn.silu(conv(x, params["Dense_0"], 3))
        h = h + jax.nn.silu(conv(h, params["Dense_1"], 1))
        return module.apply({"params": params}, x), conv(h, params["Dense_2"], 3)

    got, expected = both(params)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named(unchecked):
    with pytest.raises(ValueError, match="even last axis"):
        RealNVP(2, (4,)).init(KEY, jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="multiples of 4"):
        Glow(2, 1, 4).init(KEY, jnp.zeros((2, 6, 8, 1)))
