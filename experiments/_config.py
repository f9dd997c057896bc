"""The options that every run has, and those of every training."""

import dataclasses
import math
from typing import Any, ClassVar, Literal

from genjax import checks

# A resumed run may differ in these; what the numbers depend on must be as it was.
MAY_DIFFER = ("run_dir", "resume", "steps", "max_seconds", "data_dir", "devices", "sharding",
              "remat", "prefetch", "profile", "save_every", "keep", "log_every", "evaluate_every",
              "tensorboard", "progress", "curves", "coordinator", "processes",
              "process")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has: its data, its folder and its seed. Experiments add their own options."""

    evaluation: ClassVar[tuple[str, ...]] = ()
    """Options that training does not depend on, which a resumed run may change."""

    dataset: str = "digits"
    """Data set by name: digits, mnist_5k, a tfds image set such as mnist, or folder:PATH."""
    image_size: int | None = None
    """Side to which the images of folder:PATH are cropped and resized (default: as they are)."""
    grey: bool = False
    """Read the images of folder:PATH without colours."""
    unreadable: Literal["refuse", "skip"] = "refuse"
    """What becomes of a file of folder:PATH that is no whole image."""
    data_dir: str | None = None
    """Folder of the prepared data sets (default: the usual one of tensorflow_datasets)."""
    run_dir: str | None = None
    """Folder of this run (default: the next free number in runs/EXPERIMENT)."""
    seed: int = 0
    """Seed of everything random: weights, noise, the order of the data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Options of every experiment that trains step by step."""

    resume: bool = False
    """Go on with the run in run_dir (default: the newest one), its options and last checkpoint."""
    steps: int = 2000
    """Updates in all, those before a resume included."""
    max_seconds: float = 0.0
    """End training so many seconds after the first call, which compiles (0: no limit). A rate that
    falls along a schedule still falls by `steps`, which the budget may cut short."""
    batch_size: int = 128
    """Examples in one update, over all devices."""
    steps_per_call: int = 1
    """Updates in one call of the compiled program; more than 1 helps small networks."""
    learning_rate: float = 1e-3
    """The optimiser's largest rate; along which schedule it falls is the experiment's."""
    ema: float = 0.99
    """Decay of the averaged weights, which are the ones that are sampled and reported."""
    shift: int = 0
    """Move each training image by up to so many pixels either way, its border repeated."""
    flip: bool = False
    """Turn each training image left to right with probability 1/2 (not for digits)."""
    devices: int | None = None
    """How many devices to use (default: all)."""
    sharding: Literal["replicated", "fsdp"] = "replicated"
    """Parameters, optimiser state and averages whole on every device, or each leaf in parts."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the products in training; parameters, losses, sums and judging stay float32."""
    accumulate: int = 1
    """Take each batch in so many parts one after another, with the memory of one."""
    remat: bool = False
    """Recompute the blocks of a transformer or U-Net in the backward pass, which saves memory."""
    in_memory: bool | None = None
    """Hold the training data in memory, or read each batch from disk (default: up to 4 GiB)."""
    prefetch: int = 2
    """Calls of the compiled program for which batches are made ahead, in threads (0: none)."""
    profile: int = 0
    """Write a trace of so many updates after the first call, for jax's profiler (0: none)."""
    save_every: int = 1000
    """Steps between checkpoints; the last state is always saved."""
    keep: int = 2
    """How many of the newest checkpoints stay (the best one stays too)."""
    evaluate_every: int = 0
    """Steps between evaluations while training (0: only at the end)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = False
    """Write TensorBoard files too (needs tensorboardX)."""
    progress: bool = True
    """Show a progress bar, or where standard error is no terminal a line every 30 seconds."""
    curves: bool = True
    """Draw curves.png, every logged term by the step, when the run ends."""
    coordinator: str | None = None
    """Several processes: "host:port" of the first one (default: JAX_COORDINATOR_ADDRESS)."""
    processes: int | None = None
    """Several processes: how many (default: JAX_NUM_PROCESSES)."""
    process: int | None = None
    """Several processes: the index of this one (default: JAX_PROCESS_ID)."""


# Options that are counts or sizes, at least 1, and those that may be negative.
COUNTS = ("steps", "batch_size", "steps_per_call", "accumulate", "save_every", "keep", "log_every",
          "n_critic", "generator_updates", "latent_dim", "width", "features", "groups", "heads",
          "kv_heads", "patch", "channels", "num_steps", "num_samples", "samples", "sample_steps",
          "test_samples", "test_draws", "draws", "seeds", "num_particles", "num_images",
          "frames")  # fmt: skip
SIGNED = ("seed", "noise_mean", "guidance", "rho", "truncation")


def check_numbers(config: Any) -> None:
    """Raise by name for a number that no run has: NaN, a negative one but for `SIGNED`, and one of
    `COUNTS` that is below 1 (ValueError) or no integer (TypeError)."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in COUNTS and value is not None:
            for number in value if isinstance(value, tuple | list) else (value,):
                checks.integer(name, number, 1)
        elif isinstance(value, int | float) and name not in SIGNED:
            checks.at_least(name, value, 0)
        elif isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name} must be a number, got {value}")
