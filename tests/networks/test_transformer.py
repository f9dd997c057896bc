"""The transformer block beside recorded blocks, its cache beside the full pass, and stacks."""

import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import layers
from genjax.networks.transformer import Block, apply_stack, empty_cache, stacked

REFERENCES = Path(__file__).parents[1] / "references"
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 5, 8))
MODERN = Block(4, kv_heads=2, norm="rms", mlp="swiglu", rotary="half", qk_norm=True, causal=True)


def load(name):
    reference = json.loads((REFERENCES / name).read_text())
    arrays = {k: np.asarray(v) for k, v in reference["inputs"].pop("params").items()}
    return reference, arrays


def dense(p, name):
    return {"kernel": p[f"{name}_w"], "bias": p[f"{name}_b"]}


def filled(module, *inputs, **options):
    """Parameters away from the start, without running `init`."""
    shapes = jax.eval_shape(lambda: module.init(KEY, *inputs, **options))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.float32(0.4 * rng.normal(size=p.shape)), shapes)


def test_conditioned_block_meets_the_reference(x64):
    """adaLN-zero (Peebles & Xie 2023): value, and gradients for x and the condition."""
    reference, p = load("adaln_zero_block.json")
    x, c, probe = (jnp.asarray(reference["inputs"][name]) for name in ("x", "c", "cotangent"))
    names = {"modulation": "ada", "qkv": "qkv", "out": "out"}
    params = {name: dense(p, short) for name, short in names.items()}
    params["up"] = {"kernel": p["w1"], "bias": p["b1"]}
    params["down"] = {"kernel": p["w2"], "bias": p["b2"]}
    block = Block(reference["inputs"]["heads"], hidden=8, conditioned=True)

    @jax.jit
    def run(x, c):
        y, pull = jax.vjp(lambda x, c: block.apply({"params": params}, x, condition=c)[0], x, c)
        start = block.init_with_output(KEY, x, condition=c)[0][0]
        return y, *pull(probe), start

    *found, start = run(x, c)
    for name, out in zip(("y", "grad_x", "grad_c"), found, strict=True):
        np.testing.assert_allclose(out, reference["expected"][name], rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(start, x)


def test_plain_blocks_meet_the_reference(x64):
    """GPT-2's layout: two causal blocks between embeddings and a tied output."""
    reference, p = load("gpt_forward_loss.json")
    ids, count = np.asarray(reference["inputs"]["ids"]), reference["inputs"]["n_layer"]

    def block_params(i):
        q = {name.removeprefix(f"h{i}_"): leaf for name, leaf in p.items()}
        names = {"qkv": "qkv", "out": "proj", "up": "fc", "down": "out"}
        norms = {"norm_attention": "ln1", "norm_mlp": "ln2"}
        return {name: dense(q, short) for name, short in names.items()} | {
            name: {"scale": q[f"{short}_g"], "bias": q[f"{short}_b"]}
            for name, short in norms.items()
        }

    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(block_params, range(count)))
    block = Block(reference["inputs"]["n_head"], causal=True, epsilon=1e-5)

    @jax.jit
    def run(h):
        h, _ = apply_stack(block, params, h, remat=True)
        final = {"params": {"scale": p["lnf_g"], "bias": p["lnf_b"]}}
        return layers.Norm(use_bias=True, epsilon=1e-5).apply(final, h) @ p["wte"].T

    logits = run(jnp.asarray(p["wte"][ids] + p["wpe"][None]))
    np.testing.assert_allclose(logits, reference["expected"]["logits"], rtol=1e-10, atol=1e-12)


def test_rms_norm_swiglu_and_grouped_heads_by_hand():
    params = filled(MODERN, X)
    p = jax.tree.map(np.asarray, params["params"])

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[name]["scale"]

    def apply(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    x = np.asarray(X)
    heads = apply(norm(x, "norm_attention"), "qkv").reshape(2, 5, 8, 2)
    q, k, v = (
        norm(heads[:, :, :4], "norm_query"),
        norm(heads[:, :, 4:6], "norm_key"),
        heads[:, :, 6:],
    )
    q, k = (layers.rotary(jnp.asarray(z), jnp.arange(5)) for z in (q, k))
    out = layers.attention(q, k, jnp.asarray(v), causal=True).reshape(x.shape)
    x = x + apply(np.asarray(out), "out")
    h = norm(x, "norm_mlp")
    gate = apply(h, "gate")
    expected = x + apply(gate / (1 + np.exp(-gate)) * apply(h, "up"), "down")
    found = jax.jit(MODERN.apply)(params, X)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [False, True])
