"""GPT beside the recorded GPT-2, packed documents beside each alone; laws: tests/autoregressive."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import GPT

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "references" / "gpt_forward_loss.json").read_text()
)
KEY = jax.random.key(0)
SMALL = GPT(5, depth=2, width=8, heads=2, positions="rotary", dropout=0.5)
TOKENS = jnp.array([[0, 1, 2, 3, 4], [4, 4, 0, 1, 2]])


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(SMALL.init, KEY, TOKENS)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.float32(0.4 * rng.normal(size=p.shape)), shapes)


def reference_params(start):
    """The recorded weights; the start token's row is that of the token `start`."""
    p = {name: np.asarray(x) for name, x in REFERENCE["inputs"]["params"].items()}
    names = {"qkv": "qkv", "out": "proj", "up": "fc", "down": "out"}
    norms = {"norm_attention": "ln1", "norm_mlp": "ln2"}
    stack = lambda name: np.stack([p[f"h{i}_{name}"] for i in range(2)])  # noqa: E731
    blocks = {
        ours: {"kernel": stack(f"{theirs}_w"), "bias": stack(f"{theirs}_b")}
        for ours, theirs in names.items()
    } | {
        ours: {"scale": stack(f"{theirs}_g"), "bias": stack(f"{theirs}_b")}
        for ours, theirs in norms.items()
    }
    return {
        "params": {
            "embedding": np.concatenate([p["wte"], p["wte"][start][None]]),
            "places": p["wpe"],
            "blocks": blocks,
            "last_norm": {"scale": p["lnf_g"], "bias": p["lnf_b"]},
        }
    }


def test_meets_the_reference(x64):
    """GPT-2 reads its first token as the start token, and predicts the next ones."""
    ids, expected = np.asarray(REFERENCE["inputs"]["ids"]), REFERENCE["expected"]
    net = GPT(11, depth=2, width=8, heads=2, max_length=6)
    run = jax.jit(net.apply)
    for row in range(2):
        tokens = jnp.asarray(np.roll(ids[row], -1)[None])
        logits = run(reference_params(ids[row][0]), tokens)
        np.testing.assert_allclose(logits[0], expected["logits"][row], rtol=1e-10, atol=1e-12)


def test_the_start_is_that_of_gpt2():
    net = GPT(50, depth=8, width=32, heads=2)
    params = jax.jit(net.init)(KEY, jnp.zeros((1, 4), jnp.int32))["params"]
    assert params["embedding"].shape == (51, 32)
    for leaf, std in (
        (params["embedding"], 0.02),
        (params["blocks"]["qkv"]["kernel"], 0.02),
        (params["blocks"]["down"]["kernel"], 0.02 / 4),
        (params["blocks"]["out"]["kernel"], 0.02 / 4),
    ):
        np.testing.assert_allclose(np.std(leaf), std, rtol=0.1)
    assert params["blocks"]["up"]["kernel"].shape == (8, 32, 128)


def test_packed_documents_are_as_each_alone(params):
    """Two documents and padding in a row: logits of each alone, whatever the padding holds."""
    run = jax.jit(lambda tokens, segments: SMALL.apply(params, tokens, segments=segments))
    packed = jnp.array([[0, 1, 4, 2, 3, 9], [-5, 4, 3, 1, 1, 2]])
    segments = jnp.array([[0, 0, 1, 1, 1, -1], [-1, 0, 0, 0, 0, 0]])
    found = run(packed, segments)
    alone = jax.jit(lambda tokens: SMALL.apply(params, tokens))
    for row, start, document in ((0, 0, [0, 1]), (0, 2, [4, 2, 3]), (1, 1, [4, 3, 1, 1, 2])):
        expected = alone(jnp.asarray([document + [0] * (5 - len(document))]))[0, : len(document)]
        np.testing.assert_allclose(
            found[row, start : start + len(document)], expected, rtol=1e-4, atol=1e-5
        )
    assert np.isfinite(found).all()


