"""Time of PixelCNN++: a training step beside PyTorch's, sampling beside recomputation.

step       forward, backward and Adam, 2 resnets each way, 40 features, 16 grey images of 32 x 32 in
           256 levels, 10 logistics in a pixel's mixture, no dropout
  torch    the same network and likelihood, eager; shifted convolutions pad and crop
sampling   16 images of 8 x 8 in 17 levels, 32 features, 3 logistics, pixel by pixel with a cache
  torch    the whole network for every pixel, as published PixelCNN++ code draws
  recomputed  the same in genjax, compiled
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks._models import Trainer, torch_trainer
from experiments.benchmarks._workload import OURS, Options, Row, Side, compare, every, launch
from genjax.autoregressive import (
    colour_logistic_mixture,
    draw_colours,
    recomputing_pixel_step,
    sample_pixels,
)
from genjax.networks import PixelCNNPlus

Config = Options
TARGETS = {"step": 1.0, "sampling": 20.0}
RESNETS, LEVELS = 2, 256
SHAPE = (16, 32, 32, 1)


def torch_network(components: int, features: int) -> Any:
    """PixelCNNPlus of one colour in PyTorch: [batch, 1, height, width] to its numbers."""
    import torch
    from torch import nn
    from torch.nn import functional

    def both_signs(x: Any) -> Any:
        return functional.elu(torch.cat([x, -x], dim=1))

    class Gated(nn.Module):
        def __init__(self, left: int, right: int, skip: int = 0):
            super().__init__()
            self.pad, size = (left, right, 1, 0), (2, left + right + 1)
            self.one = nn.Conv2d(2 * features, features, size)
            self.two = nn.Conv2d(2 * features, 2 * features, size)
            self.skip = nn.Conv2d(2 * skip * features, features, 1, bias=False) if skip else None

        def forward(self, x: Any, side: Any = None) -> Any:
            c = self.one(functional.pad(both_signs(x), self.pad))
            c = c if self.skip is None else c + self.skip(both_signs(side))
            a, b = self.two(functional.pad(both_signs(c), self.pad)).chunk(2, dim=1)
            return x + a * torch.sigmoid(b)

    def nets(*args: int) -> Any:
        return nn.ModuleList([Gated(*args) for _ in range(RESNETS)])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.above, self.left = (
                nn.Conv2d(2, features, size) for size in ((2, 3), (1, 3), (2, 1))
            )
            self.rows_up, self.pixels_up = nets(1, 1), nets(1, 0, 1)
            self.rows_down, self.pixels_down = nets(1, 1, 1), nets(1, 0, 2)
            self.last = nn.Conv2d(features, 3 * components, 1)

        def forward(self, x: Any) -> Any:
            x = torch.cat([x, torch.ones_like(x)], dim=1)
            rows = self.rows(functional.pad(x, (1, 1, 2, 0)))[:, :, :-1]
            pixels = self.above(functional.pad(x, (1, 1, 1, 0)))[:, :, :-1]
            pixels = pixels + self.left(functional.pad(x, (1, 0, 1, 0)))[..., :-1]
            skips = []
            for row, pixel in zip(self.rows_up, self.pixels_up, strict=True):
                skips.append((rows, pixels))
                rows = row(rows)
                pixels = pixel(pixels, rows)
            for row, pixel in zip(self.rows_down, self.pixels_down, strict=True):
                skip, side = skips.pop()
                rows = row(rows, skip)
                pixels = pixel(pixels, torch.cat([rows, side], dim=1))
            return self.last(functional.elu(pixels))

    return Net()


def torch_nats(numbers: Any, x: Any) -> Any:
    """Minus the log probability of levels [batch, height, width] under the mixture, per image."""
    import torch
    from torch.nn import functional

    logits, mean, log_scale = numbers.chunk(3, dim=1)
    centred = (x * (2 / (LEVELS - 1)) - 1)[:, None] - mean
    rate = torch.exp(-log_scale.clamp(min=-7))
    above, below = rate * (centred + 1 / (LEVELS - 1)), rate * (centred - 1 / (LEVELS - 1))
    inside = torch.log((torch.sigmoid(above) - torch.sigmoid(below)).clamp(min=1e-12))
    level = x[:, None]
    ends = torch.where(level == LEVELS - 1, -functional.softplus(below), inside)
    log_probs = torch.where(level == 0, functional.logsigmoid(above), ends)
    log_probs = log_probs + torch.log_softmax(logits, dim=1)
    return -torch.logsumexp(log_probs, dim=1).sum(dim=(1, 2))


def torch_samples(net: Any, levels: int, shape: tuple[int, ...]) -> Any:
    """Draw images pixel by pixel, running the network whole for each."""
    import torch

    x = torch.full((shape[0], 1, *shape[1:3]), -1.0)
    with torch.inference_mode():
        for i in range(shape[1]):
            for j in range(shape[2]):
                logits, mean, log_scale = net(x)[..., i, j].chunk(3, dim=1)
                k = torch.distributions.Categorical(logits=logits).sample()[:, None]
                u = torch.rand(len(x)).clamp(1e-7, 1 - 1e-7)
                noise = log_scale.gather(1, k)[:, 0].clamp(min=-7).exp() * (u.log() - (-u).log1p())
                level = ((mean.gather(1, k)[:, 0] + noise + 1) * (levels - 1) / 2).round()
                x[:, 0, i, j] = level.clamp(0, levels - 1) * (2 / (levels - 1)) - 1
    return x


def step(config: Config) -> list[Row]:
    """Time a training step."""
    x = np.random.default_rng(0).integers(0, LEVELS, SHAPE)

    def ours() -> Side:
        net = PixelCNNPlus(LEVELS, 1, 10, 40, RESNETS, dropout=0.0)
        params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, *SHAPE[1:]), jnp.int32))

        def loss(params: Any, key: jax.Array, x: jax.Array) -> Any:
            return -colour_logistic_mixture(x, net.apply(params, x), levels=LEVELS), {}

        return Trainer(loss, params, x)

    def theirs() -> Side:
        import torch

        torch.manual_seed(0)
        net, levels = torch_network(10, 40), torch.from_numpy(x[..., 0])
        image = (levels.float() * (2 / (LEVELS - 1)) - 1)[:, None]
        return torch_trainer(net.parameters(), lambda: torch_nats(net(image), levels).mean())

    case = "x".join(map(str, SHAPE))
    makers = {OURS: ours, "torch": theirs}
    return compare("pixelcnn_step", makers, config, case=case, targets=TARGETS["step"], warm=2)


def sampling(config: Config) -> list[Row]:
    """Time the drawing of images."""
    levels, shape = 17, (16, 8, 8, 1)
    net = PixelCNNPlus(levels, 1, 3, features=32, resnets=RESNETS)
    params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, *shape[1:]), jnp.int32))
    draw = partial(draw_colours, colours=1, levels=levels)

    def side(cached: bool) -> Side:
        @jax.jit
        def run(params: Any, key: jax.Array) -> jax.Array:
            if cached:
                cache = net.apply(params, shape[0], shape[2], method="empty_cache")
                step = partial(net.apply, params, method="step")
            else:
                cache = jnp.zeros(shape, jnp.int32)
                whole = lambda x: net.apply(params, x).reshape(*x.shape[:3], -1)  # noqa: E731
                step = recomputing_pixel_step(whole)
            return sample_pixels(step, cache, key, shape, draw=draw)

        return lambda: jax.block_until_ready(run(params, jax.random.key(1)))

    def theirs() -> Side:
        peer = torch_network(3, 32)
        return lambda: torch_samples(peer, levels, shape)

    makers = {OURS: lambda: side(True), "torch": theirs, "recomputed": lambda: side(False)}
    options = {"case": "x".join(map(str, shape[:3])), "targets": TARGETS["sampling"], "calls": 3}
    return compare("pixelcnn_sampling", makers, config, **options)


def one(name: str, config: Config) -> list[Row]:
    """Time one of TARGETS."""
    return {"step": step, "sampling": sampling}[name](config)


main = every(one, TARGETS)
if __name__ == "__main__":
    launch(main)
