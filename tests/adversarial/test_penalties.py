"""Penalties against closed forms, and their derivatives against the double-backward ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from genjax.adversarial import clip_weights, gradient_penalty, r1_penalty, r2_penalty
from tests.adversarial.references import load


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def make_params(size=6):
    names = {"a": (size, 5), "b": (5,), "c": (5, 4), "d": (4,), "label": (3, 5)}
    return {n: normal(*s, seed=i) for i, (n, s) in enumerate(names.items())}


def critic(params, x, label=None):
    h = jnp.tanh(x.reshape(x.shape[0], -1) @ params["a"] + params["b"][None])
    if label is not None:
        h = h + params["label"][label]
    return jnp.sum(jnp.tanh(h @ params["c"]) * params["d"][None], axis=-1)


@pytest.fixture
def pairs():
    real, fake = jnp.asarray(normal(7, 3, 2, seed=6)), jnp.asarray(normal(7, 3, 2, seed=7))
    return jax.tree.map(jnp.asarray, make_params()), real, fake


WEIGHTS = np.linspace(0.1, 0.9, 7, dtype=np.float32)


def double_backward(params, x, target=1.0, one_sided=False, label=None):
    """The definition, for autodiff to differentiate twice."""
    slope = jax.grad(lambda x: critic(params, x, label).sum())(x).reshape(x.shape[0], -1)
    excess = jnp.linalg.norm(slope, axis=1) - target
    return jnp.square(jnp.maximum(excess, 0) if one_sided else excess)


def close(got, expected, rtol=2e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max() + 1e-6))


@pytest.mark.parametrize(
    ("event", "one_sided"), [((), False), ((5,), False), ((4, 3, 2), True), ((2, 3, 2, 2), False)]
)
def test_linear_critic(event, one_sided, key):
    """(|w| - target)^2 for every example, and d/dw = 2 (|w| - target) w / |w|."""
    w = 0.4 * normal(*event)
    real, fake = normal(6, *event, seed=1), normal(6, *event, seed=2)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def run(w, target):
        values = gradient_penalty(
            lambda x: jnp.sum((x * w[None]).reshape(6, -1), axis=1), key,
            jnp.asarray(real), jnp.asarray(fake), target=target, one_sided=one_sided,
        )  # fmt: skip
        return values.mean(), values

    norm = float(np.linalg.norm(np.ravel(w)))
    for target in (1.0, 0.1, 0.0):
        excess = max(norm - target, 0) if one_sided else norm - target
        slope, got = run(w, target)
        assert got.shape == (6,)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, np.full(6, excess**2), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(slope, 2 * excess * w / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("one_sided", [False, True])
def test_derivatives_are_those_of_the_definition(pairs, one_sided, key):
    """By parameters, real, fake and target; forward mode; second order."""
    params, real, fake = pairs
    weights = jnp.asarray(WEIGHTS)

    def ours(params, real, fake, target):
        return gradient_penalty(
            lambda x: critic(params, x), key, real, fake,
            weights=weights, target=target, one_sided=one_sided,
        ).mean()  # fmt: skip

    def definition(params, real, fake, target):
        w = weights[:, None, None]
        return double_backward(params, w * real + (1 - w) * fake, target, one_sided).mean()

    args = (params, real, fake, jnp.array(0.8))

    @partial(jax.jit, static_argnums=0)
    def outcomes(f, *args):
        def squared_slope(p):
            return sum(jnp.sum(s**2) for s in jax.tree.leaves(jax.grad(f)(p, *args[1:])))

        first = jax.value_and_grad(f, (0, 1, 2, 3))(*args), jax.jvp(f, args, args)[1]
        return first, jax.grad(squared_slope)(args[0])

    (first, second), (its_first, its_second) = outcomes(ours, *args), outcomes(definition, *args)
    close(first, its_first)
    close(second, its_second, 2e-3)


@pytest.mark.slow
def test_the_penalty_without_jit_is_the_definition(pairs, key):
    params, real, fake = pairs
    weights = jnp.asarray(WEIGHTS)
    found = gradient_penalty(lambda x: critic(params, x), key, real, fake, weights=weights)
    w = weights[:, None, None]
    close(found, double_backward(params, w * real + (1 - w) * fake))


def test_labels_and_vmap(pairs, key):
    """A critic that closes over traced integers and is trained under vmap over seeds."""
    _, real, fake = pairs
    label = np.array([0, 1, 2, 0, 1, 2, 0])
    weights = jnp.asarray(WEIGHTS)
    many = jax.tree.map(lambda x: np.stack([x, np.float32(0.5) * x, -x]), make_params())
    labels = np.stack([label, label[::-1], 0 * label])

    def ours(p, label):
        return gradient_penalty(
            lambda x: critic(p, x, label), key, real, fake, weights=weights
        ).mean()

    def definition(p, label):
        w = weights[:, None, None]
        return double_backward(p, w * real + (1 - w) * fake, label=label).mean()

    got = jax.jit(jax.vmap(jax.grad(ours)))(many, labels)
    close(got, jax.jit(jax.vmap(jax.grad(definition)))(many, labels))


def test_one_weight_per_example(key):
    """What the critic is evaluated at: real and fake mixed by one number over the whole event."""
    weights = np.float32([0.0, 0.25, 1.0, 0.5])

    @jax.jit
    def positions(weights):  # the penalty of x -> |x|^2 / 2 with target 0 is |x|^2
        real, fake = jnp.ones((4, 3, 3, 2)), jnp.zeros((4, 3, 3, 2))
        square = lambda x: 0.5 * jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=1)  # noqa: E731
        return gradient_penalty(square, key, real, fake, target=0.0, weights=weights)

    np.testing.assert_allclose(positions(weights), 18 * weights**2, rtol=1e-6)

    # Drawn ones: uniform, different for each example even if all pairs are equal.
    @jax.jit
    def draw(key):
        real, fake = jnp.ones((2000, 2)), jnp.zeros((2000, 2))
        square = lambda x: jnp.sum(x**2, 1) / 2  # noqa: E731
        return jnp.sqrt(gradient_penalty(square, key, real, fake, target=0.0) / 2)

    drawn, others = np.asarray(draw(key)), np.asarray(draw(jax.random.key(1)))
    assert np.unique(drawn).size > 1900
    assert kstest(drawn, "uniform").pvalue > 0.01
    assert not np.allclose(others, drawn)


def test_a_pair_s_penalty_depends_on_its_place_and_itself_and_changes_continuously(pairs, key):
    """e_i = U(fold_in(key, i)), whatever the points' last bits and the others are."""
    params, real, fake = pairs

    @jax.jit
    def run(real, fake):
        penalty = partial(gradient_penalty, lambda x: critic(params, x), key)
        folded = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))
        e = folded(jnp.arange(7))[:, None, None]
        expected = double_backward(params, e * real + (1 - e) * fake)
        return penalty(real, fake), penalty(real[:4], fake[:4]), expected

    whole, part, expected = map(np.asarray, run(real, fake))
    np.testing.assert_allclose(whole, expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(part, whole[:4], rtol=2e-5)
    nudged = run(np.nextafter(real, np.float32(np.inf)), np.nextafter(fake, np.float32(-np.inf)))[0]
    np.testing.assert_allclose(nudged, whole, rtol=1e-4, atol=1e-6)


@jax.custom_vjp
def smooth(x):
    return jnp.tanh(x)


smooth.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g / jnp.cosh(x) ** 2,))


