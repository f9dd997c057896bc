"""Score-based diffusion of images or 2-D points, with any process, parametrisation and sampler.

A network learns to denoise; the reverse of the noising draws samples. With labels the model is
class-conditional and can be guided; the test split is scored by the probability flow.

    python -m experiments.diffusion
    python -m experiments.diffusion --process vp --prediction v --sampler dpm_solver
    python -m experiments.diffusion --dataset 8gaussians --steps 4000 --width 128
    python -m experiments.diffusion --dataset cifar10 --network unet --channels 64 128 128
    python -m experiments.diffusion --sample-from runs/diffusion/1 --sampler heun --num-steps 18

The last samples a run's weights again without training. Samples and density are judged as in every
experiment, see experiments/_judge.py; in the plane the error of the score too, where it is known.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _run, _system
from experiments._data import Data, load_data
from experiments._networks import NetworkConfig, make_network
from experiments._system import Row, System, adamw, train
from genjax import checks, metrics
from genjax import diffusion as gd
from genjax.data import DENSITIES, DataSpec
from genjax.diffusion.samplers import check_grid

ROWS = (
    Row("diffusion", "Diffusion, with labels", {}, {"width": 128, "num_samples": 10_000},
        bits="estimate", larger={"width": 512, "likelihood_steps": 0}),
)  # fmt: skip
PROCESSES: dict[str, Callable[[], gd.Process]] = {
    "edm": gd.EDM,
    "ve": gd.VarianceExploding,
    "vp": gd.VariancePreserving,
    "subvp": gd.SubVariancePreserving,
    "cosine": gd.Cosine,
    "rectified": gd.RectifiedFlow,
    "ddpm": lambda: gd.discrete(gd.ddpm_betas(gd.VariancePreserving(), 1000, rule="euler")),
}
SAMPLERS: dict[str, gd.StepFn] = {
    "heun": gd.heun_step,
    "heun_stochastic": partial(gd.heun_step, churn=0.2, churn_min=0.05, churn_max=50.0),
    "euler": gd.euler_step,
    "ddim": gd.ddim_step,
    "dpm_solver": gd.dpm_solver_step,
    "dpm_solver_3": partial(gd.dpm_solver_step, order=3),
    "dpm_solver_sde": partial(gd.dpm_solver_step, eta=1.0),
    "unipc": gd.unipc_step,
    "euler_maruyama": gd.euler_maruyama_step,
    "ancestral": gd.ancestral_step,
    "ddpm": gd.ddpm_step,
    "predictor_corrector": gd.predictor_corrector_step,
}
# Of a run that is sampled again, these are the command's.
OF_SAMPLING = ("sampler", "num_steps", "spacing", "guidance", "num_samples", "likelihood_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(NetworkConfig):
    """Train a denoiser and draw from it, or draw from an earlier run."""

    evaluation: ClassVar = (
        "sampler",
        "num_steps",
        "spacing",
        "guidance",
        "num_samples",
        "likelihood_steps",
    )

    sample_from: str | None = None
    """Folder of a run: draw from its newest checkpoint, do not train. The options of the model are
    then that run's; those of sampling and guidance are this command's."""
    process: Literal["edm", "ve", "vp", "subvp", "cosine", "rectified", "ddpm"] = "edm"
    """The noising process."""
    prediction: Literal["edm", "x0", "epsilon", "v", "score"] = "edm"
    """What the network's output stands for; edm also scales its input."""
    weighting: Literal["edm", "x0", "epsilon", "v", "score", "likelihood", "min_snr"] = "edm"
    """The prediction whose squared error is the loss."""
    times: Literal["lognormal", "uniform"] = "lognormal"
    """How training draws t: log(sigma / alpha) normal (EDM), or t uniform."""
    noise_mean: float = -1.0
    """Mean of log(sigma / alpha) in training."""
    noise_std: float = 1.4
    """Its standard deviation."""
    network: Literal["mlp", "unet", "dit"] = "mlp"
    """Residual MLP on the flattened event, U-Net, or a transformer over patches."""
    width: int = 384
    heads: int = 6
    channels: tuple[int, ...] = ()
    """Channels of the U-Net, one entry per resolution (default: 32, then 64 for each halving of the
    image, at least one, down to at most 8 pixels)."""
    attention: tuple[int, ...] = ()
    """Heights at which the U-Net attends."""
    dropout: float = 0.2
    label_dropout: float = 0.15
    """Share of training examples whose label is hidden, for classifier-free guidance."""
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    """AdamW's decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.999
    steps: int = 6000
    steps_per_call: int = 50
    batch_size: int = 256
    sampler: Literal[tuple(SAMPLERS)] = "heun"  # type: ignore[valid-type]
    """How samples are drawn."""
    num_steps: int = 18
    """Steps of the sampler."""
    spacing: Literal["edm", "log_snr", "uniform"] = "edm"
    """How the sampler's times are spaced."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is the conditional model itself."""
    num_samples: int = 1437
    """Samples that are drawn and judged."""
    likelihood_steps: int = 48
    """Runge-Kutta steps of the likelihood on the test split (0: none)."""


