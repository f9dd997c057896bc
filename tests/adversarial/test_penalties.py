"""Penalties against closed forms, and their derivatives against the double-backward ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.adversarial import clip_weights, gradient_penalty, r1_penalty, r2_penalty
from tests.adversarial.references import load


def make_params(key, size=6):
    names = {"a": (size, 5), "b": (5,), "c": (5, 4), "d": (4,), "label": (3, 5)}
    keys = jax.random.split(key, len(names))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, names.items(), strict=True)}


def critic(params, x, label=None):
    h = jnp.tanh(x.reshape(x.shape[0], -1) @ params["a"] + params["b"][None])
    if label is not None:
        h = h + params["label"][label]
    return jnp.sum(jnp.tanh(h @ params["c"]) * params["d"][None], axis=-1)


@pytest.fixture
def pairs(key):
    keys = jax.random.split(key, 3)
    params = make_params(keys[0])
    return params, jax.random.normal(keys[1], (7, 3, 2)), jax.random.normal(keys[2], (7, 3, 2))


def double_backward(params, x, target=1.0, one_sided=False, label=None):
    """The definition, for autodiff to differentiate twice."""
    slope = jax.grad(lambda x: critic(params, x, label).sum())(x).reshape(x.shape[0], -1)
    excess = jnp.linalg.norm(slope, axis=1) - target
    return jnp.square(jnp.maximum(excess, 0) if one_sided else excess)


def close(got, expected, rtol=2e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max() + 1e-6))


@pytest.mark.parametrize(
    ("event", "one_sided"), [((), False), ((5,), False), ((4, 3, 2), True), ((2, 3, 2, 2), False)]
)
def test_linear_critic(event, one_sided, key):
    """(|w| - target)^2 for every example, and d/dw = 2 (|w| - target) w / |w|."""
    keys = jax.random.split(key, 3)
    w = 0.4 * jax.random.normal(keys[0], event)
    real, fake = (jax.random.normal(k, (6, *event)) for k in keys[1:])

    def penalty(w, target):
        return gradient_penalty(
            lambda x: jnp.sum((x * w[None]).reshape(6, -1), axis=1),
            key, real, fake, target=target, one_sided=one_sided,
        )  # fmt: skip

    norm = float(jnp.linalg.norm(w.ravel()))
    value = jax.jit(penalty)
    mean_slope = jax.jit(jax.grad(lambda w, target: penalty(w, target).mean()))
    for target in (1.0, 0.1, 0.0):
        excess = max(norm - target, 0) if one_sided else norm - target
        got = value(w, target)
        assert got.shape == (6,)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, np.full(6, excess**2), rtol=1e-5, atol=1e-7)
        slope = mean_slope(w, target)
        np.testing.assert_allclose(slope, 2 * excess * w / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("one_sided", [False, True])
def test_derivatives_are_those_of_the_definition(pairs, one_sided, key):
    """By parameters, real, fake and target; forward mode; second order."""
    params, real, fake = pairs
    weights = jnp.linspace(0.1, 0.9, 7)

    def ours(params, real, fake, target):
        return gradient_penalty(
            lambda x: critic(params, x), key, real, fake,
            weights=weights, target=target, one_sided=one_sided,
        ).mean()  # fmt: skip

    def definition(params, real, fake, target):
        w = weights[:, None, None]
        return double_backward(params, w * real + (1 - w) * fake, target, one_sided).mean()

    args = (params, real, fake, jnp.array(0.8))
    close(ours(*args), definition(*args))  # eager
    slopes = jax.jit(jax.grad(definition, (0, 1, 2, 3)))(*args)
    close(jax.jit(jax.grad(ours, (0, 1, 2, 3)))(*args), slopes)
    close(
        jax.jit(lambda *a: jax.jvp(ours, a, a)[1])(*args),
        jax.jit(lambda *a: jax.jvp(definition, a, a)[1])(*args),
    )

    def squared_slope(f):
        return jax.grad(
            lambda p: sum(jnp.sum(s**2) for s in jax.tree.leaves(jax.grad(f)(p, *args[1:])))
        )

    close(jax.jit(squared_slope(ours))(params), jax.jit(squared_slope(definition))(params), 2e-3)


def test_labels_and_vmap(pairs, key):
    """A critic that closes over traced integers and is trained under vmap over seeds."""
    params, real, fake = pairs
    label = jnp.array([0, 1, 2, 0, 1, 2, 0])
    weights = jnp.linspace(0.1, 0.9, 7)
    many = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x, -x]), params)
    labels = jnp.stack([label, label[::-1], 0 * label])

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
    weights = jnp.array([0.0, 0.25, 1.0, 0.5])
    real, fake = jnp.ones((4, 3, 3, 2)), jnp.zeros((4, 3, 3, 2))

    def positions(weights):  # the penalty of x -> |x|^2 / 2 with target 0 is |x|^2
        square = lambda x: 0.5 * jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=1)  # noqa: E731
        return gradient_penalty(square, key, real, fake, target=0.0, weights=weights)

    np.testing.assert_allclose(positions(weights), 18 * weights**2, rtol=1e-6)
    # Drawn ones: uniform, different for each example even if all pairs are equal.
    real, fake = jnp.ones((2000, 2)), jnp.zeros((2000, 2))

    def draw(key):
        square = lambda x: jnp.sum(x**2, 1) / 2  # noqa: E731
        return jnp.sqrt(gradient_penalty(square, key, real, fake, target=0.0) / 2)

    draw = jax.jit(draw)
    drawn = draw(key)
    assert jnp.unique(drawn).size > 1900
    from scipy.stats import kstest

    assert kstest(np.asarray(drawn), "uniform").pvalue > 0.01
    assert not jnp.allclose(draw(jax.random.key(1)), drawn)


def test_a_pair_s_penalty_depends_on_its_place_and_itself_and_changes_continuously(pairs, key):
    """e_i = U(fold_in(key, i)), whatever the points' last bits and the others are."""
    params, real, fake = pairs
    penalty = jax.jit(lambda r, f: gradient_penalty(lambda x: critic(params, x), key, r, f))
    whole = penalty(real, fake)
    e = jnp.stack([jax.random.uniform(jax.random.fold_in(key, i)) for i in range(7)])
    mixed = e[:, None, None] * real + (1 - e)[:, None, None] * fake
    np.testing.assert_allclose(whole, double_backward(params, mixed), rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(penalty(real[:4], fake[:4]), whole[:4], rtol=2e-5)
    nudged = penalty(jnp.nextafter(real, jnp.inf), jnp.nextafter(fake, -jnp.inf))
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
    real, fake = jax.random.normal(key, (2, 5, 4))

    def penalty(w):
        return gradient_penalty(lambda x: jnp.tanh(x @ w).sum(1), key, real, fake).mean()

    value, slope = jax.jit(jax.value_and_grad(penalty))(jnp.zeros((4, 3)))
    assert value == 1
    assert jnp.all(jnp.isfinite(slope))
    r1 = jax.jit(jax.grad(lambda w: r1_penalty(lambda x: (x @ w).sum(1), real).mean()))
    assert jnp.all(r1(jnp.zeros((4, 3))) == 0)


def test_r1_and_r2(pairs):
    """|A x|^2 for the critic x A x / 2; d/dA by the definition."""
    params, real, fake = pairs
    a = params["a"] @ params["a"].T

    def quadratic(a, x):
        flat = x.reshape(x.shape[0], -1)
        return jnp.sum(flat @ a * flat, axis=1) / 2

    for penalty, x in ((r1_penalty, real), (r2_penalty, fake)):
        value = jax.jit(lambda a, x, p=penalty: p(lambda x: quadratic(a, x), x))(a, x)
        close(value, jnp.sum((x.reshape(7, -1) @ a) ** 2, axis=1))
        slope = jax.jit(
            jax.grad(lambda q, x=x, p=penalty: p(lambda x: critic(q, x), x).mean())
        )(params)  # fmt: skip
        expected = jax.grad(lambda q, x=x: double_backward(q, x, target=0.0).mean())(params)
        close(slope, expected)


def test_bfloat16_critic(pairs, key):
    params, real, fake = pairs
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (params, real, fake))
    value, slope = jax.jit(
        jax.value_and_grad(
            lambda p: gradient_penalty(lambda x: critic(p, x), key, *half[1:]).mean()
        )
    )(half[0])
    assert value.dtype == jnp.float32
    assert all(jnp.all(jnp.isfinite(s)) for s in jax.tree.leaves(slope))


def test_clip_weights_meets_the_reference(x64, compiled):
    reference = load("wgan_clip_step")
    w = jnp.array(reference["inputs"]["w"])
    tree = {"w": w, "count": jnp.arange(3), "half": w.astype(jnp.bfloat16)}
    clipped = compiled(lambda t: clip_weights(t, reference["inputs"]["c"]))(tree)
    np.testing.assert_allclose(clipped["w"], reference["expected"]["w_clipped"])
    assert jnp.all(clipped["count"] == jnp.arange(3))
    assert clipped["half"].dtype == jnp.bfloat16
    assert jnp.abs(clipped["half"]).max() <= 0.0101


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
