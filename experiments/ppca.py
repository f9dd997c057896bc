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

from experiments import _judge, _pictures, _run
from experiments._data import Data, load_data
from experiments._system import Row, parameter_count, save_samples
from genjax.metrics import test_log_likelihood
from genjax.variational import PPCA, ppca_fit, ppca_log_likelihood

ROWS = (Row("ppca", "PPCA", images={}, trained=False, larger={}),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Fit probabilistic PCA and measure it on the test split."""

    components: int = 30
    """Dimensions of the latent variable."""
    draws: int = 8
    """Dequantisations of each test image."""


def main(config: Config) -> dict[str, Any]:
    """Fit on the train split, evaluate on the test split; returns the summary."""
    data = load_data(config)
    data.require("images")
    shape, scaling = (data.count, *data.spec.shape), data.scaling()
    with _run.start_run(config) as run:
        begun = time.monotonic()
        model = jax.block_until_ready(fit(data, config.components, config.seed))
        run.training_seconds = time.monotonic() - begun
        draw = jax.jit(lambda key: scaling.to_levels(sample(model, key, data.count)).reshape(shape))
        samples, cost = save_samples(run, lambda: draw(jax.random.key(config.seed)), evaluations=1)
        _pictures.save_samples(run.folder / "samples.png", data, samples)
        return _run.finish(
            run,
            {
                "parameters": parameter_count(model),
                **cost,
                **score(data, config.components, config.seed, config.draws, model=model),
                **_judge.judge(_judge.reference(data), samples),
            },
        )


def fit(data: Data, components: int, seed: int) -> PPCA:
    """Fit to one dequantisation of the training images."""
    y = data.scaling().dequantise(jax.random.key(seed), data.train["x"])
    return ppca_fit(y.reshape(len(y), -1), components)


def score(
    data: Data, components: int, seed: int, draws: int = 8, *, model: PPCA | None = None
) -> dict[str, Any]:
    """Bound log P of the test images' levels, in nats and bits per dimension."""
    fitted = fit(data, components, seed) if model is None else model
    x = data.test["x"].reshape(len(data.test["x"]), -1)
    found = jax.jit(
        lambda key: test_log_likelihood(
            lambda _, y: ppca_log_likelihood(fitted, y),
            key,
            x,
            scaling=data.scaling(),
            num_draws=draws,
        )
    )(jax.random.key(seed + 1))
    return {
        "test_log_likelihood": found.log_likelihood,
        "standard_error": found.standard_error,
        "bits_per_dim": found.bits_per_dim,
    }


def sample(model: PPCA, key: jax.Array, count: int) -> jax.Array:
    """Draw x = W z + mu + s noise."""
    key_z, key_x = jax.random.split(key)
    z = jax.random.normal(key_z, (count, model.weights.shape[1]))
    noise = jnp.sqrt(model.noise_variance) * jax.random.normal(key_x, (count, len(model.mean)))
    return z @ model.weights.T + model.mean[None] + noise


if __name__ == "__main__":
    _run.launch(main, Config)
