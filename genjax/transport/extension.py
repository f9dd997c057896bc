"""Potentials as functions of any point, and the map that a plan stands for."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import HIGHEST, at_least_float32
from genjax.transport.costs import squared_euclidean
from genjax.transport.relaxed import Relaxed, row_update
from genjax.transport.sinkhorn import SinkhornResult
from genjax.transport.unbalanced import UnbalancedResult
from genjax.typing import CostFn

__all__ = ["barycentric_map", "potential_functions"]


def potential_functions(
    result: SinkhornResult | UnbalancedResult,
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    cost_fn: CostFn = squared_euclidean,
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """The potentials (f, g) of a solve between x and y, at any points [k, *event] -> [k].

    f(z) = -epsilon lambda log sum_j b_j exp((g_j - c(z, y_j)) / epsilon), with lambda 1, or
    rho / (rho + epsilon) where the marginal has the penalty rho; g likewise from f. At the points
    of the solve they are its potentials, to its tolerance; the unit is the cost's. For the squared
    distance the gradient of f is 2 lambda (z - T(z)), with T the `barycentric_map` (Pooladian and
    Niles-Weed 2021, section 2). Raises ValueError where x and y are not those of the result.

        f, g = potential_functions(sinkhorn(x, y, epsilon=0.1), x, y)
        f(new)

    >>> x = jnp.array([[0.0], [1.0]])
    >>> f, g = potential_functions(sinkhorn(x, x + 3, epsilon=0.01), x, x + 3)
    >>> (x - jax.vmap(jax.grad(lambda z: f(z[None])[0]))(x) / 2).round(2)
    Array([[3.],
           [4.]], dtype=float32)
    """
    f_at, g_at = _extension(result, y, cost_fn), _extension(result, x, cost_fn, exchanged=True)
    return lambda z: f_at(z)[0], lambda z: g_at(z)[0]


def barycentric_map(
    result: SinkhornResult | UnbalancedResult,
    y: Float[Array, "m *event"],
    *,
    cost_fn: CostFn = squared_euclidean,
) -> Callable[[Array], Array]:
    """The entropic map of a solve to y: points [k, *event] to the mean of where they go.

    T(z) = sum_j y_j w_j(z), w_j(z) proportional to b_j exp((g_j - c(z, y_j)) / epsilon). At a point
    of the solve it is E[y | x_i] under the plan; elsewhere the same formula (Pooladian and
    Niles-Weed 2021, equation 4). Differentiable in the points, in y and in the result. Raises
    ValueError where y is not that of the result.

        transported = barycentric_map(sinkhorn(x, y, epsilon=0.1), y)(x)

    >>> x = jnp.array([[0.0], [1.0]])
    >>> push = barycentric_map(sinkhorn(x, x + 3, epsilon=0.01), x + 3)
    >>> push(x).round(2)
    Array([[3.],
           [4.]], dtype=float32)
    """
    extended = _extension(result, y, cost_fn)
    flat = at_least_float32(y).reshape(len(y), -1)

    def transported(z: Array) -> Array:
        _, shares = extended(z)
        return jnp.matmul(shares, flat, precision=HIGHEST).reshape(len(z), *y.shape[1:])

    return transported


def _extension(result, cloud: Array, cost_fn: CostFn, exchanged: bool = False) -> Callable:
    """Points to their potential and to the shares of their mass that each of the cloud gets."""
    if isinstance(result, UnbalancedResult):
        a, b, epsilon, pull = (getattr(result.problem, k) for k in ("a", "b", "epsilon", "pull"))
    else:
        a, b, epsilon = result.a, result.b, result.epsilon
        pull = (0 * epsilon, 0 * epsilon)
    weights, name = (a, "x") if exchanged else (b, "y")
    checks.shape(f"len({name})", jnp.zeros(len(cloud)), weights.shape)
    potential, pull = (result.f, pull[::-1]) if exchanged else (result.g, pull)
    mass = jnp.sum(weights)

    def at(points: Array) -> tuple[Array, Array]:
        checks.same_event(points=points, **{name: cloud})
        pair = (cloud, points) if exchanged else (points, cloud)
        cost = at_least_float32(cost_fn(*map(at_least_float32, pair)))
        cost = cost.T if exchanged else cost
        spread = jnp.mean(cost) - jnp.min(cost)
        given = jnp.ones(len(cost), cost.dtype)  # row weights have no part in what is asked
        p = Relaxed(cost, given, weights, epsilon, pull, (mass, mass), spread)
        return row_update(p, potential)

    return at
