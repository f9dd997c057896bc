"""MMD and KID against float64 double sums, scikit-learn's kernels and known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import pairwise

from genjax.metrics import (
    gaussian_kernel,
    kid,
    laplacian_kernel,
    mmd,
    polynomial_kernel,
    rational_quadratic_kernel,
)
from tests.metrics.test_distances import features


def reference_mmd(xx, yy, xy, unbiased=True):
    n, m = xy.shape
    if not unbiased:
        return xx.mean() + yy.mean() - 2 * xy.mean()
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return within - 2 * xy.mean()


def reference_polynomial(x, y):
    return pairwise.polynomial_kernel(x, y, degree=3, gamma=1 / x.shape[1], coef0=1)


def grams(kernel, x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return kernel(x, x), kernel(y, y), kernel(x, y)


def distances(x, y):
    return np.linalg.norm(x[:, None] - y[None], axis=-1)


KERNELS = {
    "polynomial": (polynomial_kernel(), lambda x, y: reference_polynomial(x, y) - 1),
    "gaussian": (gaussian_kernel(3.0), lambda x, y: pairwise.rbf_kernel(x, y, 1 / 18)),
    "laplacian": (laplacian_kernel(2.0), lambda x, y: np.exp(-distances(x, y) / 2)),
    "rational_quadratic": (
        rational_quadratic_kernel(2.0, 0.7),
        lambda x, y: (1 + distances(x, y) ** 2 / (2 * 0.7 * 4)) ** -0.7,
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name, x64):
    kernel, reference = KERNELS[name]
    x, y = features(7, 5, 4, np.float64)
    np.testing.assert_allclose(jax.jit(kernel)(x, y), reference(x, y), rtol=1e-9, atol=1e-12)


def test_mmd_equals_the_double_sum():
    x, y = features(n=60, m=45, d=8)
    expected = reference_mmd(*grams(KERNELS["rational_quadratic"][1], x, y))
    value = mmd(x, y, kernel=KERNELS["rational_quadratic"][0])
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.slow
def test_biased_mmd_counts_each_point_with_itself_exactly():
    """In float32 too, where a distance of 0 comes out as its rounding and the kernel has a cusp."""
    x, y = features(n=200, m=150, d=32)
    for name in KERNELS:
        kernel, reference = KERNELS[name]
        expected = reference_mmd(*grams(reference, x, y), unbiased=False)
        np.testing.assert_allclose(mmd(x, y, kernel=kernel, unbiased=False), expected, rtol=1e-5)


def test_mmd_by_name_takes_the_median_distance(x64):
    x, y = features(n=30, m=20, d=4, dtype=np.float64)
    pooled = np.concatenate([x, y])
    median = np.median(distances(pooled, pooled)[np.triu_indices(50, 1)])
    expected = reference_mmd(*grams(lambda a, b: pairwise.rbf_kernel(a, b, 0.5 / median**2), x, y))
    np.testing.assert_allclose(jax.jit(mmd)(x, y), expected, rtol=1e-9)
    np.testing.assert_allclose(mmd(x, y, bandwidth=median), expected, rtol=1e-9)


def test_mmd_known_values():
    x = features(n=50, d=4)[0]
    biased = jax.jit(lambda a, b: mmd(a, b, kernel=gaussian_kernel(3.0), unbiased=False))
    other = features(n=50, m=50, d=4)[1]
    expected = reference_mmd(*grams(KERNELS["gaussian"][1], x, other), unbiased=False)
    np.testing.assert_allclose(biased(x, other), expected, rtol=1e-5)
    assert abs(float(biased(x, x))) < 1e-6
    # Disjoint and far: the kernel between is 0, so 1/n of the diagonals and what is within.
    far = x + np.float32(1e4)
    within = pairwise.rbf_kernel(x.astype(np.float64), gamma=0.5 / 9)
    expected = 2 * within.mean()
    np.testing.assert_allclose(biased(x, far), expected, rtol=1e-3)


def test_mmd_gradient(x64):
    x, y = features(n=6, m=5, d=3, dtype=np.float64)
    loss = jax.jit(lambda v: mmd(v, y, kernel="laplacian", bandwidth=2.0))
    step = 1e-6 * np.random.default_rng(1).normal(size=x.shape)
    slope = (loss(x + step) - loss(x - step)) / 2
    np.testing.assert_allclose(jnp.sum(jax.grad(loss)(x) * step), slope, rtol=1e-5)


def test_kid_of_whole_samples_is_the_unbiased_mmd(key):
    """Subsets as large as the samples are the samples, in another order."""
    x, y = features(n=80, m=80, d=16)
    expected = reference_mmd(*grams(reference_polynomial, x, y))
    result = kid(key, x, y, num_subsets=4, subset_size=80)
    assert result.mean.dtype == np.float64
    np.testing.assert_allclose(result.mean, expected, rtol=1e-5)
    np.testing.assert_allclose(result.std / expected, 0, atol=1e-5)


def test_kid_reads_subsets_off_one_gram_matrix(x64, key, monkeypatch):
    """The two ways of computing it agree on the same subsets; their mean is near the whole's."""
    x, y = features(n=121, m=90, d=8, dtype=np.float64)
    monkeypatch.setattr("genjax.metrics._pairs._MOST_ROWS", 32)  # four blocks, the last filled up
    estimates = []
    for cheaper in (True, False):
        monkeypatch.setattr("genjax.metrics.kernels.gram_is_cheaper", lambda *a, c=cheaper: c)
        estimates.append(jax.jit(lambda k: kid(k, x, y, num_subsets=50, subset_size=40))(key))
    once, each = estimates
    np.testing.assert_allclose(once, each, rtol=1e-9)
    expected = reference_mmd(*grams(reference_polynomial, x, y))
    assert abs(float(once.mean) - expected) < 4 * float(once.std) / np.sqrt(50)
    assert float(once.std) > 0


