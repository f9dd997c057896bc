"""Unbalanced transport against POT, float64 brute force, and unrolled iterations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

from genjax.transport import sinkhorn, unbalanced_divergence, unbalanced_sinkhorn
from tests.transport.reference import clouds, logsumexp, squared


def measures(n=7, m=6):
    """Points and weights in float64, of masses 1.3 and 0.7; one point of each has no weight."""
    rng = np.random.default_rng(3)
    x, y = (np.asarray(z, np.float64) for z in clouds(n, m, 2, seed=4))
    a, b = 1.3 * rng.dirichlet(np.ones(n - 1)), 0.7 * rng.dirichlet(np.ones(m - 1))
    return x, y, np.insert(a, 2, 0.0), np.insert(b, 4, 0.0)


def kl(p, q):
    some = p > 0
    return np.sum(p[some] * np.log(p[some] / q[some])) - p.sum() + q.sum()


def solve64(x, y, a, b, epsilon, penalties, sweeps=3000):
    """Value (from the plan, the primal objective), plan and potentials: plain updates."""
    cost, pulls = squared(x, y), [1 / rho for rho in penalties]
    f, g = np.zeros(len(a)), np.zeros(len(b))
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a), np.log(b)
    for _ in range(sweeps):
        f = -epsilon * logsumexp((g[None] - cost) / epsilon + log_b[None], 1)
        f = f / (1 + epsilon * pulls[0])
        g = -epsilon * logsumexp((f[:, None] - cost) / epsilon + log_a[:, None], 0)
        g = g / (1 + epsilon * pulls[1])
    plan = a[:, None] * b[None] * np.exp((f[:, None] + g[None] - cost) / epsilon)
    value = (plan * cost).sum() + epsilon * kl(plan, a[:, None] * b[None])
    value += penalties[0] * kl(plan.sum(1), a) + penalties[1] * kl(plan.sum(0), b)
    return value, plan, f, g


@functools.cache
def solver():
    """One program for all penalties, those of each side traced."""

    def run(x, y, a, b, epsilon, first, second):
        options = {"epsilon": epsilon, "marginal_penalty": (first, second), "tolerance": 1e-9}
        result = unbalanced_sinkhorn(x, y, a=a, b=b, **options)
        return result, result.plan(), result.f, result.g

    return jax.jit(run)


@pytest.mark.parametrize("penalty", [0.1, 1.0, 20.0, (0.5, 3.0), (np.inf, 1.0)], ids=str)
def test_plan_and_value_are_those_of_pot(x64, penalty):
    """POT's entropy is relative to a b^T too; its total_cost leaves the masses of the KL out."""
    x, y, a, b = measures()
    pair = penalty if isinstance(penalty, tuple) else (penalty, penalty)
    result, plan, f, g = solver()(x, y, a, b, 0.3, *pair)
    keep = np.ix_(a > 0, b > 0)  # POT divides by the weights
    expected, log = ot.unbalanced.sinkhorn_unbalanced(
        a[a > 0], b[b > 0], squared(x, y)[keep], 0.3, penalty, stopThr=1e-14, numItermax=20_000,
        log=True,
    )  # fmt: skip
    mass = expected.sum()
    value = log["total_cost"] + 0.3 * (a.sum() * b.sum() - mass)
    for weights, rho in zip((a, b), pair, strict=True):
        value += 0 if np.isinf(rho) else rho * (weights.sum() - mass)
    np.testing.assert_allclose(plan[keep], expected, atol=1e-8)
    np.testing.assert_allclose(result.value, value, rtol=1e-8)
    assert np.all(np.asarray(plan)[a == 0] == 0)
    assert np.all(np.asarray(plan)[:, b == 0] == 0)
    assert result.converged
    # The marginals that the potentials say.
    np.testing.assert_allclose(plan.sum(1), a * np.exp(-f / pair[0]), atol=1e-8)
    np.testing.assert_allclose(plan.sum(0), b * np.exp(-g / pair[1]), atol=1e-8)


