"""Bounds against exact likelihoods, plain float64 sums and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special, stats

from genjax.variational import (
    PPCA,
    elbo,
    gaussian_log_likelihood,
    gaussian_log_prob,
    iwae,
    ppca_fit,
    ppca_log_likelihood,
    ppca_posterior,
)

RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(90, 5)) @ RNG.normal(size=(5, 5))
X = jax.device_put(np.float32(DATA[:8]))
MODEL = jax.jit(ppca_fit, static_argnums=1)(np.float32(DATA), 2)
# The posterior is diagonal because the columns of the fitted W are orthogonal.
POST_MEAN, POST_COV = map(np.asarray, jax.jit(ppca_posterior)(MODEL, X))
SOLVE = np.asarray(MODEL.weights) @ POST_COV / float(MODEL.noise_variance)
# Near the posterior but not it, with a variance that is too large in one place, small in another.
LOOSE = {
    "w": np.float32(0.9 * SOLVE + 0.02 * RNG.normal(size=(5, 2))),
    "v": np.float32(np.log(np.diag(POST_COV)) + np.array([0.5, -0.3])),
}
LOOSE = jax.device_put(LOOSE)


def exact_encode(x):
    mean = (x - MODEL.mean[None]) @ jnp.array(SOLVE)
    log_var = jnp.log(jnp.array(np.diag(POST_COV)))
    return mean, jnp.broadcast_to(log_var[None], mean.shape)


def loose_encode(x, params=LOOSE):
    mean = (x - MODEL.mean[None].astype(x.dtype)) @ params["w"]
    return mean, jnp.broadcast_to(params["v"][None], mean.shape)


def decode(x, z, model=MODEL):
    log_var = jnp.log(model.noise_variance)
    return gaussian_log_likelihood(x, z @ model.weights.T + model.mean[None], log_var)


def as_float64(tree):
    return jax.tree.map(lambda a: jnp.array(a, jnp.float64), tree)


EXACT = np.asarray(jax.jit(ppca_log_likelihood)(MODEL, X))


def average(bound, keys):
    return jax.jit(lambda keys: jax.vmap(lambda k: bound(k)[0])(keys).mean(0))(keys)


@pytest.mark.parametrize("num_samples", [1, 7])
@pytest.mark.parametrize(("bound", "options"), [(elbo, {"divergence": "sampled"}), (iwae, {})])
def test_exact_posterior_makes_every_sample_the_log_likelihood(bound, options, num_samples, key):
    losses, aux = jax.jit(
        lambda k, x: bound(exact_encode, decode, k, x, num_samples=num_samples, **options)
    )(key, X)
    np.testing.assert_allclose(-losses, EXACT, atol=1e-4)
    if bound is iwae:
        np.testing.assert_allclose(aux["effective_samples"], num_samples, rtol=1e-3)


def test_elbo_with_the_exact_posterior_is_the_log_likelihood(compiled):
    """The exact divergence, and E_q log p(x|z) in closed form: nothing is left to chance."""
    mean, log_var = exact_encode(X)
    # E |x - W z - mu|^2 = |x - W m - mu|^2 + tr W S W^T.
    spread = jnp.sum(jnp.square(MODEL.weights) * jnp.exp(log_var[0])[None]) / MODEL.noise_variance
    expected = decode(X, mean) - 0.5 * spread
    losses, aux = compiled(lambda k, x: elbo(exact_encode, lambda x, z: expected, k, x))(
        jax.random.key(1), X
    )
    np.testing.assert_allclose(-losses, EXACT, atol=1e-4)
    np.testing.assert_allclose(aux["reconstruction"] - aux["kl"], -losses, rtol=1e-6)


def test_both_divergences_give_one_bound_on_average():
    """With the exact posterior that is the log-likelihood, to five standard errors."""
    keys = jax.random.split(jax.random.key(2), 4000)
    draws = jax.jit(jax.vmap(lambda k: -elbo(exact_encode, decode, k, X)[0]))(keys)
    error = draws.std(0) / np.sqrt(len(keys))
    assert (np.abs(draws.mean(0) - EXACT) < 5 * error).all()
    draws = jax.jit(
        jax.vmap(
            lambda k: (
                elbo(loose_encode, decode, k, X)[0]
                - elbo(loose_encode, decode, k, X, divergence="sampled")[0]
            )
        )
    )(keys)
    assert (np.abs(draws.mean(0)) < 5 * draws.std(0) / np.sqrt(len(keys))).all()
    assert draws.std(0).min() > 0.1


def test_importance_bound_rises_with_k_towards_the_log_likelihood():
    bounds = []
    for num_samples, repeats in ((1, 2000), (2, 2000), (8, 2000), (512, 64)):
        keys = jax.random.split(jax.random.key(num_samples), repeats)
        bounds.append(
            -average(lambda k, n=num_samples: iwae(loose_encode, decode, k, X, num_samples=n), keys)
        )
    bounds = np.array(bounds)
    assert (np.diff(bounds, axis=0) > 0).all()
    assert (bounds[0] < EXACT - 0.05).all()
    np.testing.assert_allclose(bounds[-1], EXACT, atol=0.05)


def test_elbo_is_log_likelihood_minus_divergence_from_the_posterior():
    """For any encoder the gap is KL(q || p(z|x)); here against the closed form in float64."""
    keys = jax.random.split(jax.random.key(4), 20_000)
    value = average(lambda k: elbo(loose_encode, decode, k, X), keys)
    mean, log_var = (np.asarray(a, np.float64) for a in loose_encode(X))
    precision = np.linalg.inv(POST_COV.astype(float))
    shift = POST_MEAN - mean
    gap = 0.5 * (
        np.linalg.slogdet(POST_COV)[1]
        - log_var.sum(1)
        - 2
        + np.einsum("bi,ij,bj->b", shift, precision, shift)
        + np.exp(log_var) @ np.diag(precision)
    )
    np.testing.assert_allclose(value, gap - EXACT, rtol=0.01)


def test_values_against_plain_sums_in_float64(compiled, key, x64):
    """The samples, read through a decoder that reports them, weighted by hand."""
    x, model, params = as_float64(X), as_float64(MODEL), as_float64(LOOSE)
    mean, log_var = map(np.asarray, loose_encode(x, params))
    seen = []

    def spy(x, z):
        jax.debug.callback(lambda z: seen.append(np.asarray(z)), z)
        return decode(x, z, model)

    def bound(kind, **options):
        f = lambda k, x: kind(  # noqa: E731
            lambda x: loose_encode(x, params), spy, k, x, num_samples=3, **options
        )
        return compiled(f)(key, x)

    value, aux = bound(iwae)
    jax.effects_barrier()
    z = np.stack(seen)
    assert z.shape == (3, 8, 2)
    scale = np.sqrt(np.asarray(model.noise_variance))
    log_p = stats.norm.logpdf(x, z @ np.asarray(model.weights).T + np.asarray(model.mean), scale)
    log_ratio = stats.norm.logpdf(z) - stats.norm.logpdf(z, mean, np.exp(log_var / 2))
    log_p, log_w = log_p.sum(-1), log_p.sum(-1) + log_ratio.sum(-1)
    share = special.softmax(log_w, axis=0)
    expected = -(special.logsumexp(log_w, axis=0) - np.log(3))
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    np.testing.assert_allclose(aux["reconstruction"], log_p.mean(0), rtol=1e-10)
    np.testing.assert_allclose(aux["effective_samples"], 1 / (share**2).sum(0), rtol=1e-10)
    kl = 0.5 * (mean**2 + np.exp(log_var) - 1 - log_var).sum(1)
    np.testing.assert_allclose(aux["kl"], kl, rtol=1e-10)
    # beta weighs the divergence with several samples too.
    value, aux = bound(elbo, beta=4.0)
    np.testing.assert_allclose(value, 4 * kl - log_p.mean(0), rtol=1e-10)
    np.testing.assert_allclose(aux["reconstruction"] - aux["kl"], log_p.mean(0) - kl, rtol=1e-10)


@pytest.mark.parametrize("beta", [0, 1, 2.5, jnp.float32(4.0)])
def test_beta(beta, key):
    losses, aux = elbo(loose_encode, decode, key, X, beta=beta)
    expected = float(beta) * aux["kl"] - aux["reconstruction"]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize("estimator", ["dreg", "stl"])
def test_estimators_have_one_value(estimator, key):
    def value(name):
        return jax.jit(
            lambda k, x: iwae(loose_encode, decode, k, x, num_samples=4, estimator=name)[0]
        )(key, X)

    np.testing.assert_allclose(value(estimator), value("plain"), rtol=1e-6)


def loss_of(kind, key, num_samples=3, **options):
    """A scalar loss of (encoder, decoder) parameters, in float64."""

    def loss(params, weights):
        model = PPCA(MODEL.mean.astype(float), weights, MODEL.noise_variance.astype(float))
        bound = elbo if kind == "elbo" else iwae
        losses, _ = bound(
            lambda x: loose_encode(x, params),
            lambda x, z: decode(x, z, model),
            key,
            X.astype(float),
            num_samples=num_samples,
            **options,
        )
        return losses.sum()

    return loss


@pytest.mark.parametrize("kind", ["elbo", "iwae"])
def test_gradients_by_finite_differences(kind, key, x64):
    args = (as_float64(LOOSE), as_float64(MODEL.weights))
    check_grads(jax.jit(loss_of(kind, key)), args, order=1, rtol=1e-6, eps=1e-5)


def estimates(estimator, num_samples, repeats):
    def one(key):
        gradient = jax.grad(loss_of("iwae", key, num_samples, estimator=estimator), argnums=(0, 1))
        encoder, decoder = gradient(as_float64(LOOSE), as_float64(MODEL.weights))
        return jnp.concatenate([encoder["v"], encoder["w"].ravel()]), decoder.ravel()

    keys = jax.random.split(jax.random.key(7), repeats)
    return [np.asarray(g) for g in jax.jit(jax.vmap(one))(keys)]


def test_dreg_is_unbiased_with_less_noise_and_stl_is_biased(x64):
    repeats = 4_000
    plain, plain_decoder = estimates("plain", 8, repeats)
    dreg, dreg_decoder = estimates("dreg", 8, repeats)
    stl, stl_decoder = estimates("stl", 8, repeats)
    # The decoder's gradient is the same, sample by sample.
    np.testing.assert_allclose(dreg_decoder, plain_decoder, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(stl_decoder, plain_decoder, rtol=1e-9, atol=1e-12)
    error = np.sqrt((plain.var(0) + dreg.var(0)) / repeats)
    assert (np.abs(plain.mean(0) - dreg.mean(0)) < 5 * error).all()
    assert (np.abs(plain.mean(0)) > 5 * error).any()
    assert dreg.var(0).sum() < 0.5 * plain.var(0).sum()
    assert (np.abs(plain.mean(0) - stl.mean(0)) > 10 * error).any()


def test_one_sample_gradients_agree_on_average(x64):
    repeats = 4_000
    plain, _ = estimates("plain", 1, repeats)
    for estimator in ("dreg", "stl"):
        other, _ = estimates(estimator, 1, repeats)
        error = np.sqrt((plain.var(0) + other.var(0)) / repeats)
        assert (np.abs(plain.mean(0) - other.mean(0)) < 5 * error).all()


def test_dreg_is_the_papers_formula(key, x64):
    """sum_k v_k^2 (dlog w_k / dz_k) (dz_k / dphi) with every factor taken apart by hand."""
    params, weights = as_float64(LOOSE), as_float64(MODEL.weights)
    x = X.astype(float)
    model = PPCA(MODEL.mean.astype(float), weights, MODEL.noise_variance.astype(float))
    mean, log_var = loose_encode(x, params)
    noise = jax.random.normal(key, (3, *mean.shape), mean.dtype)
    z = mean[None] + jnp.exp(0.5 * log_var)[None] * noise

    def log_weight(z):
        prior = gaussian_log_prob(z, jnp.zeros_like(z), jnp.zeros_like(z))
        return decode(x, z, model) + prior - gaussian_log_prob(z, mean, log_var)

    share = special.softmax(jax.jit(jax.vmap(log_weight))(z), axis=0)
    d_z = jax.jit(jax.vmap(jax.grad(lambda z: log_weight(z).sum())))(z)
    weighted = share[..., None] ** 2 * d_z
    expected = -(weighted * 0.5 * np.asarray(z - mean[None])).sum((0, 1))
    gradient = jax.jit(jax.grad(loss_of("iwae", key, 3, estimator="dreg")))(params, weights)
    np.testing.assert_allclose(gradient["v"], expected, rtol=1e-9)
    np.testing.assert_allclose(
        gradient["w"],
        -np.einsum("kbl,bd->dl", weighted, np.asarray(x - MODEL.mean[None].astype(float))),
        rtol=1e-9,
    )


@pytest.mark.parametrize("bound", [elbo, iwae])
def test_each_loss_depends_on_its_own_example(bound, key):
    jacobian = jax.jit(
        jax.jacobian(lambda x: bound(loose_encode, decode, key, x, num_samples=3)[0])
    )(X)
    size = np.abs(jacobian).sum(-1)
    assert (np.diag(size) > 0).all()
    np.testing.assert_array_equal(size[~np.eye(8, dtype=bool)], 0)


@pytest.mark.parametrize("bound", [elbo, iwae])
def test_bfloat16_and_vmap_over_keys(bound, key):
    def narrow(x):
        return tuple(a.astype(jnp.bfloat16) for a in loose_encode(x))

    def narrow_decode(x, z):
        return decode(x, z).astype(jnp.bfloat16)

    losses, aux = jax.eval_shape(
        lambda k, x: bound(narrow, narrow_decode, k, x, num_samples=2), key, X.astype(jnp.bfloat16)
    )
    assert all(a.dtype == jnp.float32 for a in (losses, *aux.values()))
    keys = jax.random.split(key, 3)
    single = jax.jit(lambda k: bound(loose_encode, decode, k, X, num_samples=2)[0])
    both = jax.jit(jax.vmap(single))(keys)
    one = [single(k) for k in keys]
    np.testing.assert_allclose(both, one, rtol=1e-5)
    assert np.ptp(np.asarray(both), axis=0).min() > 0


@pytest.mark.parametrize(("bound", "options"), [(elbo, {}), (iwae, {"estimator": "dreg"})])
def test_a_latent_image_is_summed_over_all_its_axes(bound, options, key):
    """A flat latent and the same one folded draw the same noise."""

    def total(params, fold):
        shape = (8, 2) if fold is None else (8, *fold)
        losses, _ = bound(
            lambda x: tuple(a.reshape(shape) for a in loose_encode(x, params)),
            lambda x, z: decode(x, z.reshape(8, 2)),
            key,
            X,
            num_samples=3,
            **options,
        )
        return losses.sum()

    flat, folded = (
        jax.jit(jax.value_and_grad(lambda p, f=f: total(p, f)))(LOOSE) for f in (None, (1, 2, 1))
    )
    for a, b in zip(jax.tree.leaves(flat), jax.tree.leaves(folded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("bound", [elbo, iwae])
def test_traced_once(bound):
    traces = []

    @jax.jit
    def loss(key, x):
        traces.append(x)
        return bound(loose_encode, decode, key, x, num_samples=2)[0]

    for seed in range(3):
        loss(jax.random.key(seed), X)
    assert len(traces) == 1


@pytest.mark.parametrize("bound", [elbo, iwae])
def test_bad_input(bound, key, unchecked):
    call = lambda x=X, encode=loose_encode, decode=decode, **options: bound(  # noqa: E731
        encode, decode, key, x, **{"num_samples": 2, **options}
    )
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        call(num_samples=0)
    with pytest.raises(TypeError, match=r"num_samples must be an integer, got 1\.5"):
        call(num_samples=1.5)
    with pytest.raises(ValueError, match="x must be finite, got 1 of 40"):
        call(X.at[1, 2].set(jnp.nan))
    with pytest.raises(ValueError, match="x must hold at least one example"):
        call(X[:0])
    with pytest.raises(ValueError, match=r"mean \(8, 2\), log variance \(8, 1\)"):
        call(encode=lambda x: (x[:, :2], x[:, :1]))
    with pytest.raises(ValueError, match="batch sizes"):
        call(encode=lambda x: (x[:4, :2], x[:4, :2]))
    with pytest.raises(ValueError, match="the mean, must have rank at least 2"):
        call(encode=lambda x: (x[:, 0], x[:, 0]))
    with pytest.raises(ValueError, match=r"x, z\) must have shape \(8,\), got \(\)"):
        call(decode=lambda x, z: decode(x, z).mean())


def test_options_of_one_bound_are_refused_by_the_other(key, unchecked):
    with pytest.raises(ValueError, match="beta must be at least 0"):
        elbo(loose_encode, decode, key, X, beta=-1.0)
    with pytest.raises(TypeError, match="beta"):
        iwae(loose_encode, decode, key, X, num_samples=2, beta=2.0)
    with pytest.raises(ValueError, match="divergence must be one of"):
        elbo(loose_encode, decode, key, X, divergence="kl")
    with pytest.raises(ValueError, match="did you mean 'dreg'"):
        iwae(loose_encode, decode, key, X, num_samples=2, estimator="dregs")
