"""Moments of rows that come in parts against those of all rows, in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import metrics
from genjax.data import in_order

ROWS = np.random.default_rng(0).normal(size=(103, 5)) * np.logspace(-2, 2, 5) + 1e3


def fed(parts):
    state = metrics.init_moments(5)
    for part in parts:
        state = metrics.update_moments(state, part)
    return state


@pytest.mark.slow
def test_parts_in_any_deal_have_the_moments_of_all_rows():
    """Batches, an empty one, one row, two hosts; a mean 1e5 times the least spread."""
    mean, covariance = ROWS.mean(0), np.cov(ROWS.T)
    deals = {
        "one": fed([ROWS]),
        "batches": fed([ROWS[:40], ROWS[40:40], ROWS[40:41], ROWS[41:]]),
        "hosts": metrics.merge_moments(fed([ROWS[:7]]), fed([]), fed([ROWS[50:], ROWS[7:50]])),
    }
    for name, state in deals.items():
        assert state.count == 103, name
        found = metrics.compute_moments(state)
        assert found.covariance.dtype == np.float64
        np.testing.assert_allclose(found.mean, mean, rtol=1e-14, err_msg=name)
        np.testing.assert_allclose(found.covariance, covariance, rtol=1e-9, err_msg=name)
    whole = metrics.feature_moments(ROWS)
    found = metrics.compute_moments(deals["hosts"])
    np.testing.assert_allclose(metrics.frechet_distance(found, whole), 0, atol=1e-9)
    assert metrics.merge_processes(deals["one"]) is deals["one"]


def test_masked_rows_count_for_nothing_under_jit():
    """The padded last batch of an iterator, NaN in what is masked, in float32."""
    x = np.asarray(ROWS - 1e3, np.float32)
    update = jax.jit(lambda state, x, keep: metrics.update_moments(state, x, where=keep))
    state = jax.tree.map(jnp.float32, metrics.init_moments(5))
    for batch, keep in in_order({"x": x}, batch_size=32):
        state = update(state, jnp.where(keep[:, None], batch["x"], jnp.nan), keep)
    found = jax.jit(metrics.compute_moments)(state)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-4, atol=1e-3)
    nothing = update(state, jnp.full((32, 5), jnp.nan), np.zeros(32, bool))
    jax.tree.map(np.testing.assert_array_equal, nothing, state)


def test_bad_input(unchecked):
    state = metrics.init_moments(5)
    with pytest.raises(ValueError, match=r"x must have shape \('any', 5\), got \(2, 3\)"):
        metrics.update_moments(state, np.zeros((2, 3)))
    with pytest.raises(ValueError, match="x must be finite"):
        metrics.update_moments(state, np.full((2, 5), np.nan))
    with pytest.raises(ValueError, match="at least 2, got 1"):
        metrics.compute_moments(metrics.update_moments(state, np.zeros((1, 5))))
    with pytest.raises(ValueError, match="at least one state"):
        metrics.merge_moments()
    with pytest.raises(ValueError, match="mean must have shape"):
        metrics.merge_moments(state, metrics.init_moments(3))


@pytest.mark.parametrize(("size", "num_splits"), [(30, 3), (31, 4)])
def test_the_inception_score_of_splits(size, num_splits):
    """Each consecutive part by loops in float64; 1 and the number of classes at the ends."""
    logits = 2 * np.random.default_rng(1).normal(size=(size, 6))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for k in range(num_splits):
        part = p[k * size // num_splits : (k + 1) * size // num_splits]
        scores.append(np.exp(np.mean(np.sum(part * np.log(part / part.mean(0)), axis=1))))
    for run in (metrics.inception_score_splits, jax.jit(
        metrics.inception_score_splits, static_argnames="num_splits"
    )):  # fmt: skip
        found = run(p.astype(np.float32), num_splits=num_splits)
        np.testing.assert_allclose(found.mean, np.mean(scores), rtol=1e-5)
        np.testing.assert_allclose(found.std, np.std(scores, ddof=1), rtol=1e-4)
    one_hot = np.tile(np.eye(6, dtype=np.float32), (size // 6, 1))
    found = metrics.inception_score_splits(one_hot, num_splits=size // 6)
    np.testing.assert_allclose([found.mean, found.std], [6, 0], atol=1e-5)
    with pytest.raises(ValueError, match="at least 4 samples"):
        metrics.inception_score_splits(p[:3].astype(np.float32), num_splits=4)
    with pytest.raises(ValueError, match="num_splits must be at least 2"):
        metrics.inception_score_splits(p.astype(np.float32), num_splits=1)
