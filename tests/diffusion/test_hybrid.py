"""Learned variances: eq. 15 of Nichol & Dhariwal by their fixture, the hybrid loss, its law."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd
from tests.diffusion.oracles import reference
from tests.diffusion.test_bound import centres
from tests.diffusion.test_samplers import move_with_noise

STEPS = 10
PROCESS = gd.discrete(jnp.linspace(0.02, 0.4, STEPS))
STD = 0.5


def test_the_steps_variance_is_the_fixtures(x64):
    """A chain of two steps whose second has the fixture's beta and beta~."""
    data = reference("ddpm_discrete_decoder_iddpm_var")
    v, expected = data["inputs"]["v"], np.array(data["expected"]["iddpm_var"])

    @jax.jit
    def variances(first, beta):
        process = gd.discrete(jnp.stack([first, beta]))
        t, s = jnp.array(1.0), jnp.array(0.5)
        moved = [
            gd.ancestral_step(
                lambda x, t: 0 * x,
                jnp.ones((1, 3)),
                move_with_noise(jnp.full((1, 3), z), t, s, process),
                mix=lambda x, t: jnp.array([v]),
            )[0]
            for z in (1.0, 0.0)
        ]
        return jnp.square(moved[0] - moved[1])[0]

    for i, (beta, post) in enumerate(
        zip(data["inputs"]["beta"], data["inputs"]["beta_tilde"], strict=True)
    ):
        # beta~ = r beta with r = first / (1 - (1 - first) (1 - beta)).
        r = post / beta
        found = variances(jnp.array(r * beta / (1 - r * (1 - beta))), jnp.array(beta))
        np.testing.assert_allclose(found, expected[:, i], rtol=1e-7)


def moments(t):
    """In numpy, for data N(0, STD^2): gain of D, then v for which x_s | x_t is exact."""
    t = np.atleast_1d(np.asarray(t, np.float64))
    log_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-np.linspace(0.02, 0.4, STEPS)))])
    number = np.round(t * STEPS).astype(int)
    at2, as2 = np.exp(log_bar[number]), np.exp(log_bar[np.maximum(number - 1, 0)])
    beta = 1 - at2 / as2
    post = beta * (1 - as2) / (1 - at2)
    gain = np.sqrt(at2) * STD**2 / (at2 * STD**2 + 1 - at2)
    left = STD**2 * (1 - at2) / (at2 * STD**2 + 1 - at2)  # Var[x_0 | x_t]
    exact = post + as2 * beta**2 / (1 - at2) ** 2 * left
    with np.errstate(divide="ignore", invalid="ignore"):
        v = np.log(exact / post) / np.log(beta / post)
    return gain, np.where(number == 1, 0.5, v)


GRID = np.arange(1, STEPS + 1) / STEPS
GAIN, EXACT = (jnp.asarray(m, jnp.float32) for m in moments(GRID))


def network(params, x, t):
    """(epsilon, v): linear in x, exact for params (1, 0)."""
    number = jnp.round(t * STEPS).astype(int) - 1
    alpha, sigma = PROCESS.alpha(t)[:, None], PROCESS.sigma(t)[:, None]
    mean = params[0] * GAIN[number][:, None] * x
    return (x - alpha * mean) / sigma, EXACT[number][:, None] + params[1] + 0 * x


def hybrid(params, key, x, **options):
    return gd.hybrid_loss(
        partial(network, params), key, x, process=PROCESS, num_steps=STEPS, levels=9, **options
    )


def test_the_hybrid_is_the_sum_and_its_bound_does_not_move_the_mean(key):
    """Both parts by the losses that have them alone, in value and in gradient."""
    x, weight = centres(9)[np.random.default_rng(0).integers(0, 9, (6, 2))], 0.3
    params = jnp.array([0.7, 0.2])

    def simple(params):
        time_key, _ = jax.random.split(key)
        spread = gd.low_discrepancy(time_key, len(x))
        times = (1 + jnp.floor(spread * STEPS)) / STEPS
        return gd.denoising_score_matching(
            lambda x, t: network(params, x, t)[0], key, x,
            process=PROCESS, prediction="epsilon", times=times,
        )[0]  # fmt: skip

    def bound(params):
        denoise = gd.denoiser(
            lambda x, t: network(params, x, t)[0], process=PROCESS, prediction="epsilon"
        )
        return gd.variational_bound(
            denoise, key, x, process=PROCESS, num_steps=STEPS, levels=9,
            mix=lambda x, t: network(params, x, t)[1],
        )[0]  # fmt: skip

    @jax.jit
    def everything(params):
        total = lambda f: jax.value_and_grad(lambda p: f(p).sum())(params)  # noqa: E731
        loss = partial(hybrid, key=key, x=x, bound_weight=weight)
        return total(lambda p: loss(p)[0]), loss(params)[1], total(simple), total(bound)

    (value, gradient), aux, (of_simple, to_mean), (of_bound, to_both) = everything(params)
    np.testing.assert_allclose(aux["simple"].sum(), of_simple, rtol=1e-5)
    np.testing.assert_allclose(aux["bound"].sum(), of_bound, rtol=1e-5)
    np.testing.assert_allclose(value, of_simple + weight * of_bound, rtol=1e-5)
    np.testing.assert_allclose(gradient, [to_mean[0], weight * to_both[1]], rtol=1e-4)
    assert abs(to_both[0]) > 1e-2  # the bound's own gradient, which is stopped


