"""Potentials at new points and the barycentric map, against float64 brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.transport import barycentric_map, potential_functions, sinkhorn, unbalanced_sinkhorn
from tests.transport.reference import clouds, logsumexp, squared

EPSILON, PENALTIES = 0.4, (1.5, 4.0)


def given():
    """Clouds and new points in float64, and weights, one of them 0."""
    x, y = (np.asarray(z, np.float64) for z in clouds(7, 6, 2, seed=3))
    new = np.asarray(clouds(5, 4, 2, seed=8)[0], np.float64)
    rng = np.random.default_rng(0)
    a, b = rng.dirichlet(np.ones(7)), np.append(rng.dirichlet(np.ones(5)), 0.0)
    return x, y, new, a, b


def solve(kind, x, y, a, b):
    if kind == "balanced":
        return sinkhorn(x, y, epsilon=EPSILON, a=a, b=b, num_iterations=300)
    options = {"epsilon": EPSILON, "marginal_penalty": PENALTIES, "tolerance": 1e-9}
    return unbalanced_sinkhorn(x, y, a=a, b=b, **options)


@functools.cache
def everything(kind):
    """Potentials, plan, and the functions at x or y and at new points, with their gradients."""

    def run(x, y, new, a, b):
        result = solve(kind, x, y, a, b)
        f, g = potential_functions(result, x, y)
        mapped = barycentric_map(result, y)
        slope = jax.grad(lambda z: jnp.sum(f(z)))(new)
        return result.f, result.g, result.plan(), (f(x), f(new), g(y), g(new)), (
            mapped(x), mapped(new)
        ), slope  # fmt: skip

    return jax.jit(run)


@pytest.mark.parametrize("kind", ["balanced", pytest.param("unbalanced", marks=pytest.mark.slow)])
def test_against_brute_force(x64, kind):
    x, y, new, a, b = given()
    f, g, plan, potentials, maps, slope = everything(kind)(x, y, new, a, b)
    damping = [1 if kind == "balanced" else rho / (rho + EPSILON) for rho in PENALTIES]
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a), np.log(b)
    f, g = np.asarray(f), np.asarray(g)
    scores = (g[None] - squared(new, y)) / EPSILON + log_b[None]
    f_new = -damping[0] * EPSILON * logsumexp(scores, 1)
    back = (f[:, None] - squared(x, new)) / EPSILON + log_a[:, None]
    g_new = -damping[1] * EPSILON * logsumexp(back, 0)
    for mine, expected in zip(potentials, (f, f_new, g, g_new), strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-7)
    shares = np.exp(scores - logsumexp(scores, 1)[:, None])
    np.testing.assert_allclose(maps[0], plan @ y / np.sum(plan, 1)[:, None], atol=1e-7)
    np.testing.assert_allclose(maps[1], shares @ y, atol=1e-10)
    # Brenier's identity, damped where mass may vanish.
    np.testing.assert_allclose(slope, 2 * damping[0] * (new - maps[1]), atol=1e-9)


def test_the_map_is_differentiated_through_the_solve(x64):
    x, y, new, a, b = (jnp.asarray(z) for z in given())

    def total(x, y):
        return jnp.sum(jnp.sin(barycentric_map(solve("unbalanced", x, y, a, b), y)(new)))

    both = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    rng = np.random.default_rng(1)
    along = [jnp.asarray(rng.normal(size=z.shape)) for z in (x, y)]
    ends = [
        both(*(z + s * 1e-5 * v for z, v in zip((x, y), along, strict=True)))[0] for s in (1, -1)
    ]
    slope = sum(jnp.vdot(g, v) for g, v in zip(both(x, y)[1], along, strict=True))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_a_cost_of_images_and_float32():
    """Events of any rank; far from all points the map still gives points of y's hull."""
    x, y = (z.reshape(len(z), 1, 2) for z in clouds(6, 5, 2))

    def cost(u, v):
        return jnp.sum(jnp.abs(u[:, None] - v[None]), axis=(2, 3))

    def run(x, y, new):
        result = unbalanced_sinkhorn(x, y, epsilon=0.1, marginal_penalty=1.0, cost_fn=cost)
        f, _ = potential_functions(result, x, y, cost_fn=cost)
        return barycentric_map(result, y, cost_fn=cost)(new), f(new)

    mapped, f = jax.jit(run)(x, y, 1e4 + x)
    assert mapped.shape == x.shape
    assert mapped.dtype == jnp.float32
    assert np.all(np.abs(mapped) <= np.abs(y).max() + 1e-5)
    assert np.isfinite(f).all()


def test_clouds_that_are_not_those_of_the_result(unchecked):
    def traced(then):
        def run(x, y):
            return then(unbalanced_sinkhorn(x, y, epsilon=1.0, marginal_penalty=1.0), x, y)

        return lambda: jax.eval_shape(run, *clouds(6, 5, 2))

    with pytest.raises(ValueError, match=r"len\(y\)"):
        traced(lambda result, x, y: potential_functions(result, x, x)[0](x))()
    with pytest.raises(ValueError, match=r"len\(x\)"):
        traced(lambda result, x, y: potential_functions(result, y, y)[0](x))()
    with pytest.raises(ValueError, match="events"):
        traced(lambda result, x, y: barycentric_map(result, y)(jnp.ones((3, 4))))()