def test_infinite_penalties_give_sinkhorn(x64):
    x, y, a, b = measures()
    a, b = a / a.sum(), b / b.sum()
    given = [jnp.asarray(z) for z in (x, y, a, b)]

    def balanced(x, y, a, b):
        result = sinkhorn(x, y, epsilon=0.3, a=a, b=b, num_iterations=1000)
        return result, result.plan()

    expected, plan_of_sinkhorn = jax.jit(balanced)(*given)
    result, plan, f, g = solver()(x, y, a, b, 0.3, np.inf, np.inf)
    np.testing.assert_allclose(result.value, expected.value, rtol=1e-9)
    np.testing.assert_allclose(plan, plan_of_sinkhorn, atol=1e-8)
    np.testing.assert_allclose(np.vdot(a, f), np.vdot(b, g), atol=1e-9)
    wanted_f, wanted_g = expected.potentials  # up to a constant
    np.testing.assert_allclose(f - f[0], wanted_f - wanted_f[0], atol=1e-7)
    np.testing.assert_allclose(g - g[0], wanted_g - wanted_g[0], atol=1e-7)
    # And the limit is reached from below, at the rate 1 / rho.
    gaps = [
        float(expected.value - solver()(x, y, a, b, 0.3, rho, rho)[0].value) for rho in (1e4, 1e5)
    ]
    assert gaps[0] > 0
    np.testing.assert_allclose(gaps[0] / gaps[1], 10, rtol=1e-2)


def test_the_gradient_of_the_value_against_finite_differences(x64):
    x, y, a, b = measures()
    args = {"x": x, "y": y, "a": a, "b": b, "epsilon": 0.3, "rho": np.array([0.8, 2.0])}

    def value(x, y, a, b, epsilon, rho):
        options = {"epsilon": epsilon, "marginal_penalty": (rho[0], rho[1]), "tolerance": 1e-10}
        return unbalanced_sinkhorn(x, y, a=a, b=b, **options).value

    gradient = jax.jit(jax.grad(lambda args: value(**args)))(args)
    rng, step = np.random.default_rng(0), 1e-6
    for name, given in args.items():
        along = rng.standard_normal(np.shape(given)) * (np.asarray(given) != 0)
        ends = []
        for sign in (1, -1):
            moved = args | {name: given + sign * step * along}
            ends.append(
                solve64(*(moved[k] for k in ("x", "y", "a", "b", "epsilon", "rho")), 300)[0]
            )
        np.testing.assert_allclose(
            np.sum(gradient[name] * along),
            (ends[0] - ends[1]) / (2 * step),
            rtol=1e-6,
            err_msg=name,
        )


def mixed(plan, f, g):
    rng = np.random.default_rng(6)
    u, v, w = (rng.standard_normal(np.shape(z)) for z in (f, g, plan))
    return jnp.sum(w * plan) + jnp.vdot(u, f) + jnp.vdot(v, g)


@pytest.mark.slow
def test_plan_and_potentials_have_the_unrolled_derivative(x64):
    x, y, a, b = measures()
    args = {"x": x, "y": y, "a": a, "b": b, "epsilon": 0.3, "rho": np.array([0.8, 2.0])}

    def unrolled(x, y, a, b, epsilon, rho):
        cost, pull = jnp.sum(jnp.square(x[:, None] - y[None]), -1), 1 / rho

        def sweep(state, _):
            f, g = state
            f = -epsilon * jnp.log(jnp.exp((g[None] - cost) / epsilon) @ b)
            f = f / (1 + epsilon * pull[0])
            g = -epsilon * jnp.log(a @ jnp.exp((f[:, None] - cost) / epsilon))
            return (f, g / (1 + epsilon * pull[1])), None

        (f, g), _ = jax.lax.scan(sweep, (jnp.zeros_like(a), jnp.zeros_like(b)), None, length=400)
        return mixed(a[:, None] * b[None] * jnp.exp((f[:, None] + g[None] - cost) / epsilon), f, g)

    def implicit(x, y, a, b, epsilon, rho):
        return mixed(*solver()(x, y, a, b, epsilon, rho[0], rho[1])[1:])

    expected = jax.jit(jax.grad(lambda args: unrolled(**args)))(args)
    mine = jax.jit(jax.grad(lambda args: implicit(**args)))(args)
    for name, want in expected.items():
        scale = np.abs(want).max()
        np.testing.assert_allclose(mine[name], want, atol=1e-7 * scale, err_msg=name)


@pytest.mark.slow
def test_second_derivatives(x64):
    x, y, a, b = measures()

    def value(x):
        options = {"epsilon": 0.3, "marginal_penalty": 1.0, "tolerance": 1e-10}
        return unbalanced_sinkhorn(x, y, a=a, b=b, **options).value

    along = np.random.default_rng(1).standard_normal(x.shape)
    x, y, a, b = (jnp.asarray(z) for z in (x, y, a, b))
    gradient = jax.jit(jax.grad(value))
    expected = (gradient(x + 1e-5 * along) - gradient(x - 1e-5 * along)) / 2e-5
    reverse = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(value)(x), along)))(x)
    np.testing.assert_allclose(reverse, expected, atol=1e-7)