def test_kid_of_equal_subsets_has_a_finite_gradient(key):
    """Every subset is the whole sample: a spread of 0, and no NaN from its root."""
    x, y = jax.random.normal(key, (2, 6, 3))
    with jax.debug_nans(True):
        found = lambda x: kid(key, x, y, num_subsets=2, subset_size=6)  # noqa: E731
        slope = jax.jit(jax.grad(lambda x: sum(found(x))))(x)
    by_mean = jax.jit(jax.grad(lambda x: mmd(x, y, kernel=polynomial_kernel())))(x)
    np.testing.assert_allclose(slope, by_mean, rtol=1e-3, atol=1e-5)


def test_polynomial_kernel_of_small_inner_products():
    """(u + 1)^3 - 1 = 3 u + ...: float32 against float64 at u near 1e-6."""
    x = np.random.default_rng(0).normal(size=(5, 4)) * 1e-3
    u = x @ x.T / 4
    found = polynomial_kernel()(jnp.float32(x), jnp.float32(x))
    np.testing.assert_allclose(found, 3 * u + 3 * u**2 + u**3, rtol=1e-4, atol=1e-12)


def test_kid_of_equal_laws_is_near_zero_with_both_signs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 100, 4)).astype(np.float32)
    estimate = jax.jit(lambda k: kid(k, x, y, num_subsets=200, subset_size=10))
    result = estimate(jax.random.key(2))
    assert abs(float(result.mean)) < 0.3
    assert float(result.std) > 3 * abs(float(result.mean))


@pytest.mark.usefixtures("unchecked")
def test_bad_input(key):
    x, y = features(n=30, m=30, d=4)
    broken = y.copy()
    broken[0, 2] = np.inf
    for call in (mmd, lambda a, b: kid(key, a, b, subset_size=10)):
        with pytest.raises(ValueError, match="must be finite, got 1"):
            call(x, broken)
        with pytest.raises(ValueError, match="must be equal"):
            call(x, y[:, :3])
    with pytest.raises(ValueError, match="real must have at least 1000 samples for a subset"):
        kid(key, x, y)
    with pytest.raises(ValueError, match=r"kernel must be one of .* did you mean 'gaussian'"):
        mmd(x, y, kernel="gausian")
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        mmd(x, y, bandwidth=0.0)
    with pytest.raises(ValueError, match="y must have at least 2 samples"):
        mmd(x, y[:1])


def test_a_kernel_of_one_s_own_has_a_gradient_for_any_number_of_rows():
    """What fills up a block are rows of the caller's: a cosine is NaN at 0."""

    def kernel(x, y):
        norms = [jnp.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
        return (x @ y.T) / (norms[0] @ norms[1].T)

    x, y = (jax.random.normal(jax.random.key(i), (n, 3)) for i, n in enumerate((1001, 10)))
    assert np.isfinite(jax.jit(jax.grad(lambda y: mmd(x, y, kernel=kernel)))(y)).all()
