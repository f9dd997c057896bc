"""Entries of diffusion and flows: samplers by the schedule and the times too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from genjax import diffusion as D
from genjax import flows as F
from tests.flows.table import TABLE
from tests.tables.entry import T, W, X, Y, normals, of

KEY = jax.random.key(0)
BETA = np.float32(8.0)
GRID = np.array([1.0, 0.6, 0.3, 0.0], np.float32)
PROCESSES = {
    "vp": lambda b: D.VariancePreserving(beta_max=b),
    "cosine": lambda b: D.Cosine(b / 800),
    "subvp": lambda b: D.SubVariancePreserving(beta_max=b),
    "ve": lambda b: D.VarianceExploding(sigma_max=b),
    "edm": lambda b: D.EDM(t_max=b),
    "rectified": lambda b: D.RectifiedFlow(t_max=b / 8),
}
VP = D.VariancePreserving()
ONES, EYES = np.ones(2, np.float32), np.stack([np.eye(3, dtype=np.float32)] * 2)


def network(x, t):
    return jnp.tanh(x @ W) / (1 + t[:, None])


def best(process):
    """The denoiser of N(0, 1/4)."""

    def denoise(x, t):
        alpha, variance = process.alpha(t)[:, None], process.variance(t)[:, None]
        return 0.25 * alpha / (0.25 * alpha**2 + variance) * x

    return denoise


STEPS = {
    "euler_maruyama_step": D.euler_maruyama_step,
    "ancestral_step": D.ancestral_step,
    "ddpm_step": D.ddpm_step,
    "ddim_step": functools.partial(D.ddim_step, eta=0.5),
    "euler_step": D.euler_step,
    "heun_step": D.heun_step,
    "dpm_solver_step": functools.partial(D.dpm_solver_step, order=3, eta=0.5),
    "unipc_step": D.unipc_step,
    "predictor_corrector_step": D.predictor_corrector_step,
    "replacement": D.replacement(jnp.asarray(X), jnp.asarray(X > 0), step=D.ancestral_step),
    "posterior_sampling": D.posterior_sampling(
        lambda x: x[:, :2], jnp.asarray(Y[:, :2]), noise_std=0.1, step=D.ddim_step
    ),
}


def sampled(step, kind="vp"):
    """By the start, the schedule's parameter and the times, down to 0."""

    def call(x, beta, times):
        process = PROCESSES[kind](beta)
        return D.sample(
            best(process), KEY, x.shape, process=process, times=times, step=step, x_init=x
        )

    return call


def inpainted(x, beta, times):
    process = PROCESSES["vp"](beta)
    return D.inpaint(
        best(process), KEY, x, X > 0, process=process, times=times, jump=1, resamples=2
    )


def wrapped(wrap):
    """What makes one denoiser of another, at x."""
    return of(lambda x: wrap(network)(x, jnp.asarray(T, x.dtype)), X)


def drawn(times):
    """Training times by the schedule."""
    return of(
        lambda b: times(D.VarianceExploding(sigma_max=b))(KEY, 4), BETA, rows=False, wide=True
    )


def at(call):
    """By x at four times, and the schedule's parameter."""
    return of(call, X, T, BETA, rows=False)