@pytest.mark.slow
def test_a_critic_with_a_custom_vjp_has_the_same_penalty_and_derivatives(pairs, key):
    """jax.custom_vjp refuses forward mode: value, gradient, and the gradient of its square."""
    params, real, fake = pairs
    weights, label = jnp.linspace(0.1, 0.9, 7), jnp.array([0, 1, 2, 0, 1, 2, 0])

    def penalty(params, real, label, bend):
        def score(x):
            h = x.reshape(7, -1) @ params["a"] + params["b"][None] + params["label"][label]
            return jnp.sum(bend(bend(h) @ params["c"]) * params["d"][None], axis=1)

        return gradient_penalty(score, key, real, fake, weights=weights).mean()

    def outcomes(bend):
        slope = jax.grad(lambda *a: penalty(*a, label, bend), (0, 1))
        twice = jax.grad(lambda p: sum(jnp.sum(s**2) for s in jax.tree.leaves(slope(p, real))))
        return penalty(params, real, label, bend), slope(params, real), twice(params)

    expected = jax.jit(lambda: outcomes(jnp.tanh))()
    close(jax.jit(lambda: outcomes(smooth))(), expected)
    # Eager, and with traced labels.
    by_label = jax.jit(lambda n: jax.grad(lambda p: penalty(p, real, n, smooth))(params))
    close(by_label(label), expected[1][0])
    close(jax.grad(lambda p: penalty(p, real, label, smooth))(params), expected[1][0])


def test_zero_gradient_is_harmless(key):
    """A flat critic: the penalty is target^2 and its second-order gradient is finite."""
    real, fake = map(jnp.asarray, normal(2, 5, 4))

    def penalty(w):
        return gradient_penalty(lambda x: jnp.tanh(x @ w).sum(1), key, real, fake).mean()

    def r1(w):
        return r1_penalty(lambda x: (x @ w).sum(1), real).mean()

    run = jax.jit(lambda w: (jax.value_and_grad(penalty)(w), jax.grad(r1)(w)))
    (value, slope), of_r1 = run(np.zeros((4, 3), np.float32))
    assert value == 1
    assert np.all(np.isfinite(slope))
    assert np.all(np.asarray(of_r1) == 0)


