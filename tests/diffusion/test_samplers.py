from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genjax import diffusion as gd
from tests.diffusion.oracles import fixture_mixture, flow_of_vp, reference
from tests.diffusion.test_mixture import pure_mixture

STEPS = {
    "euler_maruyama": gd.euler_maruyama_step,
    "ancestral": gd.ancestral_step,
    "ddpm": gd.ddpm_step,
    "ddim": gd.ddim_step,
    "ddim_eta": partial(gd.ddim_step, eta=0.5),
    "euler": gd.euler_step,
    "heun": gd.heun_step,
    "heun_churn": partial(gd.heun_step, churn=0.2, churn_min=0.05, churn_max=50.0),
    "dpm_solver": gd.dpm_solver_step,
    "dpm_solver_3": partial(gd.dpm_solver_step, order=3),
    "dpm_solver_sde": partial(gd.dpm_solver_step, eta=1.0),
    "unipc": gd.unipc_step,
    "predictor_corrector": partial(gd.predictor_corrector_step, snr=0.16),
}


def move_with_noise(noise, t, s, process, *before):
    """A move whose normals are all `noise`."""

    class Given(gd.Move):
        def normal(self, n, like):
            return noise

    before = before or (jnp.zeros_like(noise), t)
    return Given(t, s, process, jax.random.key(0), 0, *before)


def replay(step, denoise, process, times, noise):
    """Run the steps with given noises: noise[0] is the start, noise[k + 1] that of step k."""

    def body(carry, now):
        x, before = carry
        t, s, z = now

        def at(x, t):
            return denoise(x, jnp.full(x.shape[:1], t))

        moved, denoised = step(at, x, move_with_noise(z, t, s, process, *before))
        return (moved, (denoised, t, *before[:2])), moved

    start = process.sigma(times[0]) * noise[0]
    carry = (start, 2 * (jnp.zeros_like(start), times[0]))
    _, states = jax.lax.scan(body, carry, (times[:-1], times[1:], noise[1:]))
    return jnp.concatenate([start[None], states])


def test_algorithms_3_and_4_of_the_notes(x64):
    data = reference("ve_samplers")
    times = jnp.array(data["inputs"]["sigmas"][::-1])
    noise = jnp.array(data["inputs"]["noise"])
    denoise = gd.mixture_denoiser(pure_mixture(), process=gd.EDM(t_max=10.0))

    @jax.jit
    def run(noise):
        return [
            replay(step, denoise, gd.EDM(t_max=10.0), times, noise)
            for step in (gd.euler_maruyama_step, gd.ancestral_step)
        ]

    euler, ancestral = run(noise)
    expected = data["expected"]
    np.testing.assert_allclose(euler[:-1], expected["em_trajectory"][:-1], rtol=1e-10)
    np.testing.assert_allclose(euler[-1], expected["em_denoise_last"], rtol=1e-9)
    np.testing.assert_allclose(ancestral, expected["ancestral_trajectory"], rtol=1e-9)


