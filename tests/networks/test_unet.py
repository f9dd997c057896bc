import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import Hourglass, UNet
from genjax.networks.layers import GroupNorm
from genjax.networks.unet import Attention, _doubled

X = jax.random.normal(jax.random.key(1), (2, 8, 8, 2))
T = jnp.array([0.1, -0.7])
SMALL = {"channels": (8, 16), "num_blocks": 1, "attention": (4,), "groups": 4, "embedding": 8}
TINY = {"channels": (8,), "num_blocks": 1, "groups": 4, "embedding": 8}


def _filled(net, *inputs):
    """Parameters away from the start (where the last layers are 0), without running `init`."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    filled = [jnp.float32(0.2 * rng.normal(size=p.shape) + 0.3 * (p.ndim == 1)) for p in leaves]
    return jax.tree.unflatten(tree, filled)


@pytest.fixture(scope="module")
def small():
    net = UNet(**SMALL, classes=3)
    return _filled(net, X, T), jax.jit(net.apply)


def test_attention_by_hand():
    x = jax.random.normal(jax.random.key(0), (2, 2, 3, 8))
    net = Attention(head_dim=4, groups=4)
    params = _filled(net, x)
    p = jax.tree.map(np.asarray, params["params"])
    normed = GroupNorm(4).apply({"params": p["GroupNorm_0"]}, x)
    tokens = np.asarray(normed).reshape(2, 6, 8)
    mixed = tokens @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    query, key, value = (mixed.reshape(2, 6, 3, 2, 4)[:, :, i] for i in range(3))
    out = np.zeros((2, 6, 2, 4))
    for b in range(2):
        for h in range(2):
            logits = query[b, :, h] @ key[b, :, h].T / 2
            weights = np.exp(logits - logits.max(1, keepdims=True))
            out[b, :, h] = weights / weights.sum(1, keepdims=True) @ value[b, :, h]
    out = out.reshape(2, 6, 8) @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]
    found = net.apply(params, x)
    np.testing.assert_allclose(found, np.asarray(x) + out.reshape(x.shape), atol=1e-5)


def test_doubling_repeats_pixels():
    expected = np.asarray(X).repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(_doubled(X), expected)


def test_starts_at_zero_with_the_shape_of_x():
    net = UNet(**TINY)
    out, _ = jax.jit(lambda: net.init_with_output(jax.random.key(0), X, T))()
    np.testing.assert_array_equal(out, 0 * X)


def test_size_is_that_of_the_usual_network():
    """1,624,323 parameters: DDPM's layout at 32, 64, 64 channels, attention at 16 and below."""
    net = UNet(channels=(32, 64, 64), attention=(16,))
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))
    assert sum(np.prod(p.shape) for p in jax.tree.leaves(shapes)) == 1_624_323


def test_time_label_and_rows(small):
    params, apply = small
    three = jnp.array([3, 3])
    free = apply(params, X, T, three)
    assert np.abs(free - apply(params, X, T, jnp.array([0, 1]))).max() > 1e-3
    later = apply(params, X, T.at[1].add(0.5), three)
    np.testing.assert_allclose(later[0], free[0], atol=1e-5)
    assert np.abs(later[1] - free[1]).max() > 1e-3


@pytest.mark.slow
def test_bfloat16_is_near_float32(small):
    params, apply = small
    full = apply(params, X, T, jnp.array([3, 3]))
    # No label is the class after the last.
    narrow = jax.jit(UNet(**SMALL, classes=3, dtype=jnp.bfloat16).apply)(params, X, T)
    assert np.abs(narrow.astype(jnp.float32) - full).max() < 0.1 * np.abs(full).max()


@pytest.mark.slow
def test_remat_and_dropout(key):
    params = _filled(UNet(**TINY), X, T)

    def gradient(net, key=None):
        def loss(p):
            return jnp.mean(jnp.square(net.apply(p, X, T, dropout_key=key)))

        return jax.value_and_grad(loss)

    plain, again, dropped = jax.jit(
        lambda p: (
            gradient(UNet(**TINY))(p),
            gradient(UNet(**TINY, remat=True))(p),
            gradient(UNet(**TINY, remat=True, dropout=0.5), key)(p)[0],
        )
    )(params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    assert abs(dropped - plain[0]) > 1e-3 * plain[0]


def test_hourglass():
    net, z = Hourglass(3, channels=(8, 8), short=2), jnp.ones((1, 12, 12, 4)) * X[:1, :1, :1, :1]
    image = jax.jit(net.apply)(_filled(net, z), z)
    assert image.shape == (1, 12, 12, 3)
    assert float(image.min()) > 0
    assert float(image.max()) < 1


def test_bad_input(unchecked):

    def trace(net, *shape):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(1))

    with pytest.raises(ValueError, match="multiples of 4 for 3 resolutions"):
        trace(UNet(channels=(8, 8, 8)), 1, 10, 10, 1)
    with pytest.raises(ValueError, match="channels must be a multiple of groups=8, got 12"):
        trace(UNet(channels=(12,)), 1, 4, 4, 1)
    with pytest.raises(ValueError, match="multiple of head_dim=5"):
        trace(UNet(channels=(8,), head_dim=5), 1, 4, 4, 1)
    with pytest.raises(ValueError, match="x must have rank 4"):
        trace(UNet(), 1, 64)
