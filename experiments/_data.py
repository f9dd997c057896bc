"""Both splits of a data set, and how its levels become numbers: the one place for that."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from genjax.data import DataSpec, load

# Examples that are held in memory of a split that is read from disk.
IN_PART = 10_000


class Points(NamedTuple):
    """What `Scaling` is to levels, for data that are numbers (or tokens) already: the identity."""

    def to_continuous(self, x: Any) -> Any:
        return x

    def dequantise(self, key: Any, x: Any) -> Any:
        return x

    def to_levels(self, y: Any) -> Any:
        return y


class Data(NamedTuple):
    """Both splits of a data set, and what a model must know of it."""

    train: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    spec: DataSpec
    held_out: Mapping[str, np.ndarray] | None = None
    """A part of the train split that is not trained on, to choose the best checkpoint by."""
    source: Any = None
    """The train split on disk, where it is not held in memory; `train` then is a part of it."""

    @property
    def trained_on(self) -> Any:
        """What batches are taken from."""
        return self.train if self.source is None else self.source

    @property
    def kind(self) -> str:
        """points, images or tokens."""
        return self.spec.kind

    def scaling(self, low: float = -1.0, high: float = 1.0) -> Any:
        """Between data as loaded and the numbers that a model sees: `Scaling`, or the identity."""
        return self.spec.scaling(low, high) or Points()

    @property
    def count(self) -> int:
        """Samples that a run leaves: as many as it has examples to train on, at most 5,000; in the
        plane 10,000."""
        return 10_000 if self.kind == "points" else min(len(self.train["x"]), 5000)

    def labels(self, count: int | None = None) -> jax.Array:
        """Labels to ask of so many samples (default: `count`), the classes in turn."""
        return jnp.arange(count or self.count, dtype=jnp.int32) % (self.spec.classes or 1)

    def require(self, kind: str, *, labels: bool = False) -> None:
        """Raise ValueError where the data are of another kind, or have no labels."""
        if self.kind != kind:
            raise ValueError(f"dataset must be of {kind}, got {self.spec.name!r} of {self.kind}")
        if labels and self.spec.classes is None:
            raise ValueError(f"dataset must have labels, which {self.spec.name!r} has not")


class Part:
    """The examples from `start` to `stop` of a split on disk."""

    def __init__(self, records: Any, start: int, stop: int):
        self.records, self.start, self.stop = records, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return self.records.take(indices + self.start)


def some(records: Any) -> Mapping[str, np.ndarray]:
    """As many examples of a split on disk as judging looks at, the same ones every time."""
    chosen = np.random.default_rng(0).permutation(len(records))[:IN_PART]
    return records.take(np.sort(chosen))


def load_data(config: Any) -> Data:
    """Load the data set that the config names. Of the train split it keeps back the share
    `held_out`, where the config has such a field."""
    names = ("data_dir", "image_size", "grey", "unreadable")
    options = {name: getattr(config, name) for name in names if hasattr(config, name)}
    in_memory = getattr(config, "in_memory", None)
    train, spec = load(config.dataset, "train", in_memory=in_memory, **options)
    test, _ = load(config.dataset, "test", in_memory=in_memory, **options)
    held_out = getattr(config, "held_out", 0.0)
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must lie in [0, 1), got {held_out}")
    test = test if isinstance(test, Mapping) else some(test)
    if not isinstance(train, Mapping):
        kept = int(len(train) * (1 - held_out))
        held = some(Part(train, kept, len(train))) if held_out else None
        source = Part(train, 0, kept)
        return Data(some(source), test, spec, held, source)
    if not held_out:
        return Data(train, test, spec)
    kept = int(len(train["x"]) * (1 - held_out))
    held = {name: array[kept:] for name, array in train.items()}
    return Data({name: array[:kept] for name, array in train.items()}, test, spec, held)
