"""Relaxed samples, categorical divergences and score functions against enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from genjax.variational import categorical_kl, concrete_log_prob, gumbel_softmax, score_function
from genjax.variational.discrete import _relaxed
from tests.variational.references import reference

INPUTS, EXPECTED = reference("gumbel_softmax")
TAU = INPUTS["tau"]


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_references(x64):
    logits, gumbel = jnp.asarray(INPUTS["logits"]), -jnp.log(-jnp.log(INPUTS["uniform"]))
    np.testing.assert_allclose(gumbel, EXPECTED["gumbel"], rtol=1e-9)
    soft = _relaxed(logits, gumbel, TAU, False)
    np.testing.assert_allclose(soft, EXPECTED["soft"], rtol=1e-9)
    np.testing.assert_allclose(_relaxed(logits, gumbel, TAU, True), EXPECTED["hard"], atol=1e-12)
    for hard in (False, True):  # the gradient is that of the relaxed sample
        gradient = jax.grad(lambda x, h=hard: (_relaxed(x, gumbel, TAU, h) @ INPUTS["v"]).sum())
        np.testing.assert_allclose(gradient(logits), EXPECTED["grad_logits_soft"], rtol=1e-8)
    density = jax.jit(concrete_log_prob)(soft, logits, temperature=TAU)
    np.testing.assert_allclose(density, EXPECTED["log_density_soft"], rtol=1e-9)
    kl = jax.jit(categorical_kl)(logits)
    np.testing.assert_allclose(kl, EXPECTED["kl_uniform"], rtol=1e-9)


def test_samples_in_law(key):
    """The argmax is an exact sample; the relaxed samples have the density that is said."""
    logits = jnp.asarray(INPUTS["logits"][2], jnp.float32)
    draws = jax.jit(
        lambda k: gumbel_softmax(
            k, jnp.broadcast_to(logits[None], (20_000, 5)), temperature=0.7, hard=True
        )
    )(key)
    counts = np.bincount(np.argmax(draws, -1), minlength=5)
    assert stats.chisquare(counts, 20_000 * softmax(INPUTS["logits"][2])).pvalue > 1e-3
    np.testing.assert_allclose(draws.sum(-1), 1, rtol=1e-5)
    # Two categories: y_1 = sigmoid((l_1 - l_2 + logistic noise) / t), with a known distribution.
    pair = jnp.broadcast_to(jnp.array([[0.5, -0.3]]), (20_000, 2))
    y = np.asarray(jax.jit(lambda k: gumbel_softmax(k, pair, temperature=0.7))(key))[:, 0]
    cdf = lambda y: stats.logistic.cdf(0.7 * np.log(y / (1 - y)) - 0.8)  # noqa: E731
    assert stats.kstest(y, cdf).pvalue > 1e-3
    y = np.linspace(0.02, 0.98, 9)
    at = jnp.asarray(np.stack([y, 1 - y], -1), jnp.float32)
    density = concrete_log_prob(at, pair[:9], temperature=jnp.float32(0.7))
    slope = (cdf(y + 1e-6) - cdf(y - 1e-6)) / 2e-6
    np.testing.assert_allclose(density, np.log(slope), rtol=1e-4, atol=1e-5)


def test_gradients_against_enumeration(key):
    """The score function's is without bias, with a baseline of less noise; the straight-through
    one's bias is measured."""
    logits, v = jnp.asarray(INPUTS["logits"][1], jnp.float32), jnp.asarray(INPUTS["v"], jnp.float32)
    exact = EXPECTED["exact_grad_expected_v"][1]
    n = 20_000

    def by_score(baseline):
        def one(k):
            def surrogate(logits):
                index = jax.random.categorical(k, logits)
                log_p = jax.nn.log_softmax(logits)[index][None]
                return score_function(log_p, v[index][None] + 3.0, baseline)[0]

            return jax.grad(surrogate)(logits)

        return jax.jit(jax.vmap(one))(jax.random.split(key, n))

    plain, with_baseline = by_score(0.0), by_score(3.0 + float(softmax(INPUTS["logits"][1]) @ v))
    for draws in (plain, with_baseline):
        assert (np.abs(draws.mean(0) - exact) < 4 * draws.std(0) / np.sqrt(n)).all()
    assert (with_baseline.std(0) < 0.3 * plain.std(0)).all()

    def by_relaxing(k):
        take = lambda x: gumbel_softmax(k, x, temperature=2.0, hard=True) @ v  # noqa: E731
        return jax.grad(take)(logits)

    draws = jax.jit(jax.vmap(by_relaxing))(jax.random.split(key, n))
    bias = np.abs(draws.mean(0) - exact)
    assert 0.01 < bias.max() < 0.2
    assert draws.std(0).max() < plain.std(0).max()


def test_categorical_kl(x64):
    rng = np.random.default_rng(0)
    logits, prior = rng.normal(size=(3, 2, 4)), rng.normal(size=4)
    p, r = softmax(logits), softmax(prior)
    expected = (p * np.log(p / r)).sum((1, 2))
    np.testing.assert_allclose(jax.jit(categorical_kl)(logits, prior), expected, rtol=1e-12)
    np.testing.assert_allclose(
        categorical_kl(jnp.asarray(logits), jnp.asarray(logits)), 0, atol=1e-14
    )
    np.testing.assert_allclose(categorical_kl(jnp.zeros((2, 7))), 0, atol=1e-14)
    # A category that cannot be adds nothing, and its gradient is finite.
    sure = jnp.array([[0.0, -jnp.inf, -jnp.inf]])
    np.testing.assert_allclose(categorical_kl(sure), np.log(3), rtol=1e-12)
    far = jnp.array([[0.0, -2000.0, 800.0]], jnp.float32)
    assert np.isfinite(jax.grad(lambda x: categorical_kl(x).sum())(far)).all()


def test_density_where_entries_vanish():
    y = jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    value, gradient = jax.value_and_grad(
        lambda l: concrete_log_prob(y, l, temperature=0.5).sum()  # noqa: E741
    )(jnp.zeros((2, 3)))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_bad_input(key, unchecked):
    logits = jnp.zeros((3, 4))
    for temperature in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            gumbel_softmax(key, logits, temperature=temperature)
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            concrete_log_prob(logits, logits, temperature=temperature)
    with pytest.raises(ValueError, match="prior_logits must broadcast to logits"):
        categorical_kl(logits, jnp.zeros(5))
    with pytest.raises(ValueError, match="shapes must be equal"):
        score_function(jnp.zeros(3), jnp.zeros(4))
    with pytest.raises(ValueError, match="shapes must be equal, got reward"):
        score_function(jnp.zeros(3), jnp.zeros(3), jnp.zeros(2))
