import itertools
from functools import partial

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
    x0, eps = (np.array(data["inputs"][k]) for k in ("x0", "eps"))
    # beta_min t + (beta_max - beta_min) t^2 / 2 = -2 log 0.8
    root = np.sqrt(0.1**2 - 4 * 19.9 * np.log(0.8))
    t = np.full(3, (root - 0.1) / 19.9)
    expected = data["expected"]
    kinds = {"x0": x0, "epsilon": eps, "v": np.array(expected["v"])}
    kinds["score"] = np.array(expected["score_cond"])
    # EDM's residual from its definition, at noise level 0.6 / 0.8.
    s, sd = 0.75, 0.5
    beta = float(0.1 + 19.9 * t[0])
    kinds["velocity"] = -0.5 * beta * 0.8 * x0 + 0.5 * beta * 0.8**2 / 0.6 * eps
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / np.sqrt(s**2 + sd**2)
    x_t = np.array(expected["x_t"])
    kinds["edm"] = (x0 - c_skip * x_t / 0.8) / c_out
    return x_t, t, kinds


def test_every_pair_of_predictions_converts(x64):
    x_t, t, kinds = _conversion_case()
    assert set(kinds) == set(gd.PREDICTIONS)

    @jax.jit
    def table(values, x_t, t):
        return {
            (a, b): gd.convert(values[a], x_t, t, source=a, target=b, process=VP)
            for a, b in itertools.product(kinds, kinds)
        }

    for (_, target), value in table(kinds, x_t, t).items():
        np.testing.assert_allclose(value, kinds[target], rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_losses_agree_under_every_pair(x64, key):
    """One mean, stated in five ways, has one loss under each weighting."""
    x, noise = np.random.default_rng(0).normal(size=(2, 16, 2))
    times = np.linspace(0.05, 1.0, 16)

    def predict(kind):
        def network(x_t, t):
            mean = jnp.tanh(x_t) * t[:, None]
            return gd.convert(mean, x_t, t, source="x0", target=kind, process=VP)

        return network

    @jax.jit
    def losses(x, times, noise):
        found = {
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
        weights = {w: gd.loss_weight(w, times, VP) for w in (*gd.PREDICTIONS, "likelihood")}
        return found, weights, VP.log_snr(times)

    found, weights, log_snr = jax.device_get(losses(x, times, noise))
    for (_, weighting), (value, aux) in found.items():
        np.testing.assert_array_equal(aux["time"], times)
        np.testing.assert_allclose(value, found["x0", weighting][0], rtol=1e-8)
        np.testing.assert_allclose(value, weights[weighting] * aux["x0_error"], rtol=1e-8)
        assert value.shape == (16,)
    # The definitions: eps error = (alpha / sigma)^2 x0 error, v error = (1 + snr) x0 error.
    value, aux = found["v", "v"]
    snr = np.exp(log_snr)
    np.testing.assert_allclose(value, (1 + snr) * aux["x0_error"], rtol=1e-8)
    value, aux = found["v", "epsilon"]
    np.testing.assert_allclose(value, snr * aux["x0_error"], rtol=1e-8)


def test_loss_is_the_closed_form_for_given_noise(compiled, key):
    x = np.array([[1.0, -2.0], [0.5, 0.25]], np.float32)
    eps = np.array([[0.3, 0.1], [-1.0, 2.0]], np.float32)
    t = np.array([0.5, 2.0], np.float32)
    error = np.sum((x - 0.5 * (x + t[:, None] * eps)) ** 2, axis=1)
    weightings = [
        ("x0", 1.0),
        ("epsilon", 1 / t**2),
        ("edm", (t**2 + 0.25) / (0.5 * t) ** 2),
        ("likelihood", 0.5 * 2 * t / t**4),
        ("min_snr", np.minimum(1 / t**2, 5)),
        (gd.min_snr(gd.EDM(), 1.5), np.minimum(1 / t**2, 1.5)),
        (lambda t: 3 * t, 3 * t),
    ]

    @compiled
    def losses(scale):
        loss = [
            gd.denoising_score_matching(
                lambda x_t, _: scale * x_t,
                key,
                jnp.asarray(x),
                process=gd.EDM(),
                weighting=weighting,
                times=jnp.asarray(t),
                noise=jnp.asarray(eps),
            )[0]
            for weighting, _ in weightings
        ]
        return loss[0].sum(), loss

    (_, values), slope = jax.value_and_grad(losses, has_aux=True)(0.5)
    for value, (_, weight) in zip(values, weightings, strict=True):
        np.testing.assert_allclose(value, weight * error, rtol=1e-5)
    x_t = x + t[:, None] * eps
    np.testing.assert_allclose(slope, np.sum(-2 * (x - 0.5 * x_t) * x_t), rtol=1e-5)


def test_dsm_identities(x64):
    """Expected losses of D = c x for Gaussian data; the minimiser is the exact denoiser."""
    data = reference("dsm_identities")
    std, sigma = data["inputs"]["data_std"], data["inputs"]["sigma"]
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    x, eps = (g.ravel()[:, None] for g in np.meshgrid(std * nodes, nodes, indexing="ij"))
    mass = np.outer(weights, weights).ravel()
    law = gd.GaussianMixture(
        *(jnp.asarray(a) for a in (np.ones(1), np.zeros((1, 1)), np.full((1, 1, 1), std**2)))
    )

    @jax.jit
    def losses(c, x, eps):
        t = jnp.full(x.shape[0], sigma)
        exact = gd.mixture_denoiser(law, process=gd.EDM())(jnp.ones((1, 1)), t[:1])[0, 0]
        return exact, [
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
        optimum, (denoise, dsm) = losses(c, x, eps)
        np.testing.assert_allclose(mass @ denoise, data["expected"]["denoiser_loss"][i], rtol=1e-11)
        np.testing.assert_allclose(mass @ dsm, data["expected"]["dsm_loss"][i], rtol=1e-11)
    np.testing.assert_allclose(optimum, data["expected"]["optimal_c"], rtol=1e-11)


def test_simple_loss_has_the_exact_noise_as_optimum(key):
    """L_simple over functions of x_t is least at E[eps | x_t]: any disturbance adds its square."""
    mixture = Mixture([0.4, 0.6], [[-1.0], [0.5]], [[[0.04]], [[0.25]]])
    pure = gd.GaussianMixture(*(jnp.float32(v) for v in vars(mixture).values()))
    exact = gd.mixture_denoiser(pure, process=VP)
    rng = np.random.default_rng(0)
    which = rng.choice(2, size=60_000, p=[0.4, 0.6])
    std = np.sqrt(mixture.covariances[which, 0])
    x = np.float32(mixture.means[which] + std * rng.normal(size=(60_000, 1)))

    def predict(disturb):
        def epsilon(x_t, t):
            best = gd.convert(exact(x_t, t), x_t, t, source="x0", target="epsilon", process=VP)
            return best + disturb * jnp.sin(3 * x_t)

        return epsilon

    @jax.jit
    @jax.value_and_grad
    def mean_loss(disturb):
        loss, _ = gd.denoising_score_matching(
            predict(disturb), key, jnp.asarray(x), process=VP, prediction="epsilon"
        )
        return loss.mean()

    value, slope = mean_loss(0.0)
    assert abs(slope) < 0.01
    assert mean_loss(0.2)[0] > value + 0.01
    assert mean_loss(-0.2)[0] > value + 0.01


def test_edm_preconditioning(x64):
    data = reference("edm_preconditioning")
    sigma, expected = np.array(data["inputs"]["sigma"]), data["expected"]

    @jax.jit
    def run(x, sigma):
        seen = {}

        def network(x, c_noise):
            seen["x"], seen["c_noise"] = x, c_noise
            return jnp.full_like(x, 3.0)

        denoised = gd.denoiser(network, process=gd.EDM(), prediction="edm")(x, sigma)
        with jax.numpy_rank_promotion("allow"):
            times = gd.edm_times(gd.EDM(), spread=False)(jax.random.key(1), 40_000)
        return denoised, seen, gd.loss_weight("edm", sigma, gd.EDM()), times

    denoised, seen, weight, times = run(np.full((7, 1), 2.0), sigma)
    c_skip, c_out = np.array(expected["c_skip"]), np.array(expected["c_out"])
    np.testing.assert_allclose(denoised[:, 0], 2 * c_skip + 3 * c_out, rtol=1e-10)
    np.testing.assert_allclose(seen["x"][:, 0], 2 * np.array(expected["c_in"]), rtol=1e-11)
    np.testing.assert_allclose(seen["c_noise"], expected["c_noise"], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(weight, expected["loss_weight"], rtol=1e-11)
    np.testing.assert_allclose(
        np.quantile(times, [0.25, 0.5, 0.75]), expected["sigma_quantiles"][1:4], rtol=0.03
    )


@pytest.mark.parametrize("prediction", gd.PREDICTIONS)
def test_denoisers_are_finite_at_both_ends(prediction):
    processes = (gd.EDM(), VP, gd.Cosine())

    @jax.jit
    @jax.value_and_grad
    def run(points):
        return sum(
            gd.denoiser(
                lambda x, t: 0.1 * x + 0 * t[:, None], process=process, prediction=prediction
            )(*point).sum()
            for process, point in zip(processes, points, strict=True)
        )

    points = [
        (np.ones((3, 2), np.float32), np.array([0.0, p.t_min, p.t_max], np.float32))
        for p in processes
    ]
    value, grad = run(points)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grad))


def test_bfloat16_network_gives_float32_losses(key):
    def network(x, t):
        return x.astype(jnp.bfloat16) * jnp.bfloat16(0.5)

    run = partial(gd.denoising_score_matching, network, process=VP, prediction="epsilon")
    loss, aux = jax.jit(run)(key, np.ones((4, 3), np.float32))
    assert loss.dtype == jnp.float32
    assert aux["x0_error"].dtype == jnp.float32
    assert np.all(np.isfinite(loss))


@pytest.mark.parametrize(
    "process", [gd.Cosine(), gd.RectifiedFlow(), VP, gd.EDM(), gd.VarianceExploding()]
)
def test_the_ends_are_times_of_the_process(process, key):
    """Without jit: 0.999 rounds up in float32, and is t_max all the same. Losses are finite."""
    x = jnp.asarray(np.ones((3, 2), np.float32))
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

    @compiled
    def run(x, t):
        alpha, variance = process.alpha(t)[:, None], process.variance(t)[:, None]
        exact = mean + alpha * var / (alpha**2 * var + variance) * (x - alpha * mean)
        return gd.flow_denoiser(velocity, process=process)(x, t), exact

    t = jnp.array([0.0, process.t_min, 0.3, 0.7, process.t_max])
    found, exact = run(jnp.asarray(np.linspace(-2.0, 2.0, 5, dtype=np.float32)[:, None]), t)
    np.testing.assert_allclose(found, exact, rtol=2e-4, atol=2e-5)


def test_velocity_of_the_straight_path_is_noise_minus_data(compiled):
    """Also at t = 0 and as a network's prediction; with slope 1 / t of the mean's error."""
    process, t = gd.RectifiedFlow(), np.float32([0.0, 1e-3, 0.5, 0.999])
    x0 = np.float32([[1.0], [-2.0], [0.5], [3.0]])
    eps = np.float32([[0.3], [0.1], [-1.0], [2.0]])
    x_t = x0 + t[:, None] * (eps - x0)
    to = {"source": "x0", "target": "velocity", "process": process}

    @compiled
    def run(x0, eps, x_t, t):
        denoise = gd.denoiser(lambda x, t: eps - x0, process=process, prediction="velocity")
        weight = gd.loss_weight("velocity", t, process)
        return denoise(x_t, t), gd.convert(x0, x_t, t, **to), weight

    denoised, velocity, weight = run(*map(jnp.asarray, (x0, eps, x_t, t)))
    np.testing.assert_allclose(denoised, x0, rtol=1e-5)
    np.testing.assert_allclose(velocity[1:], (eps - x0)[1:], rtol=1e-3)
    np.testing.assert_allclose(weight[1:], 1 / t[1:] ** 2, rtol=1e-5)
