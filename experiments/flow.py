"""Normalizing flows by exact likelihood: planar, RealNVP, spline, Glow and TarFlow.

    python -m experiments.flow                                   (spline couplings, digits)
    python -m experiments.flow --model glow
    python -m experiments.flow --model tarflow --batch-size 64 --steps 2500
    python -m experiments.flow --model tarflow --noise 0.15 --conditional --guidance 1
    python -m experiments.flow --model planar --dataset pinwheel

Images are dequantised uniformly onto the unit interval; each pixel first passes a spline of its
own, then, but for the spline couplings, the logit map: log P(x) >= E_u log p(x + u). Part of the
training split is held out; the weights with the best likelihood there are the ones reported, in
bits per dimension of the test split. Two-dimensional densities are fitted as they are, and the
divergence from the exact law is reported. With --noise TarFlow is trained on x + sigma eps and its
samples take the final denoising step; that density is of noisy data, so no bits are reported.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run, _samples
from genjax import flows
from genjax.data import DENSITIES, DataSpec, Scaling, load
from genjax.metrics import Likelihood, test_log_likelihood
from genjax.networks.coupling import Glow, PlanarFlow, RealNVP, SplineFlow
from genjax.networks.tarflow import TarFlow
from genjax.training import export_npz, init_state, make_train_step

# Layers (couplings, steps per level, planar maps, blocks) and width where the config has none.
SIZES = {
    "planar": (32, 0),
    "realnvp": (8, 256),
    "spline": (6, 128),
    "glow": (8, 64),
    "tarflow": (4, 64),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Train a flow by maximum likelihood and measure it on the test split."""

    model: Literal["planar", "realnvp", "spline", "glow", "tarflow"] = "spline"
    """The flow."""
    layers: int | None = None
    """Couplings, planar maps, Glow's steps per level, TarFlow's blocks (default: by model)."""
    width: int | None = None
    """Hidden units of a conditioner (default: by model)."""
    depth: int = 2
    """Hidden layers of a conditioner; layers of a TarFlow block."""
    bins: int = 16
    """Bins of every spline."""
    patch: int = 2
    """Side of TarFlow's patches."""
    alpha: float = 0.01
    """Margin of the logit map of images."""
    noise: float = 0.0
    """TarFlow on images: standard deviation of the Gaussian noise added to data in [-1, 1] (0:
    uniform dequantisation)."""
    conditional: bool = False
    """Give TarFlow the labels."""
    label_drop: float = 0.1
    """Share of labels dropped in conditional training."""
    guidance: float = 0.0
    """Guidance weight of conditional samples."""
    temperature: float = 1.0
    """Standard deviation of the base that samples are drawn from."""
    dropout: float = 0.2
    """Share of the conditioners' hidden units dropped in training."""
    learning_rate: float = 1e-3
    """AdamW's largest rate, reached after 100 steps, then falling along a cosine."""
    weight_decay: float = 0.01
    """AdamW's decay of the matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.995
    """Decay of the averaged weights, which are evaluated."""
    held_out: float = 0.1
    """Share of the training split kept for choosing the best step."""
    steps: int = 3000
    """Updates in all, those before a resume included."""
    steps_per_call: int = 50
    """Updates in one call of the compiled program."""
    evaluate_every: int = 250
    """Steps between evaluations on the held-out part."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    draws: int = 8
    """Dequantisations of each test image in the reported bits."""


class Flow(NamedTuple):
    """A trained thing: a bijection of (params, label, dropout key), its base, its preparation."""

    init: Callable[[jax.Array, jax.Array], Any]
    log_prob: Callable[..., jax.Array]  # (params, y, label, dropout key) -> [batch], nats
    sample: Callable[..., jax.Array]  # (params, key, n, label) -> y
    scaling: Scaling | None
    evaluations: int | None = 1  # passes through the network, one after another, for a sample


