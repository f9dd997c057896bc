"""The shared layers: attention beside float64 loops, rotary positions, embeddings, patches."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import layers
from genjax.networks.layers import Cache, attention, rotary, write_cache
from genjax.networks.mlp import MLP

REFERENCES = Path(__file__).parents[1] / "references"
FIXTURE = json.loads((REFERENCES / "rope_gqa_attention.json").read_text())
RNG = np.random.default_rng(0)


def arrays(*shapes):
    return tuple(jnp.asarray(RNG.normal(size=shape)) for shape in shapes)


def loops(q, k, v, mask):
    """Attention by loops; mask [batch, queries, keys]."""
    q, k, v = (np.asarray(z, np.float64) for z in (q, k, v))
    out, group = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, i, h in np.ndindex(*q.shape[:3]):
        seen = [j for j in range(k.shape[1]) if mask[b, i, j]]
        if seen:
            logits = np.array([q[b, i, h] @ k[b, j, h // group] for j in seen]) / q.shape[3] ** 0.5
            weights = np.exp(logits - logits.max())
            out[b, i, h] = (weights / weights.sum()) @ v[b, seen, h // group]
    return out


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (66, 67)])
def test_attention_beside_loops(queries, keys, accelerator, monkeypatch, x64):
    """Few and many queries, and the form of other platforms; a query without keys gives 0."""
    q, k, v = arrays((2, queries, 4, 2), (2, keys, 2, 2), (2, keys, 2, 2))
    mask = RNG.random((2, queries, keys)) < 0.6
    mask[1, 1] = False
    earlier = np.tril(np.ones((queries, keys), bool), keys - queries)
    full = np.ones((2, queries, keys), bool)
    if accelerator:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        q, k, v = (z.astype(jnp.float32) for z in (q, k, v))
    cases = [
        ({}, full),
        ({"mask": jnp.asarray(mask)}, mask),
        ({"mask": jnp.asarray(mask[0])}, mask[:1] & full),
        ({"causal": True}, earlier[None] & full),
        ({"causal": True, "mask": jnp.asarray(mask)}, earlier & mask),
    ]
    found = jax.jit(lambda *qkv: [attention(*qkv, **options) for options, _ in cases])(q, k, v)
    for out, (_, seen) in zip(found, cases, strict=True):
        expected = loops(q, k, v, seen)
        np.testing.assert_allclose(out, expected, atol=2e-6 if accelerator else 1e-12)


@pytest.mark.parametrize("tokens", [9, 81])
def test_gradients_and_bfloat16(tokens, x64):
    """Value and gradients beside float64 sums; more than 64 queries go head by head on CPU."""
    parts = arrays(*[(2, tokens, 3, 4)] * 3)
    mask = np.tril(np.ones((tokens, tokens), bool))

    def plain(q, k, v):
        weights = jnp.where(mask, jnp.exp(jnp.einsum("bihd,bjhd->bhij", q, k) / 2), 0)
        total = jnp.einsum("bhij,bjhd->bihd", weights, v)
        return total / jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]

    def causal(*qkv):
        return attention(*qkv, causal=True)

    (probe,) = arrays(parts[0].shape)

    def pull(function):
        value, back = jax.vjp(function, *parts)
        return value, back(probe)

    narrow = tuple(z.astype(jnp.bfloat16) for z in parts)
    with jax.numpy_rank_promotion("allow"):
        expected, found, mapped, narrow = jax.jit(
            lambda: (
                pull(plain),
                pull(causal),
                jax.vmap(causal)(*(z[None] for z in parts))[0],
                causal(*narrow),
            )
        )()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), found, expected)
    np.testing.assert_allclose(mapped, expected[0], atol=1e-9)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), expected[0], atol=0.05)


@pytest.mark.parametrize("queries", [4, 70])
def test_a_query_without_keys_has_a_finite_gradient(queries):
    q, k, v = (z.astype(jnp.float32) for z in arrays(*[(1, queries, 1, 2)] * 3))
    mask = jnp.ones((queries, queries), bool).at[0].set(False)

    def loss(*qkv):
        return jnp.sum(attention(*qkv, mask=mask) ** 2)

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_array_equal(grads[0][:, 0], 0)
    assert np.abs(grads[0][:, 1:]).max() > 0


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary_and_grouped_heads_meet_the_reference(layout, x64):
    inputs = FIXTURE["inputs"]
    expected = {k: np.asarray(v) for k, v in FIXTURE["expected"][layout].items()}
    arrays = [jnp.asarray(inputs[name]) for name in "qkv"]
    positions = jnp.asarray(inputs["positions"], int)
    keep = jnp.asarray(inputs["keep"], bool)

    @jax.jit
    def everything(q, k, v):
        q, k = (rotary(z, positions, base=inputs["base"], layout=layout) for z in (q, k))

        def step(caches, t):
            """One place for the batch, and one for each row: the same."""
            query, *new = (jax.lax.dynamic_slice_in_dim(z, t, 1, 1) for z in (q, k, v))
            caches = [write_cache(caches[0], *new, t), write_cache(caches[1], *new, jnp.full(2, t))]
            seen = (positions <= t)[None]
            read = [[jnp.swapaxes(z, 1, 2) for z in cache] for cache in caches]
            return caches, [attention(query, *c, mask=seen)[:, 0] for c in read]

        empty = Cache(*(jnp.zeros_like(jnp.swapaxes(z, 1, 2)) for z in (k, v)))
        steps = jax.lax.scan(step, [empty, empty], positions)[1]
        padding = jnp.repeat(keep[:, None], len(positions), 1)
        padded = attention(q, k, v, causal=True, mask=padding)
        return q, k, attention(q, k, v, causal=True), padded, steps

    q, k, full, padded, steps = everything(*arrays)
    tolerance = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(q, expected["rotated_q"], **tolerance)
    np.testing.assert_allclose(k, expected["rotated_k"], **tolerance)
    np.testing.assert_allclose(full, expected["output"], **tolerance)
    for out in steps:
        wanted = expected["output_token_by_token"]
        np.testing.assert_allclose(np.swapaxes(out, 0, 1), wanted, **tolerance)
    if layout == "half":
        np.testing.assert_allclose(padded, FIXTURE["expected"]["left_padded_half"], **tolerance)


def test_rotary_sees_differences_of_positions(compiled):
    q, k = (z.astype(jnp.float32) for z in arrays((1, 4, 1, 6), (1, 4, 1, 6)))
    places = jnp.arange(4)

    def product(q, k, shift):
        turned = (rotary(z, (places + shift)[None]) for z in (q, k))
        return jnp.einsum("bihd,bjhd->bhij", *turned)

    run = compiled(product)
    np.testing.assert_allclose(run(q, k, 50), run(q, k, 0), atol=2e-5)
    narrow = rotary(q.astype(jnp.bfloat16), 1000 + places)
    assert narrow.dtype == jnp.bfloat16
    # Angles in bfloat16 would be off by up to 4 here.
    np.testing.assert_allclose(narrow.astype(jnp.float32), rotary(q, 1000 + places), atol=0.05)


def test_a_write_beyond_the_cache_is_seen(unchecked):
    cache, new = Cache(*[jnp.zeros((2, 1, 3, 2))] * 2), jnp.ones((2, 2, 1, 2))
    with pytest.raises(ValueError, match=r"start must lie in \[0, 1\], got 2"):
        write_cache(cache, new, new, 2)
    rows = jax.jit(write_cache)(cache, new, new, jnp.array([1, 2]))
    np.testing.assert_array_equal(rows.keys[0, 0, :, 0], [0, 1, 1])
    assert np.isnan(rows.values[1]).any()
    assert np.isnan(jax.jit(write_cache)(cache, new, new, 2).keys).any()


def test_embeddings_are_their_formulas(compiled):
    t = jnp.linspace(-1.0, 1.0, 5)
    value = compiled(lambda t: layers.fourier_features(t, 6, min_frequency=0.5, max_frequency=8.0))
    angle = 2 * np.pi * np.asarray(t)[:, None] * np.array([0.5, 2.0, 8.0])
    np.testing.assert_allclose(value(t), np.c_[np.cos(angle), np.sin(angle)], atol=1e-4)
    assert layers.fourier_features(t.astype(jnp.bfloat16), 6).dtype == jnp.float32
    angle = np.pi * np.asarray(t)[:, None] * np.arange(1, 4)
    expected = np.c_[t, np.sin(angle), np.cos(angle)]
    np.testing.assert_allclose(compiled(lambda t: layers.harmonics(t, 3))(t), expected, atol=1e-5)
    places = jnp.array([0, 3, 70])
    angle = np.asarray(places)[:, None] * 100.0 ** -np.array([0, 1 / 3, 2 / 3])
    found = compiled(lambda p: layers.sinusoidal(p, 6, base=100.0))(places)
    np.testing.assert_allclose(found, np.c_[np.sin(angle), np.cos(angle)], atol=1e-5)
    for features in (layers.fourier_features, layers.sinusoidal):
        with pytest.raises(ValueError, match="num must be even"):
            features(t, 5)


def test_no_label_is_the_null_class(unchecked):
    label = jnp.array([0, 3])
    assert layers.labels_or_null(None, None, 2) is None
    np.testing.assert_array_equal(layers.labels_or_null(3, None, 2), [3, 3])
    np.testing.assert_array_equal(layers.labels_or_null(3, label, 2), label)
    with pytest.raises(ValueError, match="network has classes=None"):
        layers.labels_or_null(None, label, 2)
    with pytest.raises(ValueError, match=r"label must have shape \(3,\), got \(2,\)"):
        layers.labels_or_null(3, label, 3)


def test_patches_go_row_by_row_and_come_back(compiled, unchecked):
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    tokens = compiled(lambda x: layers.patchify(x, 2))(x)
    assert tokens.shape == (2, 6, 12)
    np.testing.assert_array_equal(tokens[:, 4], x[:, 2:, 2:4].reshape(2, 12))
    back = compiled(lambda y: layers.unpatchify(y, 2, (4, 6, 3)))(tokens)
    np.testing.assert_array_equal(back, x)
    with pytest.raises(ValueError, match="multiples of the patch 4"):
        layers.patchify(x, 4)
    with pytest.raises(ValueError, match=r"tokens of images \(8, 6, 3\)"):
        layers.unpatchify(tokens, 2, (8, 6, 3))


def filled(net, x):
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    return jax.tree.map(lambda p: jnp.asarray(0.3 + RNG.normal(size=p.shape), jnp.float32), shapes)


def test_group_norm_is_flax_s(compiled):
    x = jax.random.normal(jax.random.key(0), (3, 4, 5, 12)) * 3 + 10
    ours, theirs = layers.GroupNorm(groups=4), nn.GroupNorm(num_groups=4, epsilon=1e-5)
    params = filled(ours, x)
    found, expected = compiled(lambda x: (ours.apply(params, x), theirs.apply(params, x)))(x)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    narrow = ours.apply(params, x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), expected, atol=0.3)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_are_their_formulas(kind, compiled, unchecked):
    x = 100 + jax.random.normal(jax.random.key(0), (3, 16))
    net = layers.Norm(kind, use_bias=kind == "layer", epsilon=1e-3)
    params = filled(net, x)
    p = {k: np.asarray(v, np.float64) for k, v in params["params"].items()}
    wide = np.asarray(x, np.float64)
    wide = wide - wide.mean(1, keepdims=True) if kind == "layer" else wide
    wide = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-3)
    expected = wide * p["scale"] + p.get("bias", 0)
    np.testing.assert_allclose(compiled(net.apply)(params, x), expected, rtol=1e-3, atol=1e-3)
    bare = layers.Norm(kind, use_scale=False)
    narrow = bare.apply({}, (x - 100).astype(jnp.bfloat16) * 200 + 1000)
    assert narrow.dtype == jnp.bfloat16
    # In bfloat16 a sum of 16 squares near 10^6 would lose all but the first two digits.
    np.testing.assert_allclose((narrow.astype(jnp.float32) ** 2).mean(1), 1, rtol=0.02)
    with pytest.raises(ValueError, match="norm must be one of"):
        layers.Norm("batch").init(jax.random.key(0), x)


def test_a_layer_on_flat_rows_is_the_same_layer():
    x, key = jnp.ones((4, 3, 5)), jax.random.key(0)
    net = MLP((2,))
    params = net.init(key, x)
    flat = layers.on_flat(lambda z: net.apply(params, z), x)
    np.testing.assert_allclose(flat, net.apply(params, x), rtol=1e-6)
