"""Every public loss, sampler and metric lowers for CUDA and TPU: value and gradient, no callback.

`jax.export` compiles nothing: an operation that a platform lacks, or a call back to the host, is
refused while the program is lowered.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import autoregressive, diffusion, flows, metrics, ode, variational
from tests import laws
from tests.test_laws import CASES, FLOW, FLOW_PARAMS, OBJECTIVES, VE, W, X, Y

pytestmark = [pytest.mark.usefixtures("unchecked"), pytest.mark.slow]
PLATFORMS = ("cuda", "tpu")
VP = diffusion.VariancePreserving()
KEY = np.asarray(jax.random.key_data(jax.random.key(0)))


def export(call, *given):
    """Lower call(key, *given) for both platforms, and its gradient by the first that is given."""

    def total(x, key, *rest):
        leaves = jax.tree.leaves(call(key, x, *rest))
        numbers = [jnp.sum(y) for y in leaves if jnp.issubdtype(y.dtype, jnp.floating)]
        return sum(numbers, start=jnp.zeros(()))

    def both(key, *given):
        key = jax.random.wrap_key_data(key)
        value = call(key, *given)
        if not given or not jnp.issubdtype(given[0].dtype, jnp.floating):
            return value
        return value, jax.grad(total)(given[0], key, *given[1:])

    shapes = [jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)) for x in (KEY, *given)]
    exported = jax.export.export(jax.jit(both), platforms=PLATFORMS)(*shapes)
    assert exported.platforms == PLATFORMS
    assert "callback" not in exported.mlir_module()


@pytest.mark.parametrize("name", CASES)
def test_losses(name):
    case = CASES[name]
    export(lambda key, *data: laws.first(case.call(key, *data)), *case.data)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name):
    case = OBJECTIVES[name]
    export(lambda key, *samples: case.numbers(case.call(*samples)), *case.samples)


def ddpm():
    return diffusion.discrete(diffusion.ddpm_betas(VP, 1000, rule="euler"))


def sampled(step, make=lambda: VE):
    # The process and its times are made in the program: this file is collected by every fast run.
    def call(key, w):
        process = make()
        times = diffusion.time_grid(process, 4)

        def denoise(x, t):
            return jnp.tanh(x @ w) / (1 + t[:, None])

        shape = (4, 3)
        return diffusion.sample(denoise, key, shape, process=process, times=times, step=step)

    return call


STEPS = ("ancestral", "ddim", "dpm_solver", "euler", "euler_maruyama", "heun", "unipc")
STEPS += ("predictor_corrector",)
SAMPLERS = {name: sampled(getattr(diffusion, f"{name}_step")) for name in STEPS}
SAMPLERS |= {
    "ddpm_step": sampled(diffusion.ddpm_step, ddpm),
    "sample_adaptive": lambda key, w: diffusion.sample_adaptive(
        lambda x, t: jnp.tanh(x @ w), key, (4, 3), process=VE
    ),
    "replacement": sampled(diffusion.replacement(X, X > 0)),
    "posterior_sampling": sampled(diffusion.posterior_sampling(lambda x: x[:, :2], X[:, :2])),
    "flows.sample": lambda key, w: flows.sample(FLOW, flows.normal((3,)), FLOW_PARAMS, key, 4) @ w,
    "integrate": lambda key, w: flows.integrate(lambda x, t: jnp.tanh(x @ w), X, num_steps=3),
    **{
        f"solve {method}": partial(
            lambda method, key, w: flows.solve(
                lambda w, x, t: jnp.tanh(x @ w), w, X, method=method, num_steps=3
            ),
            method,
        )
        for method in ("rk4", "dopri5", "tsit5")
    },
    "gaussian_sample": lambda key, w: variational.gaussian_sample(key, X @ w, Y),
}


def drift(w):
    return lambda x, t, *end: jnp.tanh(x @ w)


def decoded(search):
    """search(step, cache, prompt) of a network whose next token depends on w and on the last."""

    def call(key, w):
        step = autoregressive.recomputing_step(lambda tokens: w[tokens % 3])
        return search(step, jnp.zeros((2, 6), jnp.int32), key, jnp.array([[1], [0]]))

    return call


def pixels(key, w):
    step = autoregressive.recomputing_pixel_step(lambda x: w[x % 3])
    cache, options = jnp.zeros((2, 3, 3, 1), jnp.int32), {"draw": jax.random.categorical}
    return autoregressive.sample_pixels(step, cache, key, (2, 3, 3, 1), **options)


def inpainted(key, w):
    options = {"process": VP, "times": diffusion.time_grid(VP, 4), "jump": 2, "resamples": 2}
    return diffusion.inpaint(lambda x, t: jnp.tanh(x @ w), key, X, X > 0, **options)


def masked(by, key, w):
    predict = lambda tokens: w[tokens % 3]  # noqa: E731
    return diffusion.sample_masked(predict, key, (2, 6), vocabulary=3, num_steps=3, by=by)


def levelled(key, w):
    top = variational.Level(None, lambda h, f: (f, 0 * f), lambda h, z: z @ w)
    return variational.hierarchical_sample(key, [top], (5, 3))


SAMPLERS |= {
    "generate": decoded(lambda s, c, k, p: autoregressive.generate(s, c, k, p, num_tokens=3)),
    "beam_search": decoded(
        lambda s, c, k, p: autoregressive.beam_search(s, c, p, num_tokens=3, width=2)
    ),
    "sample_pixels": pixels,
    "inpaint": inpainted,
    "sample_masked": partial(masked, "random"),
    "sample_masked by confidence": partial(masked, "confidence"),
    "consistency_sample": lambda key, w: diffusion.consistency_sample(
        diffusion.consistency_function(drift(w)), key, (5, 3), sigmas=(80.0, 1.0)
    ),
    "bridge_sample": lambda key, w: flows.bridge_sample(drift(w), key, X, sigma=0.1, num_steps=3),
    "bridge_pairs": lambda key, w: flows.bridge_pairs(drift(w), key, X, sigma=0.1, num_steps=3),
    "mean_flow_sample": lambda key, w: flows.mean_flow_sample(drift(w), X, num_steps=2),
    "sample_pairs": lambda key, w: flows.sample_pairs(key, X @ w),
    "flows.sample_and_log_prob": lambda key, w: flows.sample_and_log_prob(
        FLOW, flows.normal((3,)), FLOW_PARAMS, key, 4
    ),
    "solve_with_log_det": lambda key, w: flows.solve_with_log_det(
        lambda w, x, t: jnp.tanh(x @ w), w, X, num_steps=3
    ),
    "hierarchical_sample": levelled,
    "mixture_sample": lambda key, w: variational.mixture_sample(key, w, 0 * w, 5),
}


def test_every_sampler_is_exported():
    found = {name.split(".")[-1].split()[0] for name in SAMPLERS}
    public = {name.split(".")[-1] for name in laws.public_functions()}
    assert {name for name in public if "sample" in name and "log_prob" not in name} <= found


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name):
    if name == "sample_adaptive" or (name.startswith("solve ") and name != "solve rk4"):
        pytest.importorskip("diffrax")
    export(SAMPLERS[name], W)


FEW = {"num_subsets": 3, "subset_size": 4}
METRICS = {
    "frechet_distance": lambda key, x, y: metrics.frechet_distance(x, y),
    "feature_moments": lambda key, x, y: metrics.feature_moments(x),
    "sliced_wasserstein": metrics.sliced_wasserstein,
    "sinkhorn_distance": lambda key, x, y: metrics.sinkhorn_distance(x, y, epsilon=0.5),
    "kid": partial(metrics.kid, **FEW),
    "mmd": lambda key, x, y: metrics.mmd(x, y),
    "precision_recall": lambda key, x, y: metrics.precision_recall(x, y),
    "density_coverage": lambda key, x, y: metrics.density_coverage(x, y),
    "memorisation_share": lambda key, x, y: metrics.memorisation_share(x, y, x + 1),
    "classifier_two_sample": metrics.classifier_two_sample,
    "inception_score": lambda key, x, y: metrics.inception_score(jax.nn.softmax(x)),
    "inception_score_splits": lambda key, x, y: metrics.inception_score_splits(
        jax.nn.softmax(x), num_splits=2
    ),
    "init_moments": lambda key, x, y: metrics.init_moments(3),
    "update_moments": lambda key, x, y: metrics.update_moments(metrics.init_moments(3), x),
    "merge_moments": lambda key, x, y: metrics.merge_moments(
        *(metrics.update_moments(metrics.init_moments(3), z) for z in (x, y))
    ),
    "compute_moments": lambda key, x, y: metrics.compute_moments(
        metrics.update_moments(metrics.init_moments(3), x)
    ),
    "bits_per_dim": lambda key, x, y: metrics.bits_per_dim(x[:, 0], 3),
    "modes_covered": lambda key, x, y: metrics.modes_covered(x, y[:3], 0.5),
    "high_quality_share": lambda key, x, y: metrics.high_quality_share(x, y[:3], 0.5),
    "reverse_kl_modes": lambda key, x, y: metrics.reverse_kl_modes(x, y[:3]),
    "test_log_likelihood": lambda key, x, y: metrics.test_log_likelihood(
        lambda key, x: variational.standard_normal_log_prob(x), key, x, batch_size=4
    ),
    "gaussian_kernel": lambda key, x, y: metrics.gaussian_kernel(1.0)(x, y),
}
NOT_EXPORTED = {"feature_extractor": "a reader", "hash_of": "of bytes", "measure": "a record"}
NOT_EXPORTED["merge_processes"] = "between processes, outside of programs"


def test_every_metric_is_exported():
    public = laws.public_functions(("metrics",))
    kernels = {name for name in public if name.endswith("_kernel")}
    assert set(public) - kernels <= set(METRICS) | set(NOT_EXPORTED)


@pytest.mark.parametrize("name", METRICS)
def test_metrics(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    export(METRICS[name], x, x[::-1] + 0.5)


def test_a_call_to_the_host_is_found():
    def back(key, x):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(Exception, match=r"(?i)callback"):
        export(back, BITS)


BITS = np.arange(3)


def test_a_solve_that_ends_early_is_nan_in_a_program_and_an_error_outside():
    pytest.importorskip("diffrax")

    def run(y):
        field = lambda a, y, t: 9.0 * y  # noqa: E731
        return ode.solve(field, None, y, (0.0, 1.0), method="dopri5", max_steps=2)

    with pytest.raises(RuntimeError, match=r"did not reach t = 1 within max_steps = 2"):
        run(jnp.ones(2))
    assert np.isnan(jax.jit(run)(jnp.ones(2))).all()
