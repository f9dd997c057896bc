"""Fidelity and variety of a sample against data: neighbourhoods, memorisation, two-sample tests."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from genjax.metrics._pairs import (
    Features,
    MoreFeatures,
    around_medoid,
    check_features,
    kth_neighbour,
    map_row_blocks,
    nan_unless_finite,
    pair_distances,
    squared_norms,
)
from genjax.numerics import at_least_float32, safe_sqrt, squared_distances
from genjax.typing import PRNGKey


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: Float[Array, ""]
    recall: Float[Array, ""]


class DensityCoverage(NamedTuple):
    """Density (1 expected for equal laws, may exceed it) and coverage, a share in [0, 1]."""

    density: Float[Array, ""]
    coverage: Float[Array, ""]


def precision_recall(real: Features, fake: MoreFeatures, *, k: int = 3) -> PrecisionRecall:
    """Share of fakes inside the real manifold, and of reals inside that of the fakes.

    A manifold is the union of closed balls around its points, each reaching to the k-th nearest
    other point of its own sample; ties and duplicates lie inside. Kynkaanniemi et al. 2019,
    equations (1) and (2).

    Distances are taken in float32 (float64 where jax has it on), in blocks of rows. Raises
    ValueError on NaN, different widths, fewer than k + 1 samples; under `jax.jit` NaN gives NaN.

    >>> real, fake = jax.random.normal(jax.random.key(0), (2, 128, 2))
    >>> precision_recall(real, fake + 10)
    PrecisionRecall(precision=Array(0., dtype=float32), recall=Array(0., dtype=float32))
    """
    _check_neighbours(k, real=real, fake=fake)
    x, y = around_medoid(real, fake)
    radii_x, radii_y = kth_neighbour(x, k), kth_neighbour(y, k)
    norms_y = squared_norms(y)

    def block(rows: Array, index: Array) -> tuple[Array, Array]:
        distances = pair_distances(rows, y, (squared_norms(rows), norms_y), least=True)
        # A padding row contains nothing: its radius is below every distance.
        radius = radii_x.at[index].get(mode="fill", fill_value=-1)
        hit = jnp.any(distances <= radius[:, None], axis=0)
        return hit, jnp.any(distances <= radii_y[None, :], axis=1)

    (fakes_hit, reals_hit), valid = map_row_blocks(block, x, y.shape[0])
    precision = jnp.mean(jnp.any(fakes_hit, axis=0), dtype=x.dtype)
    recall = jnp.sum(reals_hit & valid, dtype=x.dtype) / x.shape[0]
    return PrecisionRecall(*(nan_unless_finite(v, x, y) for v in (precision, recall)))


def density_coverage(real: Features, fake: MoreFeatures, *, k: int = 5) -> DensityCoverage:
    """Mean number of real balls around a fake over k, and share of real balls that hold a fake.

    Balls reach to the k-th nearest other real point. Unlike precision, density is not raised by one
    outlying real point. Naeem et al. 2020, equations (4) and (5).

    Raises ValueError on NaN, different widths, fewer than k + 1 reals; under `jax.jit` NaN gives
    NaN.

    >>> real = jax.random.normal(jax.random.key(0), (128, 2))
    >>> float(density_coverage(real, real).coverage)
    1.0
    """
    _check_neighbours(k, real=real)
    check_features(1, real=real, fake=fake)
    x, y = around_medoid(real, fake)
    radii = kth_neighbour(x, k)
    norms_y = squared_norms(y)

    def block(rows: Array, index: Array) -> tuple[Array, Array]:
        radius = radii.at[index].get(mode="fill", fill_value=-1)
        distances = pair_distances(rows, y, (squared_norms(rows), norms_y), least=True)
        inside = distances <= radius[:, None]
        return jnp.sum(inside, dtype=x.dtype), jnp.any(inside, axis=1)

    (counts, covered), _ = map_row_blocks(block, x, y.shape[0])
    density = jnp.sum(counts) / (k * y.shape[0])
    coverage = jnp.sum(covered, dtype=x.dtype) / x.shape[0]
    return DensityCoverage(*(nan_unless_finite(v, x, y) for v in (density, coverage)))


def nearest_distance(x: Float[Array, "n d"], to: Float[Array, "m d"]) -> Float[Array, " n"]:
    """Squared distance of each x to the nearest of `to`, less rounding: 0 for a copy."""
    norms = squared_norms(to)

    def block(rows: Array, index: Array) -> Array:
        distances = pair_distances(rows, to, (squared_norms(rows), norms), least=True)
        return jnp.min(distances, axis=1)

    blocks, _ = map_row_blocks(block, x, to.shape[0])
    return blocks.reshape(-1)[: x.shape[0]]


def memorisation_share(
    train: Features, test: MoreFeatures, samples: Any, *, quantile: float = 0.01
) -> Float[Array, ""]:
    """Share of samples as close to a training point as the closest 1% of test points are.

    The threshold is the `quantile` of the test points' distances to their nearest training point:
    a model that has the law of the test data scores about `quantile`, one that copies scores 1,
    also where the threshold is 0 because test points are copies themselves.

    Raises ValueError on NaN, different widths, a quantile outside [0, 1]; under `jax.jit` NaN gives
    NaN.

    >>> train, test = jax.random.normal(jax.random.key(0), (2, 100, 2))
    >>> float(memorisation_share(train, test, train))
    1.0
    """
    check_features(1, train=train, test=test, samples=samples)
    checks.between("quantile", quantile, 0, 1)
    a, b, c = around_medoid(train, test, samples)
    threshold = jnp.quantile(nearest_distance(b, a), quantile)
    share = jnp.mean(nearest_distance(c, a) <= threshold, dtype=a.dtype)
    return nan_unless_finite(share, a, b, c)


class TwoSampleTest(NamedTuple):
    """Accuracy of the classifier on held-out points (1/2 for equal laws), and its p-value."""

    accuracy: Float[Array, ""]
    p_value: Float[Array, ""]


def classifier_two_sample(
    key: PRNGKey, real: Features, fake: MoreFeatures, *, k: int | None = None
) -> TwoSampleTest:
    """Test whether a k-nearest-neighbour classifier tells fresh fakes from fresh reals.

    Both samples are cut to the smaller size and split in two at random; the classifier votes among
    the k nearest points of the first half (default: the root of their number, made odd) and is
    scored on the second. Under equal laws the accuracy is N(1/2, 1 / (4 n_test)) for large n_test.
    Lopez-Paz, Oquab 2017, section 3.

    Raises ValueError on NaN, different widths, fewer than 4 samples; under `jax.jit` NaN gives NaN.

    >>> real, fake = jax.random.normal(jax.random.key(0), (2, 64, 2))
    >>> bool(classifier_two_sample(jax.random.key(1), real, fake + 10).accuracy > 0.95)
    True
    """
    check_features(4, real=real, fake=fake)
    x, y = around_medoid(real, fake)
    size = min(x.shape[0], y.shape[0])
    half = size // 2
    k = 2 * (math.isqrt(2 * half) // 2) + 1 if k is None else k
    checks.integer("k", k, least=1)
    checks.between("k", k, 1, 2 * half)
    key_x, key_y = jax.random.split(key)
    x = x[jax.random.permutation(key_x, x.shape[0])[:size]]
    y = y[jax.random.permutation(key_y, y.shape[0])[:size]]
    known = jnp.concatenate([x[:half], y[:half]])
    fresh = jnp.concatenate([x[half:], y[half:]])
    # In random order: among equal distances the first are taken, and they must not all be real.
    order = jax.random.permutation(jax.random.fold_in(key, 2), 2 * half)
    known, is_real = known[order], order < half

    def block(rows: Array, index: Array) -> Array:
        _, nearest = jax.lax.top_k(-squared_distances(rows, known), k)
        return jnp.mean(is_real[nearest], axis=1, dtype=x.dtype)

    votes = map_row_blocks(block, fresh, 2 * half)[0].reshape(-1)[: fresh.shape[0]]
    # A tie, possible for even k, is half a point.
    right = jnp.where(jnp.arange(fresh.shape[0]) < size - half, votes - 0.5, 0.5 - votes)
    accuracy = jnp.mean(0.5 + 0.5 * jnp.sign(right))
    deviation = (accuracy - 0.5) * 2 * math.sqrt(fresh.shape[0])
    p_value = jax.scipy.stats.norm.sf(deviation)
    return TwoSampleTest(*(nan_unless_finite(v, x, y) for v in (accuracy, p_value)))


def inception_score(
    probabilities: Float[Array, "n classes"] | Float[np.ndarray, "n classes"],
) -> Float[Array, ""]:
    """exp of the mean over x of KL(p(y | x) || p(y)), with p(y) the mean: from 1 to `classes`.

    Raises ValueError on rows that are no probabilities. Salimans et al. 2016, section 4.

    >>> inception_score(jnp.eye(4))
    Array(4., dtype=float32)
    """
    return _scores_of_splits(probabilities, 1)[0]


class InceptionScore(NamedTuple):
    """Mean and standard deviation (divided by the number of splits - 1) over the splits."""

    mean: Float[Array, ""]
    std: Float[Array, ""]


def inception_score_splits(
    probabilities: Float[Array, "n classes"] | Float[np.ndarray, "n classes"],
    *,
    num_splits: int = 10,
) -> InceptionScore:
    """The inception score of each of `num_splits` consecutive parts, p(y) that part's own mean.

    Part k holds the rows from k n // num_splits on: the usual report, lower than the score of all
    rows. In the order of the rows: shuffle what comes sorted by class. Raises ValueError on rows
    that are no probabilities, and for fewer than 2 splits or fewer rows than splits. Salimans et
    al. 2016, section 4.

    >>> inception_score_splits(jnp.tile(jnp.eye(4), (10, 1)), num_splits=10).mean
    Array(4., dtype=float32)
    """
    checks.integer("num_splits", num_splits, 2)
    scores = _scores_of_splits(probabilities, num_splits)
    return InceptionScore(jnp.mean(scores), safe_sqrt(jnp.var(scores, ddof=1)))


def _scores_of_splits(probabilities: Any, num_splits: int) -> Array:
    check_features(num_splits, probabilities=probabilities)
    p = at_least_float32(jnp.asarray(probabilities))
    if checks.is_concrete(p):
        checks.between("probabilities", p, 0, 1 + 1e-4)
        checks.between("the rows' sums of probabilities", jnp.sum(p, axis=1), 0.999, 1.001)
    starts = np.arange(num_splits + 1) * p.shape[0] // num_splits
    sizes = np.diff(starts)
    split = np.repeat(np.arange(num_splits), sizes)

    def mean(rows: Array) -> Array:
        sums = jax.ops.segment_sum(rows, split, num_splits)
        return sums / jnp.asarray(sizes, p.dtype).reshape((-1,) + (1,) * (rows.ndim - 1))

    return jnp.exp(mean(jnp.sum(jax.scipy.special.rel_entr(p, mean(p)[split]), axis=1)))


def _check_neighbours(k: int, **features: Any) -> None:
    checks.integer("k", k, least=1)
    check_features(k + 1, f" for {k} neighbours", **features)