def test_r1_and_r2(pairs):
    """|A x|^2 for the critic x A x / 2; d/dA by the definition."""
    params, real, fake = pairs
    a = np.asarray(params["a"]) @ np.asarray(params["a"]).T

    def quadratic(a, x):
        flat = x.reshape(x.shape[0], -1)
        return jnp.sum(flat @ a * flat, axis=1) / 2

    for penalty, x in ((r1_penalty, real), (r2_penalty, fake)):

        @jax.jit
        def run(a, params, x, penalty=penalty):
            slope = jax.grad(lambda q: penalty(lambda x: critic(q, x), x).mean())(params)
            expected = jax.grad(lambda q: double_backward(q, x, target=0.0).mean())(params)
            return penalty(lambda x: quadratic(a, x), x), slope, expected

        value, slope, expected = run(a, params, x)
        close(value, np.sum((np.asarray(x).reshape(7, -1) @ a) ** 2, axis=1))
        close(slope, expected)


def test_bfloat16_critic(pairs, key):
    params, real, fake = pairs
    half = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x).astype(jnp.bfloat16)), (params, real, fake)
    )
    value, slope = jax.jit(
        jax.value_and_grad(
            lambda p: gradient_penalty(lambda x: critic(p, x), key, *half[1:]).mean()
        )
    )(half[0])
    assert value.dtype == jnp.float32
    assert all(np.all(np.isfinite(np.float32(s))) for s in jax.tree.leaves(slope))


def test_clip_weights_meets_the_reference(x64, compiled):
    reference = load("wgan_clip_step")
    w = np.array(reference["inputs"]["w"])
    tree = {"w": w, "count": np.arange(3), "half": w.astype(jnp.bfloat16)}
    tree = jax.tree.map(jnp.asarray, tree)
    clipped = compiled(lambda t: clip_weights(t, reference["inputs"]["c"]))(tree)
    np.testing.assert_allclose(clipped["w"], reference["expected"]["w_clipped"])
    np.testing.assert_array_equal(clipped["count"], np.arange(3))
    assert clipped["half"].dtype == jnp.bfloat16
    assert np.abs(np.float32(clipped["half"])).max() <= 0.0101


def test_bad_input(unchecked, key):
    x = jnp.zeros((4, 3))
    good = lambda x: x.sum(1)  # noqa: E731
    with pytest.raises(ValueError, match=r"one score per example, shape \(4,\), got \(4, 1\)"):
        gradient_penalty(lambda x: good(x)[:, None], key, x, x)
    with pytest.raises(ValueError, match=r"got \(\)"):
        r1_penalty(lambda x: x.sum(), x)
    with pytest.raises(ValueError, match=r"events.*real \(3,\), fake \(2,\)"):
        gradient_penalty(good, key, x, x[:, :2])
    with pytest.raises(ValueError, match=r"batch sizes.*real \(4, 3\), fake \(3, 3\)"):
        gradient_penalty(good, key, x, x[:3])
    with pytest.raises(ValueError, match="at least one"):
        gradient_penalty(good, key, x[:0], x[:0])
    with pytest.raises(TypeError, match="floating"):
        gradient_penalty(good, key, x.astype(int), x)
    with pytest.raises(ValueError, match="target"):
        gradient_penalty(good, key, x, x, target=-1.0)
    with pytest.raises(ValueError, match="weights"):
        gradient_penalty(good, key, x, x, weights=jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="limit must be positive"):
        clip_weights({"w": x}, 0.0)


def test_a_critic_with_labels_and_keys_inside_a_branch():
    """A critic may close over integers and keys of another trace (lazy regularisation)."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)

    def loss(w, x, label, key, on):
        scale = jax.random.uniform(key)
        critic = lambda x: jnp.sum(jnp.tanh(x) * w[label], axis=1) * scale  # noqa: E731
        return jax.lax.cond(on, lambda: jnp.mean(r1_penalty(critic, x)), lambda: 0.0)

    label, key = jnp.array([0, 1, 2, 0, 1]), jax.random.key(3)
    value, slope = jax.jit(jax.value_and_grad(loss))(w, x, label, key, True)
    slopes = (1 - np.tanh(x) ** 2) * np.asarray(w)[label] * float(jax.random.uniform(key))
    np.testing.assert_allclose(value, np.mean(np.sum(slopes**2, axis=1)), rtol=1e-5)
    expected = np.zeros_like(w)
    factor = (1 - np.tanh(x) ** 2) * float(jax.random.uniform(key))
    np.add.at(expected, np.asarray(label), 2 * slopes * factor / 5)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)
