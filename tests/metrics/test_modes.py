"""Modes covered, quality and reverse KL over modes on samples whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.data import DENSITIES
from genjax.metrics import high_quality_share, modes_covered, reverse_kl_modes

GRID = DENSITIES["25gaussians"]


def test_a_true_sample_covers_all(key):
    samples = GRID.sample(key, 5000)
    covered = jax.jit(lambda x: modes_covered(x, GRID.means, GRID.std))(samples)
    quality = jax.jit(lambda x: high_quality_share(x, GRID.means, GRID.std))(samples)
    assert int(covered) == 25
    inside = 1 - np.exp(-4.5)
    assert abs(float(quality) - inside) < 4 * np.sqrt(inside * (1 - inside) / 5000)
    # Twice the divergence is about chi-square with 24 degrees of freedom over n.
    assert 0 < float(reverse_kl_modes(samples, GRID.means)) < 60 / (2 * 5000)


def test_collapsed_onto_some_modes(compiled):
    def all_three(x):
        covered = modes_covered(x, GRID.means, GRID.std, least=4)
        quality = high_quality_share(x, GRID.means, GRID.std)
        return covered, quality, reverse_kl_modes(x, GRID.means)

    every = compiled(all_three)
    for count in (1, 5, 25):
        samples = np.repeat(GRID.means[:count], 100 // count, axis=0).astype(np.float32)
        covered, quality, divergence = every(samples)
        assert (int(covered), float(quality)) == (count, 1)
        np.testing.assert_allclose(divergence, np.log(25 / count), atol=1e-6)
    assert int(modes_covered(samples, GRID.means, GRID.std, least=5)) == 0


def test_unequal_shares_equal_the_sum():
    shares = np.array([5, 3, 2, 0])
    means = np.array([[0.0, 0], [5, 0], [0, 5], [5, 5]])
    samples = np.repeat(means, shares, axis=0).astype(np.float32) + 0.1
    p = shares[:3] / 10
    expected = np.sum(p * np.log(p / 0.25))
    np.testing.assert_allclose(reverse_kl_modes(samples, means), expected, rtol=1e-6)


def test_the_edge_is_at_sigmas():
    mean = np.zeros((1, 2))
    samples = np.array([[0.29, 0], [0, 0.31], [0.2, 0.21], [0.22, -0.22]], np.float32)
    assert float(high_quality_share(samples, mean, 0.1)) == 0.5
    assert float(high_quality_share(samples, mean, 0.1, sigmas=4)) == 1
    assert int(modes_covered(samples[1:2], mean, 0.1)) == 0
    # Narrow modes far from the origin: differences keep the digits that products lose.
    far = np.array([[1000.0, 1000.0], [1000.5, 1000.0]])
    near = far.astype(np.float32) + np.float32(0.001)
    assert int(modes_covered(near, far, 0.001)) == 2


def test_vmaps_over_seeds():
    rng = np.random.default_rng(0)
    samples = GRID.means[rng.integers(0, 25, (3, 40))].astype(np.float32)
    many = jax.jit(jax.vmap(lambda x: modes_covered(x, GRID.means, GRID.std)))(samples)
    assert many.tolist() == [len(np.unique(x, axis=0)) for x in samples]


def test_nan_counts_for_nothing_under_jit():
    samples = jnp.full((4, 2), jnp.nan)
    assert int(jax.jit(lambda x: modes_covered(x, GRID.means, GRID.std))(samples)) == 0
    assert np.isnan(jax.jit(lambda x: reverse_kl_modes(x, GRID.means))(samples))


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    samples = np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match="samples must be finite"):
        modes_covered(samples * np.nan, GRID.means, GRID.std)
    with pytest.raises(ValueError, match=r"must be equal, got samples \(3,\), means \(2,\)"):
        reverse_kl_modes(np.zeros((4, 3), np.float32), GRID.means)
    with pytest.raises(ValueError, match="std must be positive"):
        high_quality_share(samples, GRID.means, 0.0)
    with pytest.raises(ValueError, match="samples must have at least 1 samples"):
        modes_covered(samples[:0], GRID.means, GRID.std)
