"""U-Net at 32x32x3, batch 16: train step and 18-step Heun sampling, beside diffusers' UNet2DModel.

Both sides: channels 32, 64, 64, two blocks per resolution, attention at 16 and in the middle,
1,624,323 parameters, EDM's preconditioning and loss, Adam 1e-4, float32; PyTorch is eager, channels
last. "sampler" is our sampling beside the sum of its 35 network evaluations.
"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks._ceilings import work_of
from experiments.benchmarks._models import Trainer, repeat, torch_trainer, waiting
from experiments.benchmarks._workload import OURS, Options, Row, compare, every, launch
from genjax import diffusion as gd
from genjax.networks import UNet

# Above 1 / 1.05 the sampler costs at most 5% more than its evaluations.
TARGETS = {"forward": None, "train": 1.0, "sample": 1.0, "sampler": 1 / 1.05}


@dataclasses.dataclass(frozen=True)
class Config(Options):
    rounds: int = 10
    sample_rounds: int = 3  # timed samplings, likewise
    batch_size: int = 16  # images in a step, and in a sampling
    num_steps: int = 18  # steps of Heun's method


@cache
def ours(config: Config) -> dict[str, Any]:
    """The library's parts, as an experiment uses them."""
    network, process = UNet(channels=(32, 64, 64), attention=(16,)), gd.EDM()
    key, shape = jax.random.key(0), (config.batch_size, 32, 32, 3)
    x, t = jax.random.normal(key, shape), jnp.ones(config.batch_size)
    params = jax.jit(network.init)(key, x, t)

    def denoise(params: Any) -> Callable[..., jax.Array]:
        apply = lambda x, t: network.apply(params, x, t)  # noqa: E731
        return gd.denoiser(apply, process=process, prediction="edm")

    def loss(params: Any, key: jax.Array, x: Any) -> Any:
        options = {"process": process, "weighting": "edm", "times": gd.edm_times(process)}
        return gd.denoising_score_matching(denoise(params), key, x, **options)

    evaluate = jax.jit(lambda params, x, t: denoise(params)(x, t))
    grid = {"process": process, "times": gd.time_grid(process, config.num_steps)}
    sample = jax.jit(lambda params, key: gd.sample(denoise(params), key, shape, **grid))
    train, work = Trainer(loss, params, x, rate=1e-4), partial(work_of, evaluate, params, x, t)
    works = {"train": train.work, "sample": partial(work, times=2 * config.num_steps - 1)}
    return {
        "forward": waiting(evaluate, params, x, t),
        "train": train,
        "sample": waiting(sample, params, key),
        "work": {"forward": work, **works},
    }


@cache
def theirs(config: Config) -> dict[str, Callable[[], Any]]:
    """The same in PyTorch, written after EDM's formulas."""
    import torch
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=(32, 64, 64),
        layers_per_block=2, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    x = torch.randn(config.batch_size, 3, 32, 32).to(memory_format=torch.channels_last)

    def denoise(x: Any, sigma: Any) -> Any:
        s = sigma.reshape(-1, 1, 1, 1)
        total = s**2 + 0.25
        out = network(x / total.sqrt(), sigma.log() / 4).sample
        return 0.25 / total * x + 0.5 * s / total.sqrt() * out

    def loss() -> Any:
        sigma = (1.2 * torch.randn(len(x)) - 1.2).exp()
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        noised = x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
        return (weight * (denoise(noised, sigma) - x).square().sum(dim=(1, 2, 3))).mean()

    @torch.no_grad()
    def sample() -> None:
        index = torch.arange(config.num_steps) / (config.num_steps - 1)
        levels = (80 ** (1 / 7) + index * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        levels = [*levels.tolist(), 0.0]
        y = 80 * torch.randn_like(x)
        for level, after in itertools.pairwise(levels):
            slope = (y - denoise(y, torch.full((len(x),), level))) / level
            moved = y + (after - level) * slope
            if after > 0:
                end = (moved - denoise(moved, torch.full((len(x),), after))) / after
                moved = y + (after - level) * (slope + end) / 2
            y = moved

    train = torch_trainer(network.parameters(), loss, lr=1e-4)
    forward = torch.no_grad()(lambda: denoise(x, torch.ones(len(x))))
    return {"forward": forward, "train": train, "sample": sample}


def one(part: str, config: Config) -> list[Row]:
    """Time one of TARGETS: a part on both sides, or our sampler beside its evaluations."""
    own, evaluations = ours(config), 2 * config.num_steps - 1
    rounds = config.sample_rounds if part.startswith("sample") else config.rounds
    options = {"targets": TARGETS[part], "rounds": rounds}
    if part == "sampler":
        evaluate = repeat(own["forward"], evaluations)
        makers = {OURS: lambda: own["sample"], f"{evaluations} evaluations": lambda: evaluate}
        return compare("unet_sampler", makers, config, warm=0, **options)
    makers = {OURS: lambda: own[part], "diffusers": lambda: theirs(config)[part]}
    options |= {"case": f"batch={config.batch_size}", "work": own["work"][part]}
    return compare(f"unet_{part}", makers, config, **options)


main = every(one, TARGETS)
if __name__ == "__main__":
    launch(main, Config)
