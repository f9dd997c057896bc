"""Precision, recall, density, coverage, memorisation, two-sample test against brute force."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from genjax.metrics import (
    classifier_two_sample,
    density_coverage,
    inception_score,
    memorisation_share,
    mmd,
    precision_recall,
)
from genjax.metrics._pairs import k_smallest, kth_neighbour
from tests.metrics.test_distances import features

REFERENCES = Path(__file__).parents[1] / "references"


def radii(x, k):
    return NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k]


def distances(x, y):
    return np.linalg.norm(x[:, None] - y[None], axis=-1)


def reference(x, y, k):
    x, y = x.astype(np.float64), y.astype(np.float64)
    to = distances(x, y)
    inside, around = to <= radii(x, k)[:, None], to <= radii(y, k)[None]
    return {
        "precision": inside.any(0).mean(),
        "recall": around.any(1).mean(),
        "density": inside.sum() / (k * len(y)),
        "coverage": inside.any(1).mean(),
    }


def measured(x, y, k, compiled=jax.jit):
    both = compiled(lambda a, b: (precision_recall(a, b, k=k), density_coverage(a, b, k=k)))(x, y)
    return both[0]._asdict() | both[1]._asdict()


@pytest.mark.parametrize(
    ("k", "how"),
    [(3, jax.jit), pytest.param(1, lambda f: f, marks=pytest.mark.slow)],
    ids=["jit", "eager"],
)
def test_equals_brute_force(k, how, monkeypatch):
    x, y = features(n=150, m=130, d=6)
    if k == 1:  # over several blocks of rows, the last one not full
        monkeypatch.setattr("genjax.metrics._pairs._BLOCK_ENTRIES", 2000)
    got, expected = measured(x, y, k, how), reference(x, y, k)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)
        assert value > 0  # a case that tells something


def test_known_values():
    x = features(n=60, d=4)[0]
    both = jax.jit(lambda a, b: (*precision_recall(a, b), *density_coverage(a, b, k=3)))
    # A sample equal to its data: each ball holds its centre and k others.
    np.testing.assert_allclose(both(x, x), [1, 1, 4 / 3, 1], rtol=1e-5)
    np.testing.assert_array_equal(both(x, x + np.float32(1e3)), [0, 0, 0, 0])
    # One point repeated: precise, and covering one ball.
    collapsed = both(x, np.repeat(x[:1], 60, axis=0))
    np.testing.assert_allclose([collapsed[0], collapsed[1]], [1, 1 / 60], rtol=1e-5)


def test_a_far_offset_does_not_cost_digits():
    x, y = features(n=100, m=80, d=6)
    got = measured(x + np.float32(1000), y + np.float32(1000), 3)
    for name, value in reference(x, y, 3).items():
        np.testing.assert_allclose(got[name], value, atol=0.03, err_msg=name)


@pytest.mark.parametrize("metric", [precision_recall, mmd])
def test_fifty_thousand_features_fit_in_four_gib(metric):
    """What the compiled program holds at 50,000 x 2,048: inputs and temporaries; nothing runs."""
    x = jax.ShapeDtypeStruct((50_000, 2048), np.float32)
    memory = jax.jit(metric).lower(x, x).compile().memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 4 * 2**30


@pytest.mark.parametrize(
    "kind",
    ["binary", "copies", *(pytest.param(k, marks=pytest.mark.slow) for k in ("plane", "offset"))],
)
def test_ties_and_duplicates_lie_inside(kind):
    rng = np.random.default_rng(5)
    if kind == "binary":
        x, y = rng.integers(0, 2, (2, 70, 40))
    elif kind == "plane":  # few dimensions: distances of differences
        x, y = rng.integers(0, 6, (2, 70, 3))
    else:  # the fakes copy the reals, three times; the radii are the copies' own rounding
        x = rng.normal(size=(70, 200)) + (500 if kind == "offset" else 0)
        x = x[rng.permutation(140) % 70]
        y = x[rng.permutation(210) % 70]
    x, y = x.astype(np.float32), y.astype(np.float32)
    got, expected = measured(x, y, 4), reference_with_ties(x, y, 4)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def reference_with_ties(x, y, k):
    """Differences in float64, of numbers that float32 holds: equal distances come out equal."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    to, near_x, near_y = (
        ((a[:, None] - b[None]) ** 2).sum(-1) for a, b in ((x, y), (x, x), (y, y))
    )
    inside = to <= np.sort(near_x, axis=1)[:, k, None]
    around = to <= np.sort(near_y, axis=1)[None, :, k]
    return {
        "precision": inside.any(0).mean(),
        "recall": around.any(1).mean(),
        "density": inside.sum() / (k * len(y)),
        "coverage": inside.any(1).mean(),
    }


@pytest.mark.parametrize("d", [3, 50])
def test_one_that_copies_scores_1_where_the_data_hold_duplicates(d):
    """Three test points are training points: the threshold is 0."""
    train, test, fresh = np.random.default_rng(4).normal(size=(3, 60, d)).astype(np.float32) + 7
    test[:3] = train[5]
    share = jax.jit(lambda s: memorisation_share(train, test, s, quantile=0.02))
    assert float(share(train[::-1].copy())) == 1
    assert float(share(fresh)) == 0
    np.testing.assert_allclose(share(test), 3 / 60, rtol=1e-6)


def test_two_sample_test_of_ties():
    """One law of a few integers: where reals came first among ties, accuracy would leave 1/2."""
    x = np.random.default_rng(1).integers(0, 2, size=(40, 2, 100, 2)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 40)
    result = jax.jit(jax.vmap(lambda k, v: classifier_two_sample(k, v[0], v[1])))(keys, x)
    assert abs(np.mean(result.accuracy) - 0.5) < 4 * 0.5 / np.sqrt(40 * 100)


