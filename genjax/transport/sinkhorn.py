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
from genjax.transport import blocks, log_domain, solve
from genjax.transport.costs import cosine, squared_euclidean
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
        cost = self.geometry[0]
        if self.cost_fn is not None:
            cost = at_least_float32(self.cost_fn(*self.geometry))
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


def _weights(name: str, weights: Any, size: int, dtype: Any) -> Array:
    """Uniform weights for None; otherwise checked, widened and divided by their sum."""
    if weights is None:
        return jnp.full((size,), 1 / size, dtype)
    checks.shape(name, weights, (size,))
    checks.at_least(name, weights, 0.0)
    weights = jnp.asarray(weights).astype(dtype)
    total = jnp.sum(weights)
    # Two digits: weights may come in bfloat16.
    checks.between(f"the sum of {name}", total, 0.99, 1.01)
    return weights / total


def _start(init: Any, n: int, m: int, dtype: Any) -> tuple[Array, Array]:
    if init is None:
        return jnp.zeros((n,), dtype), jnp.zeros((m,), dtype)
    if not isinstance(init, tuple | list) or len(init) != 2:
        raise ValueError(f"init must be two potentials (f, g), got {type(init).__name__}")
    checks.shape("init[0]", init[0], (n,))
    checks.shape("init[1]", init[1], (m,))
    f, g = (jax.lax.stop_gradient(jnp.asarray(z).astype(dtype)) for z in init)
    # Potentials of a solve that failed are no start: they would spoil every later one.
    sound = jnp.isfinite(jnp.sum(f) + jnp.sum(g))
    return jnp.where(sound, f, 0), jnp.where(sound, g, 0)


def _check(gradient: str, last_iterations: int, options: solve.Options) -> None:
    checks.one_of("gradient", gradient, GRADIENTS)
    checks.positive("tolerance", options.tolerance)
    checks.integer("max_iterations", options.max_iterations, 1)
    checks.integer("last_iterations", last_iterations, 1)
    if options.num_iterations is not None:
        checks.integer("num_iterations", options.num_iterations, 1)
    elif gradient == "unroll":
        raise ValueError("gradient 'unroll' needs num_iterations, a fixed number; got None")
    if options.relaxation is not None and not 0 < options.relaxation < 2:
        raise ValueError(f"relaxation must lie in (0, 2), got {options.relaxation}")
    if options.chunk_size is not None:
        checks.integer("chunk_size", options.chunk_size, 1)
        if gradient != "envelope":
            raise ValueError(f"chunk_size needs gradient 'envelope', got {gradient!r}")


