"""The convolutional encoder and decoder: shapes, dropout, and one image by itself."""

import jax
import numpy as np
import pytest

from genjax.networks import GridDecoder, GridEncoder

X = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
ENCODER = GridEncoder(5, (4, 8, 8), dropout=0.5)
DECODER = GridDecoder(6, (8, 8, 4), dropout=0.5)


def test_shapes_dropout_and_locality(key):
    params = jax.jit(ENCODER.init)(key, X)
    encode = jax.jit(ENCODER.apply)
    z = encode(params, X)
    assert z.shape == (2, 2, 2, 5)
    assert np.abs(encode(params, X, dropout_key=key) - z).max() > 1e-3
    # One image does not see another.
    np.testing.assert_allclose(encode(params, X.at[0].set(3.0))[1], z[1], rtol=1e-5, atol=1e-6)
    params = jax.jit(DECODER.init)(key, z)
    decode = jax.jit(DECODER.apply)
    y = decode(params, z)
    assert y.shape == (2, 8, 8, 6)
    assert np.abs(decode(params, z, dropout_key=key) - y).max() > 1e-3
    gradient = jax.jit(jax.grad(lambda z: decode(params, z)[0].sum()))(z)
    assert np.abs(gradient[0]).min() > 0
    np.testing.assert_array_equal(gradient[1], 0)


def test_sides_that_do_not_halve(key, unchecked):
    with pytest.raises(ValueError, match="sides that are multiples of 4, got"):
        jax.eval_shape(ENCODER.init, key, X[:, :6])
    with pytest.raises(ValueError, match="x must have rank 4"):
        jax.eval_shape(ENCODER.init, key, X[0])
