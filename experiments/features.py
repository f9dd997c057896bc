"""Train the small classifier whose hidden layer serves the metrics as features.

    python -m experiments.features
    python -m experiments.features --dataset mnist --channels 16 32 64

Images are shifted by up to a pixel and dequantised, features dropped, so that those of the training
split look like those of fresh images; their mean square over that split is made 1. The run folder
gets features.npz, which genjax.metrics.feature_extractor(path=...) reads; the summary has its
SHA-256. features.png has the test images by their features, on the two axes along which these vary
most.
"""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run
from experiments._data import Data, load_data
from experiments._system import System, parameter_count, prepare, weights
from genjax.networks import FeatureNetwork
from genjax.training import export_npz


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a classifier and keep its weights."""

    width: int = 64
    """How many features."""
    channels: tuple[int, ...] = (16, 32, 32)
    """Channels of the convolutions; all but the first halve the image."""
    dropout: float = 0.5
    """Share of the features dropped in training."""
    shift: int = 1
    """Largest shift of a training image in pixels, its border repeated."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    """AdamW's decay."""
    ema: float = 0.99
    """Decay of the averaged weights, which are kept."""
    steps: int = 1500
    steps_per_call: int = 1
    """Updates in one call of the compiled program: on CPU a loop slows convolutions down."""


def main(config: Config) -> dict[str, Any]:
    """Train, measure the accuracy, write the weights; returns the summary."""
    data = load_data(config)
    system, (network, scaling) = build(config, data), parts(config, data)

    @jax.jit
    def right(params: Any, arrays: Any) -> jax.Array:
        logits = network.apply(params, scaling.to_continuous(arrays["x"]))
        return jnp.mean(jnp.argmax(logits, axis=1) == arrays["label"])

    training = prepare(config, system, data)
    with _run.start_run(config) as run:
        params = weights(config, system, _run.fit(run, *training))
        path = run.folder / "features.npz"
        embed = jax.jit(lambda x: network.apply(params, scaling.to_continuous(x), method="embed"))
        scale = np.sqrt(np.mean(np.square(embed(data.train["x"]))))
        facts = {"levels": data.spec.levels, "shape": np.array(data.spec.shape), "scale": scale}
        export_npz(path, {**facts, **params})
        plot(run, data, np.asarray(embed(data.test["x"])))
        return _run.finish(
            run,
            {
                "parameters": parameter_count(params),
                "train_accuracy": right(params, data.train),
                "test_accuracy": right(params, data.test),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            },
        )


def plot(run: Any, data: Data, features: np.ndarray) -> None:
    """features.png: the test images in the plane of their features' two principal axes."""
    centred = features - features.mean(0)
    plane = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T

    def draw(axes: Any) -> None:
        points = axes[0].scatter(*plane.T, c=data.test["label"], cmap="tab10", s=8)
        axes[0].legend(*points.legend_elements(), fontsize=7)
        axes[0].set(xlabel="first axis", ylabel="second axis")

    title = f"test images by their features, {data.spec.name}"
    _pictures.save_figure(run.folder / "features.png", draw, title=title, size=5.0)


def parts(config: Config, data: Data) -> tuple[FeatureNetwork, Any]:
    """The network, and the map from levels to its inputs."""
    data.require("images", labels=True)
    network = FeatureNetwork(
        classes=data.spec.classes or 0,
        width=config.width,
        channels=config.channels,
        dropout=config.dropout,
    )
    return network, data.scaling()


def build(config: Config, data: Data) -> System:
    """The classifier with its loss; nothing is sampled."""
    network, scaling = parts(config, data)

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_noise, key_drop = jax.random.split(key)
        x = scaling.dequantise(key_noise, batch["x"])
        logits = network.apply(params, x, dropout_key=key_drop)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, {"right": (jnp.argmax(logits, 1) == batch["label"]).astype(jnp.float32)}

    def init(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, *data.spec.shape)))

    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    return System(init, loss, optax.adamw(rate, weight_decay=config.weight_decay))


if __name__ == "__main__":
    _run.launch(main, Config)
