"""How experiments and leaderboard judge samples and likelihoods: one name and one definition for
each number.

precision, recall, density, coverage, frechet, kid: in features of images (of the digits those of
our classifier, else the pixels in [0, 1]) or on the points, each a mean over blocks of as many
samples as the test split has. memorised: the share of samples nearer to a training example than 99%
of the test split are, on pixels. label_accuracy: the share in which a classifier reads the label
asked for.
modes, high_quality_share, reverse_kl_modes: for mixtures of a few Gaussians.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._data import Data
from genjax import checks
from genjax.data import DENSITIES, Scaling
from genjax.data.synthetic import GaussianMixture
from genjax.metrics import (
    Extractor,
    Measured,
    density_coverage,
    feature_extractor,
    frechet_distance,
    high_quality_share,
    kid,
    measure,
    memorisation_share,
    modes_covered,
    precision_recall,
    reverse_kl_modes,
    test_log_likelihood,
)
from genjax.metrics.extractors import SHIPPED

MOST = {"images": 10_000, "points": 1000}  # examples of either split
BLOCKS = 4
NEIGHBOURS = 3
MOST_MODES = 25  # moons and swissroll are mixtures too, of many Gaussians along a curve
# Compiled once for all runs of a process.
PRECISION_RECALL = jax.jit(precision_recall, static_argnames="k")
DENSITY_COVERAGE = jax.jit(density_coverage, static_argnames="k")
FRECHET = jax.jit(frechet_distance)
KID = jax.jit(kid, static_argnames=("num_subsets", "subset_size"))
MEMORISATION = jax.jit(memorisation_share)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The data as samples are held against it: both splits flat ("plain") and as features."""

    data: Data
    extractor: Extractor | None
    train: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]

    @property
    def count(self) -> int:
        """Samples in one block: as many as the test split has."""
        return len(self.test["plain"])

    def views(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return _views(x, self.extractor, self.data.spec.levels)


def _views(x: np.ndarray, extractor: Extractor | None, levels: int | None) -> dict[str, np.ndarray]:
    plain = np.reshape(x, (len(x), -1)).astype(np.float32)
    if extractor is not None:
        return {"plain": plain, "features": np.asarray(extractor.extract(x))}
    return {"plain": plain, "features": plain / ((levels or 2) - 1)}


def reference(data: Data, extractor: Extractor | None = None) -> Reference:
    """Both splits in the features that our own data sets have; other images take an extractor, or
    their pixels in [0, 1]."""
    if extractor is None and data.spec.name in SHIPPED:
        extractor = feature_extractor(data.spec.name)
    if extractor is not None:
        extractor = extractor._replace(extract=jax.jit(extractor.extract))
    most = MOST[data.kind]
    splits = (
        _views(split["x"][:most], extractor, data.spec.levels) for split in (data.train, data.test)
    )
    return Reference(data, extractor, *splits)


def judge(reference: Reference, samples: np.ndarray, labels: Any = None) -> dict[str, Any]:
    """What an experiment's summary says of its samples: the numbers that cost little. Of fewer
    than four images, or samples, none is by neighbours."""
    if reference.data.kind == "points":
        return _modes(reference.data.spec.name, samples)
    enough = min(reference.count, len(samples), len(reference.train["plain"])) > NEIGHBOURS
    found = numbers(_measure_blocks(reference, samples, 0, full=False)) if enough else {}
    if labels is not None:
        plain = np.reshape(samples, (len(samples), -1)).astype(np.float32)
        found["label_accuracy"] = label_accuracy(reference.data, plain, labels)
    return found


def score(reference: Reference, samples: np.ndarray, seed: int = 0) -> list[Measured]:
    """Every metric of samples [n, *event] against the training split; the records' counts are those
    of one block. Raises ValueError on samples that are not finite or too few."""
    checks.shape("samples", samples, (None, *reference.data.spec.shape))
    checks.finite("samples", samples.astype(np.float32))
    if len(samples) < reference.count:
        raise ValueError(f"samples must be at least {reference.count}, got {len(samples)}")
    return _measure_blocks(reference, samples, seed, full=True)


def numbers(records: list[Measured]) -> dict[str, float]:
    """The records' values by the names that summaries and columns have."""
    by_metric = {record.metric: record.value for record in records}
    found = {
        **by_metric["precision_recall"]._asdict(),
        "memorised": by_metric["memorisation_share"],
    }
    if "kid" in by_metric:
        found |= by_metric["density_coverage"]._asdict()
        found |= {"frechet": by_metric["frechet_distance"], "kid": by_metric["kid"].mean}
    return found


def _measure_blocks(reference: Reference, samples: Any, seed: int, full: bool) -> list[Measured]:
    """The mean over blocks; samples fewer than a block are one block."""
    size = min(reference.count, len(samples))
    starts = range(0, len(samples) - size + 1, size)[:BLOCKS]
    blocks = [_measure(reference, samples[i : i + size], seed, full) for i in starts]
    return [_mean(records) for records in zip(*blocks, strict=True)]


def _measure(reference: Reference, block: Any, seed: int, full: bool) -> list[Measured]:
    views, net, train = reference.views(block), reference.extractor, reference.train
    named = {} if net is None else {"extractor": net.name, "parameters": net.parameters}
    pair = train["features"], views["features"]
    found = [
        measure(PRECISION_RECALL, *pair, k=NEIGHBOURS, **named),
        measure(MEMORISATION, train["plain"], reference.test["plain"], views["plain"]),
    ]
    if full:
        found.append(measure(DENSITY_COVERAGE, *pair, k=5, **named))
        subsets = {"seed": seed, "num_subsets": 10, "subset_size": len(block)}
        with jax.enable_x64(True):
            found.append(measure(FRECHET, *pair, **named))
            found.append(measure(KID, *pair, **subsets, **named))
    return found


def _mean(records: tuple[Measured, ...]) -> Measured:
    value = jax.tree.map(lambda *x: float(np.mean(x)), *(record.value for record in records))
    return records[0]._replace(value=value)


def few_modes(name: str) -> GaussianMixture | None:
    """The density of that name where it is a mixture of so few Gaussians that modes count."""
    density = DENSITIES.get(name)
    few = isinstance(density, GaussianMixture) and len(density.means) <= MOST_MODES
    return density if few else None


def _modes(name: str, samples: np.ndarray) -> dict[str, Any]:
    density = few_modes(name)
    if density is None:
        return {}
    near = {"means": density.means, "std": density.std}
    return {
        "modes": int(modes_covered(samples, **near)),
        "high_quality_share": float(high_quality_share(samples, **near)),
        "reverse_kl_modes": float(reverse_kl_modes(samples, density.means)),
    }


def label_accuracy(data: Data, samples: np.ndarray, asked: Any) -> float:
    """Share of samples [n, pixels] in which a support vector machine of the training images reads
    the label asked for; of the test split's real labels it reads 99.2% on the digits and 94.8% on
    mnist_5k."""
    from sklearn.svm import SVC

    unit = 16 / ((data.spec.levels or 17) - 1)  # gamma suits the digits' levels, 0 to 16
    images, labels = (data.train[name][: MOST["images"]] for name in ("x", "label"))
    flat = unit * images.reshape(len(images), -1)
    # 0.001 for 64 pixels: squared distances grow with the number of pixels.
    reader = SVC(gamma=0.064 / flat.shape[1], C=10).fit(flat, labels)
    return float(np.mean(reader.predict(unit * samples) == np.asarray(asked)))


def likelihood(
    system: Any, data: Data, **changes: Any
) -> Callable[[Any, Any, Any], dict[str, Any]]:
    """(params, key, split) -> nats of a split under the system's density, bits of images, in the
    plane the distance to the law; nothing where the system has no density. changes: options of
    `System.likelihood`."""
    if system.log_prob is None:
        return lambda params, key, split: {}
    options = {"batch_size": 256, **system.likelihood, **changes}
    most, bits = options.pop("num_examples", None), options.pop("bits", data.kind != "points")
    scaling = system.scaling if isinstance(system.scaling, Scaling) else None

    @jax.jit
    def score(params: Any, key: Any, x: Any) -> Any:
        log_prob = lambda key, y: system.log_prob(params, key, y)  # noqa: E731
        return test_log_likelihood(log_prob, key, x, scaling=scaling, **options)

    def nats(params: Any, key: Any, split: Any) -> dict[str, Any]:
        x = split["x"][:most]
        found = score(params, key, x if scaling else jnp.asarray(x, jnp.float32))
        scores = {
            "test_log_likelihood": float(found.log_likelihood),
            "standard_error": float(found.standard_error),
        }
        if bits:
            scores["bits_per_dim"] = float(found.bits_per_dim)
        if data.kind == "points":
            exact = float(jnp.mean(DENSITIES[data.spec.name].log_prob(jnp.asarray(x))))
            scores |= {
                "exact_log_likelihood": exact,
                "kl_to_exact": exact - scores["test_log_likelihood"],
            }
        return scores

    return nats
