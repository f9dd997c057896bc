"""Score-based diffusion of images or 2-D points, with any process, parametrisation and sampler.

A network learns to denoise; the reverse of the noising draws samples. With labels the model is
class-conditional and can be guided; the test split is scored by the probability flow.

    python -m experiments.diffusion
    python -m experiments.diffusion --process vp --prediction v --sampler dpm_solver
    python -m experiments.diffusion --dataset 8gaussians --steps 4000 --width 128
    python -m experiments.diffusion --dataset cifar10 --network unet --channels 64 128 128
    python -m experiments.diffusion --sample-from runs/diffusion/1 --sampler heun --num-steps 18

The last draws from a run's checkpoint without training. Digits are judged by precision and recall
against the training split, by a classifier that reads the asked label, by the share of samples
nearer to a training image than test images are (memorisation), and in bits per dimension.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _diffusion, _pictures, _run, _samples
from genjax import diffusion as gd
from genjax.data import DataSpec, Scaling, load
from genjax.networks import TimeMLP, UNet
from genjax.training import Checkpoints, TrainState, init_state, make_train_step

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
    "euler_maruyama": gd.euler_maruyama_step,
    "ancestral": gd.ancestral_step,
    "ddpm": gd.ddpm_step,
    "predictor_corrector": gd.predictor_corrector_step,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Train a denoiser and draw from it, or draw from an earlier run."""

    sample_from: str | None = None
    """Folder of a run: draw from its newest checkpoint, do not train. The options of the model are
    then that run's; those of sampling and guidance are this command's."""
    process: Literal["edm", "ve", "vp", "subvp", "cosine", "rectified", "ddpm"] = "edm"
    """The noising process."""
    prediction: Literal["edm", "x0", "epsilon", "v", "score"] = "edm"
    """What the network's output stands for; edm also scales its input."""
    weighting: Literal["edm", "x0", "epsilon", "v", "score", "likelihood"] = "edm"
    """The prediction whose squared error is the loss."""
    times: Literal["lognormal", "uniform"] = "lognormal"
    """How training draws t: log(sigma / alpha) normal (EDM), or t uniform."""
    noise_mean: float = -1.0
    """Mean of log(sigma / alpha) in training."""
    noise_std: float = 1.4
    """Its standard deviation."""
    network: Literal["mlp", "unet"] = "mlp"
    """Residual MLP on the flattened event, or U-Net."""
    width: int = 384
    """Units of the MLP's layers."""
    depth: int = 3
    """Residual blocks of the MLP."""
    channels: tuple[int, ...] = (32, 64)
    """Channels of the U-Net, one entry per resolution."""
    attention: tuple[int, ...] = ()
    """Heights at which the U-Net attends."""
    dropout: float = 0.2
    """Share of hidden units dropped in training."""
    label_dropout: float = 0.15
    """Share of training examples whose label is hidden, for classifier-free guidance."""
    learning_rate: float = 2e-3
    """AdamW's rate: warm-up over 200 steps, then a cosine to a hundredth."""
    weight_decay: float = 1e-4
    """AdamW's decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones that are sampled."""
    steps: int = 6000
    """Updates in all, those before a resume included."""
    steps_per_call: int = 50
    """Updates in one call of the compiled program."""
    batch_size: int = 256
    """Examples in one update, over all devices."""
    sampler: str = "heun"
    """One of SAMPLERS."""
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
    if config.sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {list(SAMPLERS)}, got {config.sampler!r}")
    trained = config if config.sample_from is None else read_config(config, config.sample_from)
    train, spec = load(trained.dataset, "train", data_dir=config.data_dir)
    test, _ = load(trained.dataset, "test", data_dir=config.data_dir)
    model = build(trained, spec, train["x"])
    key_init, key_run, key_draw, key_test = jax.random.split(jax.random.key(config.seed), 4)
    optimizer = make_optimizer(trained)
    state = init_state(jax.jit(model.init)(key_init), optimizer, key_run, ema_decays=(trained.ema,))

    with _run.start_run(config) as run:
        if config.sample_from is None:
            step_fn = make_train_step(
                make_loss(config, model),
                optimizer,
                mesh=_run.mesh(config),
                steps_per_call=config.steps_per_call,
            )
            state = _run.fit(run, state, step_fn, _run.batches(config, train))
        else:
            state = restore(config.sample_from, state)
        params = state.ema_params(trained.ema)
        labels = np.resize(train["label"], config.num_samples) if spec.classes else None
        drawing = make_draw(config, model, labels)
        samples, cost = _samples.save_samples(
            run, lambda: drawing(params, key_draw), evaluations=evaluations(config)
        )
        summary = {
            "parameters": _samples.parameter_count(params),
            **cost,
            "sampler": config.sampler,
            "num_steps": config.num_steps,
            "guidance": config.guidance,
        }
        if spec.levels is None:
            _pictures.save_points(run.folder / "samples.png", {"test": test["x"], "model": samples})
            summary |= _diffusion.judge_points(
                model, params, test["x"], samples, key_test, config.likelihood_steps
            )
        else:
            _pictures.save_grid(
                run.folder / "samples.png",
                by_label(samples, labels),
                high=spec.levels - 1,
                columns=10,
            )
            summary |= _diffusion.judge_images(spec, train, test, samples, labels)
            if config.likelihood_steps:
                summary |= _diffusion.judge_likelihood(
                    model, params, test, key_test, config.likelihood_steps
                )
        return _run.finish(run, summary)


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

    def data(self, x: jax.Array, key: Any) -> jax.Array:
        """Data as the network sees it: dequantised with the key, centred."""
        if self.spec.levels is not None:
            x = Scaling(self.spec.levels).dequantise(key, x)
        return x - self.shift

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


