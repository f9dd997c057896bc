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
    x = jnp.ones((2, *shape))
    encoder = ConvEncoder(features=5, channels=channels)
    params = encoder.init(key, x)
    assert encoder.apply(params, x).shape == (2, 5)
    sides = (shape[0] >> len(channels)) * (shape[1] >> len(channels))
    assert params["params"]["Dense_0"]["kernel"].shape == (sides * channels[-1], 5)
    decoder = ConvDecoder(shape=(*shape[:2], 7), channels=channels[::-1])
    params = decoder.init(key, jnp.ones((2, 5)))
    assert decoder.apply(params, jnp.ones((2, 5))).shape == (2, *shape[:2], 7)


def test_every_pixel_is_read_and_written(compiled, key):
    """Each input pixel moves the code, each code moves each output pixel; examples stay apart."""
    x = jax.random.normal(key, (2, 8, 8, 1))
    encoder, decoder = ConvEncoder(features=3), ConvDecoder(shape=(8, 8, 2))
    p, q = encoder.init(key, x), decoder.init(key, jnp.ones((2, 3)))
    read = np.abs(compiled(jax.jacobian(lambda x: encoder.apply(p, x)))(x)).sum(1)
    assert read[0, 0].min() > 0
    assert read[1, 1].min() > 0
    assert read[0, 1].max() == read[1, 0].max() == 0
    z = jax.random.normal(key, (2, 3))
    written = np.abs(compiled(jax.jacobian(lambda z: decoder.apply(q, z)))(z))
    assert written[0, :, :, :, 0].min() > 0
    assert written[0, :, :, :, 1].max() == 0


def test_dropout_only_with_a_key(key):
    x = jax.random.normal(key, (2, 8, 8, 1))
    encoder, decoder = ConvEncoder(3, dropout=0.5), ConvDecoder((8, 8, 1), dropout=0.5)
    p, q = encoder.init(key, x), decoder.init(key, jnp.ones((2, 3)))
    for net, params, data in ((encoder, p, x), (decoder, q, jnp.ones((2, 3)))):
        plain = net.apply(params, data)
        np.testing.assert_array_equal(plain, net.apply(params, data))
        assert np.abs(plain - net.apply(params, data, dropout_key=key)).max() > 0


def test_sides_must_divide(key):
    with pytest.raises(ValueError, match=r"\(9, 8, 1\).*multiples of 4"):
        ConvDecoder(shape=(9, 8, 1)).init(key, jnp.ones((1, 2)))