def test_ddpm_and_ddim_on_given_noise(x64):
    data = reference("ddpm_ancestral_trajectory")
    process = gd.discrete(jnp.array(data["inputs"]["beta"]))

    @jax.jit
    def run(process, noise, times):
        # The reference starts from N(0, I), the sampler from N(0, sigma_T^2 I).
        noise = noise.at[0].divide(process.sigma(1.0))
        denoise = gd.mixture_denoiser(pure_mixture(), process=process)
        steps = (gd.ancestral_step, gd.ddpm_step, partial(gd.ddim_step, eta=1.0))
        return [replay(step, denoise, process, times, noise) for step in steps]

    times = np.linspace(1.0, 0.0, process.num_steps + 1)
    ancestral, ddpm, ddim = run(process, np.array(data["inputs"]["noise"]), times)
    small = data["expected"]["trajectory_beta_tilde"]
    np.testing.assert_allclose(ancestral, small, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ddim, small, rtol=1e-9, atol=1e-12)
    large = data["expected"]["trajectory_beta"]
    np.testing.assert_allclose(ddpm, large, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "spacing", "order", "few"),
    [
        ("euler", "uniform", 1, 200),
        ("ddim", "log_snr", 1, 32),
        ("heun", "log_snr", 2, 32),
        ("dpm_solver", "log_snr", 2, 32),
        ("dpm_solver_3", "log_snr", 3, 64),
        ("unipc", "log_snr", 3, 64),
    ],
)
def test_deterministic_samplers_converge_at_their_order(name, spacing, order, few, x64):
    """Against the flow of the exact score by DOP853, from the same start."""
    process = gd.VariancePreserving(t_min=0.02)
    start = np.random.default_rng(1).normal(size=(32, 2))
    expected = flow_of_vp(fixture_mixture(), start, 1.0, 0.02)
    denoise = gd.mixture_denoiser(pure_mixture(), process=process)

    @jax.jit
    def run(start):
        grids = [gd.time_grid(process, n, spacing=spacing, to_zero=False) for n in (few, 2 * few)]
        draw = partial(gd.sample, denoise, jax.random.key(0), (32, 2), x_init=start)
        return [draw(process=process, times=times, step=STEPS[name]) for times in grids]

    errors = [float(np.sqrt(np.mean((x - expected) ** 2))) for x in run(start)]
    assert errors[1] < 0.05
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.3)


def test_adaptive_flow_ends_where_the_flow_does(x64):
    process = gd.VariancePreserving(t_min=0.001)
    start = np.random.default_rng(1).normal(size=(6, 2))
    end = flow_of_vp(fixture_mixture(), start, 1.0, 0.001)
    denoise = gd.mixture_denoiser(pure_mixture(), process=process)
    options = {"process": process, "rtol": 1e-8, "atol": 1e-8}
    solve = partial(gd.sample_adaptive, denoise, jax.random.key(0), (6, 2), **options)
    run = jax.jit(lambda start, end: (solve(x_init=start), denoise(end, jnp.full(6, 0.001))))
    x, expected = run(start, end)
    np.testing.assert_allclose(x, expected, atol=1e-5)


# Held to closed forms on given noise, or to their order, by the tests above.
HELD = ["euler_maruyama", "ancestral", "ddpm", "euler", "heun", "dpm_solver", "dpm_solver_3"]
HELD += ["ddim", "ddim_eta", "unipc"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in HELD else ()) for n in STEPS]
)
def test_laws_of_the_samplers(name):
    """Mean and covariance of the mixture, within Monte Carlo error and the method's own bias."""
    num, oracle = 4096, fixture_mixture()
    process = gd.EDM(t_max=20.0) if name != "ddpm" else gd.VariancePreserving(t_min=1e-3)
    # The first-order methods have a bias of order 1 / steps.
    steps = {"ddpm": 400, "euler_maruyama": 400, "ancestral": 400, "ddim_eta": 200}.get(name, 100)
    spacing = "edm"
    if name == "euler":
        steps, process, spacing = 500, gd.VariancePreserving(t_min=1e-3), "uniform"
    mixture = gd.GaussianMixture(*(jnp.float32(v) for v in vars(oracle).values()))
    denoise = gd.mixture_denoiser(mixture, process=process)

    @jax.jit
    def draw(key):
        times = gd.time_grid(process, steps, spacing=spacing)
        options = {"process": process, "times": times, "step": STEPS[name]}
        return gd.sample(denoise, key, (num, 2), **options)

    x = np.asarray(draw(jax.random.key(3)))
    error = x.mean(0) - oracle.mean
    scale = np.sqrt(np.diag(oracle.covariance) / num)
    assert np.all(np.abs(error) < 4 * scale), error / scale
    centred = (x - oracle.mean)[:, :, None] * (x - oracle.mean)[:, None, :]
    error = centred.mean(0) - oracle.covariance
    scale = centred.std(0) / np.sqrt(num)
    assert np.all(np.abs(error) < 4 * scale + 0.005), error / scale
    # Not only the moments: the log density under the model has the right mean.
    log_prob, _ = oracle.log_prob_and_score(x)
    rng = np.random.default_rng(0)
    which = rng.choice(3, size=num, p=oracle.weights)
    factors = np.linalg.cholesky(oracle.covariances)[which]
    exact = oracle.means[which] + np.einsum("nij,nj->ni", factors, rng.normal(size=(num, 2)))
    expected, _ = oracle.log_prob_and_score(exact)
    spread = np.sqrt((log_prob.var() + expected.var()) / num)
    assert abs(log_prob.mean() - expected.mean()) < 4 * spread + 0.02


