"""Log-probabilities of tokens and responses against numpy in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.alignment import sequence_log_prob, token_entropy, token_log_probs

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.normal(size=(2, 4, 5))
TOKENS = RNG.integers(0, 5, (2, 4))


def exact(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_token_log_probs(dtype, rtol, compiled):
    """Values and gradient p - one-hot; bfloat16 logits give float32 numbers."""
    expected = np.take_along_axis(exact(LOGITS), TOKENS[..., None], -1)[..., 0]
    logits, tokens = jnp.asarray(LOGITS, dtype), jnp.asarray(TOKENS)
    found = compiled(token_log_probs)(logits, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol)
    gradient = compiled(jax.grad(lambda x: token_log_probs(x, tokens).sum()))(logits)
    one_hot = np.eye(5)[TOKENS]
    np.testing.assert_allclose(
        np.asarray(gradient, np.float32), one_hot - np.exp(exact(LOGITS)), atol=rtol
    )


def test_extreme_logits():
    """+-1e4, and -infinity for tokens that cannot come, in value and gradient."""
    logits = jnp.array([[[1e4, -1e4, 0.0], [0.0, 1.0, -jnp.inf]]])
    tokens = jnp.array([[1, 1]])
    value, gradient = jax.value_and_grad(lambda x: token_log_probs(x, tokens).sum())(logits)
    np.testing.assert_allclose(value, -2e4 - np.log1p(np.exp(-1)), rtol=1e-6)
    assert np.isfinite(gradient).all()
    entropy = token_entropy(logits)
    p = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(
        entropy, [[0, -p * np.log(p) - (1 - p) * np.log1p(-p)]], rtol=1e-5, atol=1e-6
    )
    assert np.isfinite(jax.grad(lambda x: token_entropy(x).sum())(logits)).all()


def test_entropy(x64):
    log_p = exact(LOGITS)
    expected = -(np.exp(log_p) * log_p).sum(-1)
    np.testing.assert_allclose(token_entropy(jnp.asarray(LOGITS)), expected, rtol=1e-12)


def test_all_strings_sum_to_one(x64):
    """V = 3, T = 3: the probabilities of all strings of independent places."""
    strings = jnp.array(list(itertools.product(range(3), repeat=3)))
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[:1, :3, :3]), (27, 3, 3))
    log_p = token_log_probs(logits, strings)
    np.testing.assert_allclose(np.exp(sequence_log_prob(log_p)).sum(), 1, rtol=1e-12)


def test_sequences():
    mask = jnp.array([[True, True, False], [False, False, False]])
    log_p = jnp.array([[-1.0, -2.0, jnp.nan], [jnp.inf, jnp.nan, -1.0]])
    np.testing.assert_array_equal(sequence_log_prob(log_p, where=mask), [-3, 0])
    found, gradient = jax.value_and_grad(
        lambda x: sequence_log_prob(x, where=mask, normalise="mean").sum()
    )(log_p)
    assert found == -1.5
    np.testing.assert_array_equal(gradient, [[0.5, 0.5, 0], [0, 0, 0]])


def test_bad_input_is_refused_by_name(unchecked):
    for call, error, message in (
        (lambda: token_log_probs(jnp.ones((2, 3)), jnp.ones(2, int)), ValueError, "logits must"),
        (lambda: token_log_probs(LOGITS, TOKENS[:, :2]), ValueError, "tokens must have shape"),
        (lambda: token_log_probs(LOGITS, TOKENS + 0.5), TypeError, "whole numbers"),
        (lambda: token_log_probs(LOGITS, TOKENS + 4), ValueError, "must lie in"),
        (lambda: sequence_log_prob(jnp.ones((1, 2))), ValueError, "at most 0"),
        (lambda: sequence_log_prob(-jnp.ones(2)), ValueError, "must have rank 2"),
        (lambda: sequence_log_prob(-jnp.ones((1, 2)), normalise="max"), ValueError, "normalise"),
    ):
        with pytest.raises(error, match=message):
            call()
