import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd
from tests.diffusion.oracles import Mixture, reference

VP = gd.VariancePreserving()


def _conversion_case():
    """alpha = 0.8, sigma = 0.6: a variance-preserving process and the time at which it is there."""
    data = reference("parameterisation_conversions")
    x0, eps = (jnp.array(data["inputs"][k]) for k in ("x0", "eps"))
    t = jnp.full(3, VP.time_of_log_snr(2 * np.log(0.8 / 0.6)))
    expected = data["expected"]
    kinds = {"x0": x0, "epsilon": eps, "v": jnp.array(expected["v"])}
    kinds["score"] = jnp.array(expected["score_cond"])
    # EDM's residual from its definition, at noise level 0.6 / 0.8.
    s, sd = 0.75, 0.5
    beta = float(0.1 + 19.9 * t[0])
    kinds["velocity"] = -0.5 * beta * 0.8 * x0 + 0.5 * beta * 0.8**2 / 0.6 * eps
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / np.sqrt(s**2 + sd**2)
    x_t = jnp.array(expected["x_t"])
    kinds["edm"] = (x0 - c_skip * x_t / 0.8) / c_out
    return x_t, t, kinds


def test_every_pair_of_predictions_converts(x64):
    x_t, t, kinds = _conversion_case()
    assert set(kinds) == set(gd.PREDICTIONS)

    @jax.jit
    def table(values):
        return {
            (a, b): gd.convert(values[a], x_t, t, source=a, target=b, process=VP)
            for a, b in itertools.product(kinds, kinds)
        }

    for (_, target), value in table(kinds).items():
        np.testing.assert_allclose(value, kinds[target], rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_losses_agree_under_every_pair(x64, key):
    """One mean, stated in five ways, has one loss under each weighting."""
    x = jax.random.normal(key, (16, 2))

    def predict(kind):
        def network(x_t, t):
            mean = jnp.tanh(x_t) * t[:, None]
            return gd.convert(mean, x_t, t, source="x0", target=kind, process=VP)

        return network

    times, noise = jnp.linspace(0.05, 1.0, 16), jax.random.normal(jax.random.key(1), x.shape)

    @jax.jit
    def losses():
        return {
            (kind, weighting): gd.denoising_score_matching(
                predict(kind),
                key,
                x,
                process=VP,
                prediction=kind,
                weighting=weighting,
                times=times,
                noise=noise,
            )
            for kind in gd.PREDICTIONS
            for weighting in (*gd.PREDICTIONS, "likelihood")
        }

    found = losses()
    for (_, weighting), (value, aux) in found.items():
        np.testing.assert_allclose(value, found["x0", weighting][0], rtol=1e-8)
        weight = gd.loss_weight(weighting, aux["time"], VP)
        np.testing.assert_allclose(value, weight * aux["x0_error"], rtol=1e-8)
        assert value.shape == (16,)
    # The definitions: eps error = (alpha / sigma)^2 x0 error, v error = (1 + snr) x0 error.
    value, aux = found["v", "v"]
    snr = np.exp(VP.log_snr(aux["time"]))
    np.testing.assert_allclose(value, (1 + snr) * aux["x0_error"], rtol=1e-8)
    value, aux = found["v", "epsilon"]
    np.testing.assert_allclose(value, snr * aux["x0_error"], rtol=1e-8)


def test_loss_is_the_closed_form_for_given_noise(compiled, key):
    x = jnp.array([[1.0, -2.0], [0.5, 0.25]])
    eps = jnp.array([[0.3, 0.1], [-1.0, 2.0]])
    t = jnp.array([0.5, 2.0])

    def loss(scale, weighting):
        return gd.denoising_score_matching(
            lambda x_t, _: scale * x_t,
            key,
            x,
            process=gd.EDM(),
            weighting=weighting,
            times=t,
            noise=eps,
        )[0]

    error = np.sum((x - 0.5 * (x + t[:, None] * eps)) ** 2, axis=1)
    for weighting, weight in [
        ("x0", 1.0),
        ("epsilon", 1 / t**2),
        ("edm", (t**2 + 0.25) / (0.5 * t) ** 2),
        ("likelihood", 0.5 * 2 * t / t**4),
        ("min_snr", np.minimum(1 / t**2, 5)),
        (gd.min_snr(gd.EDM(), 1.5), np.minimum(1 / t**2, 1.5)),
        (lambda t: 3 * t, 3 * t),
    ]:
        value = compiled(lambda s, w=weighting: loss(s, w))(0.5)
        np.testing.assert_allclose(value, weight * error, rtol=1e-5)
    slope = jax.grad(lambda s: loss(s, "x0").sum())(0.5)
    x_t = x + t[:, None] * eps
    np.testing.assert_allclose(slope, np.sum(-2 * (x - 0.5 * x_t) * x_t), rtol=1e-5)


def test_logit_normal_times(key):
    """log(t / (1 - t)) is normal; for the straight path these are EDM's times."""
    process = gd.RectifiedFlow(t_min=1e-6, t_max=1 - 1e-6)
    for spread in (True, False):
        t = gd.logit_normal_times(process, mean=0.4, std=0.8, spread=spread)(key, 20_000)
        logit = np.log(t) - np.log1p(-np.asarray(t))
        atol = 1e-3 if spread else 0.02
        found = np.quantile(logit, [0.16, 0.5, 0.84])
        np.testing.assert_allclose(found, 0.4 + 0.8 * np.array([-0.9945, 0, 0.9945]), atol=atol)
        edm = gd.edm_times(process, mean=0.4, std=0.8, spread=spread)(key, 20_000)
        np.testing.assert_allclose(t, edm, rtol=2e-5)
    narrow = gd.logit_normal_times(gd.RectifiedFlow(t_min=0.3, t_max=0.6), std=5.0)(key, 100)
    assert narrow.min() >= np.float32(0.3)
    assert narrow.max() <= np.float32(0.6)


def test_dsm_identities(x64):
    """Expected losses of D = c x for Gaussian data; the minimiser is the exact denoiser."""
    data = reference("dsm_identities")
    std, sigma = data["inputs"]["data_std"], data["inputs"]["sigma"]
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    x, eps = (g.ravel()[:, None] for g in np.meshgrid(std * nodes, nodes, indexing="ij"))
    mass = np.outer(weights, weights).ravel()
    t = jnp.full(x.shape[0], sigma)

    @jax.jit
    def losses(c, x, eps):
        return [
            gd.denoising_score_matching(
                lambda x_t, _: c * x_t,
                jax.random.key(0),
                x,
                process=gd.EDM(),
                times=t,
                noise=eps,
                weighting=w,
            )[0]
            for w in ("x0", "score")
        ]

    for i, c in enumerate(data["inputs"]["c_values"]):
        denoise, dsm = losses(c, jnp.array(x), jnp.array(eps))
        np.testing.assert_allclose(mass @ denoise, data["expected"]["denoiser_loss"][i], rtol=1e-11)
        np.testing.assert_allclose(mass @ dsm, data["expected"]["dsm_loss"][i], rtol=1e-11)
    exact = gd.mixture_denoiser(
        gd.GaussianMixture(jnp.ones(1), jnp.zeros((1, 1)), jnp.full((1, 1, 1), std**2)),
        process=gd.EDM(),
    )
    optimum = exact(jnp.ones((1, 1)), t[:1])[0, 0]
    np.testing.assert_allclose(optimum, data["expected"]["optimal_c"], rtol=1e-11)


def test_simple_loss_has_the_exact_noise_as_optimum(key):
    """L_simple over functions of x_t is least at E[eps | x_t]: any disturbance adds its square."""
    mixture = Mixture([0.4, 0.6], [[-1.0], [0.5]], [[[0.04]], [[0.25]]])
    pure = gd.GaussianMixture(*(jnp.float32(v) for v in vars(mixture).values()))
    exact = gd.mixture_denoiser(pure, process=VP)
    keys = jax.random.split(key, 3)
    which = jax.random.bernoulli(keys[0], 0.6, (60_000,)).astype(int)
    std = jnp.sqrt(pure.covariances[which, 0])
    x = pure.means[which] + std * jax.random.normal(keys[1], (60_000, 1))

    def predict(disturb):
        def epsilon(x_t, t):
            best = gd.convert(exact(x_t, t), x_t, t, source="x0", target="epsilon", process=VP)
            return best + disturb * jnp.sin(3 * x_t)

        return epsilon

    @jax.jit
    def mean_loss(disturb):
        loss, _ = gd.denoising_score_matching(
            predict(disturb), keys[2], x, process=VP, prediction="epsilon"
        )
        return loss.mean()

    value, slope = jax.value_and_grad(mean_loss)(0.0)
    assert abs(slope) < 0.01
    assert mean_loss(0.2) > value + 0.01
    assert mean_loss(-0.2) > value + 0.01


def test_edm_preconditioning(x64):
    data = reference("edm_preconditioning")
    sigma, expected = jnp.array(data["inputs"]["sigma"]), data["expected"]
    seen = {}

    def network(x, c_noise):
        seen["x"], seen["c_noise"] = x, c_noise
        return jnp.full_like(x, 3.0)

    x = jnp.full((7, 1), 2.0)
    denoised = gd.denoiser(network, process=gd.EDM(), prediction="edm")(x, sigma)
    c_skip, c_out = np.array(expected["c_skip"]), np.array(expected["c_out"])
    np.testing.assert_allclose(denoised[:, 0], 2 * c_skip + 3 * c_out, rtol=1e-10)
    np.testing.assert_allclose(seen["x"][:, 0], 2 * np.array(expected["c_in"]), rtol=1e-11)
    np.testing.assert_allclose(seen["c_noise"], expected["c_noise"], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(
        gd.loss_weight("edm", sigma, gd.EDM()), expected["loss_weight"], rtol=1e-11
    )
    with jax.numpy_rank_promotion("allow"):
        quantiles = gd.edm_times(gd.EDM(), spread=False)(jax.random.key(1), 40_000)
    np.testing.assert_allclose(
        np.quantile(quantiles, [0.25, 0.5, 0.75]), expected["sigma_quantiles"][1:4], rtol=0.03
    )


@pytest.mark.parametrize("prediction", gd.PREDICTIONS)
def test_denoisers_are_finite_at_both_ends(prediction):
    for process in (gd.EDM(), VP, gd.Cosine()):
        denoise = gd.denoiser(
            lambda x, t: 0.1 * x + 0 * t[:, None], process=process, prediction=prediction
        )
        t = jnp.array([0.0, process.t_min, process.t_max])
        value, grad = jax.jit(
            jax.value_and_grad(lambda x, t, f=denoise: f(x, t).sum(), argnums=(0, 1))
        )(jnp.ones((3, 2)), t)
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(g)) for g in grad)


