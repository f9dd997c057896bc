"""The smallest experiment that the leaderboard can run: a Gaussian whose mean is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from experiments import _run
from experiments._data import load_data
from experiments._system import System, train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    steps: int = 10**6
    spread: float = 1.0
    """Standard deviation of the samples."""


def main(config):
    data = load_data(config)
    return train(config, build(config, data), data)


def build(config, data):
    if config.spread <= 0:
        raise ValueError(f"spread must be positive, got {config.spread}")

    def loss(params, key, batch):
        return jnp.sum((batch["x"] - params["mean"][None]) ** 2, axis=1), {}

    def sample(params, key, n, label=None):
        return params["mean"][None] + config.spread * jax.random.normal(key, (n, 2))

    return System(
        lambda key: {"mean": jnp.ones(2)},
        loss,
        optax.adam(0.01),
        sample,
        evaluations=7,
        count=2000,
    )


if __name__ == "__main__":
    _run.launch(main, Config)
