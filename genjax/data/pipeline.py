"""Batches as a pure function of (seed, step): nothing about an iterator needs to be saved.

`batch_at` is the whole interface; `stream` is the same function mapped over steps by grain, which
reads ahead in threads. Both take arrays in memory or records on disk.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from genjax import checks


@runtime_checkable
class Records(Protocol):
    """A split on disk: its length, and the named arrays of the examples at some indices."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]: ...


def batch_at(
    data: Mapping[str, Any] | Records,
    *,
    seed: int,
    step: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> dict[str, np.ndarray]:
    """Give the batch of one step, the same for the same (seed, step) on every machine.

    Epoch e = step // (n // batch_size) visits the examples in the order of a permutation that
    depends on (seed, e) alone, without replacement; the n % batch_size examples at the end of the
    permutation are left out of that epoch. `batch_size` counts the examples of all processes;
    process i of `process_count` gets the i-th of equal shares.

    Raises ValueError: arrays of unequal length, batch larger than the split, batch not divisible
    by the processes, a batch that holds NaN. TypeError: dtypes that are not numbers.

    >>> data = {"x": np.arange(10)}
    >>> batch_at(data, seed=0, step=3, batch_size=4)["x"].shape
    (4,)
    """
    checks.integer("seed", seed, least=0)
    checks.integer("step", step, least=0)
    share = _share(batch_size, process_index, process_count)
    size = num_examples(data)
    if batch_size > size:
        raise ValueError(
            f"batch_size must be at most the split's {size} examples, got {batch_size}"
        )
    epoch, position = divmod(step, size // batch_size)
    start = position * batch_size + process_index * share
    return _take(data, _permutation(size, seed, epoch)[start : start + share])


def in_order(
    data: Mapping[str, Any] | Records,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Iterate over a split once, in its order, to the last example: for evaluation.

    Yields (batch, keep). Every batch has the same shape, so that one compiled program serves all:
    the last is filled up with copies of the last example, where `keep` [batch] is False. Process i
    of `process_count` gets the i-th of equal shares of each batch, and all get as many batches.

    Raises ValueError: an empty split, arrays of unequal length, batch not divisible by the
    processes, a batch that holds NaN. TypeError: dtypes that are not numbers.

    >>> data = {"x": np.arange(5)}
    >>> [kept.sum().item() for batch, kept in in_order(data, batch_size=2)]
    [2, 2, 1]
    """
    share = _share(batch_size, process_index, process_count)
    size = num_examples(data)
    if size == 0:
        raise ValueError("data must hold at least one example, got none")

    def batches() -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        for start in range(process_index * share, size + process_index * share, batch_size):
            rows = np.arange(start, start + share)
            yield _take(data, np.minimum(rows, size - 1)), rows < size

    return batches()


def _share(batch_size: int, process_index: int, process_count: int) -> int:
    """How many examples of a batch are this process' own."""
    checks.integer("batch_size", batch_size, least=1)
    checks.integer("process_count", process_count, least=1)
    checks.integer("process_index", process_index, least=0)
    if process_index >= process_count:
        raise ValueError(
            f"process_index must be below process_count={process_count}, got {process_index}"
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size must be divisible by process_count={process_count}, got {batch_size}"
        )
    return batch_size // process_count


def _take(data: Mapping[str, Any] | Records, indices: np.ndarray) -> dict[str, np.ndarray]:
    if isinstance(data, Mapping):
        batch = {name: np.asarray(array)[indices] for name, array in data.items()}
    else:
        batch = data.take(indices)
    check_arrays(batch)
    return batch


def stream(
    data: Mapping[str, Any] | Records,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    ahead: int = 8,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterate over `batch_at` from `start_step` on, without end, read ahead by grain.

    `threads` read at once, at most `ahead` batches wait in memory; the order is that of the steps.

    >>> batches = stream({"x": np.arange(10)}, seed=0, batch_size=4)
    >>> next(batches)["x"].shape
    (4,)
    """
    with checks.extra("data", "stream"):
        import grain

    batch = functools.partial(
        batch_at,
        data,
        seed=seed,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )
    batch(step=start_step)  # bad input raises here, not in a thread
    steps = grain.MapDataset.range(start_step, np.iinfo(np.int64).max)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    return iter(steps.map(lambda step: batch(step=int(step))).to_iter_dataset(options))


def num_examples(data: Mapping[str, Any] | Records) -> int:
    """Count the examples of a split; raises ValueError where arrays differ in length.

    >>> num_examples({"x": np.arange(5)})
    5
    """
    if not isinstance(data, Mapping):
        return len(data)
    if not data:
        raise ValueError("data must hold at least one array, got an empty dictionary")
    for name, array in data.items():
        checks.min_rank(name, array, 1)
    checks.same_batch(**data)
    return len(next(iter(data.values())))


def check_arrays(
    arrays: Mapping[str, Any], *, ranks: Mapping[str, int] | None = None
) -> Mapping[str, Any]:
    """Return the arrays as they came if they can be trained on, and raise otherwise.

    ValueError: NaN or infinity, unequal lengths, a rank other than the one that `ranks` names.
    TypeError: an array that is not of integers, booleans or floating-point numbers.

    >>> sorted(check_arrays({"x": np.zeros((4, 2)), "label": np.zeros(4, int)}))
    ['label', 'x']
    """
    num_examples(arrays)
    for name, array in arrays.items():
        dtype = np.asarray(array).dtype
        # ml_dtypes' bfloat16 and float8 have kind "V" and a name that says float.
        is_float = dtype.kind == "f" or "float" in dtype.name
        if dtype.kind not in "biu" and not is_float:
            raise TypeError(f"{name} must hold integers, booleans or floats, got dtype {dtype}")
        if ranks is not None and name in ranks:
            checks.rank(name, array, ranks[name])
        # The sum of finite numbers overflows only where they are useless too; it needs no copy.
        if is_float and not np.isfinite(np.sum(np.asarray(array), dtype=np.float64)):
            checks.finite(name, array)
    return arrays


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch; remembered because every step of the epoch asks for it."""
    return np.random.default_rng([seed, epoch]).permutation(size)
