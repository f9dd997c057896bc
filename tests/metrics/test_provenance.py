"""A measured value carries what it was measured with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.metrics import PrecisionRecall, hash_of, measure
from tests.metrics.test_distances import features


def mean_gap(real, fake):
    return jnp.sum((real.mean(axis=0) - fake.mean(axis=0)) ** 2)


def random_gap(key, real, fake, *, scale):
    return jax.random.normal(key) * scale


def shares(real, fake):
    return PrecisionRecall(jnp.float32(0.5), jnp.float32(0.25))


def test_record_of_a_metric_on_extracted_features():
    x, y = features(n=40, m=30, d=4)
    weights = {"w": np.eye(4, dtype=np.float32)[:, :3]}
    record = measure(
        mean_gap,
        x,
        y,
        extract=lambda v: jnp.asarray(v) @ weights["w"],
        extractor="first three",
        parameters=weights,
    )
    np.testing.assert_allclose(record.value, mean_gap(x[:, :3], y[:, :3]), rtol=1e-5)
    assert record[1:4] == ("mean_gap", "first three", hash_of(weights))
    assert (record.counts, record.seed, record.dtype) == ((40, 30), None, "float32")
    json.dumps(record._asdict())


def test_random_metric_takes_its_key_from_the_seed():
    x, y = features(n=20, m=20, d=4)
    record = measure(random_gap, x, y, seed=3, scale=2.0)
    assert record.value == float(2 * jax.random.normal(jax.random.key(3)))
    assert record.seed == 3
    with pytest.raises(ValueError, match="random_gap draws at random: it needs a seed"):
        measure(random_gap, x, y, scale=1.0)


def test_tuples_keep_their_names():
    x, y = features(n=20, m=20, d=4)
    record = measure(shares, x, y)
    assert record.value == PrecisionRecall(0.5, 0.25)
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