def test_times(key):
    u = gd.low_discrepancy(key, 10)
    np.testing.assert_allclose(np.diff(np.sort(u)), 0.1, atol=1e-6)
    assert u.min() >= 0
    assert u.max() < 1
    first = jax.vmap(lambda k: gd.low_discrepancy(k, 4)[1])(jax.random.split(key, 4000))
    np.testing.assert_allclose(np.quantile(first, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)
    t = gd.uniform_times(gd.EDM())(key, 50)
    assert t.min() >= 0.002
    assert t.max() <= 80
    np.testing.assert_allclose(t.mean(), 40, rtol=0.03)
    steps = gd.discrete_times(8)(key, 8)
    np.testing.assert_allclose(np.sort(steps), np.arange(1, 9) / 8, atol=1e-6)


def test_spread_times_lower_the_variance(key):
    """Mean of 32 uniform times: standard deviation 1 / (32 sqrt 12) against 1 / sqrt(32 * 12)."""

    @jax.jit
    def deviations(keys):
        return [
            jax.vmap(lambda k, f=f: f(k, 32).mean())(keys).std()
            for f in (gd.uniform_times(VP), gd.uniform_times(VP, spread=False))
        ]

    spread, free = deviations(jax.random.split(key, 2000))
    np.testing.assert_allclose(spread, 1 / (32 * np.sqrt(12)), rtol=0.05)
    np.testing.assert_allclose(free, 1 / np.sqrt(12 * 32), rtol=0.05)


def test_bfloat16_network_gives_float32_losses(key):
    def network(x, t):
        return x.astype(jnp.bfloat16) * jnp.bfloat16(0.5)

    loss, aux = gd.denoising_score_matching(
        network, key, jnp.ones((4, 3)), process=VP, prediction="epsilon"
    )
    assert loss.dtype == jnp.float32
    assert aux["x0_error"].dtype == jnp.float32
    assert np.all(np.isfinite(loss))


@pytest.mark.parametrize(
    "process", [gd.Cosine(), gd.RectifiedFlow(), VP, gd.EDM(), gd.VarianceExploding()]
)
def test_the_ends_are_times_of_the_process(process, key):
    """Without jit: 0.999 rounds up in float32, and is t_max all the same. Losses are finite."""
    x = jnp.ones((3, 2))
    t = jnp.array([0.0, process.t_min, process.t_max])
    # Every prediction and every weighting once: the pairs agree (above).
    pairs = [(kind, kind) for kind in gd.PREDICTIONS] + [("epsilon", "likelihood")]
    for prediction, weighting in pairs:

        def loss(a, prediction=prediction, weighting=weighting):
            options = {"prediction": prediction, "weighting": weighting, "times": t}
            return gd.denoising_score_matching(
                lambda x, t: a * x, key, x, process=process, **options
            )[0].sum()

        assert all(np.isfinite(v) for v in jax.value_and_grad(loss)(0.5))


def test_bad_input(unchecked, key):
    x = jnp.ones((4, 3))

    def same(x, t):
        return x

    match = gd.denoising_score_matching
    with pytest.raises(ValueError, match="times must lie in \\[0, 1"):
        match(same, key, x, process=VP, times=jnp.array([0.1, 0.2, 0.3, 1.5]))
    with pytest.raises(ValueError, match="denoiser must keep the shape"):
        match(lambda x, t: x[:, :1], key, x, process=VP)
    with pytest.raises(ValueError, match="did you mean 'epsilon'"):
        match(same, key, x, process=VP, prediction="epsilo")
    with pytest.raises(ValueError, match="weighting must be one of"):
        match(same, key, x, process=VP, weighting="snr")
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        match(same, key, jnp.ones((4, 3), int), process=VP)
    with pytest.raises(ValueError, match="times must have shape"):
        match(same, key, x, process=VP, times=jnp.array([0.1]))
    with pytest.raises(ValueError, match=r"noise must have shape \(4, 3\), got \(1, 3\)"):
        match(same, key, x, process=VP, noise=jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="what weighting returns must have shape"):
        match(same, key, x, process=VP, weighting=lambda t: t[:, None])
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        match(same, key, x, process=VP, weighting="edm", sigma_data=0.0)
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        gd.denoiser(same, process=VP, prediction="edm", sigma_data=0.0)
    with pytest.raises(ValueError, match="target must be one of"):
        gd.convert(x, x, jnp.ones(4), source="x0", target="noise", process=VP)


@pytest.mark.parametrize("process", [gd.RectifiedFlow(), VP, gd.EDM()])
def test_a_flow_matching_velocity_is_a_denoiser_under_any_process(process, compiled):
    """Data N(3, 0.5^2): E[x_0 - eps | u x_0 + (1 - u) eps] and E[x_0 | x_t] in closed form."""
    mean, var = 3.0, 0.25

    def velocity(x, u):
        u = u[:, None]
        gain = (u * var - (1 - u)) / (u**2 * var + (1 - u) ** 2)
        return mean + gain * (x - u * mean)

    def exact(x, t):
        alpha, variance = process.alpha(t)[:, None], process.variance(t)[:, None]
        return mean + alpha * var / (alpha**2 * var + variance) * (x - alpha * mean)

    t = jnp.array([0.0, process.t_min, 0.3, 0.7, process.t_max])
    x = jnp.linspace(-2.0, 2.0, 5)[:, None]
    found = compiled(gd.flow_denoiser(velocity, process=process))(x, t)
    np.testing.assert_allclose(found, exact(x, t), rtol=2e-4, atol=2e-5)


def test_velocity_of_the_straight_path_is_noise_minus_data(compiled):
    """Also at t = 0 and as a network's prediction; with slope 1 / t of the mean's error."""
    process, t = gd.RectifiedFlow(), jnp.array([0.0, 1e-3, 0.5, 0.999])
    x0, eps = jnp.array([[1.0], [-2.0], [0.5], [3.0]]), jnp.array([[0.3], [0.1], [-1.0], [2.0]])
    x_t = x0 + t[:, None] * (eps - x0)
    denoise = gd.denoiser(lambda x, t: eps - x0, process=process, prediction="velocity")
    np.testing.assert_allclose(compiled(denoise)(x_t, t), x0, rtol=1e-5)
    to = {"source": "x0", "target": "velocity", "process": process}
    np.testing.assert_allclose(gd.convert(x0, x_t, t, **to)[1:], (eps - x0)[1:], rtol=1e-3)
    weight = gd.loss_weight("velocity", t[1:], process)
    np.testing.assert_allclose(weight, 1 / t[1:] ** 2, rtol=1e-5)
