"""Our convolution and flat dense layer are those of flax: values, derivatives twice, types."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks.convolution import Conv, convolve
from genjax.networks.layers import on_flat


def pair(kernel, stride, dtype=None):
    size = (kernel, kernel)
    return nn.Conv(4, size, strides=(stride, stride), dtype=dtype), Conv(
        4, size, stride, dtype=dtype
    )


@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [
        (3, 1, 8),
        pytest.param(3, 2, 8, marks=pytest.mark.slow),
        (3, 2, 7),
        pytest.param(1, 1, 5, marks=pytest.mark.slow),
        (4, 2, 8),
        pytest.param(5, 2, 7, marks=pytest.mark.slow),
    ],
)
def test_convolution_is_flax_s(kernel, stride, size, key):
    x = jax.random.normal(key, (2, size, size + 1, 3))
    theirs, ours = pair(kernel, stride)
    params = theirs.init(key, x)
    assert jax.tree.map(jnp.shape, ours.init(key, x)) == jax.tree.map(jnp.shape, params)

    @jax.jit
    def outcomes():
        found = []
        for module in (theirs, ours):

            def value(params, x, module=module):
                return jnp.sum(jnp.sin(module.apply(params, x)))

            def penalty(params, value=value):
                return jnp.sum(jnp.square(jax.grad(value, 1)(params, x)))

            def pushed(params, value=value):  # forward over reverse, as the gradient penalty
                slope = lambda p, x: jax.grad(value)(p, x)  # noqa: E731
                return jax.jvp(lambda x: slope(params, x), (x,), (jnp.cos(x),))[1]

            grads = jax.grad(value, (0, 1))(params, x)
            found.append(
                (module.apply(params, x), grads, jax.grad(penalty)(params), pushed(params))
            )
        return found

    for a, b in zip(*map(jax.tree.leaves, outcomes()), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4)


def test_convolution_in_bfloat16(key):
    x = jax.random.normal(key, (2, 6, 6, 3))
    theirs, ours = pair(3, 1, jnp.bfloat16)
    params = theirs.init(key, x)
    a, b = theirs.apply(params, x), ours.apply(params, x)
    assert b.dtype == a.dtype == jnp.bfloat16
    np.testing.assert_allclose(b.astype(float), a.astype(float), rtol=0.03, atol=0.03)
    assert ours.init(key, x)["params"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_in_bfloat16_the_sum_is_rounded_once(stride, key):
    """Mean error against float64, value and gradients: that of one rounding, 2^-9 of the size."""
    x, kernel = (jax.random.normal(k, s) for k, s in zip(
        jax.random.split(key), ((2, 8, 8, 32), (3, 3, 32, 8)), strict=True))  # fmt: skip
    half = [a.astype(jnp.bfloat16) for a in (x, kernel)]

    def outcome(*arrays):
        value = convolve(*arrays, stride)
        pull = jax.vjp(lambda *a: convolve(*a, stride), *arrays)[1]
        ones = jnp.where(jnp.arange(value.size) % 3 == 0, 1, -1).reshape(value.shape)
        return value, *pull(ones.astype(value.dtype))

    with jax.enable_x64(True):
        exact = outcome(*(a.astype(jnp.float64) for a in half))
        for name, a, b in zip(("y", "x", "kernel"), jax.jit(outcome)(*half), exact, strict=True):
            assert a.dtype == jnp.bfloat16
            error = np.mean(np.abs(a.astype(float) - b)) / np.mean(np.abs(b))
            assert error < 0.0025, (name, error)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [((2, 0), (1, 1)), ((1, 2), (3, 0)), ((0, 0), (0, 0))])
def test_zeros_before_and_after_are_those_of_a_convolution(padding, stride, key):
    k1, k2 = jax.random.split(key)
    layout = ("NHWC", "HWIO", "NHWC")
    with jax.enable_x64(True):
        x = jax.random.normal(k1, (2, 7, 6, 3), jnp.float64)
        kernel = jax.random.normal(k2, (3, 2, 3, 5), jnp.float64)

        def theirs(x, kernel):
            strides = (stride, stride)
            return jax.lax.conv_general_dilated(
                x, kernel, strides, padding, dimension_numbers=layout
            )

        value, pull = jax.vjp(lambda *a: convolve(*a, stride, padding), x, kernel)
        exact, pull_exact = jax.vjp(theirs, x, kernel)
        np.testing.assert_allclose(value, exact, atol=1e-12)
        for a, b in zip(pull(jnp.sin(exact)), pull_exact(jnp.sin(exact)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_elsewhere_it_stays_a_convolution():
    shapes = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
    for platform, convolutions in (("cpu", 0), ("cuda", 1)):
        text = jax.jit(convolve).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.convolution") == convolutions


def test_dense_on_flat_is_dense(key):
    x, layer = jax.random.normal(key, (2, 3, 4, 5)), nn.Dense(6)
    params = layer.init(key, x)

    def outcome(apply):
        def value(params, x):
            return jnp.sum(jnp.sin(apply(params, x)))

        return apply(params, x), jax.grad(value, (0, 1))(params, x)

    flat = outcome(lambda p, x: on_flat(lambda x: layer.apply(p, x), x))
    for a, b in zip(*map(jax.tree.leaves, (outcome(layer.apply), flat)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)