def test_float32_meets_float64_over_scales():
    """Value to 1e-5 and gradient to 1e-3, epsilon from 1e-3 to 1e4 of the mean cost."""
    x, y = clouds(20, 16, 2)
    mean = squared(x, y).mean()

    def run(x, y, epsilon, rho):
        return unbalanced_sinkhorn(x, y, epsilon=epsilon, marginal_penalty=rho).value

    found = {}
    for wide in (False, True):
        with jax.enable_x64(wide):
            both = jax.jit(jax.value_and_grad(run))
            dtype = np.float64 if wide else np.float32
            for relative in (1e-3, 0.1, 1e4):
                for rho in (0.1, 10.0, 1e5):
                    given = (np.asarray(z, dtype) for z in (x, y, relative * mean, rho))
                    found[wide, relative, rho] = jax.tree.map(np.asarray, both(*given))
    for (wide, *case), (value, gradient) in found.items():
        if not wide:
            expected, slope = found[True, *case]
            np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=str(case))
            assert np.linalg.norm(gradient - slope) < 1e-3 * np.linalg.norm(slope), case


def test_an_outlier_and_clouds_that_are_too_far_to_meet():
    """What is too far is destroyed, at rho a unit of mass: nothing is infinite."""
    x, y = clouds(20, 16, 2)
    x = x.at[0].set(1e4)

    def run(x, y):
        result = unbalanced_sinkhorn(x, y, epsilon=0.5, marginal_penalty=1.0)
        return result.value + jnp.sum(jnp.square(result.plan())), result.value

    both = jax.jit(jax.value_and_grad(run, has_aux=True))
    (_, value), gradient = both(x, y)
    weights = np.full(20, 1 / 20), np.full(16, 1 / 16)
    expected = solve64(x, y, *weights, 0.5, (1.0, 1.0), 200)[0]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[0], 0, atol=1e-12)
    (_, value), gradient = both(x + 1e3, y)
    np.testing.assert_allclose(value, 1 + 1 + 0.5, rtol=1e-6)  # rho (1 + 1) + epsilon
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


@functools.cache
def divergence(tolerance):
    def run(x, y, a, b):
        options = {"epsilon": 0.3, "marginal_penalty": 1.5, "tolerance": tolerance}
        found = unbalanced_divergence(x, y, a=a, b=b, **options)
        return found.value, found

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def test_divergence_against_brute_force(x64):
    x, y, a, b = measures()
    values = [
        solve64(*z, 0.3, (1.5, 1.5), 300)[0] for z in ((x, y, a, b), (x, x, a, a), (y, y, b, b))
    ]
    expected = values[0] - (values[1] + values[2]) / 2 + 0.15 * (a.sum() - b.sum()) ** 2
    (value, result), _ = divergence(1e-9)(x, y, a, b)
    np.testing.assert_allclose(value, expected, rtol=1e-8)
    assert result.converged
    np.testing.assert_allclose([result.cross, result.self_x, result.self_y], values, rtol=1e-8)


@pytest.mark.slow
def test_divergence_is_zero_for_equal_measures_and_never_below_at_any_tolerance():
    x, _, a, _ = (jnp.asarray(z, jnp.float32) for z in measures())
    run = divergence(0.3)
    (value, result), gradient = run(x, x, a, a)
    assert value == 0
    assert result.converged
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    for size in (1e-3, 1e-1, 10.0):
        (value, _), gradient = run(x.at[0].add(size), x, a, a)
        assert value >= 0
        assert np.abs(gradient).max() > 0
    assert run(x, x, a, 1.2 * a)[0][0] > 0


def test_points_that_are_not_finite():
    x, y = clouds(6, 5, 2)
    run = jax.jit(lambda x: unbalanced_sinkhorn(x, y, epsilon=0.5, marginal_penalty=1.0)[:4])
    value, _, count, converged = run(x.at[0, 0].set(jnp.nan))
    assert np.isnan(value)
    assert not converged
    assert count < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"marginal_penalty": 0.0}, "marginal_penalty must be above 0"),
        ({"marginal_penalty": (1.0, -1.0)}, "marginal_penalty must be above 0"),
        ({"marginal_penalty": (1.0, 1.0, 1.0)}, "one number or two, got 3"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"a": jnp.zeros(6)}, "the sum of a must be positive"),
        ({"a": -jnp.ones(6)}, "a must be at least 0"),
        ({"b": jnp.ones(6)}, "b must have shape"),
        ({"marginal_penalty": jnp.inf, "a": jnp.ones(6)}, "both imposed"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
    ],
    ids=str,
)
def test_errors(unchecked, options, message):
    x, y = clouds(6, 5, 2)
    with pytest.raises(ValueError, match=message):
        unbalanced_sinkhorn(x, y, **({"epsilon": 0.5, "marginal_penalty": 1.0} | options))
