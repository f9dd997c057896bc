"""Scaling and dequantisation: exact round trips and the likelihood bound in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.data import Scaling


@pytest.mark.parametrize(
    "scaling", [Scaling(17), Scaling(256), Scaling(256, 0, 1), Scaling(2, -3.0, 5.0)]
)
def test_every_level_comes_back(scaling, key):
    compiled = (lambda f: f) if scaling == Scaling(17) else jax.jit
    x = np.repeat(np.arange(scaling.levels, dtype=np.uint8), 4000)
    y = compiled(scaling.dequantise)(key, x)
    assert y.dtype == jnp.float32
    assert scaling.low < float(y.min())
    assert float(y.max()) < scaling.high
    np.testing.assert_array_equal(compiled(scaling.to_levels)(y), x)
    np.testing.assert_array_equal(compiled(scaling.to_levels)(scaling.to_continuous(x)), x)


@pytest.mark.parametrize(
    "scaling",
    [Scaling(255), Scaling(256, 0, 255), Scaling(251, 0, 1), Scaling(200, 100.0, 101.0)],
)
@pytest.mark.parametrize("cell", [0, 2**16 - 1])
def test_every_y_lies_strictly_inside_its_bin(scaling, cell, key, monkeypatch):
    """The outermost noise of either side, in float64, read eagerly and compiled."""
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.full(shape, cell, dtype))
    x = np.arange(scaling.levels, dtype=np.uint8)
    for how in (lambda f: f, jax.jit):
        y = how(lambda x: scaling.dequantise(key, x))(x)
        np.testing.assert_array_equal(scaling.to_levels(y), x)
        np.testing.assert_array_equal(jax.jit(scaling.to_levels)(y), x)
        exact = (np.asarray(y, float) - scaling.low) / (scaling.high - scaling.low)
        exact = exact * scaling.levels - x
        assert exact.min() > 0
        assert exact.max() < 1


def test_noise_is_uniform_in_the_bin(key):
    scaling = Scaling(17, -1.0, 1.0)
    y = np.asarray(scaling.dequantise(key, np.full(200_000, 5, np.uint8)), np.float64)
    u = (y + 1) / 2 * 17 - 5
    # Moments of U(0, 1) within four standard errors.
    for power in (1, 2, 3):
        error = 4 * math.sqrt(1 / (2 * power + 1) - 1 / (power + 1) ** 2) / math.sqrt(u.size)
        assert abs(np.mean(u**power) - 1 / (power + 1)) < error
    other = scaling.dequantise(jax.random.key(1), np.full(200_000, 5, np.uint8))
    assert not np.array_equal(np.asarray(other), np.asarray(y, np.float32))


def test_bin_centres():
    x = np.array([0, 1, 127, 255], np.uint8)
    expected = -1 + 2 * (np.array([0, 1, 127, 255]) + 0.5) / 256
    np.testing.assert_allclose(Scaling(256).to_continuous(x), expected, rtol=1e-6)


def test_bound_is_tight_for_a_density_that_is_constant_in_each_bin(key):
    """p(y) piecewise constant: log P(x) = log p(y) + D log_det_per_dim exactly, for any noise."""
    scaling = Scaling(17, -2.0, 3.0)
    probability = np.random.default_rng(0).dirichlet(np.ones(17))
    width = 5 / 17
    x = np.random.default_rng(1).integers(0, 17, (50, 6)).astype(np.uint8)
    y = np.asarray(scaling.dequantise(key, x), np.float64)
    bin_of = np.floor((y + 2) / width).astype(int)
    log_p = np.log(probability[bin_of] / width).sum(1)
    expected = np.log(probability[x]).sum(1)
    np.testing.assert_allclose(log_p + 6 * scaling.log_det_per_dim, expected, rtol=1e-12)


def test_outside_is_clipped_to_the_nearest_level():
    y = jnp.array([-7.0, -1.0, 1.0, 40.0])
    np.testing.assert_array_equal(Scaling(17).to_levels(y), [0, 0, 16, 16])


@pytest.mark.usefixtures("unchecked")
def test_bad_input(key):
    with pytest.raises(TypeError, match="integer levels, got dtype float32"):
        Scaling(17).dequantise(key, np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match=r"x must lie in \[0, 16\]"):
        Scaling(17).to_continuous(np.array([17], np.uint8))
    with pytest.raises(ValueError, match=r"levels must lie in \[2, 256\], got 1"):
        _ = Scaling(1).log_det_per_dim
    with pytest.raises(ValueError, match="low must be below high"):
        Scaling(17, 1.0, -1.0).to_continuous(np.array([3]))
    with pytest.raises(ValueError, match="float32 cannot hold 256 levels"):
        Scaling(256, 1e4, 1e4 + 1).to_continuous(np.array([3]))
    with pytest.raises(TypeError, match="y must have a floating dtype"):
        Scaling(17).to_levels(jnp.array([1, 2]))
