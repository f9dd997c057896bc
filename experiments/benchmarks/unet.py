"""U-Net at 32x32x3, batch 16: train step and 18-step Heun sampling, beside diffusers' UNet2DModel.

Both sides: channels 32, 64, 64, two blocks per resolution, attention at 16 and in the middle,
1,624,323 parameters, EDM's preconditioning and loss, Adam 1e-4, float32. The two run in turn in one
process; PyTorch is eager, channels last. Medians of warm calls, in milliseconds; "sampler" is our
sampling beside the sum of its 35 network evaluations. Needs torch and diffusers.

    python -m experiments.benchmarks.unet
    python -m experiments.benchmarks.unet --rounds 20 --no-torch
"""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from genjax import diffusion as gd
from genjax.networks import UNet
from genjax.training import data_mesh, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the workload."""

    rounds: int = 10
    """Timed calls of each part, in turn between the two sides."""
    sample_rounds: int = 3
    """Timed samplings, likewise."""
    batch_size: int = 16
    """Images in a step, and in a sampling."""
    num_steps: int = 18
    """Steps of Heun's method."""
    threads: int = 2
    """Threads of PyTorch."""
    torch: bool = True
    """Time PyTorch beside."""


def main(config: Config) -> dict[str, Any]:
    """Time every part on both sides; returns milliseconds and ratios."""
    sides = {"genjax": ours(config)}
    if config.torch:
        sides["diffusers"] = theirs(config)
    result: dict[str, Any] = {}
    for part in ("forward", "train", "sample"):
        rounds = config.sample_rounds if part == "sample" else config.rounds
        times: dict[str, list[float]] = {side: [] for side in sides}
        for steps in sides.values():
            steps[part]()
            steps[part]()
        for _ in range(rounds):
            for side, steps in sides.items():
                times[side].append(timed(steps[part]))
        result |= {f"{side} {part}": round(statistics.median(t), 1) for side, t in times.items()}
        if config.torch:
            # Pair by pair: the machine's moods hit both sides of a pair alike.
            pairs = zip(times["diffusers"], times["genjax"], strict=True)
            ratio = statistics.median(theirs / ours for theirs, ours in pairs)
            result[f"diffusers / genjax {part}"] = round(ratio, 2)
    # The sampler beside its evaluations, in turn as well.
    own, shares = sides["genjax"], []
    for _ in range(config.sample_rounds):
        before = [timed(own["forward"]) for _ in range(6)]
        whole = timed(own["sample"])
        each = statistics.median(before + [timed(own["forward"]) for _ in range(6)])
        shares.append(whole / ((2 * config.num_steps - 1) * each))
    result["sampler / its evaluations"] = round(statistics.median(shares), 3)
    print(json.dumps(result, indent=2))
    return result


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def ours(config: Config) -> dict[str, Callable[[], Any]]:
    """The library's parts, as an experiment uses them."""
    network, process, key = (
        UNet(channels=(32, 64, 64), attention=(16,)),
        gd.EDM(),
        jax.random.key(0),
    )
    shape = (config.batch_size, 32, 32, 3)
    x, t = jax.random.normal(key, shape), jnp.ones(config.batch_size)
    params = jax.jit(network.init)(key, x, t)
    optimizer = optax.adam(1e-4)

    def denoise(params: Any) -> Callable[..., jax.Array]:
        return gd.denoiser(
            lambda x, t: network.apply(params, x, t), process=process, prediction="edm"
        )

    def loss(params: Any, key: jax.Array, batch: Any) -> Any:
        return gd.denoising_score_matching(
            denoise(params),
            key,
            batch["x"],
            process=process,
            weighting="edm",
            times=gd.edm_times(process),
        )

    step = make_train_step(loss, optimizer, mesh=data_mesh(1))
    state = [init_state(params, optimizer, key)]
    evaluate = jax.jit(lambda params, x, t: denoise(params)(x, t))
    times = gd.time_grid(process, config.num_steps)
    draw = jax.jit(
        lambda params, key: gd.sample(denoise(params), key, shape, process=process, times=times)
    )

    def train() -> None:
        state[0], _ = jax.block_until_ready(step(state[0], {"x": x}))

    return {
        "forward": lambda: jax.block_until_ready(evaluate(params, x, t)),
        "train": train,
        "sample": lambda: jax.block_until_ready(draw(params, key)),
    }


def theirs(config: Config) -> dict[str, Callable[[], Any]]:
    """The same in PyTorch, written after EDM's formulas."""
    import torch
    from diffusers import UNet2DModel

    torch.set_num_threads(config.threads)
    network = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)
    x = torch.randn(config.batch_size, 3, 32, 32).to(memory_format=torch.channels_last)

    def denoise(x: Any, sigma: Any) -> Any:
        s = sigma.reshape(-1, 1, 1, 1)
        total = s**2 + 0.25
        out = network(x / total.sqrt(), sigma.log() / 4).sample
        return 0.25 / total * x + 0.5 * s / total.sqrt() * out

    def train() -> None:
        sigma = (1.2 * torch.randn(len(x)) - 1.2).exp()
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        noised = x + sigma.reshape(-1, 1, 1, 1) * torch.randn_like(x)
        error = (denoise(noised, sigma) - x).square().sum(dim=(1, 2, 3))
        optimizer.zero_grad()
        loss = (weight * error).mean()
        loss.backward()
        optimizer.step()
        loss.item()

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

    @torch.no_grad()
    def forward() -> None:
        denoise(x, torch.ones(len(x)))

    return {"forward": forward, "train": train, "sample": sample}


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