def test_without_causality_every_position_reads_all(params):
    """The mask token is `vocabulary`; there is no shift."""
    net = SMALL.clone(causal=False)
    run = jax.jit(lambda tokens: net.apply(params, tokens))
    full = run(TOKENS.at[:, 1].set(5))
    other = run(TOKENS.at[:, 1].set(5).at[:, 4].set(3))
    assert (np.abs(full - other)[0].max(-1) > 1e-4).all()
    with pytest.raises(ValueError, match="a cache needs causal=True"):
        net.apply(params, net.empty_cache(1, 4), TOKENS[:1, 0], jnp.array([0]), method="step")


def test_layers_apart_take_the_same_steps(params):
    """`unstacked` moves no number; stacked parameters step as well."""
    apart = SMALL.unstacked(params)
    assert isinstance(apart["params"]["blocks"], tuple)
    cache, position = SMALL.empty_cache(len(TOKENS), 4), jnp.zeros(len(TOKENS), int)
    start = jnp.full(len(TOKENS), 5)
    step = jax.jit(lambda p: SMALL.apply(p, cache, start, position, method="step"))
    for found, wanted in zip(*(jax.tree.leaves(step(p)) for p in (apart, params)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(step(apart)[0], SMALL.apply(params, TOKENS)[:, 0], atol=1e-6)


def test_dropout_needs_its_key(params):
    run = jax.jit(lambda key: SMALL.apply(params, TOKENS, dropout_key=key))
    plain = jax.jit(lambda: SMALL.apply(params, TOKENS))()
    first, again, other = run(KEY), run(KEY), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert np.abs(first - plain).max() > 0.01


def test_bfloat16_is_near(params):
    narrow = SMALL.clone(dtype=jnp.bfloat16)
    full, half = (jax.jit(lambda n=n: n.apply(params, TOKENS))() for n in (SMALL, narrow))
    assert 1e-6 < np.abs(half.astype(jnp.float32) - full).max() < 0.05 * np.abs(full).max()


def test_bad_input(unchecked, params):
    run = lambda tokens, net=SMALL, **options: net.apply(params, tokens, **options)  # noqa: E731
    cache = SMALL.empty_cache(2, 4)
    step = lambda position: SMALL.apply(  # noqa: E731
        params, cache, TOKENS[:, 0], position, method="step"
    )
    for call, match in (
        (lambda: run(TOKENS.at[0, 0].set(5)), r"tokens must lie in \[0, 4\], got"),
        (lambda: run(TOKENS[0]), "tokens must have rank 2"),
        (lambda: run(TOKENS, segments=TOKENS[:, :2]), "shapes must be equal"),
        (lambda: step(jnp.array([0, 4])), r"position must lie in \[0, 3\], got \[0 4\]"),
        (
            lambda: SMALL.apply(params, cache, TOKENS, method="prefill"),
            r"position must lie in \[0, 3\], got 4",
        ),
        (lambda: GPT(5, positions="sine").init(KEY, TOKENS), "positions must be one of"),
        (lambda: GPT(5, width=8, max_length=4).init(KEY, TOKENS), "at most max_length = 4 long"),
        (lambda: GPT(5, depth=0).init(KEY, TOKENS), "depth must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    # Traced, they give NaN instead of another token's logits.
    assert np.isnan(jax.jit(run)(TOKENS.at[0, 1].set(-1))[0, 2]).all()
    logits, _ = jax.jit(step)(jnp.array([0, 4]))
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1]).all()


def test_a_token_outside_is_nan_where_it_is_traced_or_refused(params, unchecked):
    """The start token's row is no token's, though the embedding has it."""
    run = jax.jit(lambda tokens: SMALL.apply(params, tokens))
    size = SMALL.vocabulary
    for wrong in (-1, size, size + 1):
        logits = run(jnp.array([[0, wrong, 1], [0, 1, 1]]))
        assert np.isnan(logits[0, 2]).all()
        assert np.isfinite(logits[1]).all()
    segments = jnp.array([[0, 0, -1]])
    with pytest.raises(ValueError, match="tokens must lie in"):
        SMALL.apply(params, jnp.array([[0, size, 1]]), segments=segments)
    SMALL.apply(params, jnp.array([[0, 1, size + 2]]), segments=segments)