def test_the_start_has_the_process_scale(key):
    """Algorithms 3 and 4 start from N(0, sigma_T^2 I): tested on the draw, which samples hide."""
    processes = (gd.VarianceExploding(0.01, 50.0), gd.EDM(), gd.VariancePreserving())

    @jax.jit
    def run(key):
        draw = partial(gd.trajectory, lambda x, t: 0 * x, key, (4000, 2))
        return [draw(process=p, times=gd.time_grid(p, 1)) for p in processes]

    for x, scale in zip(map(np.asarray, run(key)), (50.0, 80.0, 1.0), strict=True):
        assert x.shape == (2, 4000, 2)
        np.testing.assert_allclose(x[0].std(), scale, rtol=0.03)
        np.testing.assert_array_equal(x[1], 0)


def _shrink(x, t):
    return jnp.tanh(x / (1 + t[:, None] ** 2))


@pytest.mark.parametrize("name", ["heun_churn", "predictor_corrector"])
def test_sample_i_depends_on_the_key_and_i_alone(name, key):
    process = gd.EDM()
    times = jnp.array([80.0, 10.0, 1.0, 0.1, 0.0])
    draw = partial(gd.sample, _shrink, process=process, times=times, step=STEPS[name])

    @jax.jit
    def batches(key, first):
        start = partial(gd.initial_noise, key, process=process)
        return (
            draw(key, (64, 2)),
            draw(key, (16, 2), first_index=first),
            draw(key, (1, 2), first_index=first),
            start((64, 2))[first],
            start((1, 2), first_index=first)[0],
        )

    found = [batches(key, first) for first in range(0, 64, 16)]
    whole = np.asarray(found[0][0])
    np.testing.assert_allclose(np.concatenate([f[1] for f in found]), whole, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([f[2] for f in found]), whole[::16], atol=1e-5)
    # Not their difference inside the program: a fused multiply-subtract would round it.
    for f in found:
        np.testing.assert_allclose(f[3], f[4], rtol=3e-7)
    assert np.unique(whole[:, 0]).size == 64


@pytest.mark.slow
def test_a_key_draws_the_samples_it_always_drew():
    """Numbers stored before a step was given a key in place of normals."""
    process = gd.VariancePreserving(t_min=0.01)
    mixture = gd.GaussianMixture(*(jnp.float32(v) for v in vars(fixture_mixture()).values()))
    denoise = gd.mixture_denoiser(mixture, process=process)
    known = jnp.array([[0.5, -0.5]] * 3)
    steps = STEPS | {"replacement": gd.replacement(known, jnp.array([[True, False]] * 3))}
    stored = reference("sampler_draws")["expected"]
    steps = {name: steps[name] for name in stored}

    @jax.jit
    def run(key):
        options = {"process": process, "times": jnp.array([1.0, 0.7, 0.4, 0.1, 0.0])}
        draw = partial(gd.sample, denoise, key, (3, 2), first_index=5, **options)
        return {name: draw(step=step) for name, step in steps.items()}

    for name, x in run(jax.random.key(11)).items():
        np.testing.assert_allclose(x, np.float32(stored[name]), atol=1e-5, err_msg=name)