def test_cached_steps_equal_the_full_pass(rows):
    """After a prefill of two, one token at a time; and rows that stand at different places."""
    first = filled(MODERN, X)["params"]
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.7 * leaf]), first)

    @jax.jit
    def run(x):
        full = apply_stack(MODERN, params, x)[0]
        cache = empty_cache(MODERN, 2, 2, 5, 8)
        place = (lambda t: jnp.full(2, t)) if rows else (lambda t: t)
        h, cache = apply_stack(MODERN, params, x[:, :2], cache=cache, start=place(0))

        def step(cache, t):
            token = jax.lax.dynamic_slice_in_dim(x, t, 1, 1)
            h, cache = apply_stack(MODERN, params, token, cache=cache, start=place(t))
            return cache, h[:, 0]

        _, steps = jax.lax.scan(step, cache, jnp.arange(2, 5))
        return full, jnp.concatenate([h, jnp.swapaxes(steps, 0, 1)], axis=1)

    full, steps = run(X)
    np.testing.assert_allclose(steps, full, rtol=1e-4, atol=1e-5)


def test_a_block_reads_what_it_may():
    """Causal, masked, at temperature: by the Jacobian's zeros and by equal outputs."""
    params = filled(MODERN, X)
    mask = jnp.ones((2, 5, 5), bool).at[:, :, 1].set(False)

    @jax.jit
    def run(x):
        apply = lambda x, **options: MODERN.apply(params, x, **options)[0]  # noqa: E731
        reach = jax.jacfwd(lambda x: apply(x[None])[0].sum(-1))(x[0])
        hidden = [apply(z, mask=mask) for z in (x, x.at[:, 1].add(3.0))]
        cold, same = (apply(x, temperature=jnp.full(2, t)) for t in (0.3, 1.0))
        return jnp.abs(reach).sum(-1), hidden, apply(x), cold, same

    reach, hidden, plain, cold, same = run(X)
    np.testing.assert_array_equal(np.asarray(reach) > 0, np.tril(np.ones((5, 5))) > 0)
    keep = np.array([0, 2, 3, 4])
    np.testing.assert_allclose(hidden[0][:, keep], hidden[1][:, keep], atol=1e-6)
    np.testing.assert_allclose(same, plain, atol=1e-5)
    assert np.abs(cold - plain)[:, 1:].max() > 1e-3


class Stack(nn.Module):
    num: int = 3
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, dropout_key=None):
        block = Block(2, dropout=self.dropout, parent=None)
        params = stacked(self, "layers", block, self.num, x[:1])
        return apply_stack(block, params, x, dropout_key=dropout_key)[0]


def test_a_stack_is_its_blocks_one_after_another():
    net = Stack(dropout=0.5)
    params = jax.jit(net.init)(KEY, X)
    kernels = params["params"]["layers"]["qkv"]["kernel"]
    assert kernels.shape == (3, 8, 24)
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01
    # Drawn per copy: the spread of one layer's kernel, not of a stack's.
    np.testing.assert_allclose(np.std(kernels), 8**-0.5, rtol=0.15)

    @jax.jit
    def run(params, keys):
        h = X
        for i in range(3):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["params"]["layers"])
            h, _ = Block(2).apply({"params": layer}, h)
        return net.apply(params, X), h, [net.apply(params, X, key) for key in keys]

    found, expected, (first, second) = run(params, jax.random.split(KEY))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(first - second).max() > 0.1
    sizes = [
        len(jax.make_jaxpr(Stack(num).apply)(jax.eval_shape(Stack(num).init, KEY, X), X).eqns)
        for num in (2, 9)
    ]
    assert sizes[0] == sizes[1]


def test_bfloat16_keeps_the_residual_stream_and_is_near():
    block = Block(2, conditioned=True)
    narrow = Block(2, conditioned=True, dtype=jnp.bfloat16)
    condition = jax.random.normal(KEY, (2, 3))
    params = filled(block, X, condition=condition)
    full, half = jax.jit(
        lambda x: [b.apply(params, x, condition=condition)[0] for b in (block, narrow)]
    )(X)
    assert half.dtype == jnp.float32
    assert 1e-6 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


def test_bad_input(unchecked):
    def trace(block, **options):
        jax.eval_shape(lambda: block.init(KEY, X, **options))

    with pytest.raises(ValueError, match="multiple of heads = 3, got 8"):
        trace(Block(3))
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads = 3, got 4"):
        trace(Block(4, kv_heads=3))
    with pytest.raises(ValueError, match="no condition is given, but the block has conditioned"):
        trace(Block(2, conditioned=True))
    with pytest.raises(ValueError, match="a condition is given"):
        trace(Block(2), condition=jnp.ones((2, 3)))
    for options, match in (
        ({"mlp": "relu"}, "mlp must be one of"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"rotary": "full"}, "layout must be one of"),
    ):
        with pytest.raises(ValueError, match=match):
            trace(Block(2, **options))
    cache = jax.tree.map(lambda leaf: leaf[0], empty_cache(Block(2), 1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"start must lie in \[0, 3\], got 4"):
        trace(Block(2), cache=cache, start=4)
