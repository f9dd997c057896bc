"""2-D densities: each integrates to one, and the sampler follows the density."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from genjax.data import DENSITIES
from genjax.data.synthetic import Checkerboard

HALF = 7.2
# Midpoint rules finer than the standard deviation; the cells of the board are met exactly.
STEPS = {"25gaussians": 0.04, "checkerboard": 0.1, "pinwheel": 0.06}


@functools.cache
def mass_on_grid(name):
    """Midpoint rule of exp(log_prob): cell masses over [-HALF, HALF]^2 and the cell edges."""
    step = STEPS.get(name, 0.1)
    count = round(2 * HALF / step)
    edges = np.linspace(-HALF, HALF, count + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    points = np.stack(np.meshgrid(middle, middle, indexing="ij"), -1).reshape(-1, 2)
    points = jnp.asarray(points).reshape(count, count, 2)
    log_p = jax.jit(lambda rows: jax.lax.map(DENSITIES[name].log_prob, rows))(points)
    return np.exp(np.asarray(log_p, np.float64)) * step**2, edges


@pytest.mark.parametrize("name", DENSITIES)
def test_integrates_to_one(name):
    mass, _ = mass_on_grid(name)
    assert abs(mass.sum() - 1) < 1e-3


@pytest.mark.parametrize("name", DENSITIES)
def test_sampler_follows_the_density(name, key):
    """Chi-square of a 2-D histogram; a sample that is 3% too wide fails the same test."""
    mass, edges = mass_on_grid(name)
    group = 4
    coarse = mass.shape[0] // group * group
    mass = mass[:coarse, :coarse].reshape(coarse // group, group, -1, group).sum((1, 3))
    x = np.asarray(DENSITIES[name].sample(key, 40_000))
    assert x.dtype == np.float32

    def p_value(points):
        counts, *_ = np.histogram2d(*points.T, bins=[edges[: coarse + 1 : group]] * 2)
        expected = mass * len(points)
        big = expected > 10
        observed = np.append(counts[big], len(points) - counts[big].sum())
        expected = np.append(expected[big], len(points) - expected[big].sum())
        return stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), big.sum())

    assert p_value(x) > 1e-3
    assert p_value(1.03 * x) < 1e-6


def test_mixture_equals_scipy(x64, compiled):
    density = DENSITIES["moons"]
    x = np.random.default_rng(0).normal(size=(20, 2)) * 3
    parts = [stats.multivariate_normal(m, density.std**2).logpdf(x) for m in density.means]
    expected = np.logaddexp.reduce(parts, axis=0) - np.log(len(density.means))
    np.testing.assert_allclose(compiled(density.log_prob)(jnp.asarray(x)), expected, rtol=1e-10)


def test_curves_are_finer_than_their_width():
    """The mixture along a curve is smooth: neighbouring centres are closer than one std."""
    for name in ("moons", "swissroll"):
        density = DENSITIES[name]
        gaps = np.linalg.norm(np.diff(density.means, axis=0), axis=1)
        assert np.sum(gaps > density.std) <= 1  # the step from one moon to the other


@pytest.mark.parametrize("name", ["swissroll", "pinwheel"])
def test_score_equals_finite_differences(name, x64):
    density = DENSITIES[name]
    x = DENSITIES[name].sample(jax.random.key(3), 10).astype(jnp.float64)
    log_prob = jax.jit(density.log_prob)
    score = jax.jit(jax.grad(lambda v: jnp.sum(density.log_prob(v))))(x)
    for axis in range(2):
        step = 1e-6 * np.eye(2)[axis][None]
        slope = (log_prob(x + step) - log_prob(x - step)) / 2e-6
        np.testing.assert_allclose(score[:, axis], slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["25gaussians", "checkerboard", "pinwheel"])
def test_extremes(name):
    density = DENSITIES[name]
    x = jnp.array([[0.0, 0.0], [1e4, -1e4]])
    value = jax.jit(density.log_prob)(x)
    score = jax.jit(jax.grad(lambda v: jnp.sum(density.log_prob(v))))(x)
    assert np.isfinite(score).all()
    if name != "checkerboard":  # -inf off the board
        assert np.isfinite(value).all()
    assert np.isnan(density.log_prob(jnp.array([[jnp.nan, 0.0]]))[0])


def test_modes():
    means = DENSITIES["25gaussians"].means
    assert means.shape == (25, 2)
    assert set(means.ravel()) == {-4.0, -2.0, 0.0, 2.0, 4.0}
    np.testing.assert_allclose(np.linalg.norm(DENSITIES["8gaussians"].means, axis=1), 2.0)


def test_boards_are_even_and_points_of_whole_numbers_are_points(unchecked):
    with pytest.raises(ValueError, match="cells must be even, got 3"):
        Checkerboard(cells=3)
    whole = jnp.array([[1, 1], [2, 0], [-1, -2]])
    density = DENSITIES["8gaussians"]
    np.testing.assert_array_equal(
        density.log_prob(whole), density.log_prob(whole.astype(jnp.float32))
    )