def test_k_smallest_with_ties():
    rows = np.random.default_rng(0).integers(0, 5, (40, 9)).astype(np.float32)
    rows[0], rows[1, 2:] = 2.0, np.inf
    for k in (1, 3, 9):
        got = jax.jit(lambda r, k=k: k_smallest(r, k))(rows)
        np.testing.assert_array_equal(got, np.sort(rows, axis=1)[:, :k])


@pytest.mark.parametrize("axis", [0, 1])
def test_k_smallest_of_many(axis):
    values = np.random.default_rng(0).integers(0, 500, (703, 711)).astype(np.float32)
    got = jax.jit(lambda v: k_smallest(v, 3, axis))(values)
    expected = np.sort(values, axis=axis).take(range(3), axis=axis)
    np.testing.assert_array_equal(got, expected if axis else expected.T)


def test_kth_neighbour_over_several_blocks():
    x = np.random.default_rng(0).normal(size=(1500, 3)).astype(np.float32)
    x[100] = x[1400]  # a pair of duplicates in two blocks
    got = np.sqrt(jax.jit(lambda v: kth_neighbour(v, 2))(x))
    np.testing.assert_allclose(got, radii(x.astype(np.float64), 2), rtol=1e-3, atol=1e-5)


def test_memorisation_share():
    rng = np.random.default_rng(0)
    train, test, samples = (rng.normal(size=(n, 3)).astype(np.float32) for n in (80, 120, 90))
    samples[:20] = train[:20] + 1e-3
    share = memorisation_share(train, test, samples, quantile=0.1)
    nearest_test, nearest = (distances(v, train).min(1).astype(float) for v in (test, samples))
    threshold = np.sqrt(np.quantile(nearest_test**2, 0.1))
    np.testing.assert_allclose(share, np.mean(nearest < threshold), rtol=1e-6)
    assert float(share) > 20 / 90
    compiled = jax.jit(lambda v: memorisation_share(train, test, v, quantile=0.1))
    np.testing.assert_allclose(compiled(samples), share, rtol=1e-6)
    assert float(compiled(train[:40].repeat(2, axis=0)[:90])) == 1
    assert float(compiled(samples + np.float32(100))) == 0


def test_two_sample_test():
    """39 pairs of one law: accuracy around 1/2, few small p-values. Disjoint laws: accuracy 1."""
    x = np.random.default_rng(1).normal(size=(40, 2, 100, 3)).astype(np.float32)
    x[39, 1] += 1e3  # the last pair is of disjoint laws
    keys = jax.random.split(jax.random.key(0), 40)
    result = jax.jit(jax.vmap(lambda k, v: classifier_two_sample(k, v[0], v[1])))(keys, x)
    assert float(result.accuracy[39]) == 1
    assert abs(np.mean(result.accuracy[:39]) - 0.5) < 4 * 0.5 / np.sqrt(39 * 100)
    assert np.mean(np.asarray(result.p_value[:39]) < 0.05) < 0.2
    deviation = (np.asarray(result.accuracy) - 0.5) * 2 * np.sqrt(100)
    np.testing.assert_allclose(result.p_value, stats.norm.sf(deviation), atol=1e-5)


def test_inception_score_fixture(x64):
    fixture = json.loads((REFERENCES / "inception_score.json").read_text())
    score = inception_score(np.array(fixture["inputs"]["p_yx"]))
    np.testing.assert_allclose(score, fixture["expected"]["inception_score"], rtol=1e-9)
    compiled = jax.jit(inception_score)
    np.testing.assert_allclose(compiled(np.eye(5)), 5, rtol=1e-12)
    np.testing.assert_allclose(compiled(np.full((5, 5), 0.2)), 1, rtol=1e-12)


def test_nan_under_jit_gives_nan():
    """A count would hide a NaN: the value must not look like a number."""
    x, y = features(n=20, m=20, d=3)
    y[2, 1] = np.nan
    every = jax.jit(
        lambda a, b: (
            *precision_recall(a, b),
            *density_coverage(a, b),
            *classifier_two_sample(jax.random.key(0), a, b),
            memorisation_share(a, a, b),
        )
    )
    assert np.isnan(every(x, y)).all()


@pytest.mark.usefixtures("unchecked")
def test_bad_input(key):
    x, y = features(n=30, m=30, d=4)
    broken = y.copy()
    broken[3, 1] = np.nan
    calls = (
        precision_recall,
        density_coverage,
        lambda a, b: memorisation_share(a, b, a),
        lambda a, b: classifier_two_sample(key, a, b),
    )
    for call in calls:
        with pytest.raises(ValueError, match="must be finite, got 1"):
            call(x, broken)
        with pytest.raises(ValueError, match="must be equal"):
            call(x, y[:, :3])
    with pytest.raises(ValueError, match="fake must have at least 4 samples for 3 neighbours"):
        precision_recall(x, y[:3])
    with pytest.raises(ValueError, match="real must have at least 31 samples for 30 neighbours"):
        density_coverage(x, y, k=30)
    with pytest.raises(ValueError, match="k must be at least 1"):
        precision_recall(x, y, k=0)
    with pytest.raises(ValueError, match=r"quantile must lie in \[0, 1\]"):
        memorisation_share(x, y, y, quantile=1.5)
    with pytest.raises(ValueError, match="real must have at least 4 samples"):
        classifier_two_sample(key, x[:3], y)
    with pytest.raises(ValueError, match="sums of probabilities must lie in"):
        inception_score(np.full((3, 4), 0.1))
