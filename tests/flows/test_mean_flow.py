"""Mean velocities: a recorded target, the exact map of Gaussian data, steps that compose."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import flows

REF = json.loads((Path(__file__).parents[1] / "references" / "meanflow_target.json").read_text())
KEY = jax.random.key(0)
MEAN, STD = REF["inputs"]["gaussian"]["mean"], REF["inputs"]["gaussian"]["std"]


def spread(t):
    """Standard deviation of x_t for data N(MEAN, STD^2): a_t^2 = t^2 std^2 + (1 - t)^2."""
    return jnp.sqrt(t**2 * STD**2 + (1 - t) ** 2)


def exact_map(x, t, s):
    """x_s = s m + (a_s / a_t) (x_t - t m), of each coordinate."""
    t, s = t[:, None], s[:, None]
    return s * MEAN + spread(s) / spread(t) * (x - t * MEAN)


def exact_velocity(x, t):
    t = t[:, None]
    slope = (t * STD**2 - (1 - t)) / spread(t) ** 2
    return MEAN + slope * (x - t * MEAN)


def exact_mean(x, t, s):
    gap = (s - t)[:, None]
    same = gap == 0
    mean = (exact_map(x, t, s) - x) / jnp.where(same, 1, gap)
    return jnp.where(same, exact_velocity(x, t), mean)


def network(weights, bias, out):
    def apply(x, t, s):
        return jnp.tanh(jnp.concatenate([x, t[:, None], s[:, None]], 1) @ weights + bias) @ out

    return apply


def test_loss_and_gradients_meet_the_reference(compiled, x64):
    inputs, expected = REF["inputs"], REF["expected"]
    given = {k: jnp.asarray(inputs[k]) for k in ("x0", "x1", "t", "s", "W1", "b", "W2")}

    def run(w1, w2):
        fn = network(w1, given["b"][None], w2)
        losses, aux = flows.mean_flow_loss(
            fn, KEY, given["x0"], given["x1"], t=given["t"], s=given["s"],
            power=inputs["power"], offset=inputs["c"],
        )  # fmt: skip
        return jnp.mean(losses), (losses, aux["squared_error"])

    gradients, (losses, squared) = compiled(jax.grad(run, (0, 1), has_aux=True))(
        given["W1"], given["W2"]
    )
    np.testing.assert_allclose(losses, expected["weighted"], rtol=1e-9)
    np.testing.assert_allclose(squared, expected["squared_error"], rtol=1e-9)
    for found, name in zip(gradients, ("grad_W1", "grad_W2"), strict=True):
        np.testing.assert_allclose(found, expected[name], rtol=1e-8, atol=1e-11)


def test_exact_mean_velocity_meets_the_reference(x64):
    given = {k: jnp.asarray(REF["inputs"]["gaussian"][k]) for k in ("x", "t", "s")}
    found = exact_mean(given["x"][:, None], given["t"], given["s"])[:, 0]
    np.testing.assert_allclose(found, REF["expected"]["gaussian_exact_u"], rtol=1e-9)


def test_losses_vanish_at_the_exact_mean_velocity(x64):
    """With the marginal velocity; two halves of an exact step are the step."""
    x0, x1 = jax.random.normal(KEY, (2, 64, 3))
    x1 = MEAN + STD * x1

    @jax.jit
    def run(off):
        fn = lambda x, t, s: exact_mean(x, t, s) + off  # noqa: E731
        mean, aux = flows.mean_flow_loss(fn, KEY, x0, x1, velocity_fn=exact_velocity, power=0)
        t, s = jnp.zeros(64), jnp.where(jnp.arange(64) % 2, 1.0, 0.75)
        short, _ = flows.shortcut_loss(exact_mean, KEY, x0, x1, t=t, s=s)
        return mean, aux, short

    mean, aux, short = run(0.0)
    np.testing.assert_allclose(mean, 0, atol=1e-20)
    np.testing.assert_allclose(short, 0, atol=1e-20)
    assert 10 < np.sum(aux["t"] == aux["s"]) < 54
    # A constant off the mark is its square: its derivative along the path is 0.
    np.testing.assert_allclose(run(0.1)[0], 3 * 0.01, rtol=1e-9)


def test_any_number_of_exact_steps_ends_where_one_does(compiled):
    x0 = jax.random.normal(KEY, (5, 2))
    one, four = (
        compiled(lambda x, n=n: flows.mean_flow_sample(exact_mean, x, num_steps=n))(x0)
        for n in (1, 4)
    )
    np.testing.assert_allclose(one, MEAN + STD * x0, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(four, one, rtol=1e-5, atol=1e-6)


def test_a_field_alone_is_flow_matching():
    """Equal times, power 0: the loss of `flow_matching_loss`, and shortcuts without long steps."""
    x0, x1 = jax.random.normal(KEY, (2, 6, 3))
    t = jnp.linspace(0.1, 0.9, 6)
    fn = lambda x, t, s: jnp.sin(x + t[:, None] + 2 * s[:, None])  # noqa: E731
    expected, _ = flows.flow_matching_loss(lambda x, t: fn(x, t, t), KEY, x0, x1, t=t)
    found, _ = flows.mean_flow_loss(fn, KEY, x0, x1, t=t, s=t, power=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    found, aux = flows.shortcut_loss(fn, KEY, x0, x1, consistency=0)
    expected, _ = flows.flow_matching_loss(lambda x, t: fn(x, t, t), KEY, x0, x1, t=aux["t"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_long_shortcut_is_two_short_ones(x64):
    """By hand: the shortest step by its halves at equal times, targets without gradient."""
    x0, x1 = jax.random.normal(KEY, (2, 3, 2))
    t, s = jnp.asarray([0.0, 0.5, 0.25]), jnp.asarray([1.0, 0.75, 0.25])
    fn = lambda a: lambda x, t, s: a * np.e**x * (1 + t + 2 * s)[:, None]  # noqa: E731

    def run(a):
        return flows.shortcut_loss(fn(a), KEY, x0, x1, t=t, s=s, halvings=3)[0]

    x_t = (1 - t)[:, None] * x0 + t[:, None] * x1
    middle = (t + s) / 2
    short = jnp.asarray([False, True, True])
    first = fn(1.0)(x_t, t, jnp.where(short, t, middle))
    x_m = x_t + (middle - t)[:, None] * first
    target = (first + fn(1.0)(x_m, middle, jnp.where(short, middle, s))) / 2
    target = jnp.where((s <= t)[:, None], x1 - x0, target)
    predicted = fn(1.0)(x_t, t, s)
    np.testing.assert_allclose(run(1.0), np.sum((predicted - target) ** 2, 1), rtol=1e-12)
    slope = jax.jacfwd(run)(1.0)
    np.testing.assert_allclose(slope, np.sum(2 * (predicted - target) * predicted, 1), rtol=1e-12)


def test_networks_without_forward_mode_have_the_same_loss_and_gradient():
    """Through `jax.custom_vjp`, whose rule forward derivatives refuse."""

    @jax.custom_vjp
    def sine(x):
        return jnp.sin(x)

    sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    x0, x1 = jax.random.normal(KEY, (2, 4, 3))
    t, s = jnp.linspace(0, 0.6, 4), jnp.linspace(0.5, 1, 4)

    def run(wave):
        def loss(a):
            fn = lambda x, t, s: wave(a * x + t[:, None] - s[:, None])  # noqa: E731
            return jnp.sum(flows.mean_flow_loss(fn, KEY, x0, x1, t=t, s=s)[0])

        return jax.jit(jax.value_and_grad(loss))(1.3)

    np.testing.assert_allclose(run(sine), run(jnp.sin), rtol=1e-5)


def test_drawn_times_are_in_order_and_reach_the_ends():
    t, s = flows.mean_flow_times(KEY, 20_000)
    assert np.all(t <= s)
    assert abs(np.mean(t == s) - 0.5) < 0.02
    apart = np.asarray(t < s)
    for share in (np.mean(t[apart] == 0), np.mean(s[apart] == 1)):
        assert abs(share - 0.3) < 0.02
    # Inside, the two are the least and the largest of two uniform ones: means 1/3 and 2/3.
    inside = apart & np.asarray((t > 0) & (s < 1))
    assert abs(np.mean(t[inside]) - 1 / 3) < 0.02
    assert abs(np.mean(s[inside]) - 2 / 3) < 0.02
    # With steps: the same within each of as many parts of time.
    t, s = (np.asarray(z) for z in flows.mean_flow_times(KEY, 20_000, num_steps=2))
    apart = t < s
    assert np.all(s[apart] - t[apart] <= 0.5)
    assert abs(np.mean(t >= 0.5) - 0.5) < 0.02
    for share in (np.mean(np.isin(t[apart], (0, 0.5))), np.mean(np.isin(s[apart], (0.5, 1)))):
        assert abs(share - 0.3) < 0.02
    x = jnp.zeros((20_000, 1))
    _, aux = flows.shortcut_loss(lambda x, t, s: x, KEY, x, x, halvings=3)
    t, step = np.asarray(aux["t"]), np.asarray(aux["s"] - aux["t"])
    assert abs(np.mean(step > 0) - 0.25) < 0.02
    for size in (1.0, 0.5, 0.25):
        mine = np.isclose(step, size)
        assert abs(np.mean(mine) - 0.25 / 3) < 0.01
        np.testing.assert_allclose(t[mine] % size, 0)


def test_bad_times_are_refused(unchecked):
    x = jnp.zeros((2, 3))
    loss = lambda **times: flows.mean_flow_loss(exact_mean, KEY, x, x, **times)  # noqa: E731
    with pytest.raises(ValueError, match="t <= s, got t > s"):
        loss(t=jnp.ones(2), s=jnp.zeros(2))
    with pytest.raises(ValueError, match="given together, got only t"):
        loss(t=jnp.ones(2))
    with pytest.raises(ValueError, match="times must increase"):
        flows.mean_flow_sample(exact_mean, x, times=(1.0, 0.0))
    with pytest.raises(ValueError, match=r"mean_velocity_fn returns must have shape \(2, 3\)"):
        flows.mean_flow_sample(lambda x, t, s: x[:, :1], x)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        flows.mean_flow_sample(exact_mean, x, num_steps=0)
