"""Inpainting and deblurring of digits with one trained diffusion model, conditioned after the fact.

The model is a run of experiments.diffusion and has never seen a degraded image.

    python -m experiments.diffusion --run-dir runs/digits
    python -m experiments.inverse --model runs/digits
    python -m experiments.inverse --model runs/digits --task deblur --method dps

Methods: replacement (inpainting only), dps (diffusion posterior sampling) and pigdm
(pseudoinverse guidance). The picture has the degraded images, the restored ones and the truth.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _pictures, _run, diffusion
from experiments._data import load_data
from experiments._system import reopen
from genjax import diffusion as gd


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Restore degraded test images."""

    dataset: Literal["model"] = "model"
    """The test images of the data set that the model was trained on."""
    model: str = "runs/diffusion/1"
    """Folder of a run of experiments.diffusion on images."""
    task: Literal["inpaint", "deblur"] = "inpaint"
    """Hide a square in the middle, or blur and add noise."""
    method: Literal["pigdm", "dps", "replacement"] = "pigdm"
    """How the observation steers the sampler."""
    noise_std: float = 0.05
    """Standard deviation of the observation's noise (data scale, [-1, 1])."""
    scale: float = 1.0
    """Strength of dps' guidance; 1 is that of a Gaussian likelihood."""
    num_steps: int = 100
    """Steps of the (ancestral) sampler."""
    num_images: int = 100
    """Test images that are restored."""


def main(config: Config) -> dict[str, Any]:
    """Degrade, restore, measure, draw; returns the summary."""
    if config.method == "replacement" and config.task != "inpaint":
        raise ValueError("method=replacement is for task=inpaint, where pixels are seen unchanged")
    _, params, trained = reopen(config.model, data_dir=config.data_dir)
    if not isinstance(trained, diffusion.Config):
        raise _run.RunError(f"model must be a run of experiments.diffusion, got {config.model}")
    data = load_data(trained)
    data.require("images")
    model = diffusion.make_model(trained, data)
    key_noise, key_sample = jax.random.split(jax.random.key(config.seed))
    x, mask = data.test["x"][: config.num_images], hidden_square(data.spec.shape)
    truth = data.scaling().to_continuous(jnp.asarray(x)) - model.shift
    operator = blur if config.task == "deblur" else (lambda y: y * ~mask)
    noise = config.noise_std * jax.random.normal(key_noise, truth.shape)
    observed = operator(truth) + (noise if config.task == "deblur" else noise * ~mask)
    with _run.start_run(config) as run:
        given = operator, observed, mask, key_sample
        restored = jax.jit(lambda params: restore(config, model, params, *given))(params)
        rows = [np.asarray(y) + model.shift for y in (observed, restored, truth)]
        columns = min(10, len(x))
        _pictures.save_grid(
            run.folder / "restored.png",
            np.concatenate([row[:columns] for row in rows]),
            title=f"{config.task}: observed, restored by {config.method}, true",
            low=-1.0,
            high=1.0,
            columns=columns,
        )
        mean = np.float32(data.train["x"]).mean(0, keepdims=True)
        levels = (rows[1] + 1) / 2 * (data.spec.levels or 0) - 0.5
        where = np.asarray(mask) if config.task == "inpaint" else np.ones(mask.shape)
        misfit = jnp.sqrt(jnp.mean(jnp.square(operator(restored) - observed)))
        return _run.finish(
            run,
            {
                # Root mean square errors in grey levels, over what was hidden (or blurred).
                "error": rms(levels - x, where),
                "error_of_the_mean_image": rms(mean - x, where),
                "misfit_of_the_observation": misfit,
            },
        )


def restore(
    config: Config,
    model: diffusion.Model,
    params: Any,
    operator: Callable[[jax.Array], jax.Array],
    observed: jax.Array,
    mask: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """One draw from the (approximate) posterior for each observation."""
    denoise, step = model.denoise(params), gd.ancestral_step
    if config.method == "pigdm":
        denoise = gd.pseudoinverse_guidance(
            denoise,
            operator,
            observed,
            process=model.process,
            noise_std=config.noise_std,
            data_std=model.sigma_data,
        )
    elif config.method == "dps":
        step = gd.posterior_sampling(
            operator,
            observed,
            step=step,
            scale=config.scale,
            noise_std=config.noise_std,
            data_std=model.sigma_data,
        )
    else:
        seen = jnp.broadcast_to(~mask, observed.shape)
        step = gd.replacement(observed, seen, step=step)
    times = gd.time_grid(model.process, config.num_steps)
    return gd.sample(denoise, key, observed.shape, process=model.process, times=times, step=step)


def hidden_square(shape: tuple[int, ...]) -> jax.Array:
    """True in the middle half of height and width, [1, height, width, channels]."""
    height, width, _ = shape
    rows, columns = np.zeros(height, bool), np.zeros(width, bool)
    rows[height // 4 : height - height // 4] = True
    columns[width // 4 : width - width // 4] = True
    square = rows[None, :, None, None] & columns[None, None, :, None]
    return jnp.asarray(np.broadcast_to(square, (1, *shape)))


def blur(x: jax.Array) -> jax.Array:
    """Binomial blur, (1, 2, 1) / 4 along height and width, zero outside."""
    for axis in (1, 2):
        size = x.shape[axis]
        matrix = 0.5 * jnp.eye(size) + 0.25 * (jnp.eye(size, k=1) + jnp.eye(size, k=-1))
        x = jnp.moveaxis(jnp.tensordot(x, matrix.astype(x.dtype), ((axis,), (1,))), -1, axis)
    return x


def rms(difference: np.ndarray, where: np.ndarray) -> float:
    """Root mean square over the pixels that count."""
    weight = np.broadcast_to(where, difference.shape)
    return float(np.sqrt((weight * difference**2).sum() / weight.sum()))


if __name__ == "__main__":
    _run.launch(main, Config)
