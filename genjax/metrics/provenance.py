"""A metric's value together with where it came from."""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from genjax import checks
from genjax.metrics.extractors import Extractor


class Measured(NamedTuple):
    """value: what the metric returned, numbers as Python floats. extractor, hash: what made the
    features, and its parameters' hash. counts: rows of each sample. seed: None where the metric
    draws nothing. dtype: of the features."""

    value: Any
    metric: str
    extractor: str
    hash: str
    counts: tuple[int, ...]
    seed: int | None
    dtype: str


def measure(
    metric: Callable[..., Any],
    *samples: Any,
    extract: Callable[[Any], Any] | None = None,
    extractor: str | Extractor = "none",
    parameters: Any = None,
    seed: int | None = None,
    **options: Any,
) -> Measured:
    """Extract features from each sample, call the metric on them and record how.

    `extract(sample) -> [n, d]` is any callable, `parameters` the pytree it depends on; an
    `Extractor` as `extractor` brings its own name, callable and parameters. A metric
    whose first argument is a key gets `jax.random.key(seed)`. For records, not for use inside
    `jax.jit`: the value is read back. Raises ValueError where a random metric comes without a seed.

    >>> x, y = jax.random.normal(jax.random.key(0), (2, 64, 2))
    >>> record = measure(frechet_distance, x, y)
    >>> record.counts
    (64, 64)
    """
    if isinstance(extractor, Extractor):
        extract, parameters, extractor = extractor.extract, extractor.parameters, extractor.name
    random = next(iter(inspect.signature(metric).parameters)) == "key"
    name = getattr(metric, "__name__", repr(metric))
    if random:
        if seed is None:
            raise ValueError(f"{name} draws at random: it needs a seed, got None")
        checks.integer("seed", seed, least=0)
    features = [sample if extract is None else extract(sample) for sample in samples]
    keys = [jax.random.key(seed)] if random and seed is not None else []
    value = jax.tree.map(_number, metric(*keys, *features, **options))
    return Measured(
        value=value,
        metric=name,
        extractor=extractor,
        hash=hash_of(parameters),
        counts=tuple(int(np.shape(f)[0]) for f in features),
        seed=seed if random else None,
        dtype=str(features[0].dtype),
    )


def hash_of(parameters: Any) -> str:
    """First 16 hex digits of the SHA-256 of a pytree: paths, dtypes, shapes and bytes.

    >>> len(hash_of({"w": jnp.ones(2)}))
    16
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _number(x: Any) -> Any:
    return x.item() if np.ndim(x) == 0 and hasattr(x, "item") else np.asarray(x)
