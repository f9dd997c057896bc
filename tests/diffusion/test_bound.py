import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from genjax import diffusion as gd
from genjax.data import Scaling
from tests.diffusion.oracles import reference
from tests.diffusion.test_samplers import move_with_noise

# Ho et al. put the centres of the outer bins at -1 and 1.
HO = {"low": -256 / 255, "high": 256 / 255}


def centres(levels):
    return Scaling(levels).to_continuous(jnp.arange(levels))


def test_discretised_decoder(x64, compiled):
    data = reference("ddpm_discrete_decoder_iddpm_var")
    inputs = data["inputs"]
    x = jnp.array(inputs["x_int"]) / 127.5 - 1
    value = compiled(lambda x, m, s: gd.discretised_gaussian(x, m, s, levels=256, **HO))(
        x, jnp.array(inputs["mean"]), jnp.array(inputs["std"])
    )
    np.testing.assert_allclose(value, data["expected"]["log_prob"], rtol=1e-7)


def test_decoder_sums_to_one_and_is_finite_in_the_tails(compiled):
    x = centres(17)
    for mean, std in [(0.2, 0.3), (0.95, 0.01), (-1.0, 1e-3)]:
        value = compiled(lambda m, s: gd.discretised_gaussian(x, m, s, levels=17))(
            jnp.full(17, mean), jnp.full(17, std)
        )
        np.testing.assert_allclose(np.exp(value).sum(), 1.0, rtol=1e-5)
    one = jnp.ones(())

    def single(m, s):
        return gd.discretised_gaussian(-0.50390625 * one, m, s, levels=256)

    value_and_grad = compiled(jax.value_and_grad(single, argnums=(0, 1)))
    for mean, std in [(1.0, 0.05), (0.5, 1e-4), (-0.5, 1e-4), (-0.5, 1e3)]:
        value, grad = value_and_grad(jnp.float32(mean), jnp.float32(std))
        assert np.isfinite(value)
        assert np.all(np.isfinite(grad))
    mass = [
        np.diff(norm.cdf((np.array([-1, 1]) / 256 - 0.50390625 - m) / 0.4))
        for m in (0.3001, 0.2999)
    ]
    numeric = (np.log(mass[0]) - np.log(mass[1]))[0] / 2e-4
    np.testing.assert_allclose(jax.grad(single)(0.3, jnp.float32(0.4)), numeric, rtol=1e-3)


def test_interpolated_variance(x64):
    """beta^v beta~^(1 - v) (Nichol & Dhariwal 2021, eq. 15), read off the noise of one step."""
    process, (t, s) = gd.VariancePreserving(), (jnp.array(0.6), jnp.array(0.5))
    moments = gd.posterior(process, t, s)
    for mix in (0.0, 0.3, 1.0):
        with_noise, without = (
            gd.ancestral_step(
                lambda x, t: 0 * x,
                jnp.ones((1, 1)),
                move_with_noise(jnp.full((1, 1), z), t, s, process),
                mix=mix,
            )[0]
            for z in (1.0, 0.0)
        )
        expected = np.exp(
            mix * np.log(moments.forward_variance) + (1 - mix) * np.log(moments.variance)
        )
        np.testing.assert_allclose((with_noise - without)[0, 0] ** 2, expected, rtol=1e-10)


def _expected_bound(x, gain, process, num_steps, levels, mix):
    """The bound for D = gain(t) x_t by closed-form expectations and a grid over the last noise."""
    t = np.arange(1, num_steps + 1) / num_steps * float(process.t_max)
    s = np.concatenate([[0.0], t[:-1]])
    at, st = np.asarray(process.alpha(t)), np.asarray(process.sigma(t))
    as_, ss = np.asarray(process.alpha(s)), np.asarray(process.sigma(s))
    prior = 0.5 * (at[-1] * x / st[-1]) ** 2
    forward = st**2 - (at / as_) ** 2 * ss**2
    post = forward * ss**2 / st**2
    coef = as_ * forward / st**2
    c = gain(t)
    error = ((1 - c * at) * x) ** 2 + (c * st) ** 2
    # The first step has no KL: it is the decoder's.
    post[0] = forward[0] = 1.0
    model = forward**mix * post ** (1 - mix)
    ratio = post / model
    kl = 0.5 * (ratio - 1 - np.log(ratio)) + 0.5 * coef**2 * error / model
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    mean = c[0] * (at[0] * x + st[0] * nodes)
    half = 1 / levels
    lower, upper = (x - half - mean) / st[0], (x + half - mean) / st[0]
    mass = np.where(lower > 0, norm.sf(lower) - norm.sf(upper), norm.cdf(upper) - norm.cdf(lower))
    decode = -(weights / weights.sum()) @ np.log(mass)
    return prior, kl[1:].sum(), decode


