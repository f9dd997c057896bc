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
from experiments._data import Data
from experiments._system import System, keys, prepare, weights
from genjax.data import DataSpec
from genjax.networks import Hourglass
from genjax.numerics import sum_event
from genjax.training.record import read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Fit a convolutional network to one noisy photograph."""

    dataset: Literal["photograph"] = "photograph"
    """One photograph."""
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
    steps: int = 2500
    """Updates of the weights; the error to the clean image has its minimum near 1,500."""
    batch_size: int = 1
    """One: the data is one image."""
    ema: float = 0.97
    devices: int | None = 1
    save_every: int = 10_000


def main(config: Config) -> dict[str, Any]:
    """Fit, follow both errors, draw; returns the summary."""
    data = load_data(config)
    noisy, clean = data.train["noisy"][0], data.train["clean"][0]
    system = build(config, data)
    training = prepare(config, system, data)
    with _run.start_run(config) as run:
        params = weights(config, system, _run.fit(run, *training))
        lines = read_metrics(run.folder / "metrics.jsonl")
        steps, to_noisy, to_clean = (
            np.array([line[name] for line in lines])
            for name in ("step", "error_to_noisy", "error_to_clean")
        )
        output = np.asarray(jax.jit(system.sample, static_argnums=2)(params, None, 1))[0]
        curves = {"to the noisy image": (steps, to_noisy), "to the clean image": (steps, to_clean)}
        path = run.folder / "errors.png"
        title = "error of the output"
        _pictures.save_curves(path, curves, title=title, y_label="mean squared error", log_y=True)
        images = np.stack([noisy, output, clean])
        title = "noisy, fitted and clean photograph"
        _pictures.save_grid(run.folder / "images.png", images, title=title, columns=3, pixel=2)
        best = int(to_clean.argmin())
        return _run.finish(
            run,
            {
                "error_of_the_noisy_image": float(np.mean((noisy - clean) ** 2)),
                "best_error_to_clean": to_clean[best],
                "best_step": steps[best],
                "last_error_to_clean": to_clean[-1],
                "last_error_to_noisy": to_noisy[-1],
                "psnr_of_the_noisy_image": psnr(noisy, clean),
                "psnr_of_the_averaged_output": psnr(output, clean),
            },
        )


def load_data(config: Config) -> Data:
    """One example: the photograph, and with noise."""
    clean = photograph(config.photograph, config.size)
    noise = jax.random.normal(keys(config.seed).sample, clean.shape)
    noisy = np.asarray(clean + config.noise_std * noise)
    arrays = {"noisy": noisy[None], "clean": clean[None]}
    return Data(arrays, arrays, DataSpec(config.photograph, "images", clean.shape, 256, None))


def build(config: Config, data: Data) -> System:
    """The network with its fixed input noise; its one sample is the picture it has become."""
    shape = (1, config.size, config.size, config.input_channels)
    z = 0.1 * jax.random.uniform(keys(config.seed).test, shape)
    network = Hourglass(3, config.channels)
    return System(
        lambda key: network.init(key, z),
        make_loss(network.apply, z, config.jitter),
        optax.adam(config.learning_rate),
        lambda params, key, n, label=None: network.apply(params, z),
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
