"""WGAN-GP at 32x32x3, batch 64: critic step with the penalty, generator step, both, beside PyTorch.

Critic: three 3x3 convolutions of stride 2 (64, 128, 256), leaky ReLU, dense. Generator: dense from
128, transposed 2x2 convolutions (256, 128, 64, 3), batch norm, ReLU, tanh. Adam(1e-4, 0.5, 0.9),
weight 10. PyTorch is eager and takes the penalty by double backward.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks._models import timed_steps, torch_trainer
from experiments.benchmarks._workload import OURS, Options, Row, compare, every, launch
from genjax.adversarial import gradient_penalty, wasserstein
from genjax.networks import DCGANCritic, DCGANGenerator

LATENT = 128
TARGETS = {"critic": 1.25, "generator": None, "both": 1.1}


@dataclasses.dataclass(frozen=True)
class Config(Options):
    rounds: int = 12
    batch_size: int = 64  # examples in a step
    width: int = 64  # channels of the first convolution


def one(part: str, config: Config) -> list[Row]:
    """Time one of TARGETS."""
    makers = {OURS: lambda: ours(config)[part], "torch": lambda: theirs(config)[part]}
    work = lambda: ours(config)["work"](part)  # noqa: E731
    case = f"width={config.width} batch={config.batch_size}"
    options = {"case": case, "targets": TARGETS[part], "work": work, "warm": 2}
    return compare(f"wgan_gp_{part}", makers, config, **options)


@cache
def ours(config: Config) -> dict[str, Callable[..., Any]]:
    """The library's parts: compiled, donated, as a user writes them; and what work they are."""
    w, n = config.width, config.batch_size
    critic = DCGANCritic(32, 3, w, kernel=3)
    generator = DCGANGenerator(32, 3, w, kernel=1, norm="batch")
    optimizer = optax.adam(1e-4, b1=0.5, b2=0.9)
    key = jax.random.key(0)
    real = jax.random.uniform(key, (n, 32, 32, 3), minval=-1, maxval=1)
    c, g = critic.init(key, real), generator.init(key, jnp.zeros((n, LATENT)))
    start = (c, g, optimizer.init(c), optimizer.init(g))

    def update(loss: Any, params: Any, opt_state: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    def critic_step(state: Any, key: Any) -> Any:
        c, g, c_opt, g_opt = state
        key_z, key_e = jax.random.split(key)
        fake = generator.apply(g, jax.random.normal(key_z, (n, LATENT)))

        def loss(c: Any) -> jax.Array:
            score = partial(critic.apply, c)
            penalty = gradient_penalty(score, key_e, real, fake)
            return wasserstein(score(real), score(fake)).critic + 10 * jnp.mean(penalty)

        c, c_opt = update(loss, c, c_opt)
        return c, g, c_opt, g_opt

    def generator_step(state: Any, key: Any) -> Any:
        c, g, c_opt, g_opt = state

        def loss(g: Any) -> jax.Array:
            scores = critic.apply(c, generator.apply(g, jax.random.normal(key, (n, LATENT))))
            return wasserstein(scores, scores).generator

        g, g_opt = update(loss, g, g_opt)
        return c, g, c_opt, g_opt

    both = lambda state, key: generator_step(critic_step(state, key), key)  # noqa: E731
    steps = {"critic": critic_step, "generator": generator_step, "both": both}
    return timed_steps(steps, start, key)


@cache
def theirs(config: Config) -> dict[str, Callable[[], Any]]:
    """The same networks and steps in eager PyTorch."""
    import torch
    from torch import nn

    w, n = config.width, config.batch_size
    leaky = partial(nn.LeakyReLU, 0.2)
    critic = nn.Sequential(
        *(nn.Conv2d(3, w, 3, 2, 1), leaky(), nn.Conv2d(w, 2 * w, 3, 2, 1), leaky()),
        *(nn.Conv2d(2 * w, 4 * w, 3, 2, 1), leaky(), nn.Flatten(), nn.Linear(64 * w, 1)),
    )
    generator = nn.Sequential(
        *(nn.Linear(LATENT, 64 * w), nn.Unflatten(1, (4 * w, 4, 4)), nn.BatchNorm2d(4 * w)),
        *(nn.ReLU(), nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), nn.BatchNorm2d(2 * w), nn.ReLU()),
        *(nn.ConvTranspose2d(2 * w, w, 2, 2), nn.BatchNorm2d(w), nn.ReLU()),
        *(nn.ConvTranspose2d(w, 3, 2, 2), nn.Tanh()),
    )
    real = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (n, 3, 32, 32))).float()

    def critic_loss() -> Any:
        with torch.no_grad():
            fake = generator(torch.randn(n, LATENT))
        weight = torch.rand(n, 1, 1, 1)
        x = (weight * real + (1 - weight) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return critic(fake).mean() - critic(real).mean() + 10 * penalty

    adam = {"lr": 1e-4, "betas": (0.5, 0.9)}
    critic_step = torch_trainer(critic.parameters(), critic_loss, **adam)
    update = torch_trainer(
        generator.parameters(), lambda: -critic(generator(torch.randn(n, LATENT))).mean(), **adam
    )

    def generator_step() -> None:
        critic.requires_grad_(False)
        update()
        critic.requires_grad_(True)

    both = lambda: (critic_step(), generator_step())  # noqa: E731
    return {"critic": critic_step, "generator": generator_step, "both": both}


main = every(one, TARGETS)
if __name__ == "__main__":
    launch(main, Config)