def test_eight_devices_draw_the_same_samples(key):
    process = gd.EDM()
    times = jnp.array([80.0, 10.0, 1.0, 0.0])

    def draw(key):
        return gd.sample(
            _shrink, key, (64, 2), process=process, times=times, step=gd.ancestral_step
        )

    whole = np.asarray(jax.jit(draw)(key))
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    spread = jax.block_until_ready(jax.jit(draw, out_shardings=sharding)(key))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(np.asarray(spread), whole, atol=1e-5)


def test_bfloat16_network_samples_without_nan(key):
    def network(x, t):
        return (x * 0.1).astype(jnp.bfloat16)

    @jax.jit
    def draw(key):
        return [
            gd.sample(
                gd.denoiser(network, process=process, prediction="edm"),
                key,
                (8, 3),
                process=process,
                times=gd.time_grid(process, 5),
            )
            for process in (gd.EDM(), gd.VariancePreserving())
        ]

    for x in draw(key):
        assert x.dtype == jnp.float32
        assert np.all(np.isfinite(x))


def test_the_start_has_the_noise_of_the_first_time(key):
    """With D = x the samples are the start: sigma(times[0]), not sigma(t_max), and stated so."""
    times = jnp.array([0.5, 0.25, 0.0])

    @jax.jit
    def run(key):
        options = {"process": gd.EDM(), "times": times, "step": gd.ddim_step}
        x = gd.sample(lambda x, t: x, key, (4000, 1), **options)
        return x, gd.initial_noise(key, (4000, 1), process=gd.EDM(), t=0.5)

    x, start = run(key)
    np.testing.assert_allclose(np.std(x), 0.5, rtol=0.05)
    np.testing.assert_allclose(x, start, rtol=1e-5)


def test_samples_have_gradients(key):
    """Through the scan, with respect to a parameter of the denoiser: against differences."""
    process = gd.EDM(t_max=2.0)

    def mean(shift):
        x = gd.sample(
            lambda x, t: shift + 0 * x,
            key,
            (3, 1),
            process=process,
            times=jnp.array([2.0, 0.5, 0.0]),
        )
        return x.sum()

    np.testing.assert_allclose(jax.jit(jax.grad(mean))(0.3), 3.0, rtol=1e-5)


@pytest.mark.parametrize("process", [gd.Cosine(), gd.RectifiedFlow()])
def test_grids_are_taken_without_jit(process, key):
    """t_max = 0.999 rounds up in float32: the grid's own start lies in the range."""
    for spacing in ("uniform", "log_snr", "edm"):
        times = gd.time_grid(process, 3, spacing=spacing)
        x = gd.sample(lambda x, t: 0.5 * x, key, (2, 3), process=process, times=times)
        assert np.isfinite(x).all()


def test_bad_input(unchecked, key):
    process = gd.VariancePreserving()

    def run(denoise=lambda x, t: x, shape=(2, 3), step=gd.heun_step, times=None, **options):
        times = jnp.array([1.0, 0.5, 0.25, 0.0]) if times is None else times
        return gd.sample(denoise, key, shape, process=process, times=times, step=step, **options)

    with pytest.raises(ValueError, match="denoiser must keep the shape"):
        run(lambda x, t: x[:, :2])
    with pytest.raises(ValueError, match="times must lie in"):
        run(times=jnp.array([2.0, 0.0]))
    with pytest.raises(ValueError, match="decrease of times"):
        run(times=jnp.array([0.5, 0.7, 0.0]))
    with pytest.raises(ValueError, match=r"at least 3 values for this solver \(2 steps\)"):
        run(step=gd.dpm_solver_step, times=jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="times must hold at least 2"):
        run(times=jnp.array([1.0]))
    with pytest.raises(ValueError, match="x_init must have shape"):
        run(x_init=jnp.ones((3, 3)))