def _solve(
    arrays: tuple[Array, ...],
    shape: tuple[int, int],
    dtype: Any,
    options: solve.Options,
    *,
    epsilon: ArrayLike,
    a: Any,
    b: Any,
    init: Any,
    gradient: str,
    last_iterations: int = 1,
    guess: tuple[Array, ...] = (),
) -> SinkhornResult:
    checks.rank("epsilon", epsilon, 0)
    checks.positive("epsilon", epsilon)
    _check(gradient, last_iterations, options)
    if options.symmetric and shape[0] != shape[1]:
        raise ValueError(f"symmetric needs y to be x, got {shape[0]} and {shape[1]} points")
    if guess and options.num_iterations is not None:
        init, guess = guess if init is None else init, ()
    if options.anneal is None and init is None:
        options = options._replace(anneal=True)
    a, b = _weights("a", a, shape[0], dtype), _weights("b", b, shape[1], dtype)
    level = jnp.asarray(epsilon).astype(dtype)
    f, g = _start(init, *shape, dtype)
    if gradient == "envelope":
        out = solve.envelope(options, arrays, a, b, level, f, g, guess)
    else:
        last = last_iterations if gradient == "last" else None
        out = solve.differentiated(options, last, arrays[0], a, b, level, f, g)
    # A cost that is not finite makes <P, C> not finite, even where the plan is 0.
    broken = ~(jnp.isfinite(out.cost) & (level > 0))
    value, cost, error = (
        jnp.where(broken, jnp.nan, z) for z in (out.value, out.cost, out.marginal_error)
    )
    return SinkhornResult(
        f=out.f,
        g=out.g,
        value=value,
        cost=cost,
        marginal_error=error,
        num_iterations=jax.lax.stop_gradient(out.count).astype(jnp.int32),
        converged=error + out.rounding <= options.tolerance,
        a=a,
        b=b,
        epsilon=level,
        geometry=arrays,
        cost_fn=None,
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
    relaxation: float | int | None = None,
    symmetric: bool = False,
) -> SinkhornResult:
    """Entropic optimal transport for a cost matrix, which may depend on learned parameters.

    value = min_P <P, C> + epsilon KL(P | a b^T). The options, the result and the errors are those
    of `sinkhorn`; the gradient of the value for the cost is the plan.
    """
    checks.rank("cost", cost, 2)
    checks.not_empty("cost", cost)
    checks.not_empty("cost[0]", cost[0])
    checks.floating("cost", cost)
    cost = at_least_float32(cost)
    options = solve.Options(
        num_iterations, tolerance, max_iterations, anneal, relaxation, symmetric, None
    )
    return _solve(
        (cost,),
        (cost.shape[0], cost.shape[1]),
        cost.dtype,
        options,
        epsilon=epsilon,
        a=a,
        b=b,
        init=init,
        gradient=gradient,
        last_iterations=last_iterations,
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
    relaxation: float | int | None = None,
    symmetric: bool = False,
    chunk_size: int | None = None,
) -> SinkhornResult:
    """Entropic optimal transport between two weighted point clouds.

    value = min_P <P, C> + epsilon KL(P | a b^T), with C = cost_fn(x, y) and the marginals of P a
    and b, uniform by default (Peyre and Cuturi 2019, section 4). Costs and epsilon share a unit.

    num_iterations: run that many plain log-domain iterations, f and then g. Otherwise stop at
    `tolerance`, an L1 marginal error, or after `max_iterations` sweeps of an annealed,
    over-relaxed solver.
    gradient: "envelope" differentiates value and cost with the potentials held constant: exact for
    the value at the optimum, and for the cost the gradient with the plan cut off (OT-GAN).
    "unroll" goes through all of num_iterations, "last" through `last_iterations` more after the
    solver: exact for the value with one, for the cost with many. Memory O(n m) for all three,
    "unroll" recomputing its exponentials.
    init: potentials (f, g) to start from. The solver then starts at epsilon itself, and goes back
    to annealing if they are of no use; `anneal` True or False forces either. Above 3% of the
    cost's scale there is nothing to anneal: the solver starts at epsilon anyway.
    relaxation: of both updates, in (0, 2); by default 1 for num_iterations, adapted otherwise.
    symmetric: y is x and b is a, for a symmetric cost: one potential, by averaged updates.
    chunk_size: form at most that many rows of the cost at a time, forward and backward, and never
    the matrix; cost_fn is then called on blocks of x.

    Weights are divided by their sum, so their gradients are the potentials less a constant:
    <a, gradient> = 0. Non-finite points give converged False and a NaN value. Narrow dtypes are
    computed in float32. Raises ValueError or TypeError for shapes, weights or options that do not
    fit and for epsilon <= 0.
    """
    options = solve.Options(
        num_iterations, tolerance, max_iterations, anneal, relaxation, symmetric, chunk_size
    )
    return between(
        x,
        y,
        cost_fn,
        options,
        epsilon=epsilon,
        a=a,
        b=b,
        init=init,
        gradient=gradient,
        last_iterations=last_iterations,
    )


def between(
    x: Array,
    y: Array,
    cost_fn: CostFn,
    options: solve.Options,
    *,
    gradient: str = "envelope",
    **problem: Any,
) -> SinkhornResult:
    """`sinkhorn` with its options packed, and a `guess` beside init: potentials that are returned
    where they meet the tolerance, stand in for init where it is None and they are near, and bound
    the value from below."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    for name, z in (("x", x), ("y", y)):
        checks.min_rank(name, z, 1)
        checks.not_empty(name, z)
        checks.floating(name, z)
    shape = (x.shape[0], y.shape[0])
    formed = jax.eval_shape(cost_fn, x, y)
    checks.shape("cost_fn(x, y)", formed, shape)
    x, y = at_least_float32(x), at_least_float32(y)
    dtype = jnp.promote_types(formed.dtype, jnp.float32)
    # A cosine is the difference of two numbers near 1, however small it is.
    options = options._replace(floor=1.0 if cost_fn is cosine else 0.0)
    arrays: tuple[Array, ...] = (x, y)
    if options.chunk_size is not None and cost_fn not in solve.COSTS:
        # What the cost closes over (learned parameters) becomes an argument, to differentiate.
        some = x[: blocks.rows(*shape, options.chunk_size)]
        converted, closed = jax.closure_convert(cost_fn, some, y)
        arrays = (x, y, *closed)
        options = options._replace(cost_fn=converted)
    elif cost_fn in solve.COSTS and gradient == "envelope":
        options = options._replace(cost_fn=cost_fn)
    else:
        arrays = (at_least_float32(cost_fn(x, y)),)
    result = _solve(arrays, shape, dtype, options, gradient=gradient, **problem)
    return dataclasses.replace(result, geometry=(x, y), cost_fn=cost_fn)
