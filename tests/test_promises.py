"""Every promise of a docstring has a test, and the tests of those that no other file holds."""

import ast
import functools
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax import alignment, numerics, training, transport, variational
from genjax.networks import UNet
from genjax.training.loop import _Training
from genjax.transport.reading import _relative
from genjax.variational.quantize import straight_through
from tests.promises import HELD, NO_PROMISE
from tests.training import test_saddle

ROOT = Path(__file__).parents[1]
WORD = re.compile(r"\b(never|always|exactly|strictly)\b", re.IGNORECASE)


def promises(source, module):
    """(owner, sentence) of every promise in a module's docstrings."""

    def walk(node, name):
        text = ast.get_docstring(node) or ""
        for sentence in re.split(r"(?<=[.;])\s+|\n\n", text):
            if WORD.search(sentence):
                yield module + (f":{name}" if name else ""), " ".join(sentence.split())
        yield from within(node, name)

    def within(node, name):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from walk(child, f"{name}.{child.name}" if name else child.name)
            else:
                yield from within(child, name)

    return list(walk(ast.parse(source), ""))


@functools.cache
def found():
    """Every promise of the package."""
    for_all = []
    for path in sorted((ROOT / "genjax").rglob("*.py")):
        parts = path.relative_to(ROOT / "genjax").with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        for_all += promises(path.read_text(), module)
    return for_all


def named(test):
    """Whether the test is a function of its file."""
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return name.startswith("test_") and any(
        isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body
    )


def test_every_promise_has_a_test_and_every_entry_a_promise():
    entries = [entry[:2] for entry in (*HELD, *NO_PROMISE)]

    def holds(entry, promise):
        return entry[0] == promise[0] and entry[1] in promise[1]

    without = [p for p in found() if not any(holds(e, p) for e in entries)]
    assert not without, "give each a test and an entry in tests/promises.py"
    stale = [e for e in entries if not any(holds(e, p) for p in found())]
    assert not stale, "no docstring says so any more"
    missing = [test for *_, test in HELD if not named(test)]
    assert not missing, "no such tests"


def test_the_reader_of_promises():
    source = '''
"""Rows never mix.
All else is free; it may be
exactly anything."""

class A:
    def f(x):
        """Nothing of the kind. It is Always
        so, for all x."""
        # never read
'''
    assert promises(source, "m") == [
        ("m", "Rows never mix."),
        ("m", "it may be exactly anything."),
        ("m:A.f", "It is Always so, for all x."),
    ]
    assert not named("test_promises.py::test_no_such")
    assert not named("test_promises.py::promises")


def test_masked_places_never_matter():
    """Values and gradients of what takes a mask, with NaN, infinity or 0 where it is False."""
    rng, where = np.random.default_rng(0), jnp.asarray([[True, False, True], [False, True, True]])
    p, q, r = -jnp.abs(jnp.asarray(rng.normal(size=(3, 2, 3)), jnp.float32))
    score = jnp.asarray([0.5, -1.0])
    dones = jnp.zeros((2, 3), bool)

    def calls(p):
        yield alignment.sequence_log_prob(p, where=where)
        yield alignment.sequence_log_prob(p, where=where, normalise="mean")
        yield alignment.whiten(p, where=where)
        yield alignment.gae(p, p, dones, where=where)[0]
        yield alignment.kl_rewards(p, p, score, beta=0.1, where=where)
        yield alignment.policy_loss(p, p + 0.1, p, where=where, ref=p - 0.1, beta=0.1)[0]
        yield alignment.value_loss(p, p + 0.3, old=p - 0.2, clip=0.2, where=where)[0]
        yield alignment.dpo(p, q, p, r, where=(where, None))[0]
        yield alignment.orpo(p, q, where=(where, None))[0]

    @jax.jit
    def both(p):
        total = lambda p: sum(jnp.sum(value) for value in calls(p))  # noqa: E731
        return list(calls(p)), jax.grad(total)(p)

    expected, slope = both(jnp.where(where, p, 0.0))
    for other in (jnp.nan, jnp.inf, -jnp.inf, -5.0):
        values, gradient = both(jnp.where(where, p, other))
        jax.tree.map(np.testing.assert_array_equal, values, expected)
        np.testing.assert_array_equal(gradient, slope)
        np.testing.assert_array_equal(gradient[~where], 0)


