from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd
from genjax import metrics
from genjax.data import scaling
from tests.diffusion.oracles import fixture_mixture

WIDE = gd.EDM(t_min=1e-3, t_max=2000.0)


def _fixture():
    """The fixture's mixture, the same in float32, and points drawn from it."""
    oracle, rng = fixture_mixture(), np.random.default_rng(2)
    which = rng.choice(3, size=24, p=oracle.weights)
    factors = np.linalg.cholesky(oracle.covariances)[which]
    x = oracle.means[which] + np.einsum("nij,nj->ni", factors, rng.normal(size=(24, 2)))
    return oracle, gd.GaussianMixture(*(jnp.float32(v) for v in vars(oracle).values())), x


def test_likelihood_of_a_mixture_within_a_millinat():
    oracle, mixture, x = _fixture()
    exact, _ = oracle.log_prob_and_score(x)
    denoise = gd.mixture_denoiser(mixture, process=WIDE)
    value, aux = jax.jit(lambda x: gd.log_likelihood(denoise, x, process=WIDE, num_steps=128))(
        jnp.float32(x)
    )
    np.testing.assert_allclose(value, exact, atol=1e-3)
    np.testing.assert_allclose(aux["prior"] + aux["volume"], value, rtol=1e-6)
    assert value.dtype == jnp.float32


@pytest.mark.parametrize("process", [gd.VariancePreserving(beta_max=30.0), gd.Cosine(t_max=0.9999)])
def test_likelihood_under_variance_preserving_processes(process, x64):
    oracle, _, x = _fixture()
    mixture = gd.GaussianMixture(*(jnp.array(v) for v in vars(oracle).values()))
    exact, _ = oracle.log_prob_and_score(x)
    denoise = gd.mixture_denoiser(mixture, process=process)
    value, _ = jax.jit(lambda x: gd.log_likelihood(denoise, x, process=process, num_steps=128))(x)
    np.testing.assert_allclose(value, exact, atol=1e-3)


@pytest.mark.slow
def test_adaptive_solver_agrees(x64):
    oracle, _, x = _fixture()
    mixture = gd.GaussianMixture(*(jnp.array(v) for v in vars(oracle).values()))
    exact, _ = oracle.log_prob_and_score(x[:4])
    denoise = gd.mixture_denoiser(mixture, process=WIDE)
    solve = partial(gd.log_likelihood, denoise, process=WIDE, rtol=1e-7, atol=1e-7)
    value, _ = jax.jit(solve)(jnp.array(x[:4]))
    np.testing.assert_allclose(value, exact, atol=1e-3)


def test_hutchinson_is_unbiased_and_indexed(key):
    _, mixture, x = _fixture()
    x = jnp.float32(x[:3])
    denoise = gd.mixture_denoiser(mixture, process=WIDE)

    def value(key, x, first_index, num_probes=1):
        return gd.log_likelihood(
            denoise,
            x,
            process=WIDE,
            key=key,
            num_probes=num_probes,
            num_steps=16,
            first_index=first_index,
        )[0]

    exact, values, many, alone = jax.jit(
        lambda keys: (
            gd.log_likelihood(denoise, x, process=WIDE, num_steps=16)[0],
            jax.vmap(lambda k: value(k, x, 0))(keys),
            jax.vmap(lambda k: value(k, x, 0, 4))(keys[:50]),
            value(keys[0], x[2:], 2),
        )
    )(jax.random.split(key, 200))
    error = values.mean(0) - exact
    assert np.all(np.abs(error) < 4 * values.std(0) / np.sqrt(200) + 1e-4)
    assert np.all(values.std(0) > 0.01)
    np.testing.assert_allclose(many.std(0), values.std(0) / 2, rtol=0.4)
    np.testing.assert_allclose(alone[0], values[0, 2], atol=1e-4)


def test_bits_per_dim_of_a_known_discretised_density(key):
    """16 levels of a Gaussian: bits/dim of the dequantised data by the flow, against the sum."""
    dims, std, levels = 4, 0.35, 16
    scale = scaling.Scaling(levels, -1.0, 1.0)
    x = jnp.clip(
        jnp.round(8 + 8 * std * jax.random.normal(key, (512, dims))), 0, levels - 1
    ).astype(jnp.uint8)
    # The density of the dequantised law, exactly: its Gaussian mixture over the levels' centres.
    counts = np.bincount(np.asarray(x).ravel(), minlength=levels) / x.size
    seen = np.nonzero(counts)[0]
    centres = np.asarray(scale.to_continuous(jnp.asarray(seen, jnp.uint8)))
    # One kernel per level, as wide as its bin: what the dequantised data looks like, smoothed.
    width = 2 / levels / np.sqrt(12)
    mixture = gd.GaussianMixture(
        jnp.float32(counts[seen]),
        jnp.float32(centres)[:, None],
        jnp.full((len(seen), 1, 1), width**2, jnp.float32),
    )
    one = gd.mixture_denoiser(mixture, process=WIDE)

    def denoise(x, t):
        flat = one(x.reshape(-1, 1), jnp.repeat(t, dims))
        return flat.reshape(x.shape)

    y = scale.dequantise(jax.random.fold_in(key, 1), x)
    value, _ = jax.jit(lambda y: gd.log_likelihood(denoise, y, process=WIDE))(y)
    found = metrics.bits_per_dim(value, dims, log_det_per_dim=scale.log_det_per_dim).mean()
    y = np.asarray(y, np.float64)
    density = (
        counts[seen]
        * np.exp(-0.5 * ((y[..., None] - centres) / width) ** 2)
        / (width * np.sqrt(2 * np.pi))
    ).sum(-1)
    expected = np.mean(-np.log2(density)) - np.log2(2 / levels)
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_gradient_in_a_parameter_of_the_denoiser(x64):
    """Gaussian data of scale s: d log p / d s by the flow, against the closed form."""
    x = jnp.array([[0.3], [-1.2]])

    def value(scale):
        def denoise(x, t):
            return x * (scale**2 / (scale**2 + t**2))[:, None]

        return gd.log_likelihood(denoise, x, process=WIDE, num_steps=200)[0].sum()

    expected = np.sum(np.asarray(x) ** 2 / 0.7**3 - 1 / 0.7)
    np.testing.assert_allclose(jax.jit(jax.grad(value))(0.7), expected, rtol=1e-3)


def test_bad_input(unchecked):
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="denoiser must keep the shape"):
        gd.log_likelihood(lambda x, t: x[:, :1], x, process=gd.EDM())
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        gd.log_likelihood(lambda x, t: x, x, process=gd.EDM(), num_steps=0)
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        gd.log_likelihood(lambda x, t: x, jnp.ones((2, 3), int), process=gd.EDM())
    with pytest.raises(ValueError, match="x must have rank at least 2"):
        gd.log_likelihood(lambda x, t: x, jnp.ones(3), process=gd.EDM())


@pytest.mark.parametrize("rtol", [None, pytest.param(1e-3, marks=pytest.mark.slow)])
def test_float32_data_stay_float32_where_64_bit_types_are_on(rtol, key):
    """Exact trace and probes: the loops keep the type of the data, and its value."""
    process, x = gd.Cosine(), jnp.array([[0.5, -0.25]], jnp.float32)
    probe = None if rtol else key

    def value():
        return gd.log_likelihood(
            lambda x, t: 0.3 * x, x, process=process, key=probe, num_steps=4, rtol=rtol
        )[0]

    expected = np.asarray(value())
    with jax.enable_x64(True):
        found = np.asarray(value())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4)
