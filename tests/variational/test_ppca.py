"""PPCA against scikit-learn, scipy's multivariate normal and the references."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from genjax.variational import PPCA, ppca_fit, ppca_log_likelihood, ppca_posterior

REFERENCE = json.loads((pathlib.Path(__file__).parents[1] / "references/ppca.json").read_text())
EXPECTED = REFERENCE["expected"]
X = np.array(REFERENCE["inputs"]["X"])
Q = REFERENCE["inputs"]["q"]


def test_fit_reference(compiled, x64):
    model = compiled(lambda x: ppca_fit(x, Q))(jnp.array(X))
    np.testing.assert_allclose(model.mean, EXPECTED["mean"], rtol=1e-10)
    np.testing.assert_allclose(model.noise_variance, EXPECTED["sigma2_ml"], rtol=1e-10)
    covariance = model.weights @ model.weights.T + model.noise_variance * np.eye(X.shape[1])
    np.testing.assert_allclose(covariance, EXPECTED["C_ml"], rtol=1e-8, atol=1e-10)
    # Eigenvectors are unique up to sign.
    np.testing.assert_allclose(
        np.abs(model.weights), np.abs(EXPECTED["W_ml_R_eq_I"]), rtol=1e-8, atol=1e-10
    )
    np.testing.assert_allclose(
        ppca_log_likelihood(model, jnp.array(X)), EXPECTED["loglik_ml"], rtol=1e-10
    )


def test_posterior_reference(compiled, x64):
    for weights, mean, covariance in (
        (EXPECTED["W_ml_R_eq_I"], EXPECTED["post_mean"], EXPECTED["post_cov"]),
        (
            np.array(EXPECTED["W_ml_R_eq_I"]) @ np.array(EXPECTED["rotation"]),
            EXPECTED["post_mean_rot"],
            EXPECTED["post_cov_rot"],
        ),
    ):
        model = PPCA(
            jnp.array(EXPECTED["mean"]), jnp.array(weights), jnp.array(EXPECTED["sigma2_ml"])
        )
        got_mean, got_covariance = compiled(ppca_posterior)(model, jnp.array(X))
        np.testing.assert_allclose(got_mean, mean, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(got_covariance, covariance, rtol=1e-8, atol=1e-12)


def test_log_likelihood_is_sklearns_on_digits(x64):
    data = load_digits().data + np.random.default_rng(0).uniform(size=(1797, 64))
    train, test = data[:1437], data[1437:]
    model = jax.jit(lambda x: ppca_fit(x, 30, ddof=1))(jnp.array(train))
    value = jax.jit(ppca_log_likelihood)(model, jnp.array(test))
    expected = PCA(30, svd_solver="full").fit(train).score_samples(test)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_log_likelihood_of_any_weights(compiled, x64):
    model, x, covariance = any_model()
    value = compiled(ppca_log_likelihood)(model, x)
    np.testing.assert_allclose(value, stats.multivariate_normal(model.mean, covariance).logpdf(x))


def test_log_likelihood_gradients(x64):
    model, x, _ = any_model()
    check_grads(jax.jit(ppca_log_likelihood), (model, x), order=1, rtol=1e-6)


def any_model():
    """Weights whose columns are not orthogonal."""
    rng = np.random.default_rng(1)
    weights, mean, x = (jnp.array(rng.normal(size=size)) for size in ((4, 3), 4, (6, 4)))
    model = PPCA(mean, weights, jnp.array(0.3))
    return model, x, np.asarray(weights @ weights.T) + 0.3 * np.eye(4)


def test_fit_is_a_maximum(x64):
    """The gradient of the mean log-likelihood vanishes at the fit."""
    model = ppca_fit(jnp.array(X), Q)
    gradient = jax.jit(jax.grad(lambda m: ppca_log_likelihood(m, jnp.array(X)).mean()))(model)
    for leaf in gradient:
        np.testing.assert_allclose(leaf, 0, atol=1e-9)


def test_fewer_examples_than_dimensions(x64):
    x = np.random.default_rng(2).normal(size=(5, 9))
    model = ppca_fit(jnp.array(x), 2)
    eigenvalues = np.linalg.eigvalsh(np.cov(x.T, ddof=0))[::-1]
    np.testing.assert_allclose(model.noise_variance, eigenvalues[2:].mean())
    assert np.isfinite(ppca_log_likelihood(model, jnp.array(x))).all()


def test_small_noise_does_not_cancel_in_float32():
    """|r|^2 - r^T W M^-1 W^T r over s^2 would lose every digit here."""
    rng = np.random.default_rng(3)
    weights, z = rng.normal(size=(8, 2)), rng.normal(size=(16, 2))
    x = 10 * z @ weights.T + 1e-3 * rng.normal(size=(16, 8))
    model = PPCA(jnp.zeros(8), jnp.array(weights * 10, jnp.float32), jnp.float32(1e-4))
    covariance = 100 * weights @ weights.T + 1e-4 * np.eye(8)
    x = x.astype(np.float32)
    expected = stats.multivariate_normal(np.zeros(8), covariance).logpdf(x)
    np.testing.assert_allclose(ppca_log_likelihood(model, jnp.array(x)), expected, rtol=2e-3)


def test_bfloat16_in_float32_out():
    x = jnp.array(X, jnp.bfloat16)
    model = jax.eval_shape(lambda x: ppca_fit(x, Q), x)
    assert all(leaf.dtype == jnp.float32 for leaf in model)
    assert jax.eval_shape(ppca_log_likelihood, model, x).dtype == jnp.float32


def test_bad_input(unchecked):
    x = jnp.array(X, jnp.float32)
    model = ppca_fit(x, Q)
    with pytest.raises(ValueError, match="num_components must be below the dimension 5, got 5"):
        ppca_fit(x, 5)
    with pytest.raises(ValueError, match="num_components must be at least 1"):
        ppca_fit(x, 0)
    with pytest.raises(TypeError, match=r"num_components must be an integer, got 2\.0"):
        ppca_fit(x, 2.0)
    with pytest.raises(ValueError, match="more examples"):
        ppca_fit(x[:2], 2)
    with pytest.raises(ValueError, match="x must be finite, got 1 of 300"):
        ppca_fit(x.at[3, 1].set(jnp.nan), 2)
    with pytest.raises(ValueError, match="noise variance"):
        ppca_fit(jnp.ones((9, 3)), 1)
    with pytest.raises(TypeError, match="x must have a floating dtype, got int32"):
        ppca_fit(x.astype(int), 2)
    with pytest.raises(ValueError, match=r"x must have shape \('any', 5\), got \(60, 4\)"):
        ppca_log_likelihood(model, x[:, :4])
    with pytest.raises(ValueError, match="x must have rank 2"):
        ppca_fit(x[0], 2)


@pytest.mark.parametrize(
    "x",
    [
        jax.random.normal(jax.random.key(0), (3, 10)),
        jnp.full((10, 3), 0.1),
        jnp.outer(jnp.arange(9.0), jnp.ones(3)) + 7.3,
    ],
)
def test_data_without_variance_left_for_the_noise_are_refused(x):
    """Rounding is no noise; centring takes an example."""
    with pytest.raises(ValueError, match=r"noise variance|must hold more examples"):
        ppca_fit(x, 2)
