"""How the leaderboard measures samples: every row by the same functions, on the same counts."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from genjax import checks
from genjax.data import DENSITIES, DataSpec, Scaling, load
from genjax.metrics import (
    Extractor,
    Measured,
    bits_per_dim,
    density_coverage,
    feature_extractor,
    frechet_distance,
    kid,
    measure,
    memorisation_share,
    precision_recall,
)

MOST = 1000  # of either split in the plane
BLOCKS = 4
# Compiled once for all rows, in float64 where the metric asks for it.
PRECISION_RECALL = jax.jit(precision_recall, static_argnames="k")
DENSITY_COVERAGE = jax.jit(density_coverage, static_argnames="k")
FRECHET = jax.jit(frechet_distance)
KID = jax.jit(kid, static_argnames=("num_subsets", "subset_size"))
MEMORISATION = jax.jit(memorisation_share)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The data as it is held against samples: features and plain values of both splits."""

    spec: DataSpec
    train: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    extractor: Extractor | None

    @property
    def count(self) -> int:
        """Samples that one measurement takes: as many as the test split has."""
        return len(self.test["plain"])

    def views(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return _views(x, self.extractor)


def _views(x: np.ndarray, extractor: Extractor | None) -> dict[str, np.ndarray]:
    """Examples as the metrics take them: flat, and as features."""
    plain = x.reshape(len(x), -1).astype(np.float32)
    features = plain if extractor is None else np.asarray(extractor.extract(x))
    return {"plain": plain, "features": features}


def reference(
    dataset: str, data_dir: str | None = None, extractor: Extractor | None = None
) -> Reference:
    """Load both splits. Features of digits are ours, those of points the points themselves; other
    images need an extractor."""
    train, spec = load(dataset, "train", data_dir=data_dir)
    test, _ = load(dataset, "test", data_dir=data_dir)
    if extractor is None and spec.levels is not None:
        extractor = feature_extractor(dataset)
    if extractor is not None:
        extractor = extractor._replace(extract=jax.jit(extractor.extract))
    most = MOST if spec.levels is None else None
    splits = [_views(split["x"][:most], extractor) for split in (train, test)]
    return Reference(spec, *splits, extractor)


def score(data: Reference, samples: np.ndarray, seed: int = 0) -> list[Measured]:
    """Every metric of samples [n, *event] against the training split, averaged over four blocks,
    or as many as there are.

    A block has as many samples as the test split, so that this split, the ceiling, is measured on
    equal terms. The records' counts are those of one block. Raises ValueError on samples that are
    not finite or too few.
    """
    expected = tuple(data.spec.shape)
    checks.shape("samples", samples, (None, *expected))
    checks.finite("samples", samples.astype(np.float32))
    if len(samples) < data.count:
        raise ValueError(f"samples must be at least {data.count}, got {len(samples)}")
    starts = range(0, len(samples) - data.count + 1, data.count)[:BLOCKS]
    scored = [_score(data, samples[i : i + data.count], seed) for i in starts]
    return [_mean(records) for records in zip(*scored, strict=True)]


def _score(data: Reference, block: np.ndarray, seed: int) -> list[Measured]:
    views, net = data.views(block), data.extractor
    named = {} if net is None else {"extractor": net.name, "parameters": net.parameters}
    real, fake = data.train["features"], views["features"]
    with jax.enable_x64(True):
        subsets = {"seed": seed, "num_subsets": 10, "subset_size": data.count}
        wide = [measure(FRECHET, real, fake, **named), measure(KID, real, fake, **subsets, **named)]
    return [
        measure(PRECISION_RECALL, real, fake, k=3, **named),
        measure(DENSITY_COVERAGE, real, fake, k=5, **named),
        *wide,
        measure(MEMORISATION, data.train["plain"], data.test["plain"], views["plain"]),
    ]


def _mean(records: tuple[Measured, ...]) -> Measured:
    value = jax.tree.map(lambda *x: float(np.mean(x)), *(record.value for record in records))
    return records[0]._replace(value=value)


def numbers(records: list[Measured]) -> dict[str, float]:
    """The records' values by the columns' names."""
    by_metric = {record.metric: record.value for record in records}
    fidelity, cover = by_metric["precision_recall"], by_metric["density_coverage"]
    return {
        "precision": fidelity.precision,
        "recall": fidelity.recall,
        "density": cover.density,
        "coverage": cover.coverage,
        "frechet": by_metric["frechet_distance"],
        "kid": by_metric["kid"].mean,
        "memorised": by_metric["memorisation_share"],
    }


def costs(summary: Mapping[str, Any], spec: DataSpec) -> dict[str, float]:
    """Likelihood and costs, from the summary of a run; what it does not have is left out."""
    bits = summary.get("bits_per_dim")
    nats = summary.get("test_log_likelihood", summary.get("log_likelihood"))
    if spec.levels is None and nats is not None:
        bits = float(bits_per_dim(nats, int(np.prod(spec.shape))))
    drawn, seconds = summary.get("samples"), summary.get("sampling_seconds")
    training = summary.get("training_seconds")
    found = {
        "bits_per_dim": bits,
        "evaluations": summary.get("sampling_evaluations"),
        "sampling_seconds": 1000 * seconds / drawn if drawn and seconds is not None else None,
        # Compiling, which the budget does not count either, is left out.
        "training_seconds": training and training - summary.get("first_call_seconds", 0.0),
        "steps": summary.get("steps_done"),
        "parameters": summary.get("parameters"),
    }
    return {name: value for name, value in found.items() if value is not None}


def ceiling(data: Reference, dataset: str, data_dir: str | None) -> tuple[np.ndarray, dict]:
    """The test split as if it were samples; in the plane with the law's own likelihood."""
    x = load(dataset, "test", data_dir=data_dir)[0]["x"]
    if data.spec.levels is not None:
        return x, {}
    nats = float(np.mean(DENSITIES[dataset].log_prob(jax.numpy.asarray(x))))
    return x[:MOST], {"bits_per_dim": float(bits_per_dim(nats, x.shape[1]))}


def floors(
    dataset: str, data_dir: str | None, seed: int
) -> dict[str, Callable[[], tuple[np.ndarray, dict[str, float]]]]:
    """scikit-learn's Gaussian mixture and kernel density estimate: samples, likelihood, costs.

    Images are dequantised in units of their levels. The bandwidth is the best of ten by the
    likelihood of held-out training points.
    """
    train, spec = load(dataset, "train", data_dir=data_dir)
    test, _ = load(dataset, "test", data_dir=data_dir)
    scaling = None if spec.levels is None else Scaling(spec.levels, 0.0, float(spec.levels))

    def flat(x: np.ndarray, draw: int) -> np.ndarray:
        y = x if scaling is None else scaling.dequantise(jax.random.fold_in(key, draw), x)
        return np.asarray(y, np.float64).reshape(len(x), -1)

    key = jax.random.key(seed)
    x, fresh = flat(train["x"], 0), flat(test["x"], 1)
    count = 10_000 if scaling is None else min(len(x), 5000)

    def finish(model: Any, parameters: int, begun: float, sample: Callable[[int], Any]) -> Any:
        training = time.monotonic() - begun
        begun = time.monotonic()
        y = np.asarray(sample(count)).reshape(count, *spec.shape)
        drawing = time.monotonic() - begun
        y = y.astype(np.float32)
        return np.asarray(y if scaling is None else scaling.to_levels(y)), {
            "bits_per_dim": float(bits_per_dim(np.mean(model.score_samples(fresh)), x.shape[1])),
            "sampling_seconds": 1000 * drawing / count,
            "training_seconds": training,
            "parameters": parameters,
        }

    def mixture() -> Any:
        from sklearn.mixture import GaussianMixture

        regular = 1e-4 if scaling is None else 0.1
        begun = time.monotonic()
        model = GaussianMixture(10, reg_covar=regular, random_state=seed).fit(x)
        dims = x.shape[1]
        parameters = 10 * (dims + dims * (dims + 1) // 2) + 9
        return finish(model, parameters, begun, lambda n: shuffled(model.sample(n)[0]))

    def kernels() -> Any:
        from sklearn.model_selection import GridSearchCV
        from sklearn.neighbors import KernelDensity

        widths = np.std(x) * np.geomspace(0.01, 1.0, 10)
        begun = time.monotonic()
        search = GridSearchCV(KernelDensity(), {"bandwidth": widths}, cv=3).fit(x[:2000])
        model = KernelDensity(**search.best_params_).fit(x)
        return finish(model, x.size + 1, begun, lambda n: model.sample(n, random_state=seed))

    def shuffled(y: np.ndarray) -> np.ndarray:
        # The mixture gives its samples one component after another.
        return np.random.default_rng(seed).permutation(y)

    return {"Mixture of 10 Gaussians": mixture, "Kernel density": kernels}
