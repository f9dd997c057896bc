"""WGAN-GP at 32x32x3, batch 64: critic step with the penalty, generator step, both, beside PyTorch.

Critic: three 3x3 convolutions of stride 2 (64, 128, 256), leaky ReLU, dense. Generator: dense from
128, transposed 2x2 convolutions (256, 128, 64, 3), batch norm, ReLU, tanh. Adam(1e-4, 0.5, 0.9),
weight 10. The two sides run in turn in one process; PyTorch is eager and takes the penalty by
double backward. Medians of warm steps, in milliseconds. Needs torch.

    python -m experiments.benchmarks.wgan_gp
    python -m experiments.benchmarks.wgan_gp --rounds 20 --width 32

With glibc, large temporaries are given back to the system at every step; for both sides,
GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296 saves that.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks._ceilings import work_of
from experiments.benchmarks._table import OURS, Row, build, make_rows, show
from experiments.benchmarks._timing import in_turn
from genjax.adversarial import gradient_penalty, wasserstein
from genjax.networks import DCGANCritic, DCGANGenerator

LATENT = 128
TARGETS = {"critic": 1.25, "generator": None, "both": 1.1}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the workload."""

    rounds: int = 12
    """Timed steps of each part, in turn between the two sides."""
    batch_size: int = 64
    """Examples in a step."""
    width: int = 64
    """Channels of the first convolution."""
    double_backward: bool = False
    """Take our penalty by double backward too, to see what the library's rule saves."""
    torch: bool = True
    """Time PyTorch beside."""


def main(config: Config) -> list[Row]:
    """Time every part on both sides in turn."""
    makers: dict[str, Any] = {OURS: partial(ours, config)}
    if config.torch:
        makers["torch"] = partial(theirs, config)
    made, notes = build(makers, ("torch",))
    case, rows = f"width={config.width} batch={config.batch_size}", []
    for part, target in TARGETS.items():
        sides = {name: steps[part] for name, steps in made.items()}
        times = in_turn(sides, rounds=config.rounds, warm=2)
        options = {"targets": target, "notes": notes, "work": made[OURS]["work"](part)}
        rows += show(make_rows(f"wgan_gp_{part}", times, case=case, **options))
    return rows


def double_backward(critic: Any, key: Any, real: jax.Array, fake: jax.Array) -> jax.Array:
    """The penalty left to autodiff."""
    weight = jax.random.uniform(key, (len(real), 1, 1, 1))
    x = weight * real + (1 - weight) * fake
    slope = jax.grad(lambda x: critic(x).sum())(x).reshape(len(x), -1)
    return jnp.square(jnp.sqrt(jnp.sum(slope**2, axis=1)) - 1)


def ours(config: Config) -> dict[str, Callable[..., Any]]:
    """The library's parts: compiled, donated, as a user writes them; and what work they are."""
    w, n = config.width, config.batch_size
    critic = DCGANCritic(32, 3, w, kernel=3)
    generator = DCGANGenerator(32, 3, w, kernel=1, norm="batch")
    penalise = double_backward if config.double_backward else gradient_penalty
    optimizer = optax.adam(1e-4, b1=0.5, b2=0.9)
    key = jax.random.key(0)
    real = jax.random.uniform(key, (n, 32, 32, 3), minval=-1, maxval=1)
    c = critic.init(key, real)
    g = generator.init(key, jnp.zeros((n, LATENT)))

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
            penalty = penalise(score, key_e, real, fake)
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

    def timed(step: Any) -> Callable[[], Any]:
        compiled = jax.jit(step, donate_argnums=0)
        state = [jax.tree.map(jnp.copy, start)]

        def run() -> None:
            state[0] = jax.block_until_ready(compiled(state[0], key))

        return run

    both = lambda state, key: generator_step(critic_step(state, key), key)  # noqa: E731
    steps = {"critic": critic_step, "generator": generator_step, "both": both}

    def work(part: str) -> dict[str, float]:
        return work_of(jax.jit(steps[part]), start, key)

    return {**{part: timed(step) for part, step in steps.items()}, "work": work}


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
    adam = partial(torch.optim.Adam, lr=1e-4, betas=(0.5, 0.9))
    c_opt, g_opt = adam(critic.parameters()), adam(generator.parameters())
    real = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (n, 3, 32, 32))).float()

    def critic_step() -> None:
        with torch.no_grad():
            fake = generator(torch.randn(n, LATENT))
        weight = torch.rand(n, 1, 1, 1)
        x = (weight * real + (1 - weight) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        loss = critic(fake).mean() - critic(real).mean() + 10 * penalty
        c_opt.zero_grad(set_to_none=True)
        loss.backward()
        c_opt.step()

    def generator_step() -> None:
        for p in critic.parameters():
            p.requires_grad_(False)
        loss = -critic(generator(torch.randn(n, LATENT))).mean()
        g_opt.zero_grad(set_to_none=True)
        loss.backward()
        g_opt.step()
        for p in critic.parameters():
            p.requires_grad_(True)

    def both() -> None:
        critic_step()
        generator_step()

    return {"critic": critic_step, "generator": generator_step, "both": both}


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
