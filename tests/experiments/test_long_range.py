"""The tasks by their rules, short runs that learn, and options that make no task."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import long_range

KEY = jax.random.key(0)


def test_copying_asks_for_the_tokens_in_order():
    config = long_range.Config(length=20, copies=4, vocabulary=6)
    x, answers = long_range.sequences(config, 20)(KEY, jnp.arange(50))
    assert x.shape == (50, 24)
    for row, wanted in zip(np.asarray(x), np.asarray(answers), strict=True):
        assert (row[20:] == 5).all()
        np.testing.assert_array_equal(row[:20][row[:20] > 0], wanted)
        assert wanted.min() >= 1
        assert wanted.max() <= 4
    again, _ = long_range.sequences(config, 20)(KEY, jnp.arange(7, 9))
    np.testing.assert_array_equal(again, x[7:9])  # a sequence is a function of its number
    assert len(np.unique(np.asarray(x), axis=0)) == 50


def test_induction_asks_for_what_followed_the_marker():
    config = long_range.Config(task="induction", vocabulary=6)
    x, answers = long_range.sequences(config, 12)(KEY, jnp.arange(200))
    places = set()
    for row, wanted in zip(np.asarray(x), np.asarray(answers), strict=True):
        first, last = np.flatnonzero(row == 5)
        assert last == 11
        assert row[first + 1] == wanted[0] < 5
        places.add(first)
    assert places == set(range(10))


def small(tmp_path, **changes):
    options = {
        "run_dir": str(tmp_path / "run"), "steps": 60, "steps_per_call": 20, "batch_size": 32,
        "width": 16, "depth": 1, "states": 8, "devices": 1, "learning_rate": 1e-2, "examples": 100,
        "progress": False, "ema": 0.9,
    }  # fmt: skip
    return long_range.Config(**{**options, **changes})


@pytest.mark.slow
def test_copying_run_learns(tmp_path):
    """One token among four places: a task of a second, from chance (a quarter) up."""
    config = small(
        tmp_path, network="mamba2", length=4, test_lengths=(4, 6), copies=1, vocabulary=6, steps=200
    )
    summary = long_range.main(config)
    assert summary["accuracy_4"] > 0.6
    assert set(summary) >= {"accuracy_6", "whole_sequences_6", "parameters", "training_seconds"}


@pytest.mark.slow
def test_digits_run_learns(tmp_path):
    summary = long_range.main(small(tmp_path, task="digits", dropout=0.0, steps=200))
    assert summary["test_accuracy"] > 0.3  # one in ten by chance


def test_what_is_left_open_goes_by_the_task():
    digits = long_range.settled(long_range.Config(task="digits", depth=1))
    assert (digits.network, digits.depth, digits.first_steps) == ("s4d", 1, (0.01, 1.0))
    assert long_range.settled(long_range.Config(task="induction")).test_lengths == (64, 1024)
    assert set(long_range.DEFAULTS) == {"copying", "induction", "digits"}


def test_options_that_make_no_task():
    for changes, message in (
        ({"length": 5}, "length must be at least 8"),
        ({"copies": 0}, "copies must be at least 1"),
        ({"vocabulary": 2}, "vocabulary must be at least 3"),
        ({"test_lengths": (2,)}, "length must be at least 8"),
        ({"dropout": 1.0}, "dropout must lie"),
        ({"first_steps": (0.1, 0.01)}, "first_steps must rise"),
        ({"task": "digits", "dataset": "moons"}, "images, got 'moons' of points"),
        ({"dataset": "minst"}, "dataset, which --task digits alone reads, must be"),
    ):
        with pytest.raises(ValueError, match=message):
            long_range.main(long_range.Config(**changes))


def test_shifts():
    x = jnp.arange(1, 10, dtype=jnp.int32).reshape(1, 3, 3, 1)
    many = np.asarray(long_range.shifted(jax.random.key(0), jnp.tile(x, (200, 1, 1, 1)), 1))
    assert len(np.unique(many.reshape(200, -1), axis=0)) == 9
    assert set(many[:, 1, 1, 0].tolist()) == set(range(1, 10))
    np.testing.assert_array_equal(long_range.shifted(jax.random.key(0), x, 0), x)
