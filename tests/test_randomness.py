"""Rows depend on their index alone; signs, normals and spread points have their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from genjax.randomness import (
    indexed_keys,
    indexed_normal,
    indexed_rademacher,
    low_discrepancy,
    rademacher,
)

ROW_DRAWS = {indexed_normal: jax.random.normal, indexed_rademacher: jax.random.rademacher}


@pytest.mark.parametrize("draw", ROW_DRAWS)
def test_a_row_is_a_function_of_the_key_and_its_index(draw, key, compiled):
    whole = compiled(lambda k: draw(k, (6, 3, 2)))(key)
    part = compiled(lambda k, first: draw(k, (2, 3, 2), first))(key, jnp.asarray(3))
    np.testing.assert_array_equal(part, whole[3:5])
    for i, row in enumerate(whole):  # the definition, one row at a time
        want = ROW_DRAWS[draw](jax.random.fold_in(key, i), (3, 2)).astype(jnp.float32)
        np.testing.assert_array_equal(row, want)
    assert draw(key, (2, 1), dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert whole.dtype == jnp.float32


def test_draws_have_their_laws(key):
    assert stats.kstest(np.asarray(indexed_normal(key, (4000,))), "norm").pvalue > 1e-3
    for signs in (indexed_rademacher(key, (4000,)), rademacher(key, jnp.zeros(4000))):
        assert set(np.unique(signs)) == {-1.0, 1.0}
        assert abs(float(jnp.mean(signs))) < 4 / np.sqrt(4000)
    assert rademacher(key, jnp.zeros((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert len(np.unique(jax.random.key_data(indexed_keys(key, 500)), axis=0)) == 500


def test_spread_points_are_evenly_spread_and_each_is_uniform(key, compiled):
    points = np.sort(compiled(lambda k: low_discrepancy(k, 10))(key))
    np.testing.assert_allclose(np.diff(points), 0.1, atol=1e-6)
    assert 0 <= points[0] < points[-1] < 1
    one = jax.vmap(lambda k: low_discrepancy(k, 4)[1])(jax.random.split(key, 4000))
    assert stats.kstest(np.asarray(one), "uniform").pvalue > 1e-3


def test_no_points_are_refused(key, unchecked):
    with pytest.raises(ValueError, match="num must be at least 1"):
        low_discrepancy(key, 0)
