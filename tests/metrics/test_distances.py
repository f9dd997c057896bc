"""Frechet, sliced Wasserstein, Sinkhorn: fixtures, float64 references, known values."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from genjax.metrics import (
    Moments,
    feature_moments,
    frechet_distance,
    sinkhorn_distance,
    sliced_wasserstein,
)

REFERENCES = Path(__file__).parents[1] / "references"
FID = json.loads((REFERENCES / "fid.json").read_text())
SW = json.loads((REFERENCES / "sliced_wasserstein.json").read_text())


def features(n=300, m=200, d=16, dtype=np.float32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 3
    y = 1.2 * rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) + 3.3
    return x.astype(dtype), y.astype(dtype)


def reference_frechet(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    c0, c1 = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(c0 @ c1).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c0 + c1 - 2 * root)


def test_frechet_fixture():
    x, y = np.array(FID["inputs"]["X"]), np.array(FID["inputs"]["Y"])
    np.testing.assert_allclose(frechet_distance(x, y), FID["expected"]["fid"], rtol=1e-9)
    few = x[: FID["inputs"]["rank_deficient_rows_of_X"]]
    with pytest.warns(UserWarning, match="real has 3 samples in 4 dimensions: its covariance"):
        value = frechet_distance(few, y)
    np.testing.assert_allclose(value, FID["expected"]["fid_rank_deficient"], rtol=1e-6)


def test_frechet_equals_scipy_from_float32_features():
    x, y = features()
    value = frechet_distance(x, y)
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, reference_frechet(x, y), rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(y, x), value, rtol=1e-9)
    moments = [Moments(v.mean(0, dtype=float), np.cov(v.T.astype(float))) for v in (x, y)]
    np.testing.assert_allclose(frechet_distance(*moments), value, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(x, moments[1]), value, rtol=1e-9)


def test_frechet_traced(x64):
    x, y = features(dtype=np.float64)
    np.testing.assert_allclose(jax.jit(frechet_distance)(x, y), reference_frechet(x, y), rtol=1e-9)


def test_frechet_known_values():
    x = features(n=60, d=8)[0]
    assert abs(float(frechet_distance(x, x))) < 1e-6
    np.testing.assert_allclose(frechet_distance(x, x + np.float32(4)), 8 * 16, rtol=1e-5)
    # Gaussians with commuting covariances: |m|^2 + sum (s0 - s1)^2.
    s0, s1 = np.arange(1.0, 6.0), np.array([2.0, 0.0, 1.0, 7.0, 5.0])
    given = Moments(np.ones(5), np.diag(s0**2)), Moments(np.zeros(5), np.diag(s1**2))
    np.testing.assert_allclose(frechet_distance(*given), 5 + np.sum((s0 - s1) ** 2), rtol=1e-7)


@pytest.mark.filterwarnings("ignore:real has|fake has")
def test_frechet_is_never_negative_and_zero_for_equal_sets():
    """Singular covariances of scale 100; under jax.debug_nans and under jit in float32 too."""
    x = 100 * np.random.default_rng(3).normal(size=(12, 40)).astype(np.float32)
    with jax.debug_nans(True):
        for how in (frechet_distance, jax.jit(frechet_distance)):
            same = float(how(x, x))
            assert same == 0 if how is frechet_distance else 0 <= same < 1e-9  # of a scale of 4e5
            again = float(how(x, x[::-1].copy()))  # the same set, another rounding
            assert 0 <= again < 1e-6 * np.var(x) * 40
        # Half the points twice: the closed form of float64 by its nuclear norm.
        y = x[:6].repeat(2, axis=0)
        factors = [(v - v.mean(0)).astype(float) / np.sqrt(11) for v in (x, y)]
        cross = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
        expected = np.sum((x.mean(0, dtype=float) - y.mean(0, dtype=float)) ** 2)
        expected += sum(np.sum(f**2) for f in factors) - 2 * cross
        np.testing.assert_allclose(frechet_distance(x, y), expected, rtol=1e-7)
        value, grad = jax.jit(jax.value_and_grad(lambda v: frechet_distance(v, y)))(x)
        np.testing.assert_allclose(value, expected, rtol=2e-3)
        assert np.isfinite(grad).all()


def test_moments_over_several_blocks():
    x = features(n=2500, d=5)[0]
    moments = feature_moments(x)
    np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x.T.astype(np.float64)), rtol=1e-10)


def test_sliced_wasserstein_fixture(x64, compiled, key):
    x, y, other = (np.array(SW["inputs"][n]) for n in ("X", "Y", "X_unequal"))
    # The fixture holds directions as columns.
    directions, expected = np.array(SW["inputs"]["theta"]).T, SW["expected"]
    for p, name in ((1, "sw1"), (2, "sw2")):
        value = compiled(
            lambda a, b, p=p: sliced_wasserstein(key, a, b, p=p, directions=directions)
        )(x, y)
        np.testing.assert_allclose(value, expected[name], rtol=1e-10)
    value = sliced_wasserstein(key, other, y, p=1, directions=directions)
    np.testing.assert_allclose(value, expected["sw1_unequal_sizes"], rtol=1e-10)


@pytest.mark.parametrize(("n", "m", "p"), [(40, 40, 3), (7, 12, 2)])
def test_sliced_wasserstein_equals_pot(x64, key, n, m, p):
    import ot

    x, y = features(n, m, 4, np.float64)
    directions = np.random.default_rng(5).normal(size=(20, 4))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    value = sliced_wasserstein(key, x, y, p=p, directions=directions)
    costs = [ot.wasserstein_1d(x @ t, y @ t, p=p) for t in directions]
    np.testing.assert_allclose(value, np.mean(costs) ** (1 / p), rtol=1e-10)


def test_sliced_wasserstein_directions_are_uniform(key):
    """Between x and x + v: (mean of <theta, v>^2)^1/2 = |v| / sqrt(d)."""
    x = features(n=10, d=6)[0]
    shift = np.array([[3.0, 0, -4.0, 0, 0, 0]], np.float32)
    value = jax.jit(lambda k: sliced_wasserstein(k, x, x + shift, num_projections=4000))(key)
    np.testing.assert_allclose(value, 5 / np.sqrt(6), rtol=0.05)


def test_sliced_wasserstein_gradient(x64, key):
    x, y = features(9, 9, 3, np.float64)
    loss = jax.jit(lambda v: sliced_wasserstein(key, v, y, num_projections=16))
    gradient = jax.grad(loss)(x)
    step = 1e-6 * np.random.default_rng(1).normal(size=x.shape)
    slope = (loss(x + step) - loss(x - step)) / 2
    np.testing.assert_allclose(jnp.sum(gradient * step), slope, rtol=1e-6)
    value, at_zero = jax.value_and_grad(loss)(y)
    assert float(value) == 0
    assert np.isfinite(at_zero).all()


def test_sliced_wasserstein_under_debug_nans(key):
    x = features(8, 8, 3)[0]
    with jax.debug_nans(True):
        assert float(sliced_wasserstein(key, x, x, num_projections=4)) == 0
        by_one = sliced_wasserstein(key, x, x + 1, directions=np.eye(3, dtype=np.float32))
        np.testing.assert_allclose(by_one, 1, rtol=1e-5)


def test_sinkhorn_of_a_shift():
    """Equal clouds moved apart: the divergence of the cost |x - y|^2 is |v|^2 for any epsilon."""
    x = features(n=12, d=3)[0]
    shift = np.array([[1.0, 2.0, 2.0]], np.float32)
    distance = jax.jit(lambda a, b: sinkhorn_distance(a, b, epsilon=5.0))
    np.testing.assert_allclose(distance(x, x + shift), 9.0, rtol=1e-2)
    np.testing.assert_allclose(distance(x, x), 0.0, atol=1e-2)
    given = sinkhorn_distance(x, x + shift, divergence=lambda a, b, *, epsilon: jnp.float32(7))
    assert float(given) == 7


def test_sinkhorn_default_epsilon_and_convergence():
    x, y = features(n=20, m=30, d=3)
    seen = {}

    class Result:
        value, converged = jnp.float32(1.5), False

    def divergence(a, b, *, epsilon):
        seen["epsilon"] = float(epsilon)
        return Result()

    with pytest.warns(UserWarning, match="has not converged"):
        assert sinkhorn_distance(x, y, divergence=divergence) == 1.5
    cost = np.mean(np.sum((x[:, None] - y[None]) ** 2, -1))
    np.testing.assert_allclose(seen["epsilon"], 0.05 * cost, rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("metric", ["frechet", "sliced", "sinkhorn"])
def test_bad_input(metric, key):
    call = {
        "frechet": frechet_distance,
        "sliced": lambda x, y: sliced_wasserstein(key, x, y),
        "sinkhorn": sinkhorn_distance,
    }[metric]
    x, y = features(n=30, m=30, d=4)
    broken = y.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"must be finite, got 1 .* at index \(3, 1\)"):
        call(x, broken)
    with pytest.raises(ValueError, match=r"must be equal|must have one width"):
        call(x, y[:, :3])
    with pytest.raises(TypeError, match="must have a floating dtype, got int"):
        call(x, y.astype(np.int32))
    with pytest.raises(ValueError, match="must have rank 2"):
        call(x[0], y)
    with pytest.raises(ValueError, match=r"must have at least [12] samples"):
        call(x, y[:0])


@pytest.mark.usefixtures("unchecked")
def test_bad_moments_and_options(key):
    x, y = features(n=30, m=30, d=4)
    with pytest.raises(ValueError, match="real covariance must have shape"):
        frechet_distance(Moments(np.zeros(4), np.eye(3)), y)
    with pytest.raises(ValueError, match="fake covariance must be finite"):
        frechet_distance(x, Moments(np.zeros(4), np.full((4, 4), np.nan)))
    with pytest.raises(ValueError, match="real must have at least 2 samples for a covariance"):
        frechet_distance(x[:1], y)
    with pytest.raises(ValueError, match="p must be at least 1, got 0"):
        sliced_wasserstein(key, x, y, p=0)
    with pytest.raises(ValueError, match="directions must have shape"):
        sliced_wasserstein(key, x, y, directions=np.ones((2, 3), np.float32))
