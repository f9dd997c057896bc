import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd
from tests.diffusion.oracles import reference

PROCESSES = {
    "ve": gd.VarianceExploding(),
    "vp": gd.VariancePreserving(),
    "subvp": gd.SubVariancePreserving(),
    "cosine": gd.Cosine(),
    "edm": gd.EDM(),
    "rectified": gd.RectifiedFlow(),
}


@pytest.fixture(params=PROCESSES)
def process(request):
    return PROCESSES[request.param]


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_marginals_drift_and_diffusion_are_song_et_als(name, x64, compiled):
    data = reference("sde_marginals")
    expected, process = data["expected"][name], PROCESSES[name]
    t = jnp.array(data["inputs"]["t"])
    for key, method in [
        ("mean_coeff", process.alpha),
        ("std", process.sigma),
        ("drift_coeff", process.drift),
        ("g", process.diffusion),
    ]:
        np.testing.assert_allclose(compiled(method)(t), expected[key], rtol=1e-9, atol=1e-12)


def test_log_snr_inverse_and_monotone(process, x64):
    t = jnp.linspace(process.t_min, process.t_max, 101)

    @jax.jit
    def values(t):
        log_snr = process.log_snr(t)
        back = process.time_of_log_snr(log_snr)
        again = process.time_of_noise_ratio(process.noise_ratio(t))
        return log_snr, back, again, process.alpha(t), process.sigma(t)

    log_snr, back, again, alpha, sigma = values(t)
    np.testing.assert_allclose(log_snr, 2 * np.log(alpha) - 2 * np.log(sigma), rtol=1e-9)
    assert np.all(np.diff(log_snr) < 0)
    np.testing.assert_allclose(back, t, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(again, t, rtol=1e-9, atol=1e-13)


def test_inverse_in_float32(process):
    t = jnp.linspace(process.t_min, process.t_max, 33)
    back = jax.jit(lambda t: process.time_of_log_snr(process.log_snr(t)))(t)
    np.testing.assert_allclose(back, t, rtol=2e-4)


def test_ends_are_finite_in_value_and_gradient(process):
    names = [
        "alpha",
        "sigma",
        "variance",
        "log_snr",
        "noise_ratio",
        "drift",
        "diffusion",
        "diffusion_squared",
    ]

    @jax.jit
    def ends(t):
        methods = [getattr(process, name) for name in names]
        return [jax.vmap(jax.value_and_grad(method))(t) for method in methods]

    found = ends(jnp.array([0.0, process.t_min, process.t_max]))
    for name, pair in zip(names, found, strict=True):
        assert np.all(np.isfinite(pair)), (name, pair)
    np.testing.assert_allclose(found[0][0][0], 1.0, atol=1e-6)
    assert found[1][0][0] == 0


def test_small_times_keep_their_digits():
    t = jnp.float32(1e-5)
    exact = {"vp": 0.1e-5 + 9.95e-10, "ve": 1e-4 * np.expm1(2e-5 * np.log(5000.0))}
    np.testing.assert_allclose(PROCESSES["vp"].variance(t), -np.expm1(-exact["vp"]), rtol=1e-5)
    np.testing.assert_allclose(PROCESSES["ve"].variance(t), exact["ve"], rtol=1e-5)
    start = np.pi / 2
    angle = (1e-5 + 0.008) / 1.008 * start
    zero = 0.008 / 1.008 * start
    cosine = np.sin(angle - zero) * np.sin(angle + zero) / np.cos(zero) ** 2
    np.testing.assert_allclose(PROCESSES["cosine"].variance(t), cosine, rtol=1e-3)


def test_processes_are_pytrees_and_differentiable():
    def end(process):
        return process.log_snr(0.5)

    process = gd.VariancePreserving(0.2, 10.0)
    grad = jax.grad(end)(jax.tree.map(jnp.float32, process))
    assert isinstance(grad, gd.VariancePreserving)
    step = 1e-3
    numeric = (end(gd.VariancePreserving(0.2, 10.0 + step)) - end(process)) / step
    np.testing.assert_allclose(grad.beta_max, numeric, rtol=1e-2)
    np.testing.assert_allclose(jax.jit(end)(process), end(process), rtol=1e-6)


def test_ddpm_coefficients(x64):
    data = reference("ddpm_coefficients")
    at = jnp.array(data["inputs"]["indices"])
    num = data["inputs"]["T"]
    expected = data["expected"]["linear"]
    betas = gd.ddpm_betas(gd.VariancePreserving(0.1, 20.0), num, rule="euler")
    process = gd.discrete(betas)
    t, s = (at + 1) / num, at / num
    moments = gd.posterior(process, t, s)
    ab = process.alpha(t) ** 2
    for key, value in [
        ("beta", betas[at]),
        ("alpha_bar", ab),
        ("post_var", moments.variance),
        ("post_mean_coef_x0", moments.x0_coef),
        ("post_mean_coef_xt", moments.xt_coef),
        ("sqrt_recip_ab", 1 / process.alpha(t)),
        ("sqrt_recipm1_ab", process.noise_ratio(t)),
        ("snr", jnp.exp(process.log_snr(t))),
    ]:
        np.testing.assert_allclose(value, expected[key], rtol=1e-10, atol=1e-12, err_msg=key)
    np.testing.assert_allclose(moments.forward_variance, expected["beta"], rtol=1e-10)
    # eq. 12: the KL's weight on |eps - eps_hat|^2, from the posterior's weight on x_0.
    weight = 0.5 * moments.x0_coef**2 * process.noise_ratio(t) ** 2
    np.testing.assert_allclose(
        weight[1:] / moments.variance[1:], expected["vlb_weight_sigma2_beta_tilde"][1:], rtol=1e-9
    )
    np.testing.assert_allclose(
        weight / moments.forward_variance, expected["vlb_weight_sigma2_beta"], rtol=1e-9
    )
    np.testing.assert_allclose(process.time_of_log_snr(process.log_snr(t)), t, rtol=1e-9)
    cosine = data["expected"]["cosine"]
    betas = gd.ddpm_betas(gd.Cosine(), num)
    np.testing.assert_allclose(betas[at], cosine["beta"], rtol=1e-9)
    assert int((betas >= 0.999).sum()) == cosine["n_clipped"]
    np.testing.assert_allclose(gd.discrete(betas).alpha(t) ** 2, cosine["alpha_bar"], rtol=1e-8)


def test_posterior_is_bayes_rule(process, x64):
    t, s = jnp.array([0.6, 0.9]) * process.t_max, jnp.array([0.3, 0.8]) * process.t_max
    moments, at, as_, st, ss = jax.jit(
        lambda t, s: (
            gd.posterior(process, t, s),
            *(process.alpha(u) for u in (t, s)),
            *(process.sigma(u) for u in (t, s)),
        )
    )(t, s)
    moments, (at, as_, st, ss) = jax.tree.map(np.asarray, (moments, (at, as_, st, ss)))
    ratio = at / as_
    forward = st**2 - ratio**2 * ss**2
    precision = 1 / ss**2 + ratio**2 / forward
    np.testing.assert_allclose(moments.variance, 1 / precision, rtol=1e-9)
    np.testing.assert_allclose(moments.xt_coef, ratio / forward / precision, rtol=1e-9)
    np.testing.assert_allclose(moments.x0_coef, as_ / ss**2 / precision, rtol=1e-9)
    np.testing.assert_allclose(moments.forward_variance, forward, rtol=1e-9)


def test_edm_grid(x64):
    expected = reference("edm_preconditioning")["expected"]
    for num in (18, 5):
        grid = gd.time_grid(gd.EDM(), num)
        np.testing.assert_allclose(grid, expected[f"sigma_steps_{num}"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("spacing", ["uniform", "log_snr", "edm"])
def test_grids_decrease_within_the_range(process, spacing):
    grids = jax.jit(
        lambda: [gd.time_grid(process, 12, spacing=spacing, to_zero=z) for z in (True, False)]
    )
    for grid, end in zip(grids(), (0.0, process.t_min), strict=True):
        assert grid.shape == (13,)
        assert grid[0] == np.float32(process.t_max)
        assert grid[-1] == np.float32(end)
        assert np.all(np.diff(grid) < 0)
    if spacing == "log_snr":
        steps = np.diff(jax.jit(process.log_snr)(grid))
        np.testing.assert_allclose(steps, steps.mean(), rtol=2e-3)


def test_bad_input(unchecked):
    with pytest.raises(ValueError, match="sigma_min must be positive"):
        gd.VarianceExploding(sigma_min=0.0)
    with pytest.raises(ValueError, match="sigma_max must be at least"):
        gd.VarianceExploding(sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="beta_min must be positive"):
        gd.VariancePreserving(beta_min=-1.0)
    with pytest.raises(ValueError, match="t_min must be positive"):
        gd.EDM(t_min=0.0)
    with pytest.raises(ValueError, match="t_min must lie in"):
        gd.EDM(t_min=2.0, t_max=1.0)
    with pytest.raises(ValueError, match="did you mean 'log_snr'"):
        gd.time_grid(gd.EDM(), 4, spacing="log_snl")
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        gd.time_grid(gd.EDM(), 0)
    with pytest.raises(ValueError, match="rule must be one of"):
        gd.ddpm_betas(gd.VariancePreserving(), 10, rule="ratio")
    with pytest.raises(ValueError, match="betas must lie in"):
        gd.discrete(jnp.array([0.1, 1.5]))
    with pytest.raises(ValueError, match="betas must be below 1"):
        gd.discrete(jnp.array([0.1, 1.0]))
    with pytest.raises(ValueError, match="betas must hold at least one"):
        gd.discrete(jnp.zeros(0))
    for process in (gd.EDM(), gd.VarianceExploding(), gd.SubVariancePreserving()):
        with pytest.raises(ValueError, match="process must preserve the variance"):
            gd.ddpm_betas(process, 10)
    with pytest.raises(ValueError, match="sigma_max - sigma_min must be positive"):
        gd.VarianceExploding(sigma_min=1.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="t_max must lie in"):
        gd.Cosine(t_max=1.5)
    with pytest.raises(ValueError, match="1 - t_max must be positive"):
        gd.RectifiedFlow(t_max=1.0)


# alpha'(0) and (sigma^2)'(0), each from its process' definition by hand.
COSINE = 0.5 * np.pi / 1.008 * np.tan(0.004 * np.pi / 1.008)
SLOPES_AT_0 = {
    "ve": (0.0, 2e-4 * np.log(5000.0)),
    "vp": (-0.05, 0.1),
    "subvp": (-0.05, 0.0),
    "cosine": (-COSINE, 2 * COSINE),
    "edm": (0.0, 0.0),
    "rectified": (-1.0, 0.0),
}


@pytest.mark.parametrize("wide", [False, True])
def test_ends_of_time_are_what_the_definition_says(wide):
    def at_0(process, zero):
        slopes = [jax.jvp(f, (zero,), (zero + 1,)) for f in (process.alpha, process.variance)]
        return slopes, process.sigma(zero), process.time_of_noise_ratio(zero)

    with jax.enable_x64(wide):
        zero = jnp.zeros((), float)
        found = jax.jit(lambda t: {name: at_0(p, t) for name, p in PROCESSES.items()})(zero)
        # The variance of Cosine was a difference of two angles, below 0 for some offsets.
        sigma = jax.jit(jax.vmap(lambda s: gd.Cosine(s).sigma(zero)))(jnp.linspace(1e-3, 0.1, 300))
        # A float32 time keeps its dtype where 64-bit types are on.
        kept = {n: p.log_snr(jnp.float32(0.3)).dtype for n, p in PROCESSES.items()}
        late = jax.jit(gd.VariancePreserving(20.0, 1e-4).time_of_log_snr)(
            gd.VariancePreserving(20.0, 1e-4).log_snr(zero + 1)
        )
    for name, (slopes, sigma_0, time) in jax.tree.map(np.asarray, found).items():
        (alpha, alpha_slope), (variance, variance_slope) = slopes
        assert (variance, sigma_0) == (0, 0), name
        np.testing.assert_allclose(alpha, 1, rtol=1e-15 if wide else 1e-7)
        assert 0 <= time < 1e-18
        expected = SLOPES_AT_0[name]
        np.testing.assert_allclose((alpha_slope, variance_slope), expected, rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(np.asarray(sigma), 0)
    np.testing.assert_allclose(np.asarray(late), 1.0, rtol=1e-3)
    assert set(kept.values()) == {jnp.dtype(jnp.float32)}


def test_debug_nans_raises_nowhere_at_time_0():
    with jax.debug_nans(True):
        for process in (PROCESSES["vp"], PROCESSES["cosine"]):
            assert process.sigma(0.0) == 0
            assert jax.grad(process.sigma)(0.0) == 0
            move = gd.Move(0.5, 0.0, process, jax.random.key(0), 0, jnp.ones((1, 1)), 0.9)
            x, _ = gd.ddim_step(lambda x, t: 0 * x, jnp.ones((1, 1)), move, eta=1.0)
            np.testing.assert_array_equal(x, 0)