LOOPS = {"rows": False}
DIFFUSION = {
    **{name: of(sampled(step), X, BETA, GRID, **LOOPS) for name, step in STEPS.items()},
    "sample": of(sampled(D.heun_step, "edm"), X, np.float32(1.0), GRID, **LOOPS),
    "sample, cosine": of(sampled(D.ddim_step, "cosine"), X, BETA, 0.99 * GRID, **LOOPS),
    "trajectory": of(
        lambda x, b, t: D.trajectory(
            best(D.VariancePreserving(beta_max=b)),
            KEY,
            x.shape,
            times=t,
            x_init=x,
            process=D.VariancePreserving(beta_max=b),
            step=D.ddim_step,
        ),
        X,
        BETA,
        GRID,
        **LOOPS,
    ),
    "inpaint": of(inpainted, X, BETA, GRID, **LOOPS),
    "scan_steps": of(
        lambda x, t: D.scan_steps(lambda x, m: (x * m.s + m.t, x), KEY, x, t), X, GRID, **LOOPS
    ),
    "sample_adaptive": of(
        lambda x: D.sample_adaptive(best(VP), KEY, x.shape, process=VP, x_init=x),
        X,
        order=1,
        **LOOPS,
    ),
    "initial_noise": of(
        lambda b: D.initial_noise(KEY, (4, 3), process=D.VarianceExploding(sigma_max=b)),
        BETA,
        **LOOPS,
        wide=True,
    ),
    "consistency_sample": of(
        lambda s: D.consistency_sample(D.consistency_function(network), KEY, (4, 3), sigmas=s),
        np.array([80.0, 2.0], np.float32),
        **LOOPS,
        wide=True,
    ),
    "consistency_function": wrapped(D.consistency_function),
    "trig_function": wrapped(D.trig_function),
    "denoiser": wrapped(lambda f: D.denoiser(f, process=VP, prediction="v")),
    "denoiser, edm": wrapped(lambda f: D.denoiser(f, process=VP, prediction="edm")),
    "flow_denoiser": wrapped(lambda f: D.flow_denoiser(f, process=VP)),
    "clipped": wrapped(lambda f: D.clipped(f, low=-0.1, high=0.1)),
    "dynamic_thresholding": wrapped(D.dynamic_thresholding),
    "classifier_free_guidance": wrapped(
        lambda f: D.classifier_free_guidance(
            f, lambda x, t: f(x, t) / 2, process=VP, scale=2.0, rescale=0.5, interval=(0.1, 5.0)
        )
    ),
    "classifier_guidance": wrapped(
        lambda f: D.classifier_guidance(f, lambda x, t: -jnp.sum(x**4, 1), process=VP)
    ),
    "pseudoinverse_guidance": wrapped(
        lambda f: D.pseudoinverse_guidance(
            f, lambda x: x[:, :2], jnp.asarray(Y[:, :2]), process=VP, noise_std=0.1, num_steps=2
        )
    ),
    "mixture_denoiser": of(
        lambda x, m: D.mixture_denoiser(D.GaussianMixture(ONES, m, EYES), process=VP)(
            x, jnp.asarray(T)
        ),
        X,
        Y[:2],
        **LOOPS,
    ),
    "convert": at(
        lambda x, t, b: D.convert(
            x, 2 * x, t, source="v", target="score", process=D.VariancePreserving(beta_max=b)
        )
    ),
    "ddim_move": at(
        lambda x, t, b: D.ddim_move(D.VariancePreserving(beta_max=b), x, 2 * x, t, t / 2)
    ),
    "progressive_target": at(
        lambda x, t, b: D.progressive_target(
            network, x, t, t / 2, process=D.VariancePreserving(beta_max=b)
        )
    ),
    "posterior": at(lambda x, t, b: D.posterior(D.VariancePreserving(beta_max=b), t, t / 2)),
    "min_snr": at(lambda x, t, b: D.min_snr(D.VariancePreserving(beta_max=b), 1.0)(t)),
    "ddpm_betas": of(
        lambda b: D.ddpm_betas(D.VariancePreserving(beta_max=b), 4), BETA, **LOOPS, wide=True
    ),
    "discrete": of(lambda b: D.discrete(b).variance(T), np.array([0.1, 0.2, 0.3]), **LOOPS),
    "discretised_gaussian": of(
        lambda m, s: D.discretised_gaussian(jnp.full_like(m, 0.25), m, jnp.exp(s), levels=4),
        X,
        Y,
    ),
    "time_grid": of(lambda b: D.time_grid(D.EDM(t_max=b), 4), BETA, **LOOPS, wide=True),
    "level_probabilities": of(D.level_probabilities, np.array([0.1, 0.5, 2.0]), **LOOPS),
    "consistency_levels": of(
        lambda s: D.consistency_levels(jnp.arange(4), 4, sigma_max=s), BETA, **LOOPS, wide=True
    ),
    "uniform_times": drawn(D.uniform_times),
    "edm_times": drawn(D.edm_times),
    "logit_normal_times": drawn(D.logit_normal_times),
}
NO_DIFFUSION = {
    "num_levels_at": "of integers",
    "discrete_times": "a fixed grid of times",
    "sample_masked": "tokens, drawn from a network of tokens",
    "unmask_step": "tokens, drawn from a network of tokens",
}


def both_ways(make):
    """A bijection there and back, at its points."""
    entry = make(jax.random.key(1))

    def call(x):
        y, log_det = entry.bijection.forward(entry.params, x)
        return y, log_det, entry.bijection.inverse(entry.params, y)

    return of(call, np.asarray(entry.x), rows=False)


def spline(points):
    raw = jnp.broadcast_to(jnp.asarray(normals(3, 11, 3)), (len(points), 11, 3))
    return F.rational_quadratic(4, -2.0, 2.0).forward(raw, points)


