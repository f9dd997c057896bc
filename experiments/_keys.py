"""The keys of a run, one for each purpose."""

from typing import Any, NamedTuple

import jax

# Indices of the keys folded from `Keys.batches`; batches have those of processes, from 0 on.
CARRY, PAIRS, PICTURES = (2**20 + i for i in range(3))


class Keys(NamedTuple):
    """The keys of a run: for the weights, the steps, the test split, the samples, and what batches
    draw by themselves. None is used for a second purpose."""

    init: Any
    run: Any
    test: Any
    sample: Any
    batches: Any


def keys(seed: int) -> Keys:
    """One split for all experiments."""
    return Keys(*jax.random.split(jax.random.key(seed), 5))