@pytest.mark.parametrize("mix", [pytest.param(0.0, marks=pytest.mark.slow), (0.3, 1.2)])
def test_bound_is_its_closed_form_for_a_linear_denoiser(mix, x64, key):
    """With a number for the variance, and with one of its own for each of two coordinates."""
    process, num_steps, levels, std = gd.VariancePreserving(), 20, 9, 0.5

    def gain(t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2)

    value, of_time = 2 / 9, lambda t: np.asarray(gain(t))
    parts = [
        _expected_bound(value, of_time, process, num_steps, levels, v) for v in np.atleast_1d(mix)
    ]
    expected = dict(
        zip(("prior", "diffusion", "reconstruction"), np.sum(parts, axis=0), strict=True)
    )
    x = jnp.full((4000, len(parts)), value)
    learned = lambda x_t, t: jnp.broadcast_to(jnp.array([mix]), x_t.shape)  # noqa: E731
    for every_step in (False, True):
        losses, aux = jax.jit(
            lambda key, e=every_step: gd.variational_bound(
                lambda x_t, t: gain(t)[:, None] * x_t,
                key,
                x,
                process=process,
                num_steps=num_steps,
                levels=levels,
                mix=learned if isinstance(mix, tuple) else mix,
                every_step=e,
            )
        )(key)
        np.testing.assert_allclose(losses, sum(aux.values()), rtol=1e-12)
        for name, number in expected.items():
            spread = 4 * aux[name].std() / np.sqrt(len(x)) + 1e-9
            assert abs(aux[name].mean() - number) < spread, (name, every_step)


def test_bound_meets_the_exact_likelihood_for_many_steps(key):
    """Data from a narrow Gaussian: the bound is above -log P and near it (128 steps).

    With the forward variance, exact while data is smooth at the scale of a step's noise.
    """
    process, levels, std = gd.VariancePreserving(), 256, 0.3
    x = jnp.tile(centres(levels)[100:160:15, None], (500, 1))

    def denoise(x_t, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return (alpha * std**2 / (alpha**2 * std**2 + sigma**2))[:, None] * x_t

    losses, _ = jax.jit(
        lambda key: gd.variational_bound(
            denoise, key, x, process=process, num_steps=128, levels=levels, mix=1.0, every_step=True
        )
    )(key)
    half = 1 / levels
    exact = -np.log(norm.cdf((x + half) / std) - norm.cdf((x - half) / std))[:, 0]
    gap = float((losses - exact).mean())
    assert -0.01 < gap < 0.1, gap


@pytest.mark.parametrize(("levels", "ends"), [(256, (-1.0, 1.0)), (17, (0.0, 3.0))])
def test_levels_scaled_by_the_data_room_sum_to_one(levels, ends):
    """The outer bins are open, the inner ones meet: also where the mass lies in the last bins."""
    x = Scaling(levels, *ends).to_continuous(jnp.arange(levels))
    mean = jnp.repeat(jnp.array([[0.1], [0.9], [2.99]]), levels, axis=1)
    low, high = ends
    log_prob = gd.discretised_gaussian(
        jnp.broadcast_to(x, mean.shape), mean, 0 * mean + 0.03, levels=levels, low=low, high=high
    )
    np.testing.assert_allclose(np.exp(log_prob).sum(1), 1.0, rtol=2e-5)


def test_bad_input(unchecked, key):
    for x in (jnp.linspace(-1, 1, 4), jnp.array([1.25])):
        with pytest.raises(ValueError, match=r"x must hold centres of the 4 bins .* from -0.75 to"):
            gd.discretised_gaussian(x, x, 0 * x + 1, levels=4)
        with pytest.raises(ValueError, match="x must hold centres of the 4 bins"):
            gd.variational_bound(lambda x, t: x, key, x, process=gd.EDM(), num_steps=4, levels=4)
    with pytest.raises(ValueError, match="levels must be at least 2"):
        gd.discretised_gaussian(jnp.ones(1), jnp.ones(1), jnp.ones(1), levels=1)
    with pytest.raises(ValueError, match="std must be positive"):
        gd.discretised_gaussian(jnp.ones(1), jnp.ones(1), jnp.zeros(1), levels=4)
    with pytest.raises(ValueError, match="denoiser must keep the shape"):
        gd.variational_bound(
            lambda x, t: x[:1], key, jnp.zeros((2, 3)), process=gd.EDM(), num_steps=4, levels=3
        )
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        gd.variational_bound(
            lambda x, t: x, key, jnp.ones((2, 3), int), process=gd.EDM(), num_steps=4, levels=4
        )


@pytest.mark.parametrize("std", [0.4, 0.05, 2e-3, 3e-4, 1e-4])
def test_the_decoder_s_gradient_holds_in_the_far_tail(std):
    """In float32 against the asymptotic law: log Phi falls by its argument, z + 1/z - 2/z^3."""
    x, mean = jnp.zeros(()) + 1 / 256, 1.0

    def nats(mean, std):
        return gd.discretised_gaussian(x, mean, std, levels=256)

    of_mean, of_std = jax.jit(jax.grad(nats, argnums=(0, 1)))(jnp.float32(mean), jnp.float32(std))
    edge = np.float64(2 / 256)
    step = 1e-6 * std

    def exact(mean, std):
        a, b = (0 - mean) / std, (edge - mean) / std
        return norm.logcdf(b) + np.log(-np.expm1(norm.logcdf(a) - norm.logcdf(b)))

    slopes = (
        (exact(mean + step, std) - exact(mean - step, std)) / (2 * step),
        (exact(mean, std + step) - exact(mean, std - step)) / (2 * step),
    )
    np.testing.assert_allclose([of_mean, of_std], slopes, rtol=2e-4)
