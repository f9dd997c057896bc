"""The aggregated posterior and what a divergence is made of: references and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.variational import (
    active_units,
    aggregated_log_prob,
    gaussian_log_prob,
    kl_decomposition,
    standard_normal_log_prob,
)
from tests.variational.references import reference

INPUTS, EXPECTED = reference("aggregated_posterior")
NAMES = ("z", "mean", "log_var")
GIVEN = tuple(INPUTS[name] for name in NAMES)


def test_references(x64):
    found = jax.jit(kl_decomposition)(*GIVEN)
    for term, name in zip(found, ("mutual_information", "total_correlation"), strict=False):
        np.testing.assert_allclose(term, EXPECTED[name], rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(found.dimension_wise, EXPECTED["dimension_wise_kl"], rtol=1e-8)
    log_q = jax.jit(lambda *a: aggregated_log_prob(*a, block=2))(*GIVEN)
    np.testing.assert_allclose(log_q, EXPECTED["log_q_aggregated"], rtol=1e-8)
    # The whole is log q(z|x) - log p(z) of these samples.
    z, mean, log_var = map(jnp.asarray, GIVEN)
    whole = gaussian_log_prob(z, mean, log_var) - standard_normal_log_prob(z)
    np.testing.assert_allclose(sum(found), whole, rtol=1e-10)


def test_two_posteriors_by_quadrature(x64):
    """Against the exact divergences of one dimension with two examples."""
    mean, log_var = (INPUTS[name][:2, :1] for name in ("mean", "log_var"))
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    decompose = jax.jit(kl_decomposition)
    sums = np.zeros(3)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        sums += weight * np.mean(decompose(mean + np.exp(log_var / 2) * node, mean, log_var), 1)
    exact = EXPECTED["two_point_exact"]
    np.testing.assert_allclose(sums[0], exact["mutual_information"], rtol=1e-8)
    np.testing.assert_allclose(sums[1], 0, atol=1e-12)
    np.testing.assert_allclose(sums[2], exact["marginal_kl"], rtol=1e-8)


def test_linear_gaussian_encoder_of_gaussian_data(key):
    """MI = 1/2 log |S_q(z)| / |S_q(z|x)| and KL(q(z) || p), both closed, by many samples."""
    a = np.array([[1.0, 0.4], [0.0, 0.8]])
    log_var = np.log([0.5, 0.3])
    x, noise = (np.asarray(jax.random.normal(k, (4000, 2))) for k in jax.random.split(key))
    mean = x @ a.T
    z = mean + np.exp(log_var / 2) * noise
    found = jax.jit(kl_decomposition)(z, mean, np.broadcast_to(log_var, z.shape).astype("f4"))
    s = a @ a.T + np.diag(np.exp(log_var))
    information = 0.5 * (np.linalg.slogdet(s)[1] - log_var.sum())
    correlation = 0.5 * (np.log(np.diag(s)).sum() - np.linalg.slogdet(s)[1])
    margins = 0.5 * (np.diag(s) - 1 - np.log(np.diag(s))).sum()
    means, errors = np.mean(found, 1), 4 * np.std(found, 1) / np.sqrt(4000)
    # The aggregate holds z's own posterior, which leans the estimate by about 1/N a dimension.
    assert (np.abs(means - [information, correlation, margins]) < errors + 0.02).all()
    assert means[0] < np.log(4000)


def test_a_prior_of_ones_own_and_information_of_separate_codes(key):
    """Posteriors that do not overlap hold log N nats; the sum is the divergence from that prior."""
    z, mean, log_var = (jnp.asarray(v, jnp.float32) for v in GIVEN)
    prior = lambda z: gaussian_log_prob(z, 1 + 0 * z, 0.3 + 0 * z)  # noqa: E731
    found = jax.jit(lambda *a: kl_decomposition(*a, prior=prior))(z, mean, log_var)
    np.testing.assert_allclose(
        sum(found), gaussian_log_prob(z, mean, log_var) - prior(z), rtol=1e-4
    )
    apart = 100.0 * jnp.arange(70.0)[:, None]  # more than one block of rows
    split = jax.jit(kl_decomposition)(apart, apart, 0 * apart)
    np.testing.assert_allclose(split.mutual_information, np.log(70), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda m: sum(kl_decomposition(apart, m, 0 * m)).sum()))(apart)
    assert np.isfinite(gradient).all()


def test_active_units():
    expected = EXPECTED["variance_of_means"]
    for threshold, count in ((0.01, 3), (0.47, 2), (1.0, 1), (2.0, 0)):
        assert (
            active_units(jnp.asarray(INPUTS["mean"]), threshold)
            == count
            == (expected > threshold).sum()
        )
    assert jax.jit(active_units)(jnp.ones((4, 6))) == 0
    # ddof 0: two means 0.2 apart vary by 0.01, by ddof 1 it would be 0.02.
    assert active_units(jnp.array([[0.0], [0.2]]), 0.015) == 0


def test_bad_input(unchecked):
    z, mean, log_var = map(jnp.asarray, GIVEN)
    with pytest.raises(ValueError, match="shapes must be equal"):
        kl_decomposition(z, mean[:3], log_var[:3])
    with pytest.raises(ValueError, match="mean must be finite"):
        kl_decomposition(z, mean * jnp.nan, log_var)
    with pytest.raises(ValueError, match=r"prior\(z\) must have shape \(5,\)"):
        kl_decomposition(z, mean, log_var, prior=lambda z: z)
    with pytest.raises(ValueError, match="threshold must be at least 0"):
        active_units(mean, -1.0)
    with pytest.raises(ValueError, match="mean must hold at least one example"):
        active_units(mean[:0])
