"""Entropic optimal transport: `sinkhorn` between point clouds, `sinkhorn_from_cost` for a matrix.

    value = min_P <P, C> + epsilon KL(P | a b^T),   P 1 = a,  P^T 1 = b

(Cuturi 2013; Peyre and Cuturi, Computational Optimal Transport, 2019, chapter 4).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from genjax import checks
from genjax.numerics import at_least_float32
from genjax.transport import log_domain, solve
from genjax.transport.costs import squared_euclidean
from genjax.typing import CostFn

GRADIENTS = ("envelope", "unroll", "last")


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class SinkhornResult:
    """What a solver returns; a pytree, with the plan formed on demand by `plan()`.

    f, g: potentials in units of the cost, P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon); they
    are defined up to a constant, chosen so that <a, f> and <b, g> are equal (nearly so after a
    fixed number of iterations).
    value: the regularised optimum, <a, f> + <b, g>. cost: <P, C>, without the entropy.
    marginal_error: |P 1 - a|_1 + |P^T 1 - b|_1, of the potentials that are returned.
    converged: whether that error is at most the tolerance, with room for the rounding of the cost.
    """

    f: Float[Array, " n"]
    g: Float[Array, " m"]
    value: Float[Array, ""]
    cost: Float[Array, ""]
    marginal_error: Float[Array, ""]
    num_iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    epsilon: Float[Array, ""]
    geometry: tuple[Array, ...]
    cost_fn: CostFn | None

    def plan(self) -> Float[Array, "n m"]:
        """The transport plan [n, m]: forms the cost matrix, whatever `chunk_size` was."""
        cost = self.geometry[0] if self.cost_fn is None else _matrix(self.cost_fn, *self.geometry)
        return log_domain.plan(cost, self.f, self.g, self.a, self.b, self.epsilon)

    def tree_flatten(self) -> tuple[tuple[Any, ...], CostFn | None]:
        names = [field.name for field in dataclasses.fields(self)]
        return tuple(getattr(self, name) for name in names[:-1]), self.cost_fn

    @classmethod
    def tree_unflatten(cls, cost_fn: CostFn | None, leaves: tuple[Any, ...]) -> "SinkhornResult":
        # Transformations put placeholders into the leaves: no checks of types here.
        new = object.__new__(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        for name, leaf in zip(names, (*leaves, cost_fn), strict=True):
            object.__setattr__(new, name, leaf)
        return new


def _matrix(cost_fn: CostFn, x: Array, y: Array) -> Array:
    cost = at_least_float32(cost_fn(x, y))
    checks.shape("cost_fn(x, y)", cost, (x.shape[0], y.shape[0]))
    return cost


def _weights(name: str, weights, size: int, dtype) -> Array:
    """Uniform weights for None; otherwise checked, widened and divided by their sum."""
    if weights is None:
        return jnp.full((size,), 1 / size, dtype)
    checks.shape(name, weights, (size,))
    checks.at_least(name, weights, 0.0)
    weights = jnp.asarray(weights).astype(dtype)
    total = jnp.sum(weights)
    if checks.is_concrete(total):
        # bfloat16 weights carry three digits.
        checks.between(f"the sum of {name}", total, 0.99, 1.01)
    return weights / total


def _start(init, n: int, m: int, dtype) -> tuple[Array, Array]:
    if init is None:
        return jnp.zeros((n,), dtype), jnp.zeros((m,), dtype)
    f, g = init
    checks.shape("init[0]", f, (n,))
    checks.shape("init[1]", g, (m,))
    f, g = jnp.asarray(f).astype(dtype), jnp.asarray(g).astype(dtype)
    return jax.lax.stop_gradient((f, g))


def _options(
    num_iterations,
    tolerance,
    max_iterations,
    gradient,
    last,
    anneal,
    relaxation,
    symmetric,
    init,
) -> solve.Options:
    checks.one_of("gradient", gradient, GRADIENTS)
    checks.positive("tolerance", tolerance)
    checks.integer("max_iterations", max_iterations, 1)
    checks.integer("last_iterations", last, 1)
    if num_iterations is not None:
        checks.integer("num_iterations", num_iterations, 1)
    elif gradient == "unroll":
        raise ValueError("gradient 'unroll' needs num_iterations, a fixed number; got None")
    if relaxation is not None and not 0 < relaxation < 2:
        raise ValueError(f"relaxation must lie in (0, 2), got {relaxation}")
    anneal = init is None if anneal is None else anneal
    return solve.Options(
        num_iterations, float(tolerance), max_iterations, anneal, relaxation, symmetric
    )


def sinkhorn_from_cost(
    cost: Float[Array, "n m"],
    *,
    epsilon: ArrayLike,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    num_iterations: int | None = None,
    tolerance: float | int = 1e-3,
    max_iterations: int = 10_000,
    gradient: str = "envelope",
    last_iterations: int = 1,
    init: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
    anneal: bool | None = None,
    relaxation: float | None = None,
    symmetric: bool = False,
) -> SinkhornResult:
    """Entropic optimal transport for a cost matrix; the options are those of `sinkhorn`."""
    checks.rank("cost", cost, 2)
    checks.not_empty("cost", cost)
    checks.floating("cost", cost)
    checks.rank("epsilon", epsilon, 0)
    checks.positive("epsilon", epsilon)
    options = _options(
        num_iterations,
        tolerance,
        max_iterations,
        gradient,
        last_iterations,
        anneal,
        relaxation,
        symmetric,
        init,
    )
    cost = at_least_float32(cost)
    n, m = cost.shape
    a, b = _weights("a", a, n, cost.dtype), _weights("b", b, m, cost.dtype)
    level = jnp.asarray(epsilon).astype(cost.dtype)
    f, g = _start(init, n, m, cost.dtype)
    if gradient == "envelope":
        out = solve.envelope(options, cost, a, b, level, f, g)
    else:
        out = solve.differentiated(options, gradient, last_iterations, cost, a, b, level, f, g)
    return _result(out, options.tolerance, 0.0, a, b, level, (cost,), None)


def _result(out, tolerance, rounding, a, b, epsilon, geometry, cost_fn) -> SinkhornResult:
    f, g, value, total, error, count = out
    broken = ~jnp.isfinite(sum(jnp.sum(jnp.abs(z)) * 0 for z in (*geometry, a, b)))
    value = jnp.where(broken, jnp.nan, value)
    total = jnp.where(broken, jnp.nan, total)
    error = jnp.where(broken, jnp.nan, error)
    return SinkhornResult(
        f=f,
        g=g,
        value=value,
        cost=total,
        marginal_error=error,
        num_iterations=jax.lax.stop_gradient(count).astype(jnp.int32),
        converged=error + rounding <= tolerance,
        a=a,
        b=b,
        epsilon=epsilon,
        geometry=geometry,
        cost_fn=cost_fn,
    )


def sinkhorn(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    epsilon: ArrayLike,
    cost_fn: CostFn = squared_euclidean,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    num_iterations: int | None = None,
    tolerance: float | int = 1e-3,
    max_iterations: int = 10_000,
    gradient: str = "envelope",
    last_iterations: int = 1,
    init: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
    anneal: bool | None = None,
    relaxation: float | None = None,
    symmetric: bool = False,
) -> SinkhornResult:
    """Entropic optimal transport between two weighted point clouds.

    value = min_P <P, C> + epsilon KL(P | a b^T), with C = cost_fn(x, y) and P's marginals a and b,
    both uniform by default (Peyre and Cuturi 2019, eq. 4.2). Costs and epsilon share one unit.
    """
    checks.not_empty("x", x)
    checks.not_empty("y", y)
    checks.floating("x", x)
    checks.floating("y", y)
    cost = _matrix(cost_fn, x, y)
    result = sinkhorn_from_cost(
        cost,
        epsilon=epsilon,
        a=a,
        b=b,
        num_iterations=num_iterations,
        tolerance=tolerance,
        max_iterations=max_iterations,
        gradient=gradient,
        last_iterations=last_iterations,
        init=init,
        anneal=anneal,
        relaxation=relaxation,
        symmetric=symmetric,
    )
    return dataclasses.replace(result, geometry=(x, y), cost_fn=cost_fn)
