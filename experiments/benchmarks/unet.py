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
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks._ceilings import work_of
from experiments.benchmarks._table import OURS, Row, build, make_rows, show
from experiments.benchmarks._timing import in_turn
from genjax import diffusion as gd
from genjax.networks import UNet
from genjax.training import data_mesh, init_state, make_train_step

TARGETS = {"forward": None, "train": 1.0, "sample": 1.0}


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


def main(config: Config) -> list[Row]:
    """Time every part on both sides in turn, then our sampler beside its evaluations."""
    makers: dict[str, Any] = {OURS: partial(ours, config)}
    if config.torch:
        makers["diffusers"] = partial(theirs, config)
    made, notes = build(makers, ("diffusers",))
    own, rows = made[OURS], []
    evaluations = 2 * config.num_steps - 1
    for part, target in TARGETS.items():
        rounds = config.sample_rounds if part == "sample" else config.rounds
        times = in_turn({k: steps[part] for k, steps in made.items()}, rounds=rounds)
        work = own["work"]("forward" if part == "sample" else part)
        if part == "sample":
            work = {what: evaluations * n for what, n in work.items()}
        options = {"targets": target, "notes": notes, "work": work}
        rows += show(make_rows(f"unet_{part}", times, case=f"batch={config.batch_size}", **options))

    def evaluate() -> None:
        for _ in range(evaluations):
            own["forward"]()

    # Above 1 / 1.05 the sampler costs at most 5% more than its evaluations.
    sides = {OURS: own["sample"], f"{evaluations} evaluations": evaluate}
    times = in_turn(sides, rounds=config.sample_rounds, warm=0)
    return rows + show(make_rows("unet_sampler", times, targets=1 / 1.05))


def ours(config: Config) -> dict[str, Callable[..., Any]]:
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

    def work(part: str) -> dict[str, float]:
        if part == "forward":
            return work_of(evaluate, params, x, t)
        return work_of(step.compiled, state[0], {"x": x})  # type: ignore[attr-defined]

    return {
        "work": work,
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
