"""Shapes, receptive fields and errors of the convolutional encoder and decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import ConvDecoder, ConvEncoder


@pytest.mark.parametrize(
    ("shape", "channels"), [((8, 8, 1), (4, 6)), ((28, 28, 1), (4, 6)), ((64, 64, 3), (2, 3, 4, 4))]
)
def test_shapes_and_parameters(shape, channels, key):
    x, z = jnp.ones((2, *shape)), jnp.ones((2, 5))
    out, params = jax.eval_shape(ConvEncoder(5, channels=channels).init_with_output, key, x)
    assert out.shape == (2, 5)
    sides = (shape[0] >> len(channels)) * (shape[1] >> len(channels))
    assert params["params"]["Dense_0"]["kernel"].shape == (sides * channels[-1], 5)
    decoder = ConvDecoder(shape=(*shape[:2], 7), channels=channels[::-1])
    out, _ = jax.eval_shape(decoder.init_with_output, key, z)
    assert out.shape == (2, *shape[:2], 7)


def test_every_pixel_is_read_and_written(key):
    encoder, decoder = ConvEncoder(3, channels=(8, 8)), ConvDecoder((8, 8, 2), channels=(8, 8))
    # One bright pixel each, and an image without any: every pixel moves the code.
    images = jnp.concatenate([jnp.eye(64), jnp.zeros((1, 64))]).reshape(65, 8, 8, 1)
    codes, _ = jax.jit(encoder.init_with_output)(key, images)
    assert np.abs(codes[:64] - codes[64:]).max(1).min() > 0
    # Every number of the code moves every output.
    steps = jnp.concatenate([jnp.eye(3), jnp.zeros((1, 3))])
    out, _ = jax.jit(decoder.init_with_output)(key, steps)
    assert np.abs(out[:3] - out[3:]).min() > 0


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (ConvEncoder(3, channels=(4,), dropout=0.5), (2, 8, 8, 1)),
        (ConvDecoder((8, 8, 1), channels=(4,), dropout=0.5), (2, 3)),
    ],
)
def test_dropout_only_with_a_key_and_examples_stay_apart(net, shape, key):
    x = jax.random.normal(key, shape)

    @jax.jit
    def outputs(x):
        params = net.init(key, x)
        moved = net.apply(params, x.at[1].add(1.0))
        return net.apply(params, x), moved, net.apply(params, x, dropout_key=key)

    plain, moved, dropped = outputs(x)
    np.testing.assert_allclose(plain[0], moved[0], rtol=1e-6)
    assert np.abs(plain[1] - moved[1]).max() > 0
    assert np.abs(plain - dropped).max() > 0


def test_sides_must_divide(key):
    with pytest.raises(ValueError, match=r"\(9, 8, 1\).*multiples of 4"):
        jax.eval_shape(ConvDecoder(shape=(9, 8, 1)).init, key, jnp.ones((1, 2)))
