"""Wasserstein GANs: clipped weights, the gradient penalty, or a critic that is 1-Lipschitz.

    bound      = mean f(data) - mean f(samples) <= W1(data, samples) for a 1-Lipschitz critic f
    clip       weights in [-limit, limit] after each update (Arjovsky et al. 2017)
    penalty    critic's loss + weight * mean (|grad f| - 1)^2 between data and samples
    lipschitz  orthonormal weights and sorting activations: 1-Lipschitz by construction

    python -m experiments.wgan
    python -m experiments.wgan --conditional --network dcgan
    python -m experiments.wgan --constraint lipschitz

Notebook 03 compares the three on the line, where W1 is known.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from experiments import _run
from experiments._data import Data, load_data
from experiments._system import Row, System, train
from experiments.gan import AdversarialConfig, Players, networks, saddle
from genjax.adversarial import clip_weights, gradient_penalty, wasserstein
from genjax.networks import LipschitzMLP

ROWS = (Row("wgan_gp", "WGAN, gradient penalty", images={}, plane={}, larger={}),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(AdversarialConfig):
    """Train a WGAN and score its samples."""

    constraint: Literal["clip", "penalty", "lipschitz"] = "penalty"
    """What keeps the critic Lipschitz, see above."""
    limit: float = 0.01
    """Largest weight of a clipped critic."""
    penalty: float = 10.0
    """Weight of the gradient penalty."""
    one_sided: bool = False
    """Penalise only gradients above 1."""
    n_critic: int = 3
    """Updates of the critic before each one of the generator (5 in the papers)."""
    learning_rate: float = 1e-3
    beta1: float = 0.0
    beta2: float = 0.9


def main(config: Config) -> dict[str, Any]:
    """Train, sample, evaluate; returns the summary."""
    data = load_data(config)
    return train(config, build(config, data), data)


def build(config: Config, data: Data) -> System:
    """The two players with the constraint of the config."""
    players, clip = networks(config, data), partial(clip_weights, limit=config.limit)
    if config.constraint == "lipschitz":
        players = lipschitz(config, players, data)

    def penalty(score: Any, key: Any, real: Any, fake: Any) -> Any:
        found = gradient_penalty(score, key, real, fake, one_sided=config.one_sided)
        return config.penalty * jnp.mean(found), {"penalty": found}

    return saddle(
        config,
        data,
        players,
        wasserstein,
        penalty if config.constraint == "penalty" else None,
        project=clip if config.constraint == "clip" else None,
    )


def lipschitz(config: Config, players: Players, data: Data) -> Players:
    """The same generator with a critic that is 1-Lipschitz by construction."""
    if config.conditional:
        raise ValueError("constraint lipschitz has no conditional critic, got conditional=True")
    critic = LipschitzMLP((config.width,) * config.depth)
    return players._replace(
        init_critic=lambda key: critic.init(key, jnp.zeros((1, *data.spec.shape))),
        score=lambda params, x, label: critic.apply(params, x),
    )


if __name__ == "__main__":
    _run.launch(main, Config)
