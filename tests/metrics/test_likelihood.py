"""Bits per dimension and test likelihood against closed forms and the fixture."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from genjax.data import Scaling
from genjax.metrics import bits_per_dim, likelihood

FIXTURE = json.loads((Path(__file__).parents[1] / "references" / "bits_per_dim.json").read_text())
evaluate = likelihood.test_log_likelihood


def test_bits_per_dim_of_the_fixture(x64, compiled):
    given, expected = FIXTURE["inputs"], FIXTURE["expected"]
    nats = jnp.asarray(given["logp_nats"])
    for scaling, name in (
        (Scaling(256, 0, 256), "bpd_if_density_on_0_256"),
        (Scaling(256, 0, 1), "bpd_if_density_on_0_1"),
        (Scaling(256, -1, 1), "bpd_if_density_on_m1_1"),
    ):
        got = compiled(
            lambda v, s=scaling: bits_per_dim(v, given["D"], log_det_per_dim=s.log_det_per_dim)
        )(nats)
        np.testing.assert_allclose(got, expected[name], rtol=1e-11)


def test_bits_per_dim_after_the_logit_of_the_fixture(x64):
    """A density in logit space: its own log-determinant is added to the nats."""
    given, expected = FIXTURE["inputs"], FIXTURE["expected"]
    nats = jnp.asarray(given["logp_nats"]) + jnp.asarray(expected["logit_logdet"])
    got = bits_per_dim(nats, given["D"], log_det_per_dim=-math.log(256))
    np.testing.assert_allclose(got, expected["bpd_if_density_in_logit_space"], rtol=1e-11)


def normal_log_prob(key, y):
    del key
    return jnp.sum(-0.5 * y**2 - 0.5 * math.log(2 * math.pi), axis=1)


@pytest.mark.parametrize(("batch_size", "how"), [(7, "jit"), (100, "eager")])
def test_continuous_data(key, batch_size, how):
    compiled = jax.jit if how == "jit" else lambda f: f
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    result = compiled(lambda k, v: evaluate(normal_log_prob, k, v, batch_size=batch_size))(key, x)
    expected = stats.norm.logpdf(x.astype(np.float64)).sum(1)
    np.testing.assert_allclose(result.per_example, expected, rtol=1e-5)
    np.testing.assert_allclose(result.log_likelihood, expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(result.standard_error, stats.sem(expected), rtol=1e-5)
    np.testing.assert_allclose(result.bits_per_dim, -expected.mean() / 3 / math.log(2), rtol=1e-5)


LEVELS = Scaling(4, -2.0, 2.0)


def bin_edges(x):
    return -2.0 + x.astype(np.float64), -1.0 + x.astype(np.float64)


def test_bound_is_the_mean_over_the_noise(key, x64):
    """E_u log N(y; 0, 1) over a bin [a, b] is -log(2 pi) / 2 - (a^2 + ab + b^2) / 6."""
    x = np.random.default_rng(1).integers(0, 4, (6, 2)).astype(np.uint8)
    result = jax.jit(
        lambda k: evaluate(normal_log_prob, k, x, scaling=LEVELS, num_draws=20_000, batch_size=4)
    )(key)
    a, b = bin_edges(x)
    expected = (-0.5 * math.log(2 * math.pi) - (a**2 + a * b + b**2) / 6).sum(1)
    np.testing.assert_allclose(result.per_example, expected, atol=0.02)
    exact = np.log(stats.norm.cdf(b) - stats.norm.cdf(a)).sum(1)
    assert (np.asarray(result.per_example) < exact).all()


def test_importance_draws_reach_the_probability_of_the_levels(key, x64):
    """log of the mean over draws: the mass of each bin, from the normal distribution function."""
    x = np.random.default_rng(1).integers(0, 4, (6, 2)).astype(np.uint8)
    a, b = bin_edges(x)
    exact = np.log(stats.norm.cdf(b) - stats.norm.cdf(a)).sum(1)
    options = {"scaling": LEVELS, "num_draws": 20_000, "estimator": "importance", "batch_size": 6}
    result = jax.jit(lambda k: evaluate(normal_log_prob, k, x, **options))(key)
    np.testing.assert_allclose(result.per_example, exact, atol=0.02)
    np.testing.assert_allclose(result.bits_per_dim, -exact.mean() / 2 / math.log(2), atol=0.02)


def test_noise_does_not_depend_on_the_batch_size(key):
    x = np.random.default_rng(1).integers(0, 17, (20, 8, 8, 1)).astype(np.uint8)

    def log_prob(key, y):
        return normal_log_prob(key, y.reshape(y.shape[0], -1))

    results = [
        jax.jit(
            lambda k, size=size: (
                evaluate(
                    log_prob, k, x, scaling=Scaling(17), num_draws=3, batch_size=size
                ).per_example
            )
        )
        for size in (20, 6)
    ]
    np.testing.assert_allclose(results[0](key), results[1](key), rtol=1e-6)
    assert not np.array_equal(results[0](key), results[0](jax.random.key(1)))


def test_keys_of_the_model_differ_from_batch_to_batch_and_draw_to_draw(key):
    def log_prob(key, y):
        return jnp.broadcast_to(jax.random.normal(key), y.shape[:1])

    x = np.zeros((6, 2), np.float32)
    once = evaluate(log_prob, key, x, batch_size=2).per_example
    assert len(set(np.asarray(once).tolist())) == 3
    many = jax.jit(lambda k: evaluate(log_prob, k, x, batch_size=2, num_draws=400).per_example)(key)
    assert np.abs(np.asarray(many)).max() < 4 / math.sqrt(400)


@pytest.mark.usefixtures("unchecked")
def test_bad_input(key):
    x = np.zeros((4, 2), np.float32)
    with pytest.raises(ValueError, match=r"estimator must be one of .* did you mean 'bound'"):
        evaluate(normal_log_prob, key, x, estimator="bounds")
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        evaluate(normal_log_prob, key, x, num_draws=0)
    with pytest.raises(ValueError, match="x must be finite"):
        evaluate(normal_log_prob, key, x * np.nan)
    with pytest.raises(TypeError, match="x must have a floating dtype, got uint8"):
        evaluate(normal_log_prob, key, x.astype(np.uint8))
    with pytest.raises(TypeError, match="x must hold integer levels"):
        evaluate(normal_log_prob, key, x, scaling=Scaling(17))
    with pytest.raises(ValueError, match=r"log_prob returns must have shape \(4,\), got \(\)"):
        evaluate(lambda key, y: jnp.sum(y), key, x)
    with pytest.raises(ValueError, match="x must hold at least one example"):
        evaluate(normal_log_prob, key, x[:0])
    with pytest.raises(ValueError, match="num_dims must be at least 1, got 0"):
        bits_per_dim(jnp.ones(3), 0)
