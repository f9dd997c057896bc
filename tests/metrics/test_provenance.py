"""A measured value carries what it was measured with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.metrics import frechet_distance, hash_of, measure, precision_recall, sliced_wasserstein
from tests.metrics.test_distances import features


def test_record_of_a_metric_on_extracted_features():
    x, y = features(n=40, m=30, d=4)
    weights = {"w": np.eye(4, dtype=np.float32)[:, :3]}
    record = measure(
        frechet_distance,
        x,
        y,
        extract=lambda v: jnp.asarray(v) @ weights["w"],
        extractor="first three",
        parameters=weights,
    )
    np.testing.assert_allclose(record.value, frechet_distance(x[:, :3], y[:, :3]), rtol=1e-6)
    assert record[1:4] == ("frechet_distance", "first three", hash_of(weights))
    assert (record.counts, record.seed, record.dtype) == ((40, 30), None, "float32")
    json.dumps(record._asdict())


def test_random_metric_takes_its_key_from_the_seed():
    x, y = features(n=20, m=20, d=4)
    record = measure(sliced_wasserstein, x, y, seed=3, num_projections=4)
    again = sliced_wasserstein(jax.random.key(3), x, y, num_projections=4)
    assert record.value == float(again)
    assert record.seed == 3
    with pytest.raises(ValueError, match="sliced_wasserstein draws at random: it needs a seed"):
        measure(sliced_wasserstein, x, y)


def test_tuples_keep_their_names():
    x, y = features(n=20, m=20, d=4)
    record = measure(precision_recall, x, y, k=2)
    assert record.value._fields == ("precision", "recall")
    assert all(isinstance(v, float) for v in record.value)


def test_hash_depends_on_values_names_and_shapes():
    base = {"a": np.arange(6.0), "b": [np.zeros(2)]}
    others = [
        {"a": np.arange(6.0) + 1e-9, "b": [np.zeros(2)]},
        {"c": np.arange(6.0), "b": [np.zeros(2)]},
        {"a": np.arange(6.0).reshape(2, 3), "b": [np.zeros(2)]},
        {"a": np.arange(6.0, dtype=np.float32), "b": [np.zeros(2)]},
    ]
    assert hash_of(base) == hash_of(jax.tree.map(np.copy, base))
    assert len({hash_of(v) for v in [base, *others]}) == 5
