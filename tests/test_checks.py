"""Each check passes what is right, and names what came and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import checks

X = np.zeros((4, 3))
NAN = np.array([0.0, np.nan, np.inf])

BAD = [
    (lambda: checks.one_of("loss", "gna", ["gan", "kl"]), ValueError, "did you mean 'gan'"),
    (lambda: checks.floating("x", np.arange(3)), TypeError, "floating dtype, got int64"),
    (lambda: checks.floating("x", 3), TypeError, "floating dtype"),
    (lambda: checks.rank("x", X, 3), ValueError, r"rank 3, got shape \(4, 3\)"),
    (lambda: checks.rank("x", X, (1, 3)), ValueError, "rank 1 or 3"),
    (lambda: checks.min_rank("x", X, 3), ValueError, "at least 3"),
    (lambda: checks.shape("x", X, (4, 2)), ValueError, r"shape \(4, 2\), got \(4, 3\)"),
    (lambda: checks.shape("x", X, (None, 2)), ValueError, "any"),
    (lambda: checks.same_shape(x=X, y=X[:2]), ValueError, r"x \(4, 3\), y \(2, 3\)"),
    (lambda: checks.same_event(x=X, y=X[:, :2]), ValueError, r"x \(3,\), y \(2,\)"),
    (lambda: checks.same_batch(x=X, y=X[:2]), ValueError, "batch sizes"),
    (lambda: checks.not_empty("x", X[:0]), ValueError, "at least one example"),
    (lambda: checks.at_least("k", 0, 1), ValueError, "at least 1, got 0"),
    (lambda: checks.at_least("k", float("nan"), 1), ValueError, "at least 1, got nan"),
    (lambda: checks.integer("k", 2.0), TypeError, "integer, got 2.0 of float"),
    (lambda: checks.integer("k", True), TypeError, "integer, got True"),
    (lambda: checks.integer("k", 0, 1), ValueError, "at least 1, got 0"),
    (lambda: checks.integers("channels", (), 1), ValueError, "channels must hold at least one"),
    (lambda: checks.integers("channels", (16, 0), 1), ValueError, "at least 1, got 0"),
    (lambda: checks.positive("epsilon", 0.0), ValueError, "positive and finite, got 0.0"),
    (lambda: checks.positive("epsilon", np.inf), ValueError, "positive and finite"),
    (lambda: checks.between("p", 1.5, 0, 1), ValueError, r"\[0, 1\], got 1.5"),
    (lambda: checks.finite("x", NAN), ValueError, r"2 of 3 values .* index \(1,\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call()


def test_good_input_passes(unchecked):
    checks.one_of("loss", "gan", ["gan", "kl"])
    checks.floating("x", X)
    checks.floating("x", 0.5)
    checks.rank("x", X, (1, 2))
    checks.min_rank("x", X, 2)
    checks.shape("x", X, (None, 3))
    checks.same_shape(x=X, y=X)
    checks.same_event(x=X, y=X[:1])
    checks.same_batch(x=X, y=X[:, :1])
    checks.not_empty("x", X)
    checks.at_least("k", 1, 1)
    checks.integer("k", np.int64(3), 3)
    checks.positive("epsilon", 1e-9)
    checks.between("p", 1.0, 0, 1)
    checks.finite("x", X)


def test_values_under_a_trace_pass_through(unchecked):
    @jax.jit
    def f(x):
        checks.positive("x", x)
        checks.between("x", x, 0, 1)
        checks.at_least("x", x, 5)
        checks.finite("x", x)
        return x

    assert float(f(jnp.float32(-1.0))) == -1.0