def main(config: Config) -> dict[str, Any]:
    """Train, evaluate, draw; returns the summary."""
    if not 0 < config.held_out < 1:
        raise ValueError(f"held_out must lie in (0, 1), got {config.held_out}")
    train, spec = load(config.dataset, "train", data_dir=config.data_dir)
    test, _ = load(config.dataset, "test", data_dir=config.data_dir)
    kept = int(len(train["x"]) * (1 - config.held_out))
    held = {name: array[kept:] for name, array in train.items()}
    train = {name: array[:kept] for name, array in train.items()}
    flow = build(config, spec)
    key_init, key_run, key_test, key_draw = jax.random.split(jax.random.key(config.seed), 4)
    optimizer = make_optimizer(config)
    loss_fn = make_loss(config, flow, spec)
    # Glow's actnorm is set from this batch.
    first = prepare(flow, config, key_init, jnp.asarray(train["x"][: config.batch_size]))
    params = jax.jit(flow.init)(key_init, first)
    state = init_state(params, optimizer, key_run, ema_decays=(config.ema,))
    evaluate = make_evaluate(config, flow)

    def validate(state: Any) -> dict[str, Any]:
        return {"nats": -evaluate(state.ema_params(config.ema), key_test, held, 1).log_likelihood}

    with _run.start_run(config) as run:
        step_fn = make_train_step(
            loss_fn, optimizer, mesh=_run.mesh(config), steps_per_call=config.steps_per_call
        )
        batches = _run.batches(config, train)
        state = _run.fit(run, state, step_fn, batches, evaluate=validate, best="nats")
        best = _run.best_state(run, state)
        params = best.ema_params(config.ema)
        export_npz(run.folder / "params.npz", params)
        scored = evaluate(params, key_test, test, config.draws if spec.levels else 1)
        classes = spec.classes if config.conditional else None
        summary = {
            "model": config.model,
            "parameters": _samples.parameter_count(params),
            **draw(run, flow, params, key_draw, _samples.sample_count(train, spec), classes),
            "best_step": int(best.step),
            "test_log_likelihood": scored.log_likelihood,
            "standard_error": scored.standard_error,
        }
        if spec.levels is None:
            exact = jnp.mean(DENSITIES[spec.name].log_prob(jnp.asarray(test["x"])))
            summary["exact_log_likelihood"] = exact
            summary["kl_to_exact"] = exact - scored.log_likelihood
            draw_density(run.folder, flow, params, spec, test["x"], key_draw)
        else:
            if not config.noise:
                summary["bits_per_dim"] = scored.bits_per_dim
            draw_images(run.folder, config, flow, params, spec, key_draw)
        return _run.finish(run, summary)


