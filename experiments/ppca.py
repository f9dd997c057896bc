"""Probabilistic PCA in closed form: the linear baseline of the variational autoencoder.

Images become real numbers by uniform dequantisation, so that the log-likelihood of the linear
Gaussian model bounds that of the levels. Nothing is trained.

    python -m experiments.ppca
    python -m experiments.ppca --dataset mnist --components 50
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _pictures, _run, _samples
from genjax.data import DataSpec, Scaling, load
from genjax.metrics import Likelihood, test_log_likelihood
from genjax.variational import PPCA, ppca_fit, ppca_log_likelihood


@dataclasses.dataclass(frozen=True)
class Config:
    """Fit probabilistic PCA and measure it on the test split."""

    dataset: str = "digits"
    """Image data set by name."""
    data_dir: str | None = None
    """Folder of the prepared data sets (default: the usual one of tensorflow_datasets)."""
    run_dir: str | None = None
    """Folder of this run (default: the next free number in runs/ppca)."""
    components: int = 30
    """Dimensions of the latent variable."""
    draws: int = 8
    """Dequantisations of each test image."""
    seed: int = 0
    """Seed of the dequantisation and of the samples."""


def main(config: Config) -> dict[str, Any]:
    """Fit on the train split, evaluate on the test split; returns the summary."""
    train, spec = load(config.dataset, "train", data_dir=config.data_dir)
    test, _ = load(config.dataset, "test", data_dir=config.data_dir)
    run_config = _run.RunConfig(
        dataset=config.dataset, run_dir=config.run_dir, seed=config.seed, steps=1
    )
    with _run.start_run(run_config, name="ppca") as run:
        begun = time.monotonic()
        model, scaling = fit(train["x"], spec, config.components, config.seed)
        jax.block_until_ready(model)
        run.training_seconds = time.monotonic() - begun
        scores = evaluate(model, scaling, test["x"], config.seed, config.draws)
        count = _samples.sample_count(train, spec)
        draw = jax.jit(lambda key: scaling.to_levels(sample(model, key, count)))
        images, cost = _samples.save_samples(
            run,
            lambda: draw(jax.random.key(config.seed)).reshape(count, *spec.shape),
            evaluations=1,
        )
        _pictures.save_grid(run.folder / "samples.png", images[:64], high=scaling.levels - 1)
        return _run.finish(
            run,
            {
                "components": config.components,
                "draws": config.draws,
                "test_log_likelihood": scores.log_likelihood,
                "standard_error": scores.standard_error,
                "bits_per_dim": scores.bits_per_dim,
                "parameters": _samples.parameter_count(model),
                **cost,
            },
        )


def fit(x: np.ndarray, spec: DataSpec, components: int, seed: int) -> tuple[PPCA, Scaling]:
    """Fit to one dequantisation of the images `x`."""
    if spec.levels is None:
        raise ValueError(f"dataset must be of images, got {spec.name!r}, which has no levels")
    scaling = Scaling(spec.levels)
    y = scaling.dequantise(jax.random.key(seed), x)
    return ppca_fit(y.reshape(len(x), -1), components), scaling


def evaluate(model: PPCA, scaling: Scaling, x: np.ndarray, seed: int, draws: int = 8) -> Likelihood:
    """Bound log P of the levels `x`, in nats and bits per dimension."""
    return jax.jit(
        lambda key: test_log_likelihood(
            lambda _, y: ppca_log_likelihood(model, y),
            key,
            x.reshape(len(x), -1),
            scaling=scaling,
            num_draws=draws,
        )
    )(jax.random.key(seed + 1))


def sample(model: PPCA, key: jax.Array, count: int) -> jax.Array:
    """Draw x = W z + mu + s noise."""
    key_z, key_x = jax.random.split(key)
    z = jax.random.normal(key_z, (count, model.weights.shape[1]))
    noise = jnp.sqrt(model.noise_variance) * jax.random.normal(key_x, (count, len(model.mean)))
    return z @ model.weights.T + model.mean[None] + noise


if __name__ == "__main__":
    _run.launch(main, Config)
