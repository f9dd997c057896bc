"""PixelCNN: the exact likelihood of images, a pixel from those before it.

    python -m experiments.pixelcnn
    python -m experiments.pixelcnn --conditional
    python -m experiments.pixelcnn --dataset mnist_5k --components 5 --first-kernel 7

A pixel's law is a probability for each level, or a mixture of discretised logistics, whose colours
follow one another. The likelihood is exact: no bound and no dequantisation, so that the bits per
dimension of other families stand beside it. The run folder gets samples.png and pixel_bits.png,
what each pixel of the test images costs.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run
from experiments._data import Data, load_data
from experiments._system import Row, System, adamw, train
from genjax import checks
from genjax.autoregressive import (
    colour_logistic_mixture,
    draw_colours,
    recomputing_pixel_step,
    sample_pixels,
)
from genjax.likelihoods import categorical_log_likelihood
from genjax.networks import GatedPixelCNN, PixelCNN, PixelCNNPlus
from genjax.numerics import log_mean_exp

ROWS = (
    Row("pixelcnn", "PixelCNN", images={}, bits="exact",
        larger={"components": 5, "first_kernel": 7, "features": 32, "dropout": 0.2,
                "batch_size": 16}),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a PixelCNN and measure its exact likelihood."""

    network: Literal["gated", "masked", "plus"] = "gated"
    """Two gated stacks, masked convolutions with their blind spot, or PixelCNN++ (components)."""
    conditional: bool = False
    """Give the label to every gate."""
    components: int | None = None
    """Logistics in a pixel's mixture, 0 for a probability of each level, of one colour (default: 5
    for colours and for PixelCNN++, else 0)."""
    features: int = 48
    """Channels of either stack."""
    layers: int = 5
    """Layers of gates, residual blocks, or resnets on either way of PixelCNN++."""
    first_kernel: int = 5
    """Side of the first layer's convolution (not of PixelCNN++)."""
    dropout: float = 0.4
    """Share of features dropped in training."""
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    """AdamW's decay of the matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.99
    steps: int = 2000
    batch_size: int = 64
    steps_per_call: int = 10
    held_out: float = 0.0
    """Share of the training split that is scored instead of trained on, to choose options by."""


def main(config: Config) -> dict[str, Any]:
    """Train, score, draw; returns the summary."""
    data = load_data(config)
    system, pixel_nats = make(config, data)

    def report(run: _run.Run, params: Any, samples: np.ndarray) -> dict[str, Any]:
        x, label = data.test["x"], data.test.get("label")
        label = label if config.conditional else None
        score = jax.jit(pixel_nats)
        parts = [
            score(params, x[i : i + 256], None if label is None else label[i : i + 256])
            for i in range(0, len(x), 256)
        ]
        bits = -np.concatenate(parts) / math.log(2)
        plot_bits(run.folder, x, bits, (data.spec.levels or 2) - 1)
        if label is None:
            return {}
        return {"bits_per_dim_given_label": float(bits.mean() / data.spec.shape[-1])}

    return train(config, system, data, report)


def build(config: Config, data: Data) -> System:
    """The network with its loss and its sampler."""
    return make(config, data)[0]


def make(config: Config, data: Data) -> tuple[System, Any]:
    """The system, and pixel_nats(params, x, label): log p of each pixel [n, height, width]."""
    data.require("images", labels=config.conditional)
    checks.between("dropout", config.dropout, 0, 0.99)
    checks.integer("features", config.features, 2 if config.network == "masked" else 1)
    height, width, colours = data.spec.shape
    levels, classes = data.spec.levels or 0, data.spec.classes if config.conditional else None
    if config.components is None:
        mixed = config.network == "plus" or (colours > 1 and config.network != "masked")
        config = dataclasses.replace(config, components=5 if mixed else 0)
    if not config.components and colours > 1:
        raise ValueError(f"components must be at least 1 for {colours} colours, got 0")
    if config.network == "masked" and (config.conditional or config.components):
        raise ValueError("network masked takes neither labels nor components")
    network = make_network(config, levels, colours, classes)

    def numbers(params: Any, x: jax.Array, label: Any = None, key: Any = None) -> jax.Array:
        options = {} if config.network == "masked" else {"label": label}
        found = network.apply(params, x, dropout_key=key, **options)
        return found.reshape(*x.shape[:3], -1)

    def pixel_nats(params: Any, x: jax.Array, label: Any = None, key: Any = None) -> jax.Array:
        x = jnp.asarray(x).astype(jnp.int32)
        raw, each = numbers(params, x, label, key), x.reshape(-1, 1, 1, colours)
        raw = raw.reshape(len(each), 1, 1, -1)
        if config.components:
            nats = colour_logistic_mixture(each, raw, levels=levels)
        else:
            nats = categorical_log_likelihood(each, raw[..., None, :])
        return nats.reshape(x.shape[:3])

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        label = batch.get("label") if config.conditional else None
        nats = pixel_nats(params, batch["x"], label, key)
        return -jnp.sum(nats, axis=(1, 2)), {}

    def log_prob(params: Any, key: jax.Array, x: jax.Array) -> jax.Array:
        total = lambda label: jnp.sum(pixel_nats(params, x, label), axis=(1, 2))  # noqa: E731
        if classes is None:
            return total(None)
        # The law of images alone: labels are as likely as one another.
        every = jnp.repeat(jnp.arange(classes)[:, None], len(x), axis=1)
        return log_mean_exp(jax.lax.map(total, every), axis=0)

    def draw(key: Any, raw: jax.Array) -> jax.Array:
        if config.components:
            return draw_colours(key, raw, colours=colours, levels=levels)
        return jax.random.categorical(key, raw, mode="high")[None]

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        if config.network == "masked":
            step = recomputing_pixel_step(functools.partial(numbers, params))
            cache = jnp.zeros((n, height, width, colours), jnp.int32)
        else:
            step = functools.partial(network.apply, params, method="step", label=label)
            cache = network.apply(params, n, width, method="empty_cache")
        drawn = sample_pixels(step, cache, key, (n, height, width, colours), draw=draw)
        return drawn.astype(jnp.uint8)

    def init(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, height, width, colours), jnp.int32))

    system = System(
        init,
        loss,
        adamw(config, optax.cosine_decay_schedule(config.learning_rate, config.steps)),
        sample,
        log_prob,
        evaluations=height * width,
        labels=data.labels() if config.conditional else None,
    )
    return system, pixel_nats


def make_network(config: Config, levels: int, colours: int, classes: int | None) -> nn.Module:
    """The network, of images of so many levels and colours."""
    shared = {"features": config.features, "dropout": config.dropout}
    if config.network == "plus":
        if not config.components:
            raise ValueError("network plus needs components, at least 1, got 0")
        options = {"resnets": config.layers, "classes": classes, **shared}
        return PixelCNNPlus(levels, colours, config.components, **options)
    shared |= {"layers": config.layers, "first_kernel": config.first_kernel}
    if config.network == "masked":
        return PixelCNN(levels, **shared)
    return GatedPixelCNN(levels, colours, config.components or None, classes=classes, **shared)


def plot_bits(folder: Any, x: np.ndarray, bits: np.ndarray, high: int) -> None:
    """Write pixel_bits.png: the mean over the test images, and three of them beside their bits."""

    def plot(axes: Any) -> None:
        axes[0].imshow(bits.mean(0), vmin=0, cmap="magma")
        axes[0].set(title=f"mean bits, {bits.mean():.2f} a pixel")
        for i in range(3):
            shown = x[i] if x.shape[-1] == 3 else x[i, ..., 0]
            axes[2 * i + 1].imshow(shown / high, cmap="gray", vmin=0, vmax=1)
            axes[2 * i + 2].imshow(bits[i], vmin=0, cmap="magma")
            axes[2 * i + 2].set(title=f"{bits[i].sum():.0f} bits")
        for axis in axes:
            axis.set(xticks=[], yticks=[])

    title = "bits of each pixel, three test images"
    _pictures.save_figure(folder / "pixel_bits.png", plot, title=title, panels=7, size=2.0)


if __name__ == "__main__":
    _run.launch(main, Config)
