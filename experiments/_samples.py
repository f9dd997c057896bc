"""Samples that a run leaves behind, and what they cost: the same in every experiment."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import _run


def save_samples(
    run: _run.Run, sample: Callable[[], Any], *, evaluations: int | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Write samples.npy and give (samples, what the summary says of their cost).

    `sample()` draws them: levels of images, uint8 [n, *event], or points [n, d]. It is called twice
    and timed the second time, after it was compiled. `evaluations` counts the passes through the
    network that one sample takes in sequence (None: not known beforehand).
    """
    jax.block_until_ready(sample())
    begun = time.monotonic()
    samples = np.asarray(sample())
    seconds = time.monotonic() - begun
    if jax.process_index() == 0:
        np.save(run.folder / "samples.npy", samples)
    return samples, {
        "samples": len(samples),
        "sampling_evaluations": evaluations,
        "sampling_seconds": round(seconds, 4),
    }


def parameter_count(params: Any) -> int:
    """Numbers in a tree of parameters."""
    return sum(np.size(x) for x in jax.tree.leaves(params))
