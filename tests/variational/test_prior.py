"""Bounds under a prior of one's own: closed forms of a linear Gaussian model, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats

from genjax.variational import (
    elbo,
    gaussian_kl,
    gaussian_kl_between,
    gaussian_log_prob,
    iwae,
    standard_normal_log_prob,
)
from tests.variational.test_elbo import LOOSE, MODEL, X, as_float64, decode, loose_encode, loss_of

# A prior of one's own: N(m, s^2) instead of N(0, 1).
PRIOR = {"m": jnp.array([0.5, -1.0]), "v": jnp.array([0.4, -0.6])}


def shifted(z, params=PRIOR):
    mean, log_var = (jnp.broadcast_to(params[k][None], z.shape).astype(z.dtype) for k in "mv")
    return gaussian_log_prob(z, mean, log_var)


def shifted_likelihood():
    """log p(x) of the linear Gaussian model with that prior, in float64."""
    weights = np.asarray(MODEL.weights, np.float64)
    mean = np.asarray(MODEL.mean) + weights @ np.asarray(PRIOR["m"])
    covariance = weights * np.exp(np.asarray(PRIOR["v"], np.float64)) @ weights.T
    covariance += float(MODEL.noise_variance) * np.eye(5)
    return stats.multivariate_normal(mean, covariance).logpdf(X)


def test_the_standard_normal_as_a_prior_changes_nothing_but_the_noise(key):
    for bound, options in ((elbo, {"divergence": "sampled"}), (iwae, {})):
        run = jax.jit(
            lambda k, prior, b=bound, o=options: b(
                loose_encode, decode, k, X, num_samples=3, prior=prior, **o
            )[0],
            static_argnums=1,
        )
        np.testing.assert_allclose(run(key, standard_normal_log_prob), run(key, None), rtol=1e-6)
    draws = jax.jit(
        jax.vmap(lambda k: elbo(loose_encode, decode, k, X, prior=standard_normal_log_prob)[1])
    )(jax.random.split(key, 4000))["kl"]
    exact = gaussian_kl(*loose_encode(X))
    assert (np.abs(draws.mean(0) - exact) < 5 * draws.std(0) / np.sqrt(4000)).all()


def test_a_shifted_prior_gives_its_own_divergence_and_likelihood(key):
    keys = jax.random.split(key, 4000)
    draws = jax.jit(jax.vmap(lambda k: elbo(loose_encode, decode, k, X, prior=shifted)[1]["kl"]))
    kl, prior = draws(keys), [jnp.broadcast_to(PRIOR[k][None], (8, 2)) for k in "mv"]
    exact = gaussian_kl_between(*loose_encode(X), *prior)
    assert (np.abs(kl.mean(0) - exact) < 5 * kl.std(0) / np.sqrt(4000)).all()
    losses, aux = jax.jit(
        lambda k: iwae(loose_encode, decode, k, X, num_samples=20_000, prior=shifted)
    )(key)
    np.testing.assert_allclose(-losses, shifted_likelihood(), atol=0.1)
    np.testing.assert_allclose(aux["kl"], exact, atol=0.1)


@pytest.mark.parametrize("kind", ["elbo", "iwae"])
def test_gradients_reach_the_prior(kind, key, x64):
    """By finite differences, and for dreg with the weights that the decoder has."""

    def loss(params, prior, **options):
        density = lambda z: shifted(z, prior)  # noqa: E731
        return loss_of(kind, key, prior=density, **options)(params, as_float64(MODEL.weights))

    args = (as_float64(LOOSE), as_float64(PRIOR))
    check_grads(jax.jit(loss), args, order=1, modes=["rev"], rtol=1e-6, eps=1e-5)
    if kind == "iwae":
        plain, dreg = (
            jax.jit(jax.grad(lambda p, e=e: loss(args[0], p, estimator=e)))(args[1])
            for e in ("plain", "dreg")
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), plain, dreg)


def test_a_prior_that_does_not_fit_is_refused(key, unchecked):
    for bound in (elbo, iwae):
        with pytest.raises(ValueError, match=r"prior\(z\) must have shape \(8,\), got \(8, 2\)"):
            bound(loose_encode, decode, key, X, num_samples=2, prior=lambda z: -(z**2))
    with pytest.raises(ValueError, match="divergence must be 'sampled' with a prior"):
        elbo(loose_encode, decode, key, X, prior=shifted, divergence="exact")
