"""The three gradients: against finite differences, the fixture, and each other."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.transport import sinkhorn, sinkhorn_from_cost, sinkhorn_loss, squared_euclidean
from tests.transport.reference import clouds, exact_plan, load, plan_of, solve64, squared

MODES = {
    "envelope": {"tolerance": 1e-11},
    "unroll": {"num_iterations": 300},
    "implicit": {"tolerance": 1e-11},
}


def learned_cost(theta, x, y):
    """A cost with parameters: distances between features."""
    return squared_euclidean(jnp.tanh(x @ theta), jnp.tanh(y @ theta))


def problem():
    """Points, logits of weights, and the parameters of a cost, in float64."""
    x, y = (z.astype(jnp.float64) for z in clouds(6, 5, 3))
    rng = np.random.default_rng(4)
    return {
        "x": x,
        "y": y,
        "a": jnp.asarray(rng.dirichlet(np.ones(6))),
        "b": jnp.asarray(rng.dirichlet(np.ones(5))),
        "theta": jnp.asarray(rng.standard_normal((3, 4))),
        "epsilon": jnp.asarray(0.3),
    }


def value(args, *, output="value", **options):
    result = sinkhorn(
        args["x"],
        args["y"],
        epsilon=args["epsilon"],
        cost_fn=functools.partial(learned_cost, args["theta"]),
        a=args["a"],
        b=args["b"],
        **options,
    )
    return getattr(result, output)


def differences(function, args, step=1e-5):
    """Central differences of a scalar function of a dictionary, every coordinate."""
    flat, restore = jax.flatten_util.ravel_pytree(args)
    shifts = step * jnp.eye(flat.size)
    evaluate = jax.jit(jax.vmap(lambda z: function(restore(z))))
    difference = evaluate(flat[None, :] + shifts) - evaluate(flat[None, :] - shifts)
    return restore(difference / (2 * step))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_value(x64, mode):
    args = problem()
    run = functools.partial(value, gradient=mode, **MODES[mode])
    mine = jax.jit(jax.grad(run))(args)
    numeric = differences(functools.partial(value, num_iterations=300), args)
    for name, expected in numeric.items():
        scale = jnp.max(jnp.abs(expected))
        np.testing.assert_allclose(mine[name], expected, atol=1e-5 * scale, err_msg=name)


@pytest.mark.slow
def test_unroll_is_the_gradient_of_five_iterations(x64):
    args = problem()

    def loss(args):
        return sinkhorn_loss(
            args["x"],
            args["y"],
            epsilon=args["epsilon"],
            cost_fn=functools.partial(learned_cost, args["theta"]),
            a=args["a"],
            b=args["b"],
            num_iterations=5,
        ).value

    mine = jax.jit(jax.grad(loss))(args)
    for name, expected in differences(loss, args).items():
        np.testing.assert_allclose(mine[name], expected, rtol=1e-5, atol=1e-8, err_msg=name)


@pytest.mark.slow
def test_gradient_of_the_cost(x64):
    case = load("sinkhorn_gradients")
    x, y = (jnp.asarray(case["inputs"][k]) for k in "XY")
    epsilon, expected = case["inputs"]["eps"], case["expected"]

    def gradient(output, **options):
        return jax.jit(
            jax.grad(lambda x: getattr(sinkhorn(x, y, epsilon=epsilon, **options), output))
        )(x)

    np.testing.assert_allclose(gradient("value", tolerance=1e-10), expected["envelope"], atol=1e-9)
    # The cost's own gradient goes through the plan; cutting that branch gives the envelope's.
    unrolled = gradient("cost", gradient="unroll", num_iterations=300)
    np.testing.assert_allclose(unrolled, expected["grad_sharp"], atol=1e-7)
    cut = gradient("cost", tolerance=1e-10)
    np.testing.assert_allclose(cut, expected["envelope"], atol=1e-9)
    assert np.abs(cut - unrolled).max() > 0.03
    implicit = gradient("cost", gradient="implicit", tolerance=1e-10)
    np.testing.assert_allclose(implicit, unrolled, atol=1e-7)


def test_envelope_has_forward_mode(x64):
    args = problem()
    run = functools.partial(value, tolerance=1e-11)
    direction = jax.tree.map(jnp.ones_like, args)
    reverse = jax.jit(jax.grad(run))(args)
    expected = sum(
        jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (reverse, direction)), strict=True)
    )
    along = jax.jit(lambda args, d: jax.jvp(run, (args,), (d,))[1])(args, direction)
    np.testing.assert_allclose(along, expected, rtol=1e-9)


def test_gradient_for_a_cost_matrix_is_the_plan():
    x, y = clouds(8, 7, 2)
    cost = jax.jit(squared_euclidean)(x, y)
    run = jax.jit(lambda c: sinkhorn_from_cost(c, epsilon=0.5, tolerance=1e-5))
    gradient = jax.jit(jax.grad(lambda c: run(c).value))(cost)
    np.testing.assert_allclose(gradient, plan_of(run(cost)), rtol=1e-5)


def test_gradient_of_weights_is_the_centred_potential():
    x, y = clouds(8, 8, 2)
    a = jnp.full((8,), 1 / 8)
    result = jax.jit(lambda a: sinkhorn(x, y, epsilon=0.5, a=a))(a)
    gradient = jax.jit(jax.grad(lambda a: sinkhorn(x, y, epsilon=0.5, a=a).value))(a)
    np.testing.assert_allclose(gradient, result.f - jnp.sum(a * result.f), rtol=1e-5, atol=1e-6)


def test_gradient_in_float32_at_small_epsilon():
    x, y = clouds(32, 32, 2)
    cost, weights = squared(x, y), np.full(32, 1 / 32)
    epsilon = 1e-3 * cost.mean()

    def value(x):
        return sinkhorn(x, y, epsilon=epsilon, tolerance=1e-4).value

    mine = jax.jit(jax.grad(value))(x)
    f, g, _, _ = solve64(cost, weights, weights, epsilon, tolerance=1e-4)
    plan = exact_plan(cost, f, g, weights, weights, epsilon)
    expected = 2 * (plan.sum(1)[:, None] * np.asarray(x) - plan @ np.asarray(y))
    assert np.linalg.norm(mine - expected) < 1e-3 * np.linalg.norm(expected)
