"""Deep image prior: an untrained convolutional network denoises one photograph.

The network's input is fixed noise and its weights are fitted to the noisy photograph alone. Its
output passes near the clean photograph before it reaches the noisy one: the error to the noisy
image falls throughout, that to the clean one has a minimum, where one would stop (Ulyanov, Vedaldi
& Lempitsky 2018).

    python -m experiments.deep_image_prior
    python -m experiments.deep_image_prior --photograph flower.jpg --noise-std 0.15 --steps 4000
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run
from genjax.networks import Hourglass
from genjax.numerics import sum_event
from genjax.training import data_mesh, init_state, make_train_step
from genjax.training.record import read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Fit a convolutional network to one noisy photograph."""

    photograph: Literal["china.jpg", "flower.jpg"] = "china.jpg"
    """One of the photographs that come with scikit-learn."""
    size: int = 128
    """Height and width of the crop."""
    noise_std: float = 0.1
    """Standard deviation of the noise that is added (white is 1)."""
    channels: tuple[int, ...] = (16, 32, 32)
    """Channels of the network at each halving."""
    input_channels: int = 16
    """Channels of the fixed input noise."""
    jitter: float = 1 / 30
    """Standard deviation of the noise added to the input at each step."""
    learning_rate: float = 0.01
    """Adam's rate."""
    steps: int = 2500
    """Updates of the weights; the error to the clean image has its minimum near 1,500."""
    steps_per_call: int = 1
    """Updates in one call of the compiled program; on a CPU convolutions are slower in a loop."""
    batch_size: int = 1
    """Not used: the data is one image."""
    save_every: int = 10_000
    """Steps between checkpoints; the last state is always saved."""


def main(config: Config) -> dict[str, Any]:
    """Fit, follow both errors, draw; returns the summary."""
    clean = photograph(config.photograph, config.size)
    key_noise, key_input, key_init, key_run = jax.random.split(jax.random.key(config.seed), 4)
    noisy = jnp.asarray(clean) + config.noise_std * jax.random.normal(key_noise, clean.shape)
    z = 0.1 * jax.random.uniform(key_input, (1, config.size, config.size, config.input_channels))
    network = Hourglass(3, config.channels)
    optimizer = optax.adam(config.learning_rate)
    state = init_state(jax.jit(network.init)(key_init, z), optimizer, key_run, ema_decays=(0.97,))

    batch = {"noisy": np.asarray(noisy)[None], "clean": clean[None]}
    apply = jax.jit(network.apply)
    with _run.start_run(config) as run:
        step_fn = make_train_step(
            make_loss(network.apply, z, config.jitter),
            optimizer,
            mesh=data_mesh(1),
            steps_per_call=config.steps_per_call,
        )
        state = _run.fit(run, state, step_fn, lambda step: batch)
        lines = read_metrics(run.folder / "metrics.jsonl")
        steps, to_noisy, to_clean = (
            np.array([line[name] for line in lines])
            for name in ("step", "error_to_noisy", "error_to_clean")
        )
        output = np.asarray(apply(state.ema_params(0.97), z))[0]
        _pictures.save_curves(
            run.folder / "errors.png",
            {"to the noisy image": (steps, to_noisy), "to the clean image": (steps, to_clean)},
            y_label="mean squared error",
            log_y=True,
        )
        _pictures.save_grid(
            run.folder / "images.png", np.stack([noisy, output, clean]), columns=3, pixel=2
        )
        best = int(to_clean.argmin())
        return _run.finish(
            run,
            {
                "error_of_the_noisy_image": float(np.mean((np.asarray(noisy) - clean) ** 2)),
                "best_error_to_clean": to_clean[best],
                "best_step": steps[best],
                "last_error_to_clean": to_clean[-1],
                "last_error_to_noisy": to_noisy[-1],
                "psnr_of_the_noisy_image": psnr(np.asarray(noisy), clean),
                "psnr_of_the_averaged_output": psnr(output, clean),
            },
        )


def make_loss(apply: Callable[..., jax.Array], z: jax.Array, jitter: float) -> Callable[..., Any]:
    """Mean squared error to the noisy image; the one to the clean image is only watched."""

    def loss_fn(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        output = apply(params, z + jitter * jax.random.normal(key, z.shape))
        to_noisy, to_clean = (
            sum_event(jnp.square(output - batch[name])) / output[0].size
            for name in ("noisy", "clean")
        )
        return to_noisy, {"error_to_noisy": to_noisy, "error_to_clean": to_clean}

    return loss_fn


def photograph(name: str, size: int) -> np.ndarray:
    """The middle of one of scikit-learn's photographs, float32 in [0, 1]."""
    from sklearn.datasets import load_sample_image

    image = load_sample_image(name)
    top, left = ((n - size) // 2 for n in image.shape[:2])
    return np.float32(image[top : top + size, left : left + size] / 255)


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal-to-noise ratio in decibels, peak 1."""
    return float(-10 * np.log10(np.mean((image - clean) ** 2)))


if __name__ == "__main__":
    _run.launch(main, Config)