def test_the_hybrid_learns_the_exact_variance(key):
    """For Gaussian data the slope in v is 0 where x_s given x_t has its own variance."""
    z = np.random.default_rng(0).normal(size=(4000, 1)) * STD
    levels = 2**12
    bins = {"levels": levels, "low": -4.0, "high": 4.0}
    x = jnp.asarray((np.floor((z + 4) / 8 * levels) + 0.5) / levels * 8 - 4, jnp.float32)

    @jax.jit
    def slope(shift):
        def loss(shift):
            losses, _ = gd.hybrid_loss(
                partial(network, jnp.stack([1.0, shift])), key, x, process=PROCESS,
                num_steps=STEPS, bound_weight=1.0, **bins,
            )  # fmt: skip
            return losses.mean()

        return jax.grad(loss)(shift)

    below, at, above = (float(slope(s)) for s in (-0.2, 0.0, 0.2))
    assert below < -4 * abs(at)
    assert above > 4 * abs(at)


@pytest.mark.parametrize("learned", [True, False])
def test_with_the_learned_variance_few_steps_have_the_exact_law(learned):
    """From level 10 to 1 in nine steps, for N(0, STD^2); the posterior variance falls short."""
    mix = (lambda x, t: network((1.0, 0.0), x, t)[1]) if learned else 0.0
    denoise = gd.denoiser(
        lambda x, t: network((1.0, 0.0), x, t)[0], process=PROCESS, prediction="epsilon"
    )
    start = np.random.default_rng(1).normal(size=(8000, 1))
    top = float(np.sqrt(PROCESS.alpha(1.0) ** 2 * STD**2 + PROCESS.variance(1.0)))
    x = jax.jit(
        lambda x: gd.sample(
            denoise, jax.random.key(2), x.shape, process=PROCESS, x_init=x,
            times=jnp.asarray(GRID[::-1], jnp.float32), step=partial(gd.ancestral_step, mix=mix),
        )
    )(jnp.asarray(top * start / start.std(), jnp.float32))  # fmt: skip
    exact = float(PROCESS.alpha(0.1) ** 2 * STD**2 + PROCESS.variance(0.1))
    # Four standard errors of a variance of 8000 draws are 6%.
    assert (abs(float(x.var()) / exact - 1) < 0.06) == learned


def test_bad_input(unchecked, key):
    x = centres(9)[:4, None]
    good = lambda x, t: (x, 0 * x)  # noqa: E731
    options = {"process": PROCESS, "num_steps": STEPS, "levels": 9}
    for bad, message in [
        (lambda x, t: (x, x[:, 0]), r"the variance that network returns must have shape \(4, 1\)"),
        (lambda x, t: (x[:2], x), r"denoiser must keep the shape \(4, 1\), it returned \(2, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            gd.hybrid_loss(bad, key, x, **options)
    with pytest.raises(ValueError, match="bound_weight must be at least 0, got -1"):
        gd.hybrid_loss(good, key, x, bound_weight=-1, **options)
    with pytest.raises(ValueError, match="prediction must be one of"):
        gd.hybrid_loss(good, key, x, prediction="eps", **options)
    with pytest.raises(ValueError, match="x must hold centres of the 9 bins"):
        gd.hybrid_loss(good, key, x + 0.05, **options)
    with pytest.raises(ValueError, match=r"what mix returns must have shape \(4, 1\), got \(4,\)"):
        gd.variational_bound(lambda x, t: x, key, x, mix=lambda x, t: t, **options)
