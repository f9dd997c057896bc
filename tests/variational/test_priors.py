"""Mixtures and the VampPrior against references, scipy and the law of their samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from genjax.variational import elbo, mixture_log_prob, mixture_sample, vamp_log_prob
from tests.variational.references import reference

MEANS = np.array([[0.0, 1.0], [2.0, -1.0], [-3.0, 0.5], [0.5, 0.5], [4.0, 4.0]])
LOG_VARS = np.array([[0.0, -1.0], [-0.5, 0.5], [0.3, 0.1], [-2.0, -2.0], [0.0, 0.0]])
LOGITS = np.array([0.1, -0.4, 0.8, 0.0, -1.0])
Z = np.random.default_rng(0).normal(size=(6, 2)) * 2
PARTS = tuple(jnp.asarray(x, jnp.float32) for x in (MEANS, LOG_VARS))


def by_scipy(z, logits=LOGITS):
    each = stats.norm(MEANS, np.exp(LOG_VARS / 2)).logpdf(z[:, None]).sum(-1)
    return special.logsumexp(each + special.log_softmax(logits), axis=1)


def test_references(x64):
    inputs, expected = reference("vampprior")
    parts = (inputs["z"], inputs["pseudo_mu"], inputs["pseudo_logvar"])
    log_p = jax.jit(mixture_log_prob)
    np.testing.assert_allclose(log_p(*parts), expected["log_p"], rtol=1e-11)
    weighted = log_p(*parts, logits=np.log(inputs["mixture_weights"]))
    np.testing.assert_allclose(weighted, expected["log_p_weighted"], rtol=1e-11)


def test_divergence_and_gradients_of_the_vamp_prior(x64, monkeypatch):
    """By the bound itself, with the reference's noise in the place of its own."""
    inputs, expected = reference("mixture_prior_kl")
    x = jnp.asarray(inputs["x"])
    noise = lambda *_: jnp.asarray(inputs["eps"])  # noqa: E731
    monkeypatch.setattr("genjax.variational.gaussian.jax.random.normal", noise)

    def kl(weights, pseudo, logits):
        def encode(x):
            return x @ weights, x @ inputs["W_log_var"] + inputs["b_log_var"][None]

        prior = lambda z: vamp_log_prob(encode, pseudo, z, logits=logits, block=2)  # noqa: E731
        flat = lambda x, z: jnp.zeros(len(x))  # noqa: E731
        found = elbo(encode, flat, jax.random.key(0), x, num_samples=3, prior=prior)[1]["kl"]
        return found.mean(), found

    args = (inputs["W_mean"], inputs["pseudo_inputs"], inputs["mixture_logits"])
    gradients, values = jax.jit(jax.grad(kl, argnums=(0, 1, 2), has_aux=True))(
        *map(jnp.asarray, args)
    )
    np.testing.assert_allclose(values, expected["kl"], rtol=1e-9)
    names = ("grad_W_mean", "grad_pseudo_inputs", "grad_logits")
    for found, name in zip(gradients, names, strict=True):
        np.testing.assert_allclose(found, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("block", [2, 3, 8])
def test_blocks_change_nothing(block):
    """Nor do they in float32, at points a long way off, in value and gradient."""
    z = jnp.asarray(np.concatenate([Z, 40 * Z[:1]]), jnp.float32)

    def total(z, logits):
        found = mixture_log_prob(z, *PARTS, logits=logits, block=block)
        return found.sum(), found

    gradients, values = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(
        z, jnp.asarray(LOGITS)
    )
    np.testing.assert_allclose(values, by_scipy(np.asarray(z, np.float64)), rtol=2e-6)
    exact, step = np.asarray(z, np.float64), np.zeros(z.shape)
    step[2, 1] = 1e-5
    slope = (by_scipy(exact + step) - by_scipy(exact - step)).sum() / 2e-5
    np.testing.assert_allclose(gradients[0][2, 1], slope, rtol=1e-4)
    responsibility = np.exp(
        stats.norm(MEANS, np.exp(LOG_VARS / 2)).logpdf(np.asarray(z)[:, None]).sum(-1)
        + special.log_softmax(LOGITS)
        - by_scipy(np.asarray(z, np.float64))[:, None]
    )
    expected = (responsibility - special.softmax(LOGITS)).sum(0)
    np.testing.assert_allclose(gradients[1], expected, rtol=1e-4, atol=1e-5)


def test_samples_in_law(key):
    n = 40_000
    logits = jnp.asarray(LOGITS)
    z = np.asarray(jax.jit(lambda k: mixture_sample(k, *PARTS, n, logits=logits))(key))
    w = special.softmax(LOGITS)
    mean = w @ MEANS
    covariance = (MEANS - mean).T @ np.diag(w) @ (MEANS - mean) + np.diag(w @ np.exp(LOG_VARS))
    spread = np.sqrt(np.diag(covariance) / n)
    assert (np.abs(z.mean(0) - mean) < 4 * spread).all()
    np.testing.assert_allclose(np.cov(z.T), covariance, atol=0.12)
    few = mixture_sample(key, *PARTS, 3, logits=logits)
    np.testing.assert_allclose(few, z[:3], rtol=1e-6)


def test_bad_input(key, unchecked):
    z = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"events .* must be equal, got z"):
        mixture_log_prob(jnp.zeros((3, 4)), MEANS, LOG_VARS)
    with pytest.raises(ValueError, match=r"logits must have shape \(5,\), got \(4,\)"):
        mixture_log_prob(z, MEANS, LOG_VARS, logits=LOGITS[:4])
    with pytest.raises(ValueError, match="means must hold at least one"):
        mixture_log_prob(z, MEANS[:0], LOG_VARS[:0])
    with pytest.raises(ValueError, match="means must be finite"):
        mixture_log_prob(z, MEANS * np.nan, LOG_VARS)
    with pytest.raises(ValueError, match="shapes must be equal"):
        mixture_sample(key, MEANS, LOG_VARS[:2], 3)
    with pytest.raises(ValueError, match="batch sizes"):
        vamp_log_prob(lambda u: (u[:2], u[:2]), jnp.zeros((4, 2)), z)


def test_components_without_weight_leave_gradients_finite():
    """A whole block of them, by logits of -inf."""
    logits = jnp.where(jnp.arange(8) < 4, -jnp.inf, 0.0)
    means = jnp.linspace(-1, 1, 8)[:, None]

    def nats(z, means, logits):
        return mixture_log_prob(z, means, jnp.zeros((8, 1)), logits=logits, block=4)[0]

    given = jnp.zeros((1, 1)), means, logits
    half = mixture_log_prob(given[0], means[4:], jnp.zeros((4, 1)))
    np.testing.assert_allclose(nats(*given), half[0], rtol=1e-6)
    for gradient in jax.grad(nats, argnums=(0, 1, 2))(*given):
        assert np.isfinite(gradient).all()
