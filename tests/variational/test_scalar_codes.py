"""Finite scalar and lookup-free quantisation: references, enumeration, and indices both ways."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.variational import (
    finite_scalar_codes,
    finite_scalar_quantise,
    lookup_free_codes,
    lookup_free_quantise,
)
from tests.variational.references import reference


def test_finite_scalar_reference(x64):
    inputs, expected = reference("finite_scalar_quantisation")
    z, levels = jnp.asarray(inputs["z"]), tuple(int(n) for n in inputs["levels"])

    def loss(z):
        found = finite_scalar_quantise(z, levels)
        return (found.values * inputs["cotangent"]).sum(), found

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(z)
    np.testing.assert_allclose(found.values, expected["codes"], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(found.index, expected["index"])
    np.testing.assert_allclose(gradient, expected["grad_z"], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(finite_scalar_codes(found.index, levels), expected["codes"])


@pytest.mark.parametrize("levels", [(8, 6, 5), (3, 4)])
def test_every_code_is_reached_and_no_other(levels):
    """In float32 and in bfloat16; the index counts in mixed radix, the first level fastest."""
    count = int(np.prod(levels))
    codes = finite_scalar_codes(jnp.arange(count), levels)
    assert len(np.unique(np.asarray(codes), axis=0)) == count
    digits = [range(n) for n in levels[::-1]]
    for k, place in enumerate(itertools.product(*digits)):
        expected = [(d - n // 2) / (n // 2) for d, n in zip(place[::-1], levels, strict=True)]
        np.testing.assert_allclose(codes[k], expected, rtol=1e-6)
    z = 3 * jax.random.normal(jax.random.key(0), (20_000, len(levels)))
    quantise = jax.jit(lambda z: finite_scalar_quantise(z, levels))
    for dtype in (jnp.float32, jnp.bfloat16):
        found = quantise(z.astype(dtype))
        assert found.index.dtype == jnp.int32
        assert found.values.dtype == jnp.float32
        assert set(np.unique(found.index)) == set(range(count))
        np.testing.assert_allclose(found.values, codes[found.index], atol=1e-6)
    np.testing.assert_array_equal(quantise(jnp.zeros((1, len(levels)))).values, 0)


def test_lookup_free_by_enumeration(x64):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4)))
    found = jax.jit(lambda z: lookup_free_quantise(z, temperature=1.5))(z)
    np.testing.assert_array_equal(found.values, np.where(np.asarray(z) > 0, 1.0, -1.0))
    np.testing.assert_array_equal(found.index, ((np.asarray(z) > 0) * [1, 2, 4, 8]).sum(-1))
    np.testing.assert_array_equal(lookup_free_codes(found.index, 4), found.values)
    codes = lookup_free_codes(jnp.arange(16), 4)
    distance = np.square(np.asarray(z)[..., None, :] - np.asarray(codes)).sum(-1)
    p = np.exp(-distance / 1.5)
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(p)).sum(-1)
    np.testing.assert_allclose(found.entropy, entropy.mean(1), rtol=1e-10)
    mean = p.mean((0, 1))
    np.testing.assert_allclose(found.usage_entropy, -(mean * np.log(mean)).sum(), rtol=1e-10)
    straight = jax.grad(lambda z: (lookup_free_quantise(z).values ** 2 / 2).sum())(z)
    np.testing.assert_array_equal(straight, found.values)


def test_entropies_at_extremes():
    """Sure bits: no entropy of an example, and the batch's usage; all finite with gradients."""
    z = 1e4 * lookup_free_codes(jnp.arange(8), 3)
    found = lookup_free_quantise(z)
    np.testing.assert_allclose(found.entropy, 0, atol=1e-6)
    np.testing.assert_allclose(found.usage_entropy, np.log(8), rtol=1e-6)

    def penalty(z):
        found = lookup_free_quantise(z)
        return found.entropy.mean() - found.usage_entropy

    for value in (z, 0 * z, z[:1]):
        assert np.isfinite(jax.jit(jax.grad(penalty))(value)).all()


def test_bad_input(unchecked):
    z = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="levels must be at least 3, got 2"):
        finite_scalar_quantise(z, (8, 2, 5))
    with pytest.raises(ValueError, match="levels must be one for each of 3 features, got"):
        finite_scalar_quantise(z, (8, 5))
    with pytest.raises(ValueError, match="fewer than 2"):
        finite_scalar_quantise(jnp.zeros((2, 4)), (1000,) * 4)
    with pytest.raises(ValueError, match="z must be finite"):
        finite_scalar_quantise(z * jnp.nan, (3, 3, 3))
    with pytest.raises(ValueError, match="temperature must be positive"):
        lookup_free_quantise(z, temperature=0.0)
    with pytest.raises(ValueError, match=r"bits, the features of z, must lie in \[1, 16\], got 20"):
        lookup_free_quantise(jnp.zeros((2, 20)))


@pytest.mark.parametrize("levels", [1001, 1002, 1500])
def test_many_levels_stay_within_their_ends(levels):
    values, index = finite_scalar_quantise(jnp.array([[100.0], [-100.0]]), (levels,))
    assert index.tolist() == [levels - 1, 0]
    np.testing.assert_allclose(values, finite_scalar_codes(index, (levels,)), rtol=1e-6)
