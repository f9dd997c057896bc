"""StyleGAN2 at 32x32x3, batch 16: critic step with R1, generator step, the same with path lengths.

Widths 128, 128, 64, 32 from 4x4 up, styles of 64, a mapping of 8 layers, noise at every layer,
minibatch deviation, Adam(1e-3, 0, 0.99). PyTorch is eager, has the same network, modulates input
and output of one shared convolution as we do, and takes both penalties by double backward.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks._models import timed_steps, torch_trainer
from experiments.benchmarks._workload import OURS, Options, Row, compare, every, launch
from genjax import adversarial as ga
from genjax.networks import StyleCritic, StyleGenerator

SIZE, LATENT, GROUP = 32, 64, 4
TARGETS = {"critic": 1.0, "generator": 1.0, "path": None}


@dataclasses.dataclass(frozen=True)
class Config(Options):
    rounds: int = 8
    batch_size: int = 16  # examples in a step, a multiple of 4
    width: int = 128  # channels of the smallest feature maps


def one(part: str, config: Config) -> list[Row]:
    """Time one of TARGETS."""
    makers = {OURS: lambda: ours(config)[part], "torch": lambda: theirs(config)[part]}
    work = lambda: ours(config)["work"](part)  # noqa: E731
    case = f"width={config.width} batch={config.batch_size}"
    options = {"case": case, "targets": TARGETS[part], "work": work, "warm": 2}
    return compare(f"stylegan_{part}", makers, config, **options)


def widths(config: Config) -> tuple[int, ...]:
    """Channels at 4x4, 8x8, 16x16 and 32x32."""
    return (config.width, config.width, config.width // 2, config.width // 4)


@cache
def ours(config: Config) -> dict[str, Callable[..., Any]]:
    """The library's parts, compiled and donated; and what work they are."""
    n, shared = config.batch_size, {"size": SIZE, "channels": 3, "base": 4}
    generator = StyleGenerator(widths=widths(config), latent=LATENT, **shared)
    critic = StyleCritic(widths=widths(config)[::-1], group=GROUP, **shared)
    optimizer, key = optax.adam(1e-3, b1=0.0, b2=0.99), jax.random.key(0)
    real = jax.random.uniform(key, (n, SIZE, SIZE, 3), minval=-1, maxval=1)
    c, g = critic.init(key, real), generator.init(key, jnp.zeros((1, LATENT)), None, None)
    start = (c, g, optimizer.init(c), optimizer.init(g))

    def make(g: Any, key: Any, w: jax.Array) -> jax.Array:
        return generator.apply(g, w, generator.draw_noise(key, len(w)), method="synthesis")  # pyright: ignore

    def styles(g: Any, key: Any) -> jax.Array:
        w: Any = generator.apply(g, jax.random.normal(key, (n, LATENT)), method="mapping")
        return jnp.repeat(w[:, None], generator.num_layers, axis=1)

    def critic_loss(c: Any, g: Any, key: Any) -> jax.Array:
        score: Any = partial(critic.apply, c)
        fake = jax.lax.stop_gradient(make(g, key, styles(g, key)))
        losses = ga.gan(score(real), score(fake))
        return losses.critic + 5 * jnp.mean(ga.r1_penalty(score, real))

    def generator_loss(g: Any, c: Any, key: Any) -> jax.Array:
        scores: Any = critic.apply(c, make(g, key, styles(g, key)))
        return ga.gan(scores, scores).generator

    def path_loss(g: Any, c: Any, key: Any) -> jax.Array:
        w = styles(g, key)[: n // 2]
        noise = jax.random.normal(key, (n // 2, SIZE, SIZE, 3))
        found = ga.path_length_penalty(partial(make, g, key), w, noise, mean=1.0)
        return generator_loss(g, c, key) + 2 * jnp.mean(found.penalties)

    def step(loss: Any, player: int) -> Callable[..., Any]:
        def stepped(state: Any, key: Any) -> Any:
            own, opponent, opt_state = state[player], state[1 - player], state[2 + player]
            slope = jax.grad(loss)(own, opponent, key)
            updates, opt_state = optimizer.update(slope, opt_state)
            own, new = optax.apply_updates(own, updates), list(state)
            new[player], new[2 + player] = own, opt_state
            return tuple(new)

        return stepped

    steps = {
        "critic": step(critic_loss, 0),
        "generator": step(generator_loss, 1),
        "path": step(path_loss, 1),
    }

    return timed_steps(steps, start, key)


class Layers:
    """Layers of one player in PyTorch, whose parameters are made when they are first called."""

    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}

    def weight(self, name: str, *shape: int, start: float | None = None) -> Any:
        import torch

        if name not in self.parameters:
            value = torch.randn(*shape) if start is None else torch.full(shape, start)
            self.parameters[name] = value.requires_grad_()
        return self.parameters[name]

    def dense(self, name: str, x: Any, out: int, bias: float = 0, rate: float = 1) -> Any:
        import torch.nn.functional as F

        kernel = self.weight(f"{name}.w", out, x.shape[1]) * (rate / math.sqrt(x.shape[1]))
        return F.linear(x, kernel, rate * self.weight(f"{name}.b", out, start=bias / rate))

    def kernel(self, name: str, size: int, inputs: int, out: int) -> Any:
        return self.weight(f"{name}.k", out, inputs, size, size) / math.sqrt(size * size * inputs)


def leaky(x: Any) -> Any:
    import torch.nn.functional as F

    return math.sqrt(2) * F.leaky_relu(x, 0.2)


def resample(x: Any, up: bool) -> Any:
    """Twice or half the side by [1, 3, 3, 1]."""
    import torch
    import torch.nn.functional as F

    tap = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    taps = torch.outer(tap, tap).expand(x.shape[1], 1, 4, 4)
    if up:
        return F.conv_transpose2d(x, 4 * taps, stride=2, padding=1, groups=x.shape[1])
    return F.conv2d(x, taps, stride=2, padding=1, groups=x.shape[1])


def torch_generator(layers: Layers, wide: tuple[int, ...]) -> tuple[Any, Any]:
    """z -> w, and w [batch, layers, latent] -> images, where convolution k reads row k."""
    import torch
    import torch.nn.functional as F

    def modulated(name: str, x: Any, w: Any, out: int, size: int) -> Any:
        kernel = layers.kernel(name, size, x.shape[1], out)
        style = layers.dense(f"{name}.style", w, x.shape[1], bias=1)
        y = F.conv2d(x * style[:, :, None, None], kernel, padding=size // 2)
        if size == 3:
            total = style.square() @ kernel.square().sum((2, 3)).T
            y = y * torch.rsqrt(total + 1e-8)[:, :, None, None]
        return y + layers.weight(f"{name}.b", out, start=0.0)[:, None, None]

    def layer(name: str, x: Any, w: Any, out: int) -> Any:
        y = modulated(name, x, w, out, 3)
        strength = layers.weight(f"{name}.noise", start=0.0)
        return leaky(y + strength * torch.randn(len(y), 1, *y.shape[2:]))

    def mapping(z: Any) -> Any:
        h = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        for i in range(8):
            h = leaky(layers.dense(f"map{i}", h, LATENT, rate=0.01))
        return h

    def synthesis(w: Any) -> Any:
        """w [batch, layers, latent]: convolution k reads row k."""
        first = layers.weight("start", 1, wide[0], 4, 4)
        h = layer("first", first.expand(len(w), -1, -1, -1), w[:, 0], wide[0])
        image = modulated("image0", h, w[:, 1], 3, 1)
        for i, out in enumerate(wide[1:], 1):
            h = layer(f"up{i}", resample(h, True), w[:, 2 * i - 1], out)
            h = layer(f"flat{i}", h, w[:, 2 * i], out)
            image = resample(image, True) + modulated(f"image{i}", h, w[:, 2 * i + 1], 3, 1)
        return image

    return mapping, synthesis


def torch_critic(layers: Layers, wide: tuple[int, ...], n: int) -> Any:
    """Images [n, 3, side, side] -> scores [n, 1]."""
    import torch
    import torch.nn.functional as F

    def convolved(name: str, x: Any, out: int, size: int, bias: bool = True) -> Any:
        kernel = layers.kernel(name, size, x.shape[1], out)
        b = layers.weight(f"{name}.b", out, start=0.0) if bias else None
        return F.conv2d(x, kernel, b, padding=size // 2)

    def score(x: Any) -> Any:
        h = leaky(convolved("from", x, wide[-1], 1))
        for i, out in enumerate(wide[::-1][1:]):
            y = leaky(convolved(f"first{i}", h, h.shape[1], 3))
            y = leaky(convolved(f"second{i}", resample(y, False), out, 3))
            skip = convolved(f"skip{i}", resample(h, False), out, 1, bias=False)
            h = (y + skip) / math.sqrt(2)
        groups = h.reshape(GROUP, n // GROUP, -1)
        spread = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean(1).repeat(GROUP)
        h = torch.cat([h, spread[:, None, None, None].expand(-1, 1, 4, 4)], 1)
        h = leaky(convolved("last", h, wide[0], 3))
        return layers.dense("out", leaky(layers.dense("features", h.flatten(1), wide[0])), 1)

    return score


@cache
def theirs(config: Config) -> dict[str, Callable[[], Any]]:
    """The same networks and steps in eager PyTorch."""
    import torch
    import torch.nn.functional as F

    n, wide, of_critic, of_generator = config.batch_size, widths(config), Layers(), Layers()
    mapping, synthesis = torch_generator(of_generator, wide)
    score = torch_critic(of_critic, wide, n)

    def styles() -> Any:
        return mapping(torch.randn(n, LATENT))[:, None].expand(-1, 2 * len(wide), -1)

    real = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (n, 3, SIZE, SIZE))).float()

    def critic_loss() -> Any:
        with torch.no_grad():
            fake = synthesis(styles())
        x = real.clone().requires_grad_()
        scores = score(x)
        (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        loss = F.softplus(-scores).mean() + F.softplus(score(fake)).mean()
        return loss + 5 * slope.square().sum((1, 2, 3)).mean()

    def generator_loss() -> Any:
        return F.softplus(-score(synthesis(styles()))).mean()

    def path_loss() -> Any:
        w = styles()[: n // 2]
        noise = torch.randn(n // 2, 3, SIZE, SIZE) / SIZE
        (slope,) = torch.autograd.grad((synthesis(w) * noise).sum(), w, create_graph=True)
        lengths = slope.square().sum(2).mean(1).sqrt()
        return generator_loss() + 2 * (lengths - 1).square().mean()

    score(synthesis(styles()))  # makes the parameters
    adam = {"lr": 1e-3, "betas": (0.0, 0.99)}
    opponent = list(of_critic.parameters.values())

    def with_generator(loss: Callable[[], Any]) -> Callable[[], None]:
        update = torch_trainer(of_generator.parameters.values(), loss, **adam)

        def step() -> None:
            for p in opponent:
                p.requires_grad_(False)
            update()
            for p in opponent:
                p.requires_grad_(True)

        return step

    critic_step = torch_trainer(opponent, critic_loss, **adam)
    losses = {"generator": generator_loss, "path": path_loss}
    return {"critic": critic_step, **{name: with_generator(f) for name, f in losses.items()}}


main = every(one, TARGETS)
if __name__ == "__main__":
    launch(main, Config)