PLANAR = F.planar_init(jax.random.key(2), 3)
BASE = F.normal((3,))
# Of the table of bijections: a name there -> the public function that makes it.
MADE = {
    "planar": "planar",
    "radial": "radial",
    "inverted radial": "invert",
    "affine coupling": "coupling",
    "alternating couplings": "alternating_couplings",
    "checkerboard coupling": "masked_coupling",
    "autoregressive affine": "masked_autoregressive",
    "elementwise": "elementwise",
    "actnorm": "actnorm",
    "plu": "plu",
    "squeeze": "squeeze",
    "split": "split",
    "multi-scale": "multi_scale",
    "permutation": "permutation",
    "rescale": "rescale",
    "logit": "logit",
    "chain": "chain",
    "repeat": "repeat",
    "continuous": "continuous_flow",
}
FLOWS = {
    **{made: functools.partial(both_ways, TABLE[name]) for name, made in MADE.items()},
    "rational_quadratic": of(spline, X),
    "affine": of(lambda r, x: F.affine().forward(r, x), normals(4, 4, 2, 3), X, rows=False),
    "standardise": of(
        lambda r, x: F.standardise().forward(r, x), normals(4, 4, 2, 3), X, rows=False
    ),
    "normal": of(lambda x: F.normal((3,), 2.0).log_prob(x), X),
    "uniform": of(lambda x: F.uniform((3,), -9.0, 9.0).log_prob(x), X),
    "actnorm_init": of(F.actnorm_init, X, rows=False),
    "planar_init": of(
        lambda s: F.planar_init(KEY, 3, scale=1.0)["u"] * s, BETA, rows=False, wide=True
    ),
    "flows.sample": of(
        lambda w: F.sample(F.planar(), BASE, PLANAR | {"w": w}, KEY, 4), X[0], rows=False, wide=True
    ),
    "sample_and_log_prob": of(
        lambda w: F.sample_and_log_prob(F.planar(), BASE, PLANAR | {"w": w}, KEY, 4),
        X[0],
        rows=False,
        wide=True,
    ),
    "denoise": of(lambda x: F.denoise(lambda x: -jnp.sum(x**4, 1), x, 0.1), X),
    "integrate": of(lambda x: F.integrate(network, x, num_steps=2, method="heun"), X),
    "solve": of(
        lambda p, x: F.solve(lambda p, x, t: jnp.tanh(x @ p), p, x, num_steps=2), W, X, rows=False
    ),
    "solve_with_log_det": of(
        lambda p, x: F.solve_with_log_det(lambda p, x, t: jnp.tanh(x @ p), p, x, num_steps=2),
        W,
        X,
        rows=False,
    ),
    "interpolate": of(lambda x, y, t: F.interpolate(F.vp_path(), x, y, t), X, Y, T, rows=False),
    "preconditioned": of(lambda x, t: F.preconditioned(network)(x, t), X, T),
    "ot_path": of(lambda x, y, t: F.interpolate(F.ot_path(0.1), x, y, t), X, Y, T, rows=False),
    "vp_path": of(lambda t: [weight(t) for weight in F.vp_path()], T),
    "sample_pairs": of(
        lambda x, y: F.sample_pairs(KEY, x, x0=y, coupling=lambda c: jax.nn.softmax(-c)),
        X,
        Y,
        order=0,
    ),
    "reflow_pairs": of(lambda x: F.reflow_pairs(network, x, num_steps=2), X, order=0),
    "bridge_pairs": of(
        lambda x: F.bridge_pairs(network, KEY, x, sigma=0.5, num_steps=2), X, order=0
    ),
    "bridge_sample": of(lambda x: F.bridge_sample(network, KEY, x, sigma=0.5, num_steps=2), X),
    "brownian_bridge": of(
        lambda x, y, t: F.brownian_bridge(x, y, t, x - y, sigma=0.5), X, Y, T, rows=False
    ),
    "mean_flow_sample": of(
        lambda x: F.mean_flow_sample(lambda x, t, s: network(x, t) * s[:, None], x, num_steps=2), X
    ),
    "mean_flow_times": of(
        lambda x: x * F.mean_flow_times(KEY, 4)[0], X[:, 0], rows=False, wide=True
    ),
}
NO_FLOWS = {
    "plu_init": "a matrix in numpy",
    "random_rotation": "a matrix in numpy",
    "radial_init": "no data",
}
