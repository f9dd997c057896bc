"""State space networks: numpy beside each block, the laws of a sequence model, parameter groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import RATES, StateSpace, StateSpaceBlock, computing_in, state_space_groups
from genjax.training.update import cast_floating
from tests.state_space import oracles

KINDS = ["s4", "s4d", "mamba", "mamba2"]
# The laws of all four in test-all; of mamba also in tests/autoregressive/table.py.
TWO = [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("s4d", "mamba", "mamba2")), "s4"]
KEY = jax.random.key(0)
SIZES = {"states": 4, "head": 8, "chunk": 4}
VOCABULARY, LENGTH, BATCH = 5, 7, 2
TOKENS = jax.random.randint(jax.random.key(1), (BATCH, LENGTH), 0, VOCABULARY)


def model(kind, **changes):
    options = {"vocabulary": VOCABULARY, "depth": 2, "width": 8, "kind": kind, **changes}
    return StateSpace(**options, block_options=tuple(SIZES.items()))


def filled(module, *inputs):
    """Parameters away from the start."""
    params = jax.jit(module.init)(KEY, *inputs)
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    moved = [p + jnp.float32(0.1 * rng.normal(size=p.shape)) for p in leaves]
    return jax.tree.unflatten(tree, moved)


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def short(x, p):
    padded = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    y = sum(padded[:, k : k + x.shape[1]] * p["conv"][k] for k in range(4))
    return silu(y + p["conv_bias"])


def by_numpy(kind, p, x):
    """One block on [batch, length, 8], from its parameters, in float64."""
    h = rms(x, p["norm"]["scale"])
    if kind == "mamba":
        u, z = np.split(h @ p["in"]["kernel"], 2, -1)
        u = short(u, p)
        low, B, C = np.split(u @ p["select"]["kernel"], [1, 5], -1)
        dt = oracles.softplus(low @ p["step"]["kernel"] + p["dt_bias"])
        h0 = np.zeros((len(x), 16, 4))
        y, _ = oracles.selective_loop(u, dt, -np.exp(p["log_a"]), B, C, p["skip"], z, h0)
        return x + y @ p["out"]["kernel"]
    if kind == "mamba2":
        z, mixed, dt = np.split(h @ p["in"]["kernel"], [16, 40], -1)
        u, B, C = np.split(short(mixed, p), [16, 20], -1)
        dt = oracles.softplus(dt + p["dt_bias"])
        y, _ = oracles.ssd_loop(
            u.reshape(*u.shape[:2], 2, 8), dt, -np.exp(p["log_a"]), B[:, :, None], C[:, :, None],
            p["skip"], np.zeros((len(x), 2, 8, 4)),
        )  # fmt: skip
        y = rms(y.reshape(u.shape) * silu(z), p["gated_norm"]["scale"])
        return x + y @ p["out"]["kernel"]
    y = np.zeros_like(h)
    for ch in range(h.shape[-1]):
        both = lambda v: np.concatenate([v, np.conj(v)])  # noqa: E731
        rates = both(-np.exp(p["log_rate"][ch]) + 1j * p["frequency"][ch])
        c, dt = both(p["read"][0, ch] + 1j * p["read"][1, ch]), np.exp(p["log_dt"][ch])
        if kind == "s4":
            low = both(p["low_rank"][ch, 0] + 1j * p["low_rank"][ch, 1])
            drive = both(p["drive"][ch, 0] + 1j * p["drive"][ch, 1])
            dense, eye = np.diag(rates) - np.outer(low, low.conj()), np.eye(4)
            step = np.linalg.solve(eye - dt / 2 * dense, eye + dt / 2 * dense)
            drive = np.linalg.solve(eye - dt / 2 * dense, dt * drive)
        else:
            step, drive = np.diag(np.exp(dt * rates)), (np.exp(dt * rates) - 1) / rates
        for row in range(len(x)):
            y[row, :, ch], _ = oracles.lti_loop(
                h[row, :, ch], lambda s, m=step: m @ s, drive, lambda s, c=c: (c @ s).real,
                p["skip"][ch], np.zeros(4, complex),
            )  # fmt: skip
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    a, gate = np.split(y @ p["out"]["kernel"], 2, -1)
    return x + a / (1 + np.exp(-gate))


@pytest.mark.parametrize("kind", KINDS)
def test_block_is_its_formula(kind):
    x = np.random.default_rng(2).normal(size=(BATCH, LENGTH, 8))
    block = StateSpaceBlock(kind, **SIZES)
    params = filled(block, jnp.float32(x))
    found, cache = jax.jit(block.apply)(params, jnp.float32(x))
    assert cache is None
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params["params"])
    np.testing.assert_allclose(found, by_numpy(kind, exact, x), atol=2e-5)


@pytest.mark.parametrize("kind", TWO)
def test_laws_of_a_sequence_model(kind):
    """Causal; rows apart; steps, also after a prefill, are the full pass."""
    net = model(kind)
    params = filled(net, TOKENS)

    @jax.jit
    def everything(tokens):
        full = net.apply(params, tokens)
        cache = net.apply(params, BATCH, method="empty_cache")
        prefilled, middle = net.apply(params, cache, tokens[:, :3], method="prefill")

        def scan(cache, first):
            def step(cache, t):
                before = tokens[:, jnp.maximum(t - 1, 0)]
                place = jnp.full(BATCH, t)
                logits, cache = net.apply(params, cache, before, place, method="step")
                return cache, logits

            return jnp.moveaxis(jax.lax.scan(step, cache, first)[1], 0, 1)

        return full, prefilled, scan(middle, jnp.arange(3, LENGTH)), scan(cache, jnp.arange(LENGTH))

    full, prefilled, later, steps = everything(TOKENS)
    assert full.shape == (BATCH, LENGTH, VOCABULARY)
    np.testing.assert_allclose(steps, full, atol=1e-4)
    np.testing.assert_allclose(prefilled, full[:, :3], atol=1e-4)
    np.testing.assert_allclose(later, full[:, 3:], atol=1e-4)
    changed = TOKENS.at[0, 4].set((TOKENS[0, 4] + 1) % VOCABULARY)
    moved = np.abs(everything(changed)[0] - full).max(-1)
    assert moved[0, :5].max() < 1e-5  # by the FFT's rounding alone
    assert moved[0, 5:].min() > 1e-4
    assert not moved[1].any()


@pytest.mark.parametrize("kind", TWO)
def test_masked_positions_change_nothing(kind):
    net = model(kind, vocabulary=None, outputs=3, shift=False)
    rng = np.random.default_rng(3)
    x = jnp.float32(rng.normal(size=(1, 6, 2)))
    params = filled(net, x)
    where = np.array([[True, False, True, True, False, True]])
    spoilt = jnp.where(where[..., None], x, jnp.nan)

    @jax.jit
    def run(x, where):
        def loss(params):
            y = net.apply(params, x, where=where)
            return jnp.sum(jnp.where(where[..., None], y, 0) ** 2), y

        return jax.grad(loss, has_aux=True)(params)

    grads, y = run(spoilt, jnp.asarray(where))
    alone, kept = run(x[:, where[0]], jnp.ones((1, 4), bool))
    np.testing.assert_allclose(y[:, where[0]], kept, atol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(alone), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=1e-4 * (1 + np.abs(b).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_program_and_groups(kind):
    """As long for any depth; A, steps and skip are slow, and nothing else; dropout needs a key."""

    def traced(depth):
        net = model(kind, depth=depth, dropout=0.5)
        params = jax.eval_shape(net.init, KEY, TOKENS)
        return len(str(jax.make_jaxpr(net.apply)(params, TOKENS)).splitlines()), params

    (short_program, params), (long_program, _) = traced(2), traced(8)
    assert short_program == long_program
    groups = state_space_groups(params)["params"]["blocks"]
    slow = {name for name, group in groups.items() if group == "slow"}
    lti = {"log_rate", "frequency", "log_dt", "skip"}
    expected = {
        "s4": lti | {"low_rank", "drive"},
        "s4d": lti,
        "mamba": {"log_a", "dt_bias", "skip"},
        "mamba2": {"log_a", "dt_bias", "skip"},
    }
    assert slow == expected[kind]
    assert groups["out"]["kernel"] == "rest"


def test_start_of_the_steps():
    block = StateSpaceBlock("mamba", states=4)
    params = block.init(KEY, jnp.zeros((1, 2, 64)))["params"]
    dt = np.logaddexp(0, params["dt_bias"])
    assert dt.min() >= 1e-4
    assert dt.max() <= 0.1001
    assert abs(np.mean(np.log(dt)) - np.log(1e-2)) < 0.5
    np.testing.assert_allclose(-np.exp(params["log_a"][0]), [-1, -2, -3, -4], rtol=1e-6)


def test_bad_input_is_refused_by_name(unchecked):
    with pytest.raises(ValueError, match="did you mean 'mamba'"):
        model("mamba3").init(KEY, TOKENS)
    with pytest.raises(ValueError, match="need outputs"):
        model("s4d", vocabulary=None).init(KEY, jnp.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match="head must divide"):
        StateSpaceBlock("mamba2", head=7).init(KEY, jnp.zeros((1, 2, 8)))
    net = model("s4d", shift=False)
    params = jax.eval_shape(net.init, KEY, TOKENS)
    with pytest.raises(ValueError, match="shift=True"):
        net.apply(params, None, TOKENS, method="prefill")
    with pytest.raises(ValueError, match="tokens must have rank 2"):
        net.apply(params, TOKENS[0])


@pytest.mark.parametrize("kind", TWO)
def test_a_language_model_reads_kept_tokens_as_if_they_stood_alone(kind):
    """Padded on the left, on the right and inside; masked tokens may be anything."""
    net = model(kind)
    params = filled(net, TOKENS)
    run = jax.jit(lambda tokens, where: net.apply(params, tokens, where=where))
    alone = jax.jit(lambda tokens: net.apply(params, tokens))(TOKENS[:, :5])
    for kept in ([2, 3, 4, 5, 6], [0, 1, 2, 3, 4], [0, 2, 3, 5, 6]):
        where = jnp.zeros((BATCH, LENGTH), bool).at[:, jnp.array(kept)].set(True)
        tokens = jnp.full((BATCH, LENGTH), 4).at[:, jnp.array(kept)].set(TOKENS[:, :5])
        np.testing.assert_allclose(run(tokens, where)[:, kept], alone, atol=2e-5)


@pytest.mark.parametrize("kind", ["mamba2", "s4d"])
def test_a_cache_keeps_its_types(kind):
    """In bfloat16 too, so that a scan over steps can carry it."""
    net = model(kind, dtype=jnp.bfloat16)
    params = jax.jit(net.init)(KEY, TOKENS)
    for dtype in (jnp.float32, jnp.bfloat16):
        cache = net.apply(params, BATCH, dtype=dtype, method="empty_cache")
        step = lambda *a: net.apply(params, *a, method="step")[1]  # noqa: E731
        after = jax.eval_shape(step, cache, TOKENS[:, 0], jnp.zeros(BATCH, int))
        assert [x.dtype for x in jax.tree.leaves(after)] == [
            x.dtype for x in jax.tree.leaves(cache)
        ]


def test_bytes_and_tokens_that_are_none():
    """The start token of bytes, 256, is no byte; a negative token is seen under jit."""
    net = StateSpace(256, depth=1, width=8, kind="s4d", block_options=tuple(SIZES.items()))
    tokens = jnp.array([[3, 250, 7]], jnp.uint8)
    params = filled(net, tokens)
    cache = net.apply(params, 1, method="empty_cache")
    prefill = jax.jit(lambda cache, x: net.apply(params, cache, x, method="prefill")[0])
    expected = net.apply(params, tokens)
    np.testing.assert_allclose(prefill(cache, tokens), expected, atol=1e-5)
    step = net.apply(params, cache, tokens[:, 0], jnp.zeros(1, jnp.int32), method="step")[0]
    np.testing.assert_allclose(step, expected[:, 0], atol=1e-5)
    wrong = jax.jit(lambda x: net.apply(params, x))(jnp.array([[-1, 0, 0]]))
    assert np.isnan(wrong[0, 1]).all()


@pytest.mark.parametrize("kind", ["s4", "s4d"])
def test_rates_that_stay_float32_keep_the_phase(kind):
    """Rounded to eight bits, a frequency near 100 is off by a radian some ten time units later."""
    block = StateSpaceBlock(kind=kind, states=64, dt_range=(0.05, 0.1))
    x = jax.random.normal(KEY, (2, 256, 8))
    params = jax.jit(block.init)(KEY, x)

    @jax.jit
    def off(params):
        def run(given):
            with computing_in(jnp.bfloat16):
                return block.apply(given, x)[0] - x

        exact = run(params)
        found = [run(cast_floating(params, jnp.bfloat16, kept)) for kept in (RATES, ())]
        return [jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact) for y in found]

    kept, cast = off(params)
    assert kept < 0.02
    assert cast > 2 * kept