def main(config: Config) -> dict[str, Any]:
    """Train (or read a checkpoint), sample, judge, draw; returns the summary."""
    checks.one_of("sampler", config.sampler, SAMPLERS)
    if config.sample_from is not None:
        return _system.sample_from(config, config.sample_from, OF_SAMPLING, report)
    data = load_data(config)
    return train(config, build(config, data), data, partial(report, config, data))


def report(config: Config, data: Data, run: Any, params: Any, samples: Any) -> dict[str, Any]:
    """What only a denoiser has to tell."""
    model, key = make_model(config, data), _system.keys(config.seed).test
    if data.kind == "points":
        return judge_points(model, params, data, samples, key)
    if config.likelihood_steps and data.spec.classes is not None:
        return bits_given_label(model, params, data, key, config.likelihood_steps)
    return {}


def build(config: Config, data: Data) -> System:
    """The denoiser with its loss, its sampler and the likelihood of its probability flow."""
    checks.one_of("sampler", config.sampler, SAMPLERS)
    model, scaling, classes = make_model(config, data), data.scaling(), data.spec.classes
    times = gd.time_grid(model.process, config.num_steps, spacing=config.spacing)
    check_grid(times, SAMPLERS[config.sampler], model.process)
    if config.guidance != 1 and classes is None:
        raise ValueError(f"guidance must be 1 for data without labels, got {config.guidance}")

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        x = gd.sample(
            model.guided(params, None if label is None else jnp.asarray(label), config.guidance),
            key,
            (n, *data.spec.shape),
            process=model.process,
            times=times,
            step=SAMPLERS[config.sampler],
        )
        return scaling.to_levels(x + model.shift)

    def log_prob(params: Any, key: Any, y: jax.Array) -> jax.Array:
        # One dequantisation and two probes of the trace for each image: both unbiased.
        probes = {} if data.kind == "points" else {"key": key, "num_probes": 2}
        none = None if classes is None else jnp.full(len(y), classes, jnp.int32)
        return gd.log_likelihood(
            model.denoise(params, none),
            y - model.shift,
            process=model.process,
            num_steps=config.likelihood_steps,
            **probes,
        )[0]

    peak, warm = config.learning_rate, min(200, config.steps // 4)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warm, config.steps, 0.01 * peak)
    labels = None if classes is None else np.resize(data.train["label"], config.num_samples)
    return System(
        model.init,
        make_loss(config, model, scaling),
        adamw(config, rate, only_matrices=False),
        sample,
        log_prob if config.likelihood_steps else None,
        scaling,
        likelihood={"num_examples": 1000, "batch_size": 500},
        evaluations=evaluations(config),
        count=config.num_samples,
        labels=labels,
        remat=config.network in ("unet", "dit"),
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its process: denoise(params, label, key)(x_t, t) is E[x_0 | x_t, label]."""

    process: gd.Process
    network: Any
    spec: DataSpec
    prediction: str
    sigma_data: float
    shift: np.ndarray  # the training data's mean, which the model does not see

    def init(self, key: jax.Array) -> Any:
        label = None if self.spec.classes is None else jnp.zeros(1, jnp.int32)
        return self.network.init(key, jnp.zeros((1, *self.spec.shape)), jnp.zeros(1), label)

    def denoise(self, params: Any, label: Any = None, key: Any = None) -> Callable[..., jax.Array]:
        return gd.denoiser(
            lambda x, t: self.network.apply(params, x, t, label, dropout_key=key),
            process=self.process,
            prediction=self.prediction,
            sigma_data=self.sigma_data,
        )

    def guided(self, params: Any, label: Any, scale: float) -> Callable[..., jax.Array]:
        """The conditional denoiser, guided where scale is not 1."""
        conditional = self.denoise(params, label)
        if label is None or scale == 1:
            return conditional
        return gd.classifier_free_guidance(
            conditional, self.denoise(params), process=self.process, scale=scale
        )


def make_model(config: Config, data: Data) -> Model:
    """The model of a data set; its mean and scale are taken from the training data."""
    spec, y = data.spec, np.asarray(data.scaling().to_continuous(data.train["x"]))
    shift = y.mean(0, keepdims=True) if data.kind == "points" else y.mean()
    if config.network != "mlp":
        data.require("images")
    shape = {"channels": config.channels, "attention": config.attention}
    network = make_network(config, spec.shape, spec.classes, norm="layer", **shape)
    process = PROCESSES[config.process]()
    scale = float((y - shift).std())
    return Model(process, network, spec, config.prediction, scale, np.asarray(shift, np.float32))


def make_loss(config: Config, model: Model, scaling: Any) -> Callable[..., Any]:
    """Denoising score matching as loss(params, key, batch) -> (losses, aux)."""
    if config.times == "uniform":
        times = gd.uniform_times(model.process)
    else:
        times = gd.edm_times(model.process, mean=config.noise_mean, std=config.noise_std)

    def loss_fn(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_x, key_label, key_drop, key_loss = jax.random.split(key, 4)
        x, label = scaling.dequantise(key_x, batch["x"]) - model.shift, None
        if model.spec.classes is not None:
            hidden = jax.random.bernoulli(key_label, config.label_dropout, (x.shape[0],))
            label = jnp.where(hidden, model.spec.classes, batch["label"])
        losses, aux = gd.denoising_score_matching(
            model.denoise(params, label, key_drop),
            key_loss,
            x,
            process=model.process,
            weighting=config.weighting,
            times=times,
            sigma_data=model.sigma_data,
        )
        return losses / x[0].size, {"x0_error": aux["x0_error"]}

    return loss_fn


def evaluations(config: Config) -> int:
    """Passes through the network for one sample; guidance takes two where one would do."""
    twice = config.sampler in ("heun", "heun_stochastic", "predictor_corrector")
    passes = 2 * config.num_steps - 1 if twice else config.num_steps
    return passes if config.guidance == 1 else 2 * passes


def bits_given_label(
    model: Any, params: Any, data: Data, key: jax.Array, num_steps: int
) -> dict[str, Any]:
    """Bits/dim of test images given their labels, as `bits_per_dim` is measured without."""
    key_x, key_probe = jax.random.split(key)
    scaling, x = data.scaling(), data.test["x"][:1000]
    y = scaling.dequantise(key_x, x) - model.shift

    @jax.jit
    def bits(params: Any, y: jax.Array, label: Any) -> jax.Array:
        denoise, process = model.denoise(params, label), model.process
        value, _ = gd.log_likelihood(
            denoise, y, process=process, key=key_probe, num_probes=2, num_steps=num_steps
        )
        size, log_det = math.prod(data.spec.shape), scaling.log_det_per_dim
        return metrics.bits_per_dim(value, size, log_det_per_dim=log_det).mean()

    return {"bits_per_dim_given_label": bits(params, y, data.test["label"][: len(x)])}


def judge_points(
    model: Any, params: Any, data: Data, samples: Any, key: jax.Array
) -> dict[str, Any]:
    """Distance of samples to test points, and the score's error where the law is a mixture."""
    test = data.test["x"]
    key_distance, key_score = jax.random.split(key)
    found = metrics.sliced_wasserstein(key_distance, test[: len(samples)], samples)
    summary: dict[str, Any] = {"sliced_wasserstein": found}
    means, std = (getattr(DENSITIES[data.spec.name], name, None) for name in ("means", "std"))
    if means is not None and std is not None:
        points, means = jnp.asarray(test[:1000]) - model.shift, means - model.shift
        summary["score_error"] = score_error(model, params, points, means, std, key_score)
    return summary


def score_error(
    model: Any, params: Any, x: jax.Array, means: Any, std: float, key: jax.Array
) -> dict[str, float]:
    """|score - exact| / |exact| in L2 over noised data, at five noise levels."""
    mixture = gd.GaussianMixture(
        jnp.full(len(means), 1 / len(means)),
        jnp.asarray(means, jnp.float32),
        jnp.broadcast_to(std**2 * jnp.eye(2), (len(means), 2, 2)),
    )
    exact, found = gd.mixture_denoiser(mixture, process=model.process), model.denoise(params)
    errors = {}
    for level in (0.05, 0.2, 0.5, 1.0, 3.0):
        t = jnp.full(len(x), model.process.time_of_noise_ratio(level))
        alpha, sigma = model.process.alpha(t)[:, None], model.process.sigma(t)[:, None]
        x_t = alpha * x + sigma * jax.random.normal(key, x.shape)
        best = exact(x_t, t)
        gap = jnp.linalg.norm(found(x_t, t) - best) / jnp.linalg.norm(best - x_t / alpha)
        errors[str(level)] = float(gap)
    return errors


if __name__ == "__main__":
    _run.launch(main, Config)