def build(config: Config, spec: DataSpec, x: np.ndarray) -> Model:
    """The model of a data set; its mean and scale are taken from the training data."""
    y = x if spec.levels is None else np.asarray(Scaling(spec.levels).to_continuous(x))
    shift = y.mean() if spec.levels else y.mean(0, keepdims=True)
    if config.network == "unet":
        if len(spec.shape) != 3:
            raise ValueError(f"network=unet needs images, got {spec.name!r} of shape {spec.shape}")
        network = UNet(
            channels=config.channels,
            attention=config.attention,
            classes=spec.classes,
            dropout=config.dropout,
        )
    else:
        network = TimeMLP(config.width, config.depth, "layer", spec.classes, dropout=config.dropout)
    process = PROCESSES[config.process]()
    scale = float((y - shift).std())
    return Model(process, network, spec, config.prediction, scale, np.asarray(shift, np.float32))


def make_loss(config: Config, model: Model) -> Callable[..., Any]:
    """Denoising score matching as loss(params, key, batch) -> (losses, aux)."""
    if config.times == "uniform":
        times = gd.uniform_times(model.process)
    else:
        times = gd.edm_times(model.process, mean=config.noise_mean, std=config.noise_std)

    def loss_fn(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_x, key_label, key_drop, key_loss = jax.random.split(key, 4)
        x, label = model.data(batch["x"], key_x), None
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


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with clipped gradients, a warm-up and a cosine."""
    rate = config.learning_rate
    warm = min(200, config.steps // 4)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warm, config.steps, 0.01 * rate)
    adam = optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip), adam)


def make_draw(config: Config, model: Model, labels: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """Draw `num_samples` points, or levels of images, for the labels where there are classes."""
    times = gd.time_grid(model.process, config.num_steps, spacing=config.spacing)
    labels = None if labels is None else jnp.asarray(labels)

    @jax.jit
    def draw(params: Any, key: jax.Array) -> jax.Array:
        x = gd.sample(
            model.guided(params, labels, config.guidance),
            key,
            (config.num_samples, *model.spec.shape),
            process=model.process,
            times=times,
            step=SAMPLERS[config.sampler],
        )
        x = x + model.shift
        return x if model.spec.levels is None else Scaling(model.spec.levels).to_levels(x)

    return draw


def evaluations(config: Config) -> int:
    """Passes through the network for one sample; guidance takes two where one would do."""
    twice = config.sampler in ("heun", "heun_stochastic", "predictor_corrector")
    passes = 2 * config.num_steps - 1 if twice else config.num_steps
    return passes if config.guidance == 1 else 2 * passes


def by_label(images: np.ndarray, labels: Any) -> np.ndarray:
    """A hundred images; with ten classes, one to a column."""
    if labels is None or len(images) < 100:
        return images[:100]
    places = [np.flatnonzero(labels == c)[:10] for c in range(10)]
    return images[np.stack(places, 1).ravel()] if min(map(len, places)) == 10 else images[:100]


def read_config(config: Config, folder: str) -> Config:
    """The Config of an earlier run, for its model."""
    path = Path(folder) / "config.json"
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _run.RunError(f"{path} cannot be read ({error}): give a run's folder") from error
    known = {field.name for field in dataclasses.fields(Config)}
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known}
    return dataclasses.replace(config, **stored)


def restore(folder: str, like: TrainState) -> TrainState:
    """The newest state of an earlier run."""
    checkpoints = Checkpoints(Path(folder) / "checkpoints")
    try:
        found = checkpoints.restore(like)
    finally:
        checkpoints.close()
    if found is None:
        raise _run.RunError(f"{folder} holds no checkpoint to sample from")
    return found[1]


if __name__ == "__main__":
    _run.launch(main, Config)
