import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import TimeMLP
from genjax.networks.layers import fourier_features

X = jax.random.normal(jax.random.key(1), (5, 3))
T = jnp.linspace(-1.0, 1.0, 5)


def _filled(net, *inputs):
    """Parameters away from the start, where the last layer is 0, without running `init`."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [jnp.float32(0.3 * rng.normal(size=p.shape)) for p in leaves])


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_output_starts_at_zero_and_keeps_the_shape(norm):
    net = TimeMLP(width=16, depth=2, norm=norm)
    x = jnp.ones((4, 2, 3, 1))
    out, _ = jax.jit(lambda: net.init_with_output(jax.random.key(0), x, T[:4]))()
    np.testing.assert_array_equal(out, 0 * x)


def test_formula_without_norm():
    """Two layers: the shifts are linear in the harmonics of time and the one-hot label."""
    net = TimeMLP(width=4, depth=2, classes=2, num_harmonics=3)
    label = jnp.array([0, 1, 2, 0, 1])
    params = _filled(net, X, T, label)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])

    def dense(i, x):
        return x @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"]

    t = np.asarray(T, np.float64)[:, None]
    k = np.arange(1, 4)
    parts = [t, np.sin(np.pi * t * k), np.cos(np.pi * t * k), np.eye(3)[np.asarray(label)]]
    shifts = np.split(dense(0, np.concatenate(parts, axis=1)), 2, axis=1)
    h = dense(1, np.asarray(X))
    for i, shift in enumerate(shifts):
        y = dense(2 + 2 * i, h) + shift
        h = h + dense(3 + 2 * i, y / (1 + np.exp(-y)))
    expected = dense(6, h / (1 + np.exp(-h)))
    np.testing.assert_allclose(net.apply(params, X, T, label), expected, rtol=2e-4, atol=2e-5)
    free = net.apply(params, X, T, jnp.full(5, 2))
    np.testing.assert_allclose(net.apply(params, X, T), free, atol=1e-6)


def test_formula_by_hand():
    """One block, written with numpy from the parameters."""
    net = TimeMLP(norm="layer", width=8, depth=1, embedding=4, classes=2)
    label = jnp.array([0, 1, 2, 0, 1])
    params = _filled(net, X, T, label)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])

    def dense(name, x, scope=p):
        return x @ scope[name]["kernel"] + scope[name]["bias"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def norm(x):
        return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)

    c = p["Conditioning_0"]
    e = dense("Dense_1", silu(dense("Dense_0", np.asarray(fourier_features(T, 64)), c)), c)
    e = silu(e + c["Embed_0"]["embedding"][np.asarray(label)])
    h = dense("Dense_0", np.asarray(X))
    scale, shift = np.split(dense("Dense_1", e), 2, axis=1)
    y = dense("Dense_2", silu(norm(h)))
    h = h + dense("Dense_3", silu(norm(y) * (1 + scale) + shift))
    expected = dense("Dense_4", silu(norm(h)))
    found = jax.jit(net.apply)(params, X, T, label)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_no_label_is_the_extra_class_and_rows_are_independent():
    net = TimeMLP(norm="layer", width=8, depth=1, classes=3)
    params = _filled(net, X, T, jnp.zeros(5, int))
    apply = jax.jit(net.apply)
    free = apply(params, X, T, jnp.full(5, 3))
    np.testing.assert_allclose(jax.jit(net.apply)(params, X, T), free, rtol=1e-5, atol=1e-6)
    first, second = (apply(params, X, T, jnp.full(5, c)) for c in (0, 1))
    assert np.abs(first - second).max() > 1e-3
    changed = apply(params, X.at[1:].multiply(7.0), T.at[1:].add(0.3), jnp.full(5, 3))
    np.testing.assert_allclose(changed[0], free[0], rtol=1e-5, atol=1e-6)
    assert np.abs(changed[1:] - free[1:]).max() > 1e-2


def test_dropout_needs_a_key(key):
    net = TimeMLP(norm="layer", width=32, depth=1, dropout=0.5)
    params = _filled(net, X, T)
    apply = jax.jit(lambda key: net.apply(params, X, T, dropout_key=key))
    first, second = (apply(k) for k in jax.random.split(key))
    assert np.abs(first - second).max() > 1e-3
    plain = jax.jit(lambda: net.apply(params, X, T))()
    kept = jax.jit(TimeMLP(norm="layer", width=32, depth=1).apply)(params, X, T)
    np.testing.assert_allclose(plain, kept, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_its_statistics_in_float32():
    net = TimeMLP(norm="layer", width=32, depth=2)
    params = _filled(net, X, T)
    narrow = TimeMLP(norm="layer", width=32, depth=2, dtype=jnp.bfloat16)
    narrow, full = jax.jit(lambda p: (narrow.apply(p, X, T), net.apply(p, X, T)))(params)
    assert narrow.dtype == jnp.bfloat16
    assert np.abs(narrow.astype(jnp.float32) - full).max() < 0.05 * np.abs(full).max()


def test_bad_input(unchecked):
    for norm in ("none", "layer"):
        net = TimeMLP(width=8, depth=1, norm=norm)

        def trace(*inputs, net=net):
            jax.eval_shape(net.init, jax.random.key(0), *inputs)

        with pytest.raises(ValueError, match="label is given, but the network has classes=None"):
            trace(X, T, jnp.zeros(5, int))
        with pytest.raises(ValueError, match=r"t must have shape \(5,\), got \(2,\)"):
            trace(X, T[:2])
        with pytest.raises(ValueError, match=r"label must have shape \(5,\), got \(2,\)"):
            trace(X, T, jnp.zeros(2, int), net=net.clone(classes=2))
    with pytest.raises(ValueError, match="norm must be one of"):
        trace(X, T, net=TimeMLP(norm="batch"))
