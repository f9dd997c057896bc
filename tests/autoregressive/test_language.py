"""The next token's loss beside recorded numbers; what is masked leaves no trace."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.autoregressive import bits_per_byte, dynamic_evaluation, next_token

FIXTURE = json.loads(
    (Path(__file__).parents[1] / "references" / "language_model_loss.json").read_text()
)
GIVEN, EXPECTED = FIXTURE["inputs"], FIXTURE["expected"]


def given(dtype=jnp.float64):
    arrays = (GIVEN[name] for name in ("logits", "targets", "mask"))
    return [jnp.asarray(x, t) for x, t in zip(arrays, (dtype, jnp.int32, bool), strict=True)]


def test_meets_the_reference(x64, compiled):
    logits, tokens, mask = given()
    options = {"z_loss": GIVEN["z_loss"], "label_smoothing": GIVEN["label_smoothing"]}

    @compiled
    def run(logits):
        plain, aux = next_token(lambda _: logits, tokens, where=mask)
        full = lambda z: next_token(  # noqa: E731
            lambda _: z, tokens, where=mask, divisor=jnp.sum(mask) / len(mask), **options
        )[0].mean()
        return plain, aux, *jax.value_and_grad(full)(logits)

    plain, aux, mean, gradient = run(logits)
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(plain, EXPECTED["sequence_nll"], **close)
    np.testing.assert_array_equal(aux["tokens"], EXPECTED["tokens"])
    np.testing.assert_allclose(mean, EXPECTED["token_mean_with_z_and_smoothing"], **close)
    np.testing.assert_allclose(gradient, EXPECTED["grad_logits"], **close)
    log_z = np.where(mask, EXPECTED["log_z"], 0).sum(1) / np.maximum(np.sum(mask, 1), 1)
    np.testing.assert_allclose(aux["log_z"], log_z, **close)
    greedy = (np.argmax(GIVEN["logits"], -1) == np.asarray(GIVEN["targets"])) & np.asarray(mask)
    np.testing.assert_array_equal(aux["correct"], greedy.sum(1))
    num_bytes = np.where(mask, GIVEN["bytes_per_token"], 0).sum()
    np.testing.assert_allclose(
        bits_per_byte(plain.sum(), int(num_bytes)), EXPECTED["bits_per_byte"], **close
    )


def test_float32_and_bfloat16_are_near():
    logits, tokens, mask = given(jnp.float32)
    for dtype, rtol in ((jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)):
        losses = next_token(lambda _, t=dtype: logits.astype(t), tokens, where=mask)[0]
        assert losses.dtype == jnp.float32
        np.testing.assert_allclose(losses, EXPECTED["sequence_nll"], rtol=rtol)


def test_what_is_masked_leaves_no_trace():
    """NaN logits and tokens of any number; a network sees 0 after the last kept token."""
    logits, tokens, mask = given(jnp.float32)
    seen = []

    def run(logits, tokens):
        def network(tokens):
            seen.append(tokens)
            return logits

        return next_token(network, tokens, where=mask, z_loss=0.1)[0]

    gradient = jax.grad(lambda z, t: run(z, t).sum())
    poisoned = jnp.where(mask[..., None], logits, jnp.nan), jnp.where(mask, tokens, -77)
    np.testing.assert_array_equal(run(logits, tokens), run(*poisoned))
    np.testing.assert_array_equal(gradient(logits, tokens), gradient(*poisoned))
    # Row 1 hides a token in its middle, which the network is still given; row 3 hides all.
    np.testing.assert_array_equal(seen[1][1], jnp.asarray([1, 0, -77, 0, 6]))
    np.testing.assert_array_equal(seen[1][3], 0)


def test_the_divisor_makes_accumulated_means_the_mean_over_tokens():
    logits, tokens, mask = given(jnp.float32)
    share = jnp.sum(mask) / len(mask)
    whole = next_token(lambda _: logits, tokens, where=mask)[0].sum() / mask.sum()
    halves = [
        next_token(lambda _, s=s: logits[s], tokens[s], where=mask[s], divisor=share)[0].mean()
        for s in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(np.mean(halves), whole, rtol=1e-6)


def test_extremes_are_finite_in_value_and_gradient():
    tokens = jnp.array([[0, 1]])

    @jax.jit
    def run(logits):
        loss = lambda z: next_token(  # noqa: E731
            lambda _: z, tokens, z_loss=1e-4, label_smoothing=0.1
        )[0].sum()
        return jax.value_and_grad(loss)(logits)

    for scale in (0.0, 1e4, -1e4):
        value, gradient = run(jnp.full((1, 2, 3), scale).at[..., 0].add(1e4))
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_bad_input(unchecked):
    logits, tokens, mask = given(jnp.float32)
    run = lambda t, z=logits, **options: next_token(lambda _: z, t, **options)  # noqa: E731
    for t, options, match in (
        (tokens[0], {}, "tokens must have rank 2"),
        (tokens.at[0, 0].set(7), {}, r"tokens must lie in \[0, 6\]"),
        (tokens, {"where": mask[:2]}, "shapes must be equal"),
        (tokens, {"where": mask & False}, "where must keep a token"),
        (tokens, {"z": logits[:, :3]}, "logits must have shape"),
        (tokens, {"label_smoothing": 1.5}, "label_smoothing must lie in"),
        (tokens, {"z_loss": -1.0}, "z_loss must be at least 0"),
        (tokens, {"divisor": 0.0}, "divisor must be positive"),
    ):
        with pytest.raises(ValueError, match=match):
            run(t, **options)
    with pytest.raises(TypeError, match="tokens must be integers"):
        run(tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match="num_bytes must be positive"):
        bits_per_byte(1.0, 0)
    # Traced, a kept token outside the vocabulary is NaN.
    found = jax.jit(lambda t: run(t)[0])(tokens.at[0, 0].set(7))
    assert np.isnan(found[0])
    assert np.isfinite(found[1:]).all()


def bigrams(params, tokens):
    """Logits of each token by the one before it, of the first by a row of its own."""
    before = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=params.shape[1])[:, :-1]
    return params[before]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_dynamic_evaluation_is_a_loop_of_scores_and_steps(x64, dtype):
    rng = np.random.default_rng(0)
    params = rng.normal(size=(4, 3)).astype(dtype)
    windows = jnp.asarray(rng.integers(0, 3, (5, 6)), jnp.int32)
    where = jnp.arange(6)[None] >= jnp.array([[0], [3], [3], [3], [5]])
    losses, last = jax.jit(
        lambda p: dynamic_evaluation(bigrams, p, windows, where, rate=0.7)
    )(jnp.asarray(params))  # fmt: skip
    theta, wanted = params.astype(np.float64), []
    for window, kept in zip(np.asarray(windows), np.asarray(where), strict=True):
        before = np.concatenate([[3], window[:-1]])
        p = np.exp(theta) / np.exp(theta).sum(1, keepdims=True)
        wanted.append(-np.log(p[before, window])[kept].sum())
        slope = np.zeros_like(theta)
        for b, w in zip(before, window, strict=True):
            slope[b] += (p[b] - np.eye(3)[w]) / len(window)
        theta = theta - 0.7 * slope
    close = {"rtol": 1e-10 if dtype == np.float64 else 1e-5}
    np.testing.assert_allclose(losses, wanted, **close)
    np.testing.assert_allclose(last, theta, **close)
    assert losses.dtype == last.dtype == dtype


def test_dynamic_evaluation_never_scores_what_it_has_learnt_and_may_stand_still():
    params, windows = jnp.zeros((4, 3)), jnp.array([[0, 1, 2, 0]] * 3)
    where = jnp.ones(windows.shape, bool)
    losses, _ = dynamic_evaluation(bigrams, params, windows, where, rate=1.0)
    np.testing.assert_allclose(losses[0], 4 * np.log(3), rtol=1e-6)
    assert losses[0] > losses[1] > losses[2]
    still, last = dynamic_evaluation(bigrams, params, windows, where, rate=0.0)
    expected = next_token(lambda x: bigrams(params, x), jnp.asarray(windows))[0]
    np.testing.assert_allclose(still, expected, rtol=1e-6)
    np.testing.assert_array_equal(last, params)
    with pytest.raises(ValueError, match="rate must be at least 0"):
        dynamic_evaluation(bigrams, params, windows, where, rate=-1.0)


def test_a_kept_token_that_is_none_is_seen_under_jit_and_masks_are_boolean(unchecked):
    logits = lambda tokens: jnp.zeros((*tokens.shape, 4))  # noqa: E731
    tokens, where = jnp.array([[1, -1, 2]]), jnp.array([[True, False, True]])
    assert np.isnan(jax.jit(lambda x: next_token(logits, x)[0])(tokens)[0])
    hidden = jax.jit(lambda x: next_token(logits, x, where=where)[0])(tokens)
    np.testing.assert_allclose(hidden, 2 * np.log(4), rtol=1e-6)
    with pytest.raises(TypeError, match="where must be boolean, got dtype int32"):
        next_token(logits, tokens, where=where.astype(jnp.int32))