def test_k3_is_never_negative_and_unbiased(x64):
    estimate = jax.jit(functools.partial(alignment.kl_estimate, kind="k3"))
    p = np.log(np.random.default_rng(0).dirichlet(np.ones(6), (4,)))
    for tiny in (0.0, 1e-9, 1e-7, 1e-5, 1e-3, 1.0, 30.0):
        q = p - tiny * np.random.default_rng(1).random(p.shape)
        for dtype in (jnp.float32, jnp.float64):
            assert (estimate(jnp.asarray(p, dtype), jnp.asarray(q, dtype)) >= 0).all()
    q = np.log(np.random.default_rng(2).dirichlet(np.ones(6), (4,)))
    exact = (np.exp(p) * (p - q)).sum(1)
    for kind in ("k1", "k3"):
        value = jnp.sum(jnp.exp(p) * alignment.kl_estimate(jnp.asarray(p), jnp.asarray(q), kind), 1)
        np.testing.assert_allclose(value, exact, rtol=1e-12)


def test_the_middle_of_a_unet_always_has_attention():
    """Nowhere asked for, one module attends; asked for at the last size, its blocks do too."""

    def attentions(attention):
        net = UNet(channels=(8, 8), num_blocks=1, attention=attention, groups=4, embedding=8)
        x, t = jnp.zeros((1, 4, 4, 2)), jnp.zeros(1)
        params = jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]
        return sum("Attention" in name for name in params)

    assert attentions(()) == 1
    assert attentions((2,)) == 1 + 3


def test_squared_distances_are_never_negative():
    """Equal and close points far from the origin, both ways of summing, with norms too."""
    for dims in (2, 40):
        x = np.random.default_rng(0).normal(size=(30, dims)) + 300.0
        y = x + 1e-6 * np.random.default_rng(1).normal(size=x.shape)
        for a, b in ((x, x), (x, y), (y, x)):
            a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
            norms = jnp.sum(a * a, 1), jnp.sum(b * b, 1)
            for value in (
                numerics.squared_distances(a, b),
                numerics.squared_distances(a, b, norms=norms),
                transport.squared_euclidean(a, b),
            ):
                assert (value >= 0).all()


def test_no_call_reaches_a_multiple_of_0():
    def reached(before, step, every):
        return _Training.reached(types.SimpleNamespace(before=before, step=step), every)

    assert not any(reached(n, n + 3, 0) for n in range(8))
    assert [n for n in range(6) if reached(n, n + 2, 5)] == [3, 4]


def test_the_key_of_a_state_is_never_advanced():
    key = jax.random.key(7)
    state = training.init_state({"w": jnp.ones(2)}, optax.sgd(0.1), key)
    noisy = lambda p, k, b: (b * (p["w"] @ jax.random.normal(k, (2,))), {})  # noqa: E731
    step = jax.jit(lambda s: training.train_step(noisy, optax.sgd(0.1), s, jnp.ones(3))[0])
    one = step(state)
    two = step(one)
    assert two.params["w"][0] - one.params["w"][0] != one.params["w"][0] - 1.0
    assert two.key == key
    saddle = test_saddle.start(key)
    moved, _ = jax.jit(test_saddle.step_of())(saddle, test_saddle.make_batch(0))
    assert moved.key == key
    assert moved.step == 1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_integrand_of_the_plans_divergence_is_never_negative(dtype, x64):
    small = np.geomspace(1e-12, 0.2, 2001)
    s = np.concatenate([-small, [0.0], small, np.linspace(-50, 20, 701)])
    value = jax.jit(_relative)(jnp.asarray(s, dtype))
    assert (value >= 0).all()
    exact = np.where(np.abs(s) < 1e-3, s**2 / 2 + s**3 / 3 + s**4 / 8, np.exp(s) * (s - 1) + 1)
    np.testing.assert_allclose(value, exact, rtol=2e-4 if dtype == jnp.float32 else 1e-8)


def test_a_round_of_kmeans_never_raises_the_error():
    z = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    errors = []
    for rounds in range(5):
        codes = np.asarray(
            variational.kmeans(jax.random.key(1), jnp.asarray(z), 5, num_iterations=rounds)
        )
        errors.append(((z[:, None] - codes[None]) ** 2).sum(2).min(1).mean())
    assert (np.diff(errors) <= 1e-7).all()
    assert errors[-1] < 0.8 * errors[0]


def test_straight_through_is_exactly_the_code():
    z, code = (jnp.asarray(np.random.default_rng(i).normal(size=(5, 3)) * 1e3) for i in (0, 1))
    value, pull = jax.vjp(straight_through, z, code)
    np.testing.assert_array_equal(value, code)
    to_z, to_code = pull(z)
    np.testing.assert_array_equal(to_z, z)
    np.testing.assert_array_equal(to_code, 0)
