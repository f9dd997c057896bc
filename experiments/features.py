"""Train the small classifier whose hidden layer serves the metrics as features.

    python -m experiments.features
    python -m experiments.features --dataset mnist --channels 16 32 64

Images are shifted by up to a pixel and dequantised, features dropped, so that those of the training
split look like those of fresh images; their mean square over that split is made 1. The run folder
gets features.npz, which genjax.metrics.feature_extractor(path=...) reads; the summary has its
SHA-256.
"""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _run, _samples
from genjax.data import Scaling, load
from genjax.networks import FeatureNetwork
from genjax.training import export_npz, init_state, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Train a classifier and keep its weights."""

    width: int = 64
    """How many features."""
    channels: tuple[int, ...] = (16, 32, 32)
    """Channels of the convolutions; all but the first halve the image."""
    dropout: float = 0.5
    """Share of the features dropped in training."""
    shift: int = 1
    """Largest shift of an image, in pixels along each side."""
    learning_rate: float = 3e-3
    """AdamW's largest rate, falling along a cosine."""
    weight_decay: float = 0.01
    """AdamW's decay."""
    ema: float = 0.99
    """Decay of the averaged weights, which are kept."""
    steps: int = 1500
    """Updates in all, those before a resume included."""
    steps_per_call: int = 1
    """Updates in one call of the compiled program: on CPU a loop slows convolutions down."""


def main(config: Config) -> dict[str, Any]:
    """Train, measure the accuracy, write the weights; returns the summary."""
    train, spec = load(config.dataset, "train", data_dir=config.data_dir)
    test, _ = load(config.dataset, "test", data_dir=config.data_dir)
    if spec.levels is None or spec.classes is None:
        raise ValueError(f"dataset must be of images with labels, got {spec.name!r}")
    scaling = Scaling(spec.levels)
    network = FeatureNetwork(
        classes=spec.classes, width=config.width, channels=config.channels, dropout=config.dropout
    )

    def loss_fn(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_noise, key_shift, key_drop = jax.random.split(key, 3)
        x = shifted(key_shift, batch["x"], config.shift)
        logits = network.apply(params, scaling.dequantise(key_noise, x), dropout_key=key_drop)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses, {"right": (jnp.argmax(logits, 1) == batch["label"]).astype(jnp.float32)}

    @jax.jit
    def right(params: Any, arrays: Any) -> jax.Array:
        logits = network.apply(params, scaling.to_continuous(arrays["x"]))
        return jnp.mean(jnp.argmax(logits, axis=1) == arrays["label"])

    key_init, key_run = jax.random.split(jax.random.key(config.seed))
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adamw(rate, weight_decay=config.weight_decay)
    params = jax.jit(network.init)(key_init, jnp.zeros((1, *spec.shape)))
    state = init_state(params, optimizer, key_run, ema_decays=(config.ema,))
    with _run.start_run(config) as run:
        step_fn = make_train_step(
            loss_fn, optimizer, mesh=_run.mesh(config), steps_per_call=config.steps_per_call
        )
        state = _run.fit(run, state, step_fn, _run.batches(config, train))
        params = state.ema_params(config.ema)
        path = run.folder / "features.npz"
        embed = jax.jit(lambda x: network.apply(params, scaling.to_continuous(x), method="embed"))
        scale = np.sqrt(np.mean(np.square(embed(train["x"]))))
        facts = {"levels": spec.levels, "shape": np.array(spec.shape), "scale": scale}
        export_npz(path, {**facts, **params})
        return _run.finish(
            run,
            {
                "parameters": _samples.parameter_count(params),
                "train_accuracy": right(params, train),
                "test_accuracy": right(params, test),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            },
        )


def shifted(key: jax.Array, x: jax.Array, most: int) -> jax.Array:
    """Shift each image by up to `most` pixels up or down and to either side, level 0 moving in."""
    padded = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)))
    starts = jax.random.randint(key, (len(x), 2), 0, 2 * most + 1)

    def cut(image: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), x.shape[1:])

    return jax.vmap(cut)(padded, starts)


if __name__ == "__main__":
    _run.launch(main, Config)