def build(config: Config, spec: DataSpec) -> Flow:
    """The flow of the config for data of that shape."""
    default_layers, default_width = SIZES[config.model]
    layers = default_layers if config.layers is None else config.layers
    width = default_width if config.width is None else config.width
    images = spec.levels is not None
    if not images and config.model in ("glow", "tarflow"):
        raise ValueError(f"model {config.model!r} is for images, got dataset {spec.name!r}")
    if (config.conditional or config.noise) and config.model != "tarflow":
        raise ValueError("conditional and noise need model 'tarflow'")
    event = tuple(spec.shape)
    flat = (math.prod(event),)
    unit = images and not config.noise
    spline = flows.rational_quadratic(config.bins, *((0.0, 1.0) if unit else (-6.0, 6.0)))
    inner, base_shape, takes_label = flat, flat, False
    options: dict[str, Any] = {"dropout": config.dropout}
    if config.model == "planar":
        network, options = PlanarFlow(layers), {}
    elif config.model == "realnvp":
        network = RealNVP(layers, (width,) * config.depth, **options)
    elif config.model == "spline":
        hidden = (width,) * config.depth
        # Two dimensions have but two orders; many are shuffled.
        network = SplineFlow(layers, hidden, spline, images, seed=config.seed, **options)
    elif config.model == "glow":
        network = Glow(2, layers, width, seed=config.seed, **options)
        inner, base_shape = event, network.shapes(event)
    else:
        classes = spec.classes if config.conditional else None
        network = TarFlow(config.patch, layers, config.depth, width, classes=classes, **options)
        inner, takes_label = event, classes is not None
        side = config.patch
        tokens = (event[0] // side) * (event[1] // side)
        base_shape = (tokens, side * side * event[2])
    uniform = unit and config.model == "spline"

    def base(scale: float = 1.0) -> flows.Base:
        return flows.uniform(base_shape) if uniform else flows.normal(base_shape, scale)

    def bijection(label: Any = None, key: Any = None, guidance: float = 0.0) -> flows.Bijection:
        """Margins, logit and network, with the label and the dropout key closed over."""
        extra = {"label": label} if takes_label else {}
        drop = {"dropout_key": key} if options else {}

        def forward(params: Any, x: jax.Array) -> Any:
            return network.apply(params, x.reshape(len(x), *inner), **extra, **drop)

        def inverse(params: Any, z: Any) -> Any:
            if config.model == "tarflow":
                guided = {**extra, **({"guidance": guidance} if guidance else {})}
                return network.apply(params, z, inner, method="inverse", **guided)
            x, log_det = network.apply(params, z, inverse=True)
            return x.reshape(len(x), *event), log_det

        parts = [flows.Bijection(forward, inverse)]
        if unit and not uniform:
            parts.insert(0, flows.logit(config.alpha))
        if unit:
            parts.insert(0, flows.elementwise(spline))
        return flows.chain(parts)

    def tree(params: Any) -> list[Any]:
        margins = [params["margins"]] if unit else []
        return [*margins, *([None] if unit and not uniform else []), params["network"]]

    def init(key: jax.Array, y: jax.Array) -> Any:
        params: dict[str, Any] = {}
        if unit:
            params["margins"] = jnp.zeros((*event[:-1], spline.size, event[-1]))
            y = y if uniform else flows.logit(config.alpha).forward(None, y)[0]
        params["network"] = network.init(key, y.reshape(len(y), *inner))
        return params

    def log_prob(params: Any, y: jax.Array, label: Any = None, key: Any = None) -> jax.Array:
        return flows.log_prob(bijection(label, key), base(), tree(params), y)

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        flow = bijection(label, guidance=config.guidance)
        y = flows.sample(flow, base(config.temperature), tree(params), key, n)
        if config.noise:
            y = flows.denoise(lambda y: log_prob(params, y, label), y, config.noise)
        return y

    scaling = None if not images else Scaling(spec.levels or 0, 0.0 if unit else -1.0, 1.0)
    # TarFlow goes through its tokens one after another.
    passes = base_shape[0] if config.model == "tarflow" else 1
    return Flow(init, log_prob, sample, scaling, passes)


def prepare(flow: Flow, config: Config, key: jax.Array, x: jax.Array) -> jax.Array:
    """Data as the flow sees it: dequantised, or noisy."""
    if flow.scaling is None:
        return x
    if config.noise:
        y = flow.scaling.to_continuous(x)
        return y + config.noise * jax.random.normal(key, y.shape)
    return flow.scaling.dequantise(key, x)


def make_loss(config: Config, flow: Flow, spec: DataSpec) -> Callable[..., Any]:
    """Negative log-likelihood as loss(params, key, batch) -> (losses, aux)."""

    def loss_fn(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_noise, key_net, key_label = jax.random.split(key, 3)
        y = prepare(flow, config, key_noise, batch["x"])
        label = batch.get("label") if config.conditional else None
        if label is not None:
            drop = jax.random.bernoulli(key_label, config.label_drop, label.shape)
            label = jnp.where(drop, spec.classes or 0, label)
        return -flow.log_prob(params, y, label, key_net), {}

    return loss_fn


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with clipped gradients, warm-up and a cosine."""
    warm = min(100, config.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warm, config.steps, 0.02 * config.learning_rate
    )
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(rate, b2=0.99, weight_decay=config.weight_decay, mask=matrices),
    )


def make_evaluate(config: Config, flow: Flow) -> Callable[..., Likelihood]:
    """Score a split: evaluate(params, key, arrays, draws)."""

    def score(params: Any, key: jax.Array, x: Any, draws: int) -> Likelihood:
        def log_prob(key: jax.Array, y: jax.Array) -> jax.Array:
            if config.noise:
                y = prepare(flow, config, key, y.astype(jnp.int32))
            return flow.log_prob(params, y)

        scaling = None if config.noise else flow.scaling
        x = jnp.asarray(x, jnp.float32) if scaling is None else x
        return test_log_likelihood(
            log_prob, key, x, scaling=scaling, batch_size=256, num_draws=draws
        )

    compiled = jax.jit(score, static_argnums=3)
    return lambda params, key, arrays, draws: compiled(params, key, arrays["x"], draws)


def draw(
    run: _run.Run, flow: Flow, params: Any, key: jax.Array, count: int, classes: int | None = None
) -> dict[str, Any]:
    """Leave `count` samples in the run's folder, the classes in turn; what they cost."""
    label = {} if classes is None else {"label": jnp.arange(count) % classes}

    @jax.jit
    def sample(params: Any) -> jax.Array:
        y = flow.sample(params, key, count, **label)
        return y if flow.scaling is None else flow.scaling.to_levels(y)

    return _samples.save_samples(run, lambda: sample(params), evaluations=flow.evaluations)[1]


def draw_images(
    folder: Any, config: Config, flow: Flow, params: Any, spec: DataSpec, key: jax.Array
) -> None:
    """Write samples, by class in columns where the model takes labels."""
    label = jnp.arange(100) % (spec.classes or 1) if config.conditional else None
    y = jax.jit(lambda p, k: flow.sample(p, k, 100, label))(params, key)
    images = flow.scaling.to_levels(y) if flow.scaling else y
    _pictures.save_grid(folder / "samples.png", images, high=(spec.levels or 2) - 1, columns=10)


def draw_density(
    folder: Any, flow: Flow, params: Any, spec: DataSpec, data: np.ndarray, key: jax.Array
) -> None:
    """Write the density and samples of the flow beside the data."""
    limit = 1.15 * float(np.abs(data).max())
    axis = np.linspace(-limit, limit, 200)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2), jnp.float32)
    density = np.exp(np.asarray(jax.jit(flow.log_prob)(params, grid))).reshape(200, 200)
    samples = np.asarray(jax.jit(lambda p, k: flow.sample(p, k, 5000))(params, key))

    def draw(axes: Any) -> None:
        axes[0].imshow(density, origin="lower", extent=(-limit, limit) * 2)
        axes[0].set(title="density of the flow")
        for axis, points, title in ((axes[1], samples, "samples"), (axes[2], data, spec.name)):
            axis.plot(*points.T, ".", markersize=1)
            axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")

    _pictures.save_figure(folder / "density.png", draw, panels=3)


if __name__ == "__main__":
    _run.launch(main, Config)
