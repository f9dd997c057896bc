"""Entropic optimal transport: `sinkhorn` between point clouds, `sinkhorn_from_cost` for a matrix.

    value = min_P <P, C> + epsilon KL(P | a b^T),   P 1 = a,  P^T 1 = b

(Cuturi 2013; Peyre and Cuturi, Computational Optimal Transport, 2019, chapter 4).
"""

import dataclasses
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from genjax import checks
from genjax.numerics import at_least_float32
from genjax.transport import blocks, derivatives
from genjax.transport.costs import cosine, squared_euclidean
from genjax.transport.derivatives import still
from genjax.transport.forbidden import barred, refuse_isolated
from genjax.transport.problem import COSTS, Method, Problem
from genjax.typing import CostFn

GRADIENTS = ("envelope", "implicit", "unroll")


class Limits(TypedDict, total=False):
    """When to stop.

    num_iterations: run that many plain log-domain iterations, f and then g. By default None: stop
    at `tolerance`, an L1 marginal error (1e-3), or after `max_iterations` sweeps (10,000) of an
    annealed, over-relaxed solver.
    """

    num_iterations: int | None
    tolerance: float | int
    max_iterations: int


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class SinkhornResult:
    """What a solver returns; a pytree, with the plan formed on demand by `plan()`.

    f, g: potentials in units of the cost, P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon); they
    are defined up to a constant, chosen so that <a, f> and <b, g> are equal (nearly so after a
    fixed number of iterations).
    value: the regularised optimum, <a, f> + <b, g> + slack; slack is 0 unless both marginals are
    inexact. cost: <P, C>, without the entropy.
    marginal_error: |P 1 - a|_1 + |P^T 1 - b|_1, of the potentials that are returned.
    converged: whether that error is at most the tolerance, with room for the rounding of the cost.
    """

    potentials: tuple[Float[Array, " n"], Float[Array, " m"]]
    value: Float[Array, ""]
    cost: Float[Array, ""]
    marginal_error: Float[Array, ""]
    num_iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    epsilon: Float[Array, ""]
    slack: Float[Array, ""]
    geometry: tuple[Array, ...]
    scaling: tuple[Array, Array]  # potential of one side as a sum of two, for the plan
    cost_fn: CostFn | None
    gradient: str
    exchanged: bool  # whether the scaling is that of f: the columns of the plan are exact

    @property
    def f(self) -> Array:
        return self._differentiable()[0]

    @property
    def g(self) -> Array:
        return self._differentiable()[1]

    def plan(self) -> Float[Array, "n m"]:
        """The transport plan [n, m]: forms the cost matrix, whatever `chunk_size` was."""
        given, weights = self.cost_matrix(), (self.a, self.b)
        cost, (base, gain) = barred(given, self.epsilon)[0], self.scaling
        if self.gradient != "unroll":
            gain = gain + still(self._differentiable()[0 if self.exchanged else 1])
        if self.exchanged:
            plan = derivatives.plan(cost.T, base, gain, *weights[::-1], self.epsilon).T  # pyright: ignore
        else:
            plan = derivatives.plan(cost, base, gain, *weights, self.epsilon)
        return jnp.where(given == jnp.inf, 0, plan)

    def cost_matrix(self) -> Float[Array, "n m"]:
        """The costs [n, m]."""
        if self.cost_fn is None:
            return self.geometry[0]
        return at_least_float32(self.cost_fn(*self.geometry))

    def _differentiable(self) -> tuple[Array, Array]:
        """The potentials, with the derivatives of the optimum unless they have their own."""
        if self.gradient == "unroll":
            return self.potentials
        arrays, cost_fn = self.geometry, self.cost_fn
        known = cost_fn in COSTS
        if cost_fn is not None and not known:
            cost_fn, closed = jax.closure_convert(cost_fn, *arrays)
            arrays = (*arrays, *closed)
        f, g = self.potentials
        problem = Problem(arrays, self.a, self.b, self.epsilon, (f, g))

        def run(problem: Problem, f: Array, g: Array) -> tuple[Array, Array]:
            if not known:
                given = cost_fn(*problem.arrays) if cost_fn else problem.arrays[0]
                finite = barred(at_least_float32(given), problem.epsilon)[0]
                problem = problem._replace(arrays=(finite,))
            return derivatives.implicit(Method(cost_fn if known else None), problem, f, g)

        for _ in range(f.ndim - 1):  # results that came out of jax.vmap
            run = jax.vmap(run)
        df, dg = run(problem, f, g)
        return f + df, g + dg

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        names = [field.name for field in dataclasses.fields(self)]
        values = tuple(getattr(self, name) for name in names)
        return values[:-3], values[-3:]

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], leaves: tuple[Any, ...]) -> "SinkhornResult":
        # Transformations put placeholders into the leaves: no checks of types here.
        new = object.__new__(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        for name, leaf in zip(names, (*leaves, *static), strict=True):
            object.__setattr__(new, name, leaf)
        return new


def sinkhorn(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    epsilon: ArrayLike,
    cost_fn: CostFn = squared_euclidean,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    gradient: str = "envelope",
    init: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
    chunk_size: int | None = None,
    **limits: Unpack[Limits],
) -> SinkhornResult:
    """Entropic optimal transport between two weighted point clouds.

    value = min_P <P, C> + epsilon KL(P | a b^T), with C = cost_fn(x, y) and the marginals of P a
    and b, uniform by default (Peyre and Cuturi 2019, section 4). Costs and epsilon share a unit.

    num_iterations, tolerance, max_iterations: when to stop, as in `Limits`.
    gradient: "envelope" differentiates value and cost with the potentials held constant: exact for
    the value at the optimum, and for the cost the gradient with the plan cut off (OT-GAN); f, g
    and plan() have the derivatives of the optimum, by the implicit function theorem (a dense
    linear solve of size m, done only where they are asked for). "implicit" differentiates the cost
    so too. "unroll" goes through all of num_iterations, recomputing its exponentials. The first
    two have second derivatives.
    init: potentials (f, g) to start from. The solver then starts at epsilon itself, and goes back
    to annealing if they are of no use.
    chunk_size: form at most that many rows of the cost at a time, forward and backward, and never
    the matrix, unless plan() or derivatives of f and g are asked for; cost_fn is then called on
    blocks of one cloud.

    An infinite cost of a cost_fn of one's own forbids its pair, as in `sinkhorn_from_cost`, but not
    in blocks (chunk_size). Weights are divided by their sum, so their gradients are the potentials
    less a constant: <a, gradient> = 0. Non-finite points give converged False and a NaN value.
    Narrow dtypes are computed in float32. Raises ValueError or TypeError for shapes, weights or
    options that do not fit and for epsilon <= 0.

    >>> x, y = jax.random.normal(jax.random.key(0), (2, 64, 2))
    >>> result = sinkhorn(x, y + 1, epsilon=0.1)
    >>> bool(result.converged), result.plan().shape
    (True, (64, 64))
    """
    method = make_method(gradient, init, chunk_size, **limits)
    return solve_clouds(x, y, cost_fn, method, epsilon=epsilon, a=a, b=b, init=init)


def sinkhorn_from_cost(
    cost: Float[Array, "n m"],
    *,
    epsilon: ArrayLike,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    gradient: str = "envelope",
    init: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
    **limits: Unpack[Limits],
) -> SinkhornResult:
    """Entropic optimal transport for a cost matrix, which may depend on learned parameters.

    value = min_P <P, C> + epsilon KL(P | a b^T). The options, the result and the errors are those
    of `sinkhorn`; the gradient of the value for the cost is the plan.

    An infinite entry forbids its pair: the plan and the gradient are 0 there. Where no plan is
    left value, cost and marginal_error are infinite; ValueError is raised, if the cost is concrete,
    where all of a row or a column that has weight is infinite.

    >>> result = sinkhorn_from_cost(jnp.array([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.01)
    >>> result.plan().round(3)
    Array([[0.5, 0. ],
           [0. , 0.5]], dtype=float32)
    """
    checks.rank("cost", cost, 2)
    checks.not_empty("cost", cost)
    checks.not_empty("cost[0]", cost[0])
    checks.floating("cost", cost)
    method = make_method(gradient, init, None, **limits)
    cost = at_least_float32(cost)
    n, m = cost.shape
    problem = _problem((cost,), (n, m), cost.dtype, epsilon, a, b, init)
    refuse_isolated(cost, a, b)
    finite, most, sizes = barred(cost, problem.epsilon)
    problem = problem._replace(arrays=(finite,), sizes=sizes)
    exchanged = ends_with_columns(method)
    if exchanged:
        problem = _exchange(problem)._replace(arrays=(finite.T,))
    return _solve(method, problem, (cost,), None, exchanged, most)


def make_method(
    gradient: str = "envelope",
    init: Any = None,
    chunk_size: int | None = None,
    *,
    num_iterations: int | None = None,
    tolerance: float | int = 1e-3,
    max_iterations: int = 10_000,
) -> Method:
    """The options of `sinkhorn`, checked."""
    checks.one_of("gradient", gradient, GRADIENTS)
    checks.positive("tolerance", tolerance)
    checks.integer("max_iterations", max_iterations, 1)
    if num_iterations is not None:
        checks.integer("num_iterations", num_iterations, 1)
    elif gradient == "unroll":
        raise ValueError("gradient 'unroll' needs num_iterations, a fixed number; got None")
    if chunk_size is not None:
        checks.integer("chunk_size", chunk_size, 1)
        if gradient != "envelope":
            raise ValueError(f"chunk_size needs gradient 'envelope', got {gradient!r}")
    warm = init is not None
    return Method(None, gradient, num_iterations, tolerance, max_iterations, chunk_size, warm)


def ends_with_columns(method: Method) -> bool:
    """A fixed number of iterations ends with g: it is solved with the sides exchanged."""
    return method.num_iterations is not None and not method.symmetric


def solve_clouds(
    x: Array,
    y: Array,
    cost_fn: CostFn,
    method: Method,
    *,
    epsilon: ArrayLike,
    a: Any,
    b: Any,
    init: Any,
    guess: tuple[Array, Array] | None = None,
) -> SinkhornResult:
    """`sinkhorn` with its options packed, and the `guess` of a `Problem`."""
    x, y, dtype = checked_clouds(x, y, cost_fn)
    problem = _problem((x, y), (len(x), len(y)), dtype, epsilon, a, b, init)._replace(guess=guess)
    exchanged, block_cost, most = ends_with_columns(method), cost_fn, jnp.inf
    if exchanged:
        problem = _exchange(problem)
        if cost_fn not in COSTS:
            block_cost = lambda y, x: cost_fn(x, y).T  # noqa: E731
    # The unit vectors of a cosine are rounded, however small it is.
    method = method._replace(floor=1.0 if cost_fn is cosine else 0.0)
    if method.chunk_size is not None and cost_fn not in COSTS:
        # What the cost closes over (learned parameters) becomes an argument, to differentiate.
        first, second = problem.arrays
        some = first[: blocks.rows(len(first), len(second), method.chunk_size)]
        block_cost, closed = jax.closure_convert(block_cost, some, second)
        problem = problem._replace(arrays=(first, second, *closed))
    elif cost_fn not in COSTS or method.gradient == "unroll":
        cost, block_cost = at_least_float32(block_cost(*problem.arrays)), None
        if cost_fn not in COSTS:
            refuse_isolated(cost.T if exchanged else cost, a, b)
            cost, most, sizes = barred(cost, problem.epsilon)
            problem = problem._replace(sizes=sizes)
        problem = problem._replace(arrays=(cost,))
    return _solve(method._replace(cost_fn=block_cost), problem, (x, y), cost_fn, exchanged, most)


def checked_clouds(x: Any, y: Any, cost_fn: CostFn) -> tuple[Array, Array, Any]:
    """Two clouds in float32 at least, and the dtype of their cost."""
    for name, z in (("x", x), ("y", y)):
        checks.min_rank(name, z, 1)
        checks.not_empty(name, z)
        checks.floating(name, z)
    x, y = jnp.asarray(x), jnp.asarray(y)
    formed = jax.eval_shape(cost_fn, x, y)
    checks.shape("cost_fn(x, y)", formed, (len(x), len(y)))
    dtype = jnp.promote_types(formed.dtype, jnp.float32)
    return at_least_float32(x), at_least_float32(y), dtype


def _problem(arrays, shape, dtype, epsilon, a, b, init) -> Problem:
    checks.rank("epsilon", epsilon, 0)
    checks.positive("epsilon", epsilon)
    a, b = normalised("a", a, shape[0], dtype), normalised("b", b, shape[1], dtype)
    return Problem(arrays, a, b, jnp.asarray(epsilon).astype(dtype), _start(init, *shape, dtype))  # pyright: ignore


def _exchange(problem: Problem) -> Problem:
    return problem._replace(
        arrays=problem.arrays[::-1],
        a=problem.b,
        b=problem.a,
        start=problem.start[::-1],
        guess=None if problem.guess is None else problem.guess[::-1],
    )


def normalised(name: str, weights: Any, size: int, dtype: Any) -> Array:
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


def _solve(
    method: Method,
    problem: Problem,
    geometry: tuple[Array, ...],
    cost_fn: CostFn | None,
    exchanged: bool,
    most: Array | float = jnp.inf,
) -> SinkhornResult:
    if method.num_iterations is not None and problem.guess is not None and not method.warm:
        problem = problem._replace(start=problem.guess)
    run = derivatives.unrolled if method.gradient == "unroll" else derivatives.envelope
    out = run(method, problem)
    # A cost that is not finite makes <P, C> not finite, even where the plan is 0.
    broken = ~(jnp.isfinite(out.cost) & (problem.epsilon > 0))
    value, cost, error = (
        jnp.where(broken, jnp.nan, jnp.where(out.value > most, jnp.inf, z))
        for z in (out.value, out.cost, out.error)
    )
    sides = (out.f, out.g), (problem.a, problem.b)
    (f, g), (a, b) = (z[::-1] for z in sides) if exchanged else sides
    result = SinkhornResult(
        potentials=(f, g),
        value=value,
        cost=cost,
        marginal_error=error,
        num_iterations=jax.lax.stop_gradient(out.count).astype(jnp.int32),
        converged=error + out.rounding <= method.tolerance,
        a=a,
        b=b,
        epsilon=problem.epsilon,
        slack=out.slack,
        geometry=geometry,
        scaling=(out.potentials.base, out.potentials.gain),
        cost_fn=cost_fn,
        gradient=method.gradient,
        exchanged=exchanged,
    )
    if method.gradient == "implicit":
        plan, costs = result.plan(), result.cost_matrix()
        change = still(jnp.sum(plan * jnp.where(costs == jnp.inf, 0, costs)))
        result = dataclasses.replace(result, cost=jax.lax.stop_gradient(cost) + change)
    return result
