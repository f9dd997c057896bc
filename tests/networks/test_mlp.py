"""The networks against their formulas in numpy, and what their fields mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from genjax.networks import MLP, ResidualMLP

X = jnp.array(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)


def layers(params):
    return [
        (np.asarray(p["kernel"], float), np.asarray(p["bias"], float))
        for _, p in sorted(params["params"].items())
    ]


def test_mlp_is_its_formula(compiled, key):
    net = MLP(features=(7, 4, 3), activation=jnp.tanh)
    params = jax.jit(net.init)(key, X)
    (w0, b0), (w1, b1), (w2, b2) = layers(params)
    expected = np.tanh(np.tanh(np.asarray(X) @ w0 + b0) @ w1 + b1) @ w2 + b2
    np.testing.assert_allclose(compiled(net.apply)(params, X), expected, rtol=1e-4, atol=1e-5)


def test_residual_mlp_is_its_formula(compiled, key):
    net = ResidualMLP(width=8, depth=3, features=2)
    params = jax.jit(net.init)(key, X)
    *hidden, (w, b) = layers(params)
    h = 0
    for i, (wi, bi) in enumerate(hidden):
        pre = (np.asarray(X) if i == 0 else h) @ wi + bi
        h = h + pre * expit(pre)
    np.testing.assert_allclose(compiled(net.apply)(params, X), h @ w + b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "net", [MLP((400, 400), dropout=0.3), ResidualMLP(400, 1, 400, dropout=0.3)]
)
def test_dropout_needs_a_key_and_keeps_the_mean(net, key):
    params = jax.jit(net.init)(key, X)
    plain = net.apply(params, X)
    np.testing.assert_array_equal(plain, net.apply(params, X))
    keys = jax.random.split(key, 2000)
    drawn = jax.jit(jax.vmap(lambda k: net.apply(params, X[:1], dropout_key=k)))(keys)
    error = np.std(drawn, axis=0) / np.sqrt(2000)
    assert (np.abs(np.mean(drawn, axis=0) - plain[:1]) < 6 * error + 1e-6).all()
    assert np.std(drawn, axis=0).min() > 0


def test_layers_drop_different_units(key):
    """Layers of one width draw from keys of their own."""
    seen = []

    def ones(x):
        seen.append(x)
        return jnp.ones_like(x)

    x = jnp.ones((6, 64))
    net = MLP((64, 64, 64), activation=ones, dropout=0.5)
    params = jax.eval_shape(net.init, key, x)
    identity = jax.tree.map(
        lambda p: jnp.eye(*p.shape) if p.ndim == 2 else jnp.zeros(p.shape), params
    )
    seen.clear()
    last = net.apply(identity, x, dropout_key=key)
    first = np.asarray(seen[1])
    assert set(np.unique(first)) == {0.0, 2.0}
    assert 0.3 < np.mean((first > 0) == (np.asarray(last) > 0)) < 0.7


def test_bfloat16_parameters_compute_in_bfloat16(key):
    net, x = MLP((4, 2)), X.astype(jnp.bfloat16)
    params = jax.eval_shape(net.init, key, X)
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
    assert jax.eval_shape(net.apply, params, x).dtype == jnp.bfloat16
