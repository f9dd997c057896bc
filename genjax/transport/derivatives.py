"""One solve and its derivatives: at fixed potentials, of the potentials, or through iterations.

Each gives an `Outcome`, whose number of iterations is a float so that it may be differentiated.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from genjax.numerics import HIGHEST
from genjax.transport import blocks, iterate, solver
from genjax.transport.problem import Method, Problem, Scales, measure
from genjax.transport.reading import Potentials, Reading, read


class Outcome(NamedTuple):
    """f, g with <a, f> = <b, g>, and what a `Reading` says. The plan is that of `potentials`."""

    f: Array
    g: Array
    value: Array
    cost: Array
    error: Array
    count: Array
    slack: Array  # the value less <a, f> and <b, g>
    rounding: Array  # what the rounding of the cost may add to the marginal error
    potentials: Potentials


def unrolled(method: Method, problem: Problem) -> Outcome:
    """Solve, with the derivative through all iterations."""
    scales = measure(method, jax.lax.stop_gradient(problem))
    found = iterate.fixed(method, problem, scales)
    return _outcome(scales, found, read(method, problem, found.potentials, scales.large))


def _outcome(scales: Scales, found: solver.Solved, seen: Reading) -> Outcome:
    # Of a guess that is far off the exponentials overflow: what is not finite is no bound.
    better = jnp.where(jnp.isfinite(found.bound), found.bound - seen.value, 0)
    better = jax.lax.stop_gradient(jnp.maximum(better, 0))
    return Outcome(
        f=seen.f,
        g=seen.g,
        value=seen.value + better,
        cost=seen.cost,
        error=seen.error,
        count=jnp.asarray(found.count).astype(seen.f.dtype),
        slack=jax.lax.stop_gradient(seen.slack) + better,
        rounding=scales.rounding,
        potentials=found.potentials._replace(own=None),
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def envelope(method: Method, problem: Problem) -> Outcome:
    """Solve, with the derivative of the value at fixed potentials (the envelope theorem).

    Of the value it is P for the cost, f and g for the weights and KL(P | a b^T) for epsilon; of
    <P, C>, with the plan a constant, P. The potentials are constants.
    """
    scales, found = _solve(method, problem)
    return _outcome(scales, found, read(method, problem, found.potentials, scales.large))


@functools.partial(envelope.defjvp, symbolic_zeros=True)
def _envelope_jvp(method: Method, primals, tangents):
    problem, change = primals[0], tangents[0]
    wanted = tuple(not isinstance(t, SymbolicZero) for t in change.arrays)
    informed = not isinstance(change.epsilon, SymbolicZero)
    scales, found = _solve(method._replace(sharp=informed), jax.lax.stop_gradient(problem))
    live = _alive(method, problem, found.potentials)
    seen = read(method, problem, live, scales.large, wanted, informed)
    out = _outcome(scales, found, seen)

    def along(gradient, tangent):
        if isinstance(tangent, SymbolicZero):
            return jnp.zeros_like(out.value)
        return jnp.sum(gradient * tangent)

    moved = sum(
        (along(g, t) for g, t in zip(seen.gradient, change.arrays, strict=True)),
        jnp.zeros_like(out.value),
    )
    weighed = along(seen.f, change.a) + along(seen.g, change.b)
    weighed = weighed + along(seen.information, change.epsilon)
    still = jax.tree.map(jnp.zeros_like, out)
    return out, still._replace(value=moved + weighed, cost=moved)


def _solve(method: Method, problem: Problem) -> tuple[Scales, solver.Solved]:
    scales = measure(method, problem)
    if method.num_iterations is not None:
        return scales, iterate.fixed(method, problem, scales)
    if method.symmetric:
        return scales, iterate.self_transport(method, problem, scales)
    return scales, solver.anneal(method, problem, scales)


def _alive(method: Method, problem: Problem, found: Potentials) -> Potentials:
    """The potentials with their derivatives: for whoever differentiates a derivative."""
    g = found.base + found.gain
    own = found.f is not None
    df, dg = implicit(method, problem, found.f if own else 0 * problem.a, g)
    return found._replace(gain=found.gain + dg, f=found.f + df if own else None)


def still(x: Array) -> Array:
    """0, with the derivative of x."""
    return x - jax.lax.stop_gradient(x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def implicit(method: Method, problem: Problem, f: Array, g: Array) -> tuple[Array, Array]:
    """Zeros, with the derivatives of the potentials f and g at the optimum.

    The column sums of the plan whose rows are exact, P(g), stay b: with the densities
    K_ij = P_ij / (a_i b_j) the change of g solves

        (diag(K^T a) - K^T diag(a) K diag(b)) dg = -epsilon d(K^T a),

    the Schur complement of the plan. A constant is free: that of <a, f> = <b, g>. Forms the matrix.
    """
    return jnp.zeros_like(f), jnp.zeros_like(g)


@implicit.defjvp
def _implicit_jvp(method: Method, primals, tangents):
    problem, f, g = primals
    change = tangents[0]
    _, a, b, epsilon, *_ = problem
    k, _ = densities(method, problem, g)

    def sums(problem):
        k, f = densities(method, problem, g)
        return jnp.matmul(problem.a, k, precision=HIGHEST), f

    (cols, _), (cols_change, f_change) = jax.jvp(sums, (problem,), (change,))
    root = jnp.sqrt(b)
    gram = jnp.matmul(k.T * a[None, :], k, precision=HIGHEST)
    matrix = jnp.diag(cols) - root[:, None] * gram * root[None, :]
    dg = root * _solve_semidefinite(matrix, root, -epsilon * root * cols_change)
    # Columns of zero weight follow from the others.
    dg = (jnp.matmul(gram, dg, precision=HIGHEST) - epsilon * cols_change) / cols
    df = f_change - jnp.matmul(k * b[None, :], dg, precision=HIGHEST)
    shift = jnp.vdot(a, df) + jnp.vdot(change.a, f) - jnp.vdot(b, dg) - jnp.vdot(change.b, g)
    return implicit(method, problem, f, g), (df - shift / 2, dg + shift / 2)


def _solve_semidefinite(matrix: Array, null: Array, rhs: Array) -> Array:
    """x with matrix x = rhs and <null, x> = 0, for a matrix whose null space is the unit `null`."""
    matrix = matrix + null[:, None] * null[None, :]
    # Eigenvalues below the rounding of float32 belong to points that hardly exchange mass.
    ridge = 4 * jnp.finfo(matrix.dtype).eps
    matrix = matrix + ridge * jnp.eye(len(null), dtype=matrix.dtype)

    def solve(_, rhs):
        factor = jax.scipy.linalg.cho_factor(jax.lax.stop_gradient(matrix), lower=True)
        return jax.scipy.linalg.cho_solve(factor, rhs)

    def product(x):
        return jnp.matmul(matrix, x, precision=HIGHEST)

    return jax.lax.custom_linear_solve(product, rhs, solve, symmetric=True)


def densities(method: Method, problem: Problem, g: Array) -> tuple[Array, Array]:
    """P_ij / (a_i b_j) of the plan whose rows are exact, and f: forms the matrix."""
    parts = problem.blocks(method)

    def formed(_, rows):
        return None, parts.cost(rows)

    cost = parts.join(blocks.scan(formed, None, parts.rows(), parts.count)[1])
    large = measure(method, jax.lax.stop_gradient(problem)).large
    return row_densities(cost, g, 0 * g, problem.b, problem.epsilon, large)


def row_densities(cost, base, gain, b, epsilon, large) -> tuple[Array, Array]:
    """The same of a matrix, for g = base + gain."""
    w, peak = blocks.row_exponentials(cost, base, gain, b, epsilon, large)
    log_total = blocks.log_sum(jnp.matmul(w, b, precision=HIGHEST), large)
    k = (w + large.astype(w.dtype)) * jnp.exp(-log_total)[:, None]
    return k, -(peak + epsilon * log_total)


def plan(cost, base, gain, a, b, epsilon) -> Array:
    """P for column potentials base + gain: its rows sum to a."""
    problem = Problem((cost,), a, b, epsilon, (a, b))
    large = measure(Method(None), jax.lax.stop_gradient(problem)).large
    return a[:, None] * row_densities(cost, base, gain, b, epsilon, large)[0] * b[None, :]
