"""Large epsilon, outliers, running out of sweeps: float32 beside float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from genjax.transport import sinkhorn, sinkhorn_divergence
from tests.transport.reference import clouds, exact_plan, plan_of, solve64, squared

N, M = 24, 20


def uniform(n):
    return np.full(n, 1 / n)


@jax.jit
def transport(x, y, a, epsilon):
    def value(x, a):
        result = sinkhorn(x, y, a=a, epsilon=epsilon)
        return result.value, result

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(x, a)


@jax.jit
def divergence(x, y, epsilon):
    def value(x, epsilon):
        result = sinkhorn_divergence(x, y, epsilon=epsilon)
        return result.value, result

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(x, epsilon)


def transport64(x, y, epsilon, tolerance=1e-10):
    """Value, gradients for x and for centred weights, and KL(P | a b^T)."""
    cost, a, b = squared(x, y), uniform(len(x)), uniform(len(y))
    f, g, value, _ = solve64(cost, a, b, epsilon, tolerance, limit=20_000)
    plan = exact_plan(cost, f, g, a, b, epsilon)
    x, y = np.float64(x), np.float64(y)
    s = (f[:, None] + g[None, :] - cost) / epsilon
    information = ((s - 1) * np.exp(s) + 1).mean() if epsilon < 1e3 * cost.mean() else None
    return value, 2 * (plan.sum(1)[:, None] * x - plan @ y), f - f.mean(), information


def close(mine, expected, share):
    np.testing.assert_allclose(mine, expected, atol=share * np.abs(expected).max(), rtol=share)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_value_and_gradients_at_every_epsilon(shift):
    x, y = (np.asarray(z) + np.float32(shift) for z in clouds(N, M, 2))
    a = np.full((N,), 1 / N, np.float32)
    mean = squared(x, y).mean()
    for relative in (0.03, 1.0, 10.0, 1e3, 1e5, 1e7):
        (value, result), (for_x, for_a) = transport(x, y, a, relative * mean)
        expected, gradient, potential, _ = transport64(x, y, relative * mean)
        assert result.converged
        np.testing.assert_allclose(value, expected, rtol=3e-6)
        close(for_x, gradient, 1e-3)
        close(for_a, potential, 3e-3)
        close(np.asarray(result.f) - np.mean(result.f), potential, 3e-3)
        np.testing.assert_allclose(np.asarray(plan_of(result)).sum(1), a, rtol=1e-5)


def test_the_smallest_epsilon_meets_the_assignment():
    x, y = clouds(M, M, 2)
    cost = squared(x, y)
    exact = cost[linear_sum_assignment(cost)].mean()
    value = jax.jit(lambda x, y, e: sinkhorn(x, y, epsilon=e).value)(x, y, 1e-4 * cost.mean())
    # KL(P | a b^T) of a permutation is log n.
    np.testing.assert_allclose(value, exact + 1e-4 * cost.mean() * np.log(M), rtol=1e-4)


@pytest.mark.parametrize(("side", "far"), [("x", 1e3), ("x", 1e4), ("y", -1e3), ("xy", 3e3)])
def test_outliers(side, far):
    """Of one point at 1e4 the cost is 2e8, and rounded to 16: beside an epsilon of 0.25."""
    x, y = clouds(N, M, 2)
    x = x.at[0].set(far) if "x" in side else x
    y = y.at[3].set(-far) if "y" in side else y
    a = jnp.full((N,), 1 / N)
    (value, result), (for_x, _) = transport(x, y, a, 0.25)
    expected, gradient, *_ = transport64(x, y, 0.25, tolerance=1e-4)
    assert not result.converged
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    close(for_x, gradient, 5e-3)
    np.testing.assert_allclose(np.asarray(plan_of(result)).sum(1), a, rtol=1e-5)


@pytest.mark.parametrize("noise", [1.0, pytest.param(0.03, marks=pytest.mark.slow)])
def test_divergence_and_its_derivative_for_epsilon(noise):
    x, y = clouds(N, N, 2)
    y = x + noise * y
    mean = squared(x, y).mean()
    for relative in (0.03, 1.0, 100.0, 1e3, 1e6):
        epsilon = relative * mean
        (value, result), (_, slope) = divergence(x, y, epsilon)
        cross, self_x, self_y = (transport64(u, v, epsilon) for u, v in ((x, y), (x, x), (y, y)))
        expected = cross[0] - (self_x[0] + self_y[0]) / 2
        assert result.converged
        # The three values are rounded at 6e-8 of the mean cost.
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=2e-7 * mean)
        assert value >= 0
        if noise == 1.0 and relative < 1e3:
            expected = cross[3] - (self_x[3] + self_y[3]) / 2
            np.testing.assert_allclose(slope, expected, rtol=1e-3)


def test_divergence_of_fixed_iterations_is_not_negative():
    x, noise = clouds(N, N, 2)

    def value(x, y, epsilon, init=None):
        result = sinkhorn_divergence(x, y, epsilon=epsilon, init=init, num_iterations=3)
        return result.value, result.init

    run = jax.jit(value)
    for step in (1e-3, 0.1):
        y = x + step * noise
        for relative in (1.0, 0.01):
            epsilon = relative * squared(x, y).mean()
            cold, _ = run(x, y, epsilon)
            warm, _ = run(x, y, epsilon, run(y[::-1], x + noise, epsilon)[1])
            assert cold >= 0
            assert warm >= 0


def test_all_sweeps_count():
    x, y = clouds(520, 512, 2)
    run = jax.jit(lambda x, y: sinkhorn(x, y, epsilon=1e-3, max_iterations=7))
    result = run(x, y)
    assert result.num_iterations == 7
    assert not result.converged
    assert jnp.isfinite(result.value)


def test_divergence_of_two_far_points_is_their_squared_distance():
    x, y = jnp.asarray([[2.0, -1.0]]), jnp.asarray([[0.5, 1.0]])
    for epsilon in (1e-3, 0.05, 0.5):
        (value, result), (for_x, _) = divergence(x, y, epsilon)
        assert result.converged
        np.testing.assert_allclose(value, 6.25, rtol=1e-6)
        np.testing.assert_allclose(for_x, 2 * (x - y), rtol=1e-6)
