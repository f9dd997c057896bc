"""Infinite entries of a cost: a plan without them, against float64 and a linear program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

from genjax.transport import sinkhorn, sinkhorn_from_cost, squared_euclidean
from tests.transport.reference import plan_of, solve64

EPSILON = 0.05


def problem(n=9, m=8, share=0.4):
    """A cost with forbidden pairs that leave a plan: each row keeps its neighbours."""
    rng = np.random.default_rng(0)
    cost = rng.uniform(size=(n, m))
    near = np.abs(np.arange(n)[:, None] / n - np.arange(m)[None] / m) < 0.2
    cost[(rng.uniform(size=(n, m)) < share) & ~near] = np.inf
    return cost


@functools.cache
def solver(**options):
    weights = np.random.default_rng(1).normal(size=(9, 8))

    def run(cost):
        result = sinkhorn_from_cost(cost, epsilon=EPSILON, **options)
        return result.value, (result, result.plan())

    def of_plan(cost):
        return jnp.sum(weights.astype(cost.dtype) * run(cost)[1][1])

    return jax.jit(
        lambda cost: (jax.value_and_grad(run, has_aux=True)(cost), jax.grad(of_plan)(cost))
    )


@pytest.mark.parametrize(
    "options",
    [{"tolerance": 1e-9}, pytest.param({"num_iterations": 1000}, marks=pytest.mark.slow)],
    ids=str,
)
def test_against_float64(x64, options):
    cost = problem()
    a, b = np.full(9, 1 / 9), np.full(8, 1 / 8)
    forbidden = np.isinf(cost)
    f, g, value, _ = solve64(np.where(forbidden, 50.0, cost), a, b, EPSILON)
    expected = np.exp((f[:, None] + g[None] - cost) / EPSILON) / 72
    ((mine, (result, plan)), gradient), of_plan = solver(**options)(cost)
    np.testing.assert_allclose(mine, value, rtol=1e-7)
    np.testing.assert_allclose(plan, expected, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(plan)[forbidden], 0)
    np.testing.assert_allclose(
        result.cost, np.sum(expected * np.where(forbidden, 0, cost)), rtol=1e-6
    )
    np.testing.assert_allclose(gradient, expected, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(of_plan)[forbidden], 0)
    assert result.converged
    # The derivative of the plan, at one entry, by finite differences.
    change = np.zeros_like(cost)
    change[2, 1] = 1e-5
    weights = np.random.default_rng(1).normal(size=(9, 8))
    ends = [np.sum(weights * solver(**options)(cost + s * change)[0][0][1][1]) for s in (1, -1)]
    np.testing.assert_allclose(of_plan[2, 1], (ends[0] - ends[1]) / 2e-5, rtol=1e-5)


def test_float32_and_small_epsilon_meet_the_linear_program():
    cost = problem()
    allowed = np.where(np.isinf(cost), 100.0, cost)
    exact = ot.emd2(np.full(9, 1 / 9), np.full(8, 1 / 8), allowed)
    assert exact < 1
    run = jax.jit(lambda cost, epsilon: sinkhorn_from_cost(cost, epsilon=epsilon))
    given = jnp.asarray(cost, jnp.float32)
    result = run(given, jnp.float32(1e-3))
    assert result.converged
    np.testing.assert_allclose(result.cost, exact, rtol=1e-2)
    # Of a large epsilon: uniform over what is allowed would be wrong, the marginals hold.
    wide = run(given, jnp.float32(100.0))
    assert wide.converged
    np.testing.assert_array_equal(np.asarray(plan_of(wide))[np.isinf(cost)], 0)
    np.testing.assert_allclose(np.sum(np.asarray(plan_of(wide)), 0), 1 / 8, atol=2e-4)


def test_only_a_permutation_is_left(x64):
    """Everything is forbidden but a matching: it is the plan."""
    cost = np.full((5, 5), np.inf)
    cost[np.arange(5), [2, 0, 4, 1, 3]] = [0.1, 5.0, -1.0, 2.0, 0.3]
    result = jax.jit(lambda cost: sinkhorn_from_cost(cost, epsilon=0.1, tolerance=1e-6))(cost)
    np.testing.assert_allclose(plan_of(result), np.where(np.isinf(cost), 0, 0.2), atol=1e-6)
    np.testing.assert_allclose(result.cost, 6.4 / 5, rtol=1e-6)
    np.testing.assert_allclose(result.value, 6.4 / 5 + 0.1 * np.log(5), rtol=1e-6)


def test_no_plan_is_left():
    """Three rows for two columns: infinite in a program; a row alone is an error outside."""
    cost = np.ones((4, 4), np.float32)
    cost[:3, 2:] = np.inf
    run = jax.jit(jax.value_and_grad(lambda cost: sinkhorn_from_cost(cost, epsilon=0.1).value))
    value, gradient = run(cost)
    assert value == np.inf
    assert np.isfinite(gradient).all()
    cost[1] = np.inf
    assert run(cost)[0] == np.inf
    assert run(np.full_like(cost, np.inf))[0] == np.inf
    result = jax.jit(lambda cost: sinkhorn_from_cost(cost, epsilon=0.1))(cost)
    assert not result.converged
    assert result.marginal_error == np.inf
    with pytest.raises(ValueError, match=r"some pair for what has weight: row 1 is infinite"):
        sinkhorn_from_cost(jnp.asarray(cost), epsilon=0.1)
    with pytest.raises(ValueError, match=r"column 1 is infinite throughout, and 0 more"):
        sinkhorn_from_cost(jnp.ones((3, 2)).at[:, 1].set(jnp.inf), epsilon=0.1)


@pytest.mark.parametrize("gradient", ["envelope", pytest.param("implicit", marks=pytest.mark.slow)])
def test_a_cost_function_forbids_as_a_matrix_does(x64, unchecked, gradient):
    """Value, plan, and the gradients of both, through the points and what the cost closes over."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(9, 2)), rng.normal(size=(8, 2))
    open_pairs, weights = np.isfinite(problem()), rng.normal(size=(9, 8))

    def cost(scale, x, y):
        return jnp.where(open_pairs, scale * squared_euclidean(x, y), jnp.inf)

    def total(result):
        return 3 * result.value + result.cost + jnp.sum(weights * result.plan())

    options = {"epsilon": 0.3, "tolerance": 1e-10, "gradient": gradient}

    def by_points(s, x):
        return total(sinkhorn(x, y, cost_fn=lambda x, y: cost(s, x, y), **options))

    def by_matrix(s, x):
        return total(sinkhorn_from_cost(cost(s, x, y), **options))

    found, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1)))(2.0, x) for f in (by_points, by_matrix)
    )
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-6), found, expected)


def test_a_cost_function_that_leaves_a_point_alone_is_refused(unchecked):
    x = np.array([[0.0], [9.0]], np.float32)
    near = lambda x, y: jnp.where(squared_euclidean(x, y) < 1, 0.0, jnp.inf)  # noqa: E731
    with pytest.raises(ValueError, match="row 1 is infinite"):
        sinkhorn(x, x[:1], epsilon=0.1, cost_fn=near)


def test_equal_costs_far_above_epsilon_leave_a_plan():
    """The value rounds by more than the width that epsilon leaves: it is not taken for a bar."""
    rng = np.random.default_rng(0)
    a, b = rng.dirichlet(np.ones(40), (2, 64)).astype(np.float32)
    levels = np.geomspace(1e2, 1e7, 64, dtype=np.float32)

    def value(level, a, b):
        cost = jnp.full((40, 40), level)
        return sinkhorn_from_cost(cost, epsilon=1e-6, a=a, b=b, max_iterations=20).value

    np.testing.assert_allclose(jax.jit(jax.vmap(value))(levels, a, b), levels, rtol=1e-6)
