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
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments import _pictures, _run
from experiments._data import Data, load_data
from experiments._system import Row, System, adamw, train
from genjax import checks, flows
from genjax.networks.coupling import Glow, PlanarFlow, RealNVP, SplineFlow
from genjax.networks.tarflow import TarFlow

# Layers (couplings, steps per level, planar maps, blocks) and width where the config has none.
SIZES = {
    "planar": (32, 0),
    "realnvp": (8, 256),
    "spline": (6, 128),
    "glow": (8, 64),
    "tarflow": (4, 64),
}
ROWS = (
    Row("planar", "Flow, planar", None, {"model": "planar"}),
    Row("realnvp", "Flow, RealNVP", {"model": "realnvp"}, {"model": "realnvp"}),
    Row("spline", "Flow, spline", {"model": "spline"}, {"model": "spline"}),
    Row("glow", "Flow, Glow", {"model": "glow"}, None),
    Row("tarflow", "Flow, TarFlow", {"model": "tarflow"}, None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a flow by maximum likelihood and measure it on the test split."""

    evaluation: ClassVar = ("guidance", "temperature", "draws")

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
    patch: int | None = None
    """Side of TarFlow's patches (default: 2, above 32 pixels 4)."""
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
    weight_decay: float = 0.01
    """AdamW's decay of the matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.995
    held_out: float = 0.1
    """Share of the training split kept for choosing the best step."""
    steps: int = 3000
    steps_per_call: int = 50
    evaluate_every: int = 250
    """Steps between evaluations on the held-out part."""
    log_every: int = 50
    draws: int = 8
    """Dequantisations of each test image in the reported bits."""


def main(config: Config) -> dict[str, Any]:
    """Train, evaluate, draw; returns the summary."""
    checks.positive("held_out", config.held_out)
    data = load_data(config)
    system = build(config, data)
    return train(config, system, data, _pictures.density_report(system, data))


def build(config: Config, data: Data) -> System:
    """The flow of the config, its loss and its optimizer."""
    flow, scaling = make_flow(config, data), data.scaling(0.0 if unit(config, data) else -1.0)

    def prepare(key: jax.Array, x: jax.Array) -> jax.Array:
        """Data as the flow sees it: dequantised, or noisy."""
        if not config.noise:
            return scaling.dequantise(key, x)
        y = scaling.to_continuous(x.astype(jnp.int32))
        return y + config.noise * jax.random.normal(key, y.shape)

    def init(key: jax.Array) -> Any:
        key_net, key_noise = jax.random.split(key)
        # Glow's actnorm is set from this batch.
        first = prepare(key_noise, jnp.asarray(data.train["x"][: config.batch_size]))
        return flow.init(key_net, first)

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_noise, key_net, key_label = jax.random.split(key, 3)
        y, label = prepare(key_noise, batch["x"]), None
        if config.conditional and data.spec.classes:
            drop = jax.random.bernoulli(key_label, config.label_drop, batch["label"].shape)
            label = jnp.where(drop, data.spec.classes, batch["label"])
        return -flow.log_prob(params, y, label, key_net), {}

    def log_prob(params: Any, key: Any, y: jax.Array) -> jax.Array:
        return flow.log_prob(params, prepare(key, y) if config.noise else y)

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        return scaling.to_levels(flow.sample(params, key, n, label))

    peak, warm = config.learning_rate, min(100, config.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warm, config.steps, 0.02 * peak)
    # With noise the density is of noisy data, and says nothing of the levels' bits.
    bits = {"bits": False} if config.noise else {}
    return System(
        init,
        loss,
        adamw(config, rate),
        sample,
        log_prob,
        None if config.noise else scaling,
        likelihood={"num_draws": config.draws if data.kind == "images" else 1, **bits},
        evaluations=flow.passes,
        labels=data.labels() if config.conditional else None,
        best="nats",
        remat=config.model == "tarflow",
    )


class Flow(NamedTuple):
    """A network between data as it sees them and its base."""

    init: Callable[[jax.Array, jax.Array], Any]  # (key, y) -> params
    log_prob: Callable[..., jax.Array]  # (params, y, label, dropout key) -> [batch], nats
    sample: Callable[..., jax.Array]  # (params, key, n, label) -> y
    passes: int  # through the network, one after another, for a sample


class Core(NamedTuple):
    """The network, the shapes that it takes and gives, and what else it takes."""

    network: Any
    shape: tuple[int, ...]
    base: Any  # shape, or tree of shapes
    dropout: bool = True
    label: bool = False


def unit(config: Config, data: Data) -> bool:
    """Whether data are dequantised onto the unit interval, where margins come first."""
    return data.kind == "images" and not config.noise


def splines(config: Config, data: Data) -> Any:
    """The splines of the margins, and of spline couplings."""
    return flows.rational_quadratic(
        config.bins, *((0.0, 1.0) if unit(config, data) else (-6.0, 6.0))
    )


def core(config: Config, data: Data) -> Core:
    """The network of the config for data of that shape."""
    if config.model in ("glow", "tarflow") and data.kind != "images":
        raise ValueError(f"model {config.model!r} is for images, got dataset {data.spec.name!r}")
    if (config.conditional or config.noise) and config.model != "tarflow":
        raise ValueError("conditional and noise need model 'tarflow'")
    if config.conditional:
        data.require("images", labels=True)
    if config.guidance and not config.conditional:
        raise ValueError(f"guidance must be 0 without --conditional, got {config.guidance}")
    if config.temperature != 1 and config.model == "spline" and unit(config, data):
        raise ValueError(
            "temperature must be 1 with splines on images, whose base is uniform, got "
            f"{config.temperature}"
        )
    layers, width = (
        default if given is None else given
        for given, default in zip((config.layers, config.width), SIZES[config.model], strict=True)
    )
    event, hidden, drop = data.spec.shape, (width,) * config.depth, {"dropout": config.dropout}
    flat = (math.prod(event),)
    if config.model == "planar":
        return Core(PlanarFlow(layers), flat, flat, dropout=False)
    if config.model == "realnvp":
        return Core(RealNVP(layers, hidden, **drop), flat, flat)
    if config.model == "spline":
        # Two dimensions have but two orders; many are shuffled.
        shuffled = data.kind == "images"
        spline = splines(config, data)
        return Core(
            SplineFlow(layers, hidden, spline, shuffled, seed=config.seed, **drop), flat, flat
        )
    if config.model == "glow":
        glow = Glow(2, layers, width, seed=config.seed, **drop)
        return Core(glow, event, glow.shapes(event))
    classes = data.spec.classes if config.conditional else None
    patch = config.patch or (4 if event[0] > 32 else 2)
    tarflow = TarFlow(patch, layers, config.depth, width, classes=classes, **drop)
    tarflow = tarflow.clone(remat=config.remat)
    tokens = (event[0] // patch) * (event[1] // patch)
    return Core(tarflow, event, (tokens, patch**2 * event[2]), label=classes is not None)


def make_flow(config: Config, data: Data) -> Flow:
    """Margins, logit map and network as one flow; the spline couplings need no logit map."""
    net, event, margins = core(config, data), tuple(data.spec.shape), unit(config, data)
    uniform = margins and config.model == "spline"
    spline, logit = splines(config, data), flows.logit(config.alpha)

    def base(scale: float = 1.0) -> flows.Base:
        return flows.uniform(net.base) if uniform else flows.normal(net.base, scale)

    def bijection(label: Any = None, key: Any = None, guidance: float = 0.0) -> flows.Bijection:
        """The whole, with the label and the dropout key closed over."""
        extra = {"label": label} if net.label else {}
        drop = {"dropout_key": key} if net.dropout else {}

        def forward(params: Any, x: jax.Array) -> Any:
            return net.network.apply(params, x.reshape(len(x), *net.shape), **extra, **drop)

        def inverse(params: Any, z: Any) -> Any:
            if config.model == "tarflow":
                guided = {**extra, **({"guidance": guidance} if guidance else {})}
                return net.network.apply(params, z, net.shape, method="inverse", **guided)
            x, log_det = net.network.apply(params, z, inverse=True)
            return x.reshape(len(x), *event), log_det

        first = [flows.elementwise(spline)] if margins else []
        second = [logit] if margins and not uniform else []
        return flows.chain([*first, *second, flows.Bijection(forward, inverse)])

    def tree(params: Any) -> list[Any]:
        first = [params["margins"]] if margins else []
        return [*first, *([None] if margins and not uniform else []), params["network"]]

    def init(key: jax.Array, y: jax.Array) -> Any:
        params: dict[str, Any] = {}
        if margins:
            params["margins"] = jnp.zeros((*event[:-1], spline.size, event[-1]))
            y = y if uniform else logit.forward(None, y)[0]
        params["network"] = net.network.init(key, y.reshape(len(y), *net.shape))
        return params

    def log_prob(params: Any, y: jax.Array, label: Any = None, key: Any = None) -> jax.Array:
        return flows.log_prob(bijection(label, key), base(), tree(params), y)

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        flow = bijection(label, guidance=config.guidance)
        y = flows.sample(flow, base(config.temperature), tree(params), key, n)
        if config.noise:
            y = flows.denoise(lambda y: log_prob(params, y, label), y, config.noise)
        return y

    # TarFlow goes through its tokens one after another.
    return Flow(init, log_prob, sample, net.base[0] if config.model == "tarflow" else 1)


if __name__ == "__main__":
    _run.launch(main, Config)
