import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd
from tests.diffusion.oracles import fixture_mixture, reference


def pure_mixture():
    return gd.GaussianMixture(*(jnp.array(v) for v in vars(fixture_mixture()).values()))


def test_log_prob_score_and_denoiser_of_the_fixture(x64, compiled):
    mixture, process = pure_mixture(), gd.EDM()
    denoise = compiled(gd.mixture_denoiser(mixture, process=process))

    @jax.jit
    def log_prob_and_score(x, t):
        value, pull = jax.vjp(lambda x: gd.mixture_log_prob(mixture, x, t, process=process), x)
        return value, pull(jnp.ones_like(value))[0]

    # Every example has its own noise level.
    rows = reference("gmm_score_denoiser_ve")["expected"]["rows"]
    x = jnp.concatenate([jnp.array(row["x"]) for row in rows])
    t = jnp.concatenate([jnp.full(len(row["x"]), row["sigma"]) for row in rows])
    value, score = log_prob_and_score(x, t)
    for found, name in [(value, "log_p"), (score, "score"), (denoise(x, t), "denoiser")]:
        expected = np.concatenate([row[name] for row in rows])
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_tweedie_for_a_variance_preserving_process(x64):
    mixture, process, oracle = pure_mixture(), gd.VariancePreserving(), fixture_mixture()
    x = np.random.default_rng(0).normal(size=(5, 2))

    @jax.jit
    def found(x, t):
        mean = gd.mixture_denoiser(mixture, process=process)(x, t)
        value = gd.mixture_log_prob(mixture, x, t, process=process)
        return mean, value, process.alpha(t[0]), process.sigma(t[0])

    for time in (0.1, 0.7):
        mean, value, alpha, sigma = found(jnp.array(x), jnp.full(5, time))
        log_prob, score = oracle.log_prob_and_score(x, float(alpha), float(sigma))
        np.testing.assert_allclose(mean, (x + sigma**2 * score) / alpha, rtol=1e-9)
        np.testing.assert_allclose(value, log_prob, rtol=1e-10)


def test_bad_input(unchecked):
    mixture = pure_mixture()
    with pytest.raises(ValueError, match="weights must have shape"):
        gd.mixture_denoiser(mixture._replace(weights=jnp.ones(2)), process=gd.EDM())
    with pytest.raises(ValueError, match="t must lie in"):
        gd.mixture_denoiser(mixture, process=gd.EDM())(jnp.ones((1, 2)), jnp.array([100.0]))
