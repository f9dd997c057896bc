"""Entropic barycentres on a fixed support, by iterated Bregman projections.

The potentials are h_k = -epsilon log sum_i a_ki exp((f_ki - C_ij) / epsilon), with f_k the update
of g_k, and g_k = h_k - sum_l w_l h_l: where they stand still all plans have one second marginal.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from genjax import checks
from genjax.numerics import HIGHEST, at_least_float32
from genjax.transport.relaxed import Relaxed, row_update
from genjax.transport.sinkhorn import normalised

__all__ = ["Barycentre", "barycentre"]


class Barycentre(NamedTuple):
    """measure: the barycentre's weights on its support, of sum 1.

    marginal_error: the mean over the plans, by their weights, of the L1 distance of their second
    marginal to it. converged: whether that is at most the tolerance.
    """

    measure: Float[Array, " m"]
    marginal_error: Float[Array, ""]
    num_iterations: Int[Array, ""]
    converged: Bool[Array, ""]


class _Mix(NamedTuple):
    cost: Array  # [n, m]
    measures: Array  # [k, n]
    weights: Array  # [k]
    epsilon: Array


def barycentre(
    cost: Float[Array, "n m"],
    measures: Float[Array, "k n"],
    *,
    epsilon: ArrayLike,
    weights: Float[Array, " k"] | None = None,
    tolerance: float | int = 1e-4,
    max_iterations: int = 10_000,
) -> Barycentre:
    """The measure whose entropic transport to all given ones is cheapest, on a fixed support.

    argmin_b sum_k w_k min_P <P, C> + epsilon sum P (log P - 1), over the plans P from measure k to
    b (Benamou et al. 2015, section 3), by iterated Bregman projections in the log domain. cost:
    between the n points of the measures and the m of the barycentre, with epsilon in its unit.
    weights: of the measures, uniform by default; they and each measure are divided by their sums.

    The entropy is that of the plan itself, so that the barycentre is blurred, by about
    sqrt(epsilon / 2) in every coordinate for the squared distance (Janati et al. 2020). Stops at
    `tolerance`, an L1 marginal error, or after `max_iterations`. Derivatives are those of the
    optimum, by the implicit function theorem, whose linear system is iterated as the solve is.
    Raises ValueError or TypeError for shapes, weights or options that do not fit.

    >>> cost = squared_euclidean(*2 * [jnp.linspace(0, 1, 5)[:, None]])
    >>> result = barycentre(cost, jnp.eye(5)[jnp.array([0, 4])], epsilon=0.02)
    >>> int(result.measure.argmax())
    2
    """
    checks.rank("cost", cost, 2)
    checks.rank("measures", measures, 2)
    for name, z in (("cost", cost), ("measures", measures)):
        checks.not_empty(name, z)
        checks.floating(name, z)
    checks.shape("measures", measures, (None, len(cost)))
    checks.rank("epsilon", epsilon, 0)
    checks.positive("epsilon", epsilon)
    checks.positive("tolerance", tolerance)
    checks.integer("max_iterations", max_iterations, 1)
    cost = at_least_float32(cost)
    rows = [normalised(f"measures[{k}]", z, len(cost), cost.dtype) for k, z in enumerate(measures)]
    weights = normalised("weights", weights, len(rows), cost.dtype)
    mix = _Mix(cost, jnp.stack(rows), weights, jnp.asarray(epsilon).astype(cost.dtype))
    fixed = jax.lax.stop_gradient(mix)
    g, _, count = _solve(fixed, tolerance, max_iterations)
    error = _error(fixed, g, _updates(fixed, g))
    measure = _common(mix, _updates(mix, g + _implicit(mix, g)))
    return Barycentre(measure, error, count, error <= tolerance)


def _updates(mix: _Mix, g: Array) -> Array:
    """h_k [k, m], of the rows' update f_k of g_k [k, m]."""
    m = mix.cost.shape[1]
    zero, one = 0 * mix.epsilon, 0 * mix.epsilon + 1
    spread = jax.lax.stop_gradient(jnp.mean(mix.cost) - jnp.min(mix.cost))

    def update(measure: Array, g: Array) -> Array:
        flat = jnp.ones((m,), g.dtype)
        pull, mass = (zero, zero), (one, one * m)
        p = Relaxed(mix.cost, measure, flat, mix.epsilon, pull, mass, spread)
        return row_update(p.exchanged(), row_update(p, g)[0])[0]

    return jax.vmap(update)(mix.measures, g)


def _next(mix: _Mix, h: Array) -> Array:
    """The next g; constants are free, and means of 0 are taken."""
    g = h - jnp.matmul(mix.weights, h, precision=HIGHEST)[None, :]
    return g - jnp.mean(g, axis=1, keepdims=True)


def _common(mix: _Mix, h: Array) -> Array:
    """The weighted geometric mean of the second marginals, of sum 1."""
    return jax.nn.softmax(-jnp.matmul(mix.weights, h, precision=HIGHEST) / mix.epsilon)


def _error(mix: _Mix, g: Array, h: Array) -> Array:
    gaps = jnp.abs(jnp.exp((g - h) / mix.epsilon) - _common(mix, h)[None, :])
    return jnp.vdot(mix.weights, jnp.sum(gaps, axis=1))


def _solve(mix: _Mix, tolerance: Any, max_iterations: int) -> tuple[Array, Array, Array]:
    """g, the last error seen, and the number of sweeps."""

    def going(state):
        _, error, count = state
        return (error > tolerance) & (count < max_iterations)

    def body(state):
        g, _, count = state
        h = _updates(mix, g)
        error = _error(mix, g, h)
        return jnp.where(error > tolerance, _next(mix, h), g), error, count + 1

    none = jnp.zeros((), jnp.int32)
    start = jnp.zeros((len(mix.weights), mix.cost.shape[1]), mix.cost.dtype)
    return jax.lax.while_loop(going, body, (start, jnp.full_like(mix.epsilon, jnp.inf), none))


@jax.custom_jvp
def _implicit(mix: _Mix, g: Array) -> Array:
    """Zeros, with the derivative of the g that stands still: (1 - d step / dg) dg = d step."""
    return jnp.zeros_like(g)


@_implicit.defjvp
def _implicit_jvp(primals, tangents):
    mix, g = primals
    alive = g + _implicit(mix, g)  # for the next derivative

    def step(mix, g):
        return _next(mix, _updates(mix, g))

    _, change = jax.jvp(lambda mix: step(mix, alive), (mix,), (tangents[0],))
    _, push = jax.linearize(lambda g: step(mix, g), alive)
    dg = jax.lax.custom_linear_solve(lambda v: v - push(v), change, _iterate, _iterate)
    return _implicit(mix, g), dg


def _iterate(product: Any, right: Array) -> Array:
    """x with product(x) = right, by the iteration x + right - product(x)."""
    tiny = 10 * jnp.finfo(right.dtype).eps

    def going(state):
        x, left, count = state
        return (jnp.max(jnp.abs(left)) > tiny * jnp.max(jnp.abs(x))) & (count < 10_000)

    def body(state):
        x, left, count = state
        x = x + left
        return x, right - product(x), count + 1

    return jax.lax.while_loop(going, body, (0 * right, right, jnp.zeros((), jnp.int32)))[0]
