"""Derivatives of potentials and plan, and second derivatives: the implicit function theorem."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.transport import cosine, sinkhorn, sinkhorn_divergence, sinkhorn_from_cost
from tests.transport.reference import clouds

UNROLLED = {"num_iterations": 800, "gradient": "unroll"}


def problem(n=6, m=5):
    """Points and weights in float64; one point of each cloud has no weight."""
    rng = np.random.default_rng(5)
    x, y = (z.astype(jnp.float64) for z in clouds(n, m, 2, seed=2))
    a, b = (jnp.asarray(rng.dirichlet(np.ones(k))) for k in (n, m))
    a, b = a.at[1].set(0) / (1 - a[1]), b.at[3].set(0) / (1 - b[3])
    return {"x": x, "y": y, "a": a, "b": b, "epsilon": jnp.asarray(0.5)}


def mixed(result):
    """A function of the plan and of potentials, up to their constant."""
    rng = np.random.default_rng(6)
    n, m = len(result.f), len(result.g)
    u, v, w = (jnp.asarray(rng.standard_normal(s), result.f.dtype) for s in (n, m, (n, m)))
    plan = result.plan()
    return jnp.sum(w * plan) + jnp.vdot(u - u.mean(), result.f) + jnp.vdot(v - v.mean(), result.g)


def of_problem(args, **options):
    return mixed(
        sinkhorn(args["x"], args["y"], **{k: args[k] for k in ("a", "b", "epsilon")}, **options)
    )


@functools.cache
def unrolled():
    return jax.jit(jax.grad(functools.partial(of_problem, **UNROLLED)))(problem())


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance": 1e-11},
        {"tolerance": 1e-11, "gradient": "implicit"},
        pytest.param({"num_iterations": 800}, marks=pytest.mark.slow),
        pytest.param({"tolerance": 1e-11, "chunk_size": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_potentials_and_plan_have_the_unrolled_derivative(x64, options):
    args, expected = problem(), unrolled()
    mine = jax.jit(jax.grad(functools.partial(of_problem, **options)))(args)
    for name, want in expected.items():
        if name in "ab":  # a weight of zero stays zero: only the others can be compared
            keep = args[name] > 0
            mine[name], want = mine[name][keep], want[keep]
        np.testing.assert_allclose(mine[name], want, atol=1e-7 * jnp.abs(want).max(), err_msg=name)


@pytest.mark.slow
def test_the_cost_of_the_plan_and_the_cost_cut_off(x64):
    args = problem()

    def cost(x, **options):
        return sinkhorn(x, args["y"], a=args["a"], epsilon=0.5, cost_fn=cosine, **options).cost

    whole, unrolled, cut = (
        jax.jit(jax.grad(functools.partial(cost, **options)))(args["x"])
        for options in ({"tolerance": 1e-11, "gradient": "implicit"}, UNROLLED, {})
    )
    np.testing.assert_allclose(whole, unrolled, atol=1e-8)
    assert np.abs(cut - unrolled).max() > 1e-3


@pytest.mark.slow
def test_a_cost_matrix_and_forward_mode(x64):
    args = problem()
    cost = jnp.sum(jnp.square(args["x"][:, None] - args["y"][None]), axis=-1)

    def run(cost, **options):
        return mixed(sinkhorn_from_cost(cost, epsilon=0.5, a=args["a"], **options))

    solved = functools.partial(run, tolerance=1e-11)
    expected = jax.jit(jax.grad(functools.partial(run, **UNROLLED)))(cost)
    np.testing.assert_allclose(jax.jit(jax.grad(solved))(cost), expected, atol=1e-8)
    forward = jax.jit(lambda cost, tangent: jax.jvp(solved, (cost,), (tangent,))[1])
    along = forward(cost, jnp.ones_like(cost).at[0].set(0))
    np.testing.assert_allclose(along, jnp.sum(expected[1:]), atol=1e-8)


@pytest.mark.slow
def test_a_learned_cost_and_a_result_that_crosses_jit(x64):
    args = problem()
    theta = jnp.asarray([[1.0, 0.3], [-0.2, 0.8]])

    def run(theta, **options):
        def cost_fn(x, y):
            return jnp.sum(jnp.abs(x @ theta)[:, None] * jnp.cos(y)[None], axis=-1)

        return mixed(sinkhorn(args["x"], args["y"], epsilon=0.5, cost_fn=cost_fn, **options))

    expected = jax.jit(jax.grad(functools.partial(run, **UNROLLED)))(theta)
    mine = jax.jit(jax.grad(functools.partial(run, tolerance=1e-11)))(theta)
    np.testing.assert_allclose(mine, expected, atol=1e-8)
    solve = jax.jit(lambda x: sinkhorn(x, args["y"], epsilon=0.5, tolerance=1e-11))
    inside = jax.jit(jax.grad(lambda x: mixed(solve.__wrapped__(x))))
    outside = jax.jit(jax.grad(lambda x: mixed(solve(x))))(args["x"])
    np.testing.assert_allclose(outside, inside(args["x"]), atol=1e-9)


@pytest.mark.parametrize("relative", [pytest.param(1.0, marks=pytest.mark.slow), 0.01])
def test_float32_meets_float64(relative):
    x, y = clouds(30, 30, 2)
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((30, 30)), jnp.float32)

    def run(x, y, weights):
        scale = jnp.mean(jnp.square(x)) + jnp.mean(jnp.square(y))
        result = sinkhorn(x, y, epsilon=relative * jax.lax.stop_gradient(scale), tolerance=1e-4)
        return jnp.sum(result.plan() * weights)

    mine = jax.jit(jax.grad(run))(x, y, weights)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(z), jnp.float64) for z in (x, y, weights)]
        expected = np.asarray(jax.jit(jax.grad(run))(*wide))
    assert np.linalg.norm(np.asarray(mine) - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["value", pytest.param("divergence", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_second_derivatives(x64, name):
    args = problem()
    x, y, b = args["x"], args["y"], args["b"]

    def run(x, epsilon=0.5, **options):
        if name == "divergence":
            return sinkhorn_divergence(x, y, b=b, epsilon=epsilon, tolerance=1e-11).value
        return sinkhorn(x, y, b=b, epsilon=epsilon, tolerance=1e-11).value

    gradient, step = jax.jit(jax.grad(run)), 1e-5
    shift = jnp.zeros_like(x).at[2, 1].set(step)
    expected = (gradient(x + shift) - gradient(x - shift)) / (2 * step)
    hessian = jax.jit(jax.hessian(run))(x)
    np.testing.assert_allclose(hessian[:, :, 2, 1], expected, atol=1e-7)
    np.testing.assert_allclose(hessian[2, 1], hessian[:, :, 2, 1], atol=1e-7)
    twice = jax.jit(jax.grad(lambda x: jax.grad(run)(x)[2, 1]))
    np.testing.assert_allclose(twice(x), expected, atol=1e-7)
    batch = jax.jit(jax.vmap(jax.grad(lambda x: jax.grad(run)(x)[2, 1])))(jnp.stack([x, x + 0.1]))
    np.testing.assert_allclose(batch[0], expected, atol=1e-7)


@pytest.mark.slow
def test_vmap_of_the_derivative_meets_the_loop(x64):
    args = problem()
    batch = jnp.stack([args["x"], 0.5 * args["x"] + 0.2])

    def run(x):
        return mixed(sinkhorn(x, args["y"], b=args["b"], epsilon=0.3, tolerance=1e-10))

    together = jax.jit(jax.vmap(jax.grad(run)))(batch)
    single = jax.jit(jax.grad(run))
    for x, mine in zip(batch, together, strict=True):
        np.testing.assert_allclose(mine, single(x), atol=1e-8)
    # A batch of results, differentiated outside.
    solve = jax.vmap(lambda x: sinkhorn(x, args["y"], b=args["b"], epsilon=0.3, tolerance=1e-10))
    outside = jax.jit(jax.grad(lambda x: jax.vmap(mixed)(solve(x)).sum()))(batch)
    np.testing.assert_allclose(outside, together, atol=1e-8)


def test_the_gradient_of_the_value_holds_no_linear_solve():
    x, y = clouds(6, 5, 2)

    def value(x):
        return sinkhorn(x, y, epsilon=0.5).value

    assert "cholesky" not in jax.jit(jax.grad(value)).lower(x).as_text()
    plan = jax.jit(jax.grad(lambda x: sinkhorn(x, y, epsilon=0.5).plan()[0, 0]))
    assert "cholesky" in plan.lower(x).as_text().lower() or "potrf" in plan.lower(x).as_text()
