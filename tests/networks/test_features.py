"""The feature network against the same layers in plain jax."""

import jax
import jax.numpy as jnp
import numpy as np

from genjax.networks import FeatureNetwork


def test_layers_in_plain_jax(key):
    network = FeatureNetwork(classes=3, width=5, channels=(2, 4))
    x = jax.random.normal(key, (2, 6, 6, 1))
    params = network.init(key, x)
    layers = params["params"]

    def convolve(x, layer, stride):
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.silu(x + layer["bias"][None, None, None])

    first = convolve(x, layers["convolutions_0"], 1)
    h = convolve(first, layers["convolutions_1"], 2)
    assert h.shape == (2, 3, 3, 4)
    maps = network.apply(params, x, method="maps")
    for found, expected in zip(maps, (first, h), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    h = jax.nn.silu(h.reshape(2, -1) @ layers["hidden"]["kernel"] + layers["hidden"]["bias"][None])
    np.testing.assert_allclose(network.apply(params, x, method="embed"), h, atol=1e-5)
    logits = h @ layers["output"]["kernel"] + layers["output"]["bias"][None]
    np.testing.assert_allclose(network.apply(params, x), logits, atol=1e-5)


def test_dropout_needs_a_key(key):
    network = FeatureNetwork(channels=(2,), dropout=0.5)
    x = jnp.ones((1, 4, 4, 1))
    params = network.init(key, x)
    np.testing.assert_array_equal(network.apply(params, x), network.apply(params, x))
    assert np.any(network.apply(params, x) != network.apply(params, x, dropout_key=key))
