"""One solve and its derivatives: at fixed potentials, through all iterations, or through the last.

Each returns an `Outcome`, whose number of iterations is a float so that it may be differentiated.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from genjax.transport import blocks, kernel, log_domain
from genjax.transport.costs import DIRECT_DIMS, cosine, euclidean, squared_euclidean

# Costs that are cheap to form again, block by block.
COSTS = (squared_euclidean, euclidean, cosine)
# With FINE points on both sides, annealing is done on a sample of COARSE, or a quarter. (Where the
# kernel is not stored `kernel.solve` takes a sample by itself.)
FINE, COARSE = 512, 2048


class Options(NamedTuple):
    """What is static in a solve. cost_fn is None where the cost is given as a matrix.

    floor: the cost was computed, with the rounding of numbers at least that large; None where the
    matrix itself is what was asked about.
    """

    num_iterations: int | None
    tolerance: float
    max_iterations: int
    anneal: bool | None
    relaxation: float | None
    symmetric: bool
    chunk_size: int | None
    cost_fn: Callable | None = None
    floor: float | None = None


class Outcome(NamedTuple):
    f: Array
    g: Array
    value: Array
    cost: Array
    marginal_error: Array
    count: Array
    rounding: Array  # what the rounding of the cost may add to the marginal error


def _moments(options: Options, arrays: tuple[Array, ...]) -> tuple[Array, Array]:
    """The variation of the cost, and its size where it is rounded, for scales and stopping."""
    if options.cost_fn is None:
        sample = arrays[0]
    elif options.cost_fn is squared_euclidean:
        x, y = arrays
        centre, other = (jnp.mean(z, axis=0, keepdims=True) for z in arrays)
        scale = jnp.sum(jnp.square(x - centre)) / len(x) + jnp.sum(jnp.square(y - other)) / len(y)
        size = scale + jnp.sum(jnp.square(centre - other))
        # Differences lose nothing but the last digit of a cost that is small where the plan is.
        return scale, size - scale / 2 if x.shape[1] <= DIRECT_DIMS else size
    else:
        # A sample of rows stands for the rest: as many as a block has, where the cost was traced
        # for one.
        n, m = arrays[0].shape[0], arrays[1].shape[0]
        known = options.cost_fn in COSTS
        count = min(n, 64) if known else blocks.rows(n, m, options.chunk_size)
        sample = options.cost_fn(arrays[0][np.arange(count) * n // count], *arrays[1:])
    mean = jnp.mean(sample)
    if options.floor is None:
        return mean - jnp.min(sample), jnp.zeros_like(mean)
    return mean - jnp.min(sample), jnp.maximum(jnp.mean(jnp.abs(sample)), options.floor)


def _rounding(size: Array, epsilon: Array) -> Array:
    return jnp.finfo(size.dtype).eps * size / epsilon


def _judge(seen: blocks.Reading, f, g, a, b, epsilon) -> tuple[Array, Array]:
    """The marginal error, and the dual objective, a lower bound of the value."""
    error = jnp.sum(jnp.abs(seen.row_sums - a)) + jnp.sum(jnp.abs(seen.col_sums - b))
    return error, jnp.sum(a * f) + jnp.sum(b * g) - epsilon * (jnp.sum(seen.col_sums) - 1)


def _potentials(
    options: Options, arrays, a, b, epsilon, f, g, guess: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Run the solver that the options name: f, g, the count, the rounding, a bound of the value."""
    limit = options.num_iterations
    scale, size = _moments(options, arrays)
    rounding = _rounding(size, epsilon)
    bound = jnp.full_like(rounding, -jnp.inf)
    if limit is not None and options.chunk_size is not None:
        parts = blocks.make(arrays, options.cost_fn, options.chunk_size)
        f, g = kernel.scan_updates(parts, f, g, a, b, epsilon, limit, options.symmetric)
        return f, g, jnp.asarray(limit, f.dtype), rounding, bound
    if limit is not None:
        cost = arrays[0] if options.cost_fn is None else options.cost_fn(*arrays)
        if options.symmetric:
            f = log_domain.scan_symmetric(cost, f, a, epsilon, limit)
            return f, f, jnp.asarray(limit, f.dtype), rounding, bound
        relaxation = 1.0 if options.relaxation is None else options.relaxation
        f, g = log_domain.scan_updates(cost, f, g, a, b, epsilon, limit, relaxation)
        return f, g, jnp.asarray(limit, f.dtype), rounding, bound
    parts = blocks.make(arrays, options.cost_fn, options.chunk_size)
    tiny = jnp.finfo(f.dtype).eps
    # Potentials are rounded too: leave room for both below the tolerance.
    room = rounding + tiny * scale / (4 * epsilon)
    goal = jnp.maximum(0.95 * options.tolerance - room, 0.3 * options.tolerance)
    smooth = kernel.SMOOTH * scale
    sound = jnp.isfinite(scale) & jnp.isfinite(jnp.sum(a) + jnp.sum(b)) & (epsilon > 0)
    sound = sound & (jnp.minimum(jnp.min(a), jnp.min(b)) >= 0)
    problem = kernel.Problem(
        blocks=parts,
        a=a,
        b=b,
        epsilon=epsilon,
        scale=jnp.maximum(scale, tiny * epsilon),
        goal=goal,
        limit=jnp.where(sound, options.max_iterations, 0),
        # Where epsilon is large the first sweeps at it do what the stages above it would.
        start=jnp.where(epsilon < smooth, scale / 4, epsilon),
    )
    stored = options.chunk_size is None
    served = near = epsilon > jnp.inf
    if guess:
        p, q = guess
        error, bound = _judge(blocks.read(parts, p, q, a, b, epsilon), p, q, a, b, epsilon)
        enough = jnp.maximum(options.tolerance - rounding, goal)
        served, near = error <= enough, error <= kernel.HOPELESS
        problem = problem._replace(limit=jnp.where(served, 0, problem.limit))
        if options.anneal:
            g = jnp.where(near, q, g)
            problem = problem._replace(start=jnp.where(near, epsilon, problem.start))
    before = 0
    if options.anneal and not options.symmetric and _thinnable(options, parts):
        cold = (epsilon < smooth) & ~near
        g, before = jax.lax.cond(
            cold,
            lambda: _coarse(problem, smooth),
            lambda: (g, jnp.zeros((), jnp.int32)),
        )
        problem = problem._replace(start=jnp.where(cold, smooth, epsilon))
    if options.symmetric:
        f, count = kernel.solve_symmetric(problem, f, stored=stored)
        return f, f, count.astype(f.dtype), rounding, bound
    f, g, count = kernel.solve(
        problem, g, anneal=options.anneal, relaxation=options.relaxation, stored=stored
    )
    count = count + before
    if guess:
        f, g = (jnp.where(served, new, old) for new, old in zip(guess, (f, g), strict=True))
    # Of the constant by which potentials may differ: <a, f> = <b, g>, where both are smallest.
    shift = (jnp.sum(a * f) - jnp.sum(b * g)) / 2
    return f - shift, g + shift, count.astype(f.dtype), rounding, bound


def _thinnable(options: Options, parts: blocks.Blocks) -> bool:
    """Whether a sample of the points can be annealed in place of all of them."""
    plain = options.cost_fn is None or options.cost_fn in COSTS
    return options.chunk_size is None and plain and min(parts.n, parts.m) >= FINE


def _coarse(problem: kernel.Problem, level: Array) -> tuple[Array, Array]:
    """Anneal every k-th point down to an epsilon at which a sample tells the potential of all.

    Returns the potential extended to all of y, and the number of sweeps.
    """
    parts = problem.blocks
    rows, cols = (slice(None, None, max(4, size // COARSE)) for size in (parts.n, parts.m))
    if parts.cost_fn is None:
        tall = (parts.arrays[0][rows],)
        arrays = (tall[0][:, cols],)
    else:
        x, y = parts.arrays
        tall, arrays = (x[rows], y), (x[rows], y[cols])
    small = problem._replace(
        blocks=blocks.make(arrays, parts.cost_fn, None),
        a=_thin(problem.a, rows),
        b=_thin(problem.b, cols),
        epsilon=level,
        goal=jnp.maximum(problem.goal, kernel.LOOSE),
    )
    start = jnp.zeros_like(small.b)
    f, _, count = kernel.solve(small, start, anneal=True, relaxation=None, stored=True)
    wide = blocks.make(tall, parts.cost_fn, None)
    return blocks.col_update(wide, f, small.a, level), count


def _thin(weights: Array, every: slice) -> Array:
    some = weights[every]
    total = jnp.sum(some)
    return jnp.where(total > 0, some / jnp.where(total > 0, total, 1), 1 / some.size)


def _solve(
    options: Options, wanted: tuple[bool, ...], arrays, a, b, epsilon, f, g, guess
) -> tuple[Outcome, tuple[Array | None, ...]]:
    """Solve, and read value, cost, error and the wanted gradients off the potentials."""
    f, g, count, rounding, bound = _potentials(options, arrays, a, b, epsilon, f, g, guess)
    parts = blocks.make(arrays, options.cost_fn, options.chunk_size)
    seen = blocks.read(parts, f, g, a, b, epsilon, wanted)
    error, dual = _judge(seen, f, g, a, b, epsilon)
    value = jnp.maximum(dual, bound)
    return Outcome(f, g, value, seen.total, error, count, rounding), seen.gradient


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def envelope(options: Options, arrays, a, b, epsilon, f, g, guess) -> Outcome:
    """Solve, with the derivative of the value at fixed potentials (the envelope theorem).

    Of the value it is P for the cost, f and g for the weights and KL(P | a b^T) for epsilon; of
    <P, C>, with the plan a constant, P. The potentials are constants. `guess` is () or potentials
    which are returned where they meet the tolerance, and whose dual objective bounds the value.
    """
    return _solve(options, (), arrays, a, b, epsilon, f, g, guess)[0]


@functools.partial(envelope.defjvp, symbolic_zeros=True)
def _envelope_jvp(options: Options, primals, tangents):
    wanted = tuple(not isinstance(t, SymbolicZero) for t in tangents[0])
    out, gradient = _solve(options, wanted, *primals)
    epsilon = primals[3]

    def along(gradient, tangent):
        if isinstance(tangent, SymbolicZero):
            return jnp.zeros_like(out.value)
        return jnp.sum(gradient * tangent)

    moved = sum(
        (along(g, t) for g, t in zip(gradient, tangents[0], strict=True)),
        jnp.zeros_like(out.value),
    )
    change = along(out.f, tangents[1]) + along(out.g, tangents[2])
    change = change + along((out.value - out.cost) / epsilon, tangents[3])
    still = jax.tree.map(jnp.zeros_like, out)
    return out, still._replace(value=moved + change, cost=moved)


def differentiated(options: Options, last: int | None, cost, a, b, epsilon, f, g) -> Outcome:
    """Solve with the derivative through the `last` iterations only, or through all for None."""
    relaxation = 1.0
    if options.num_iterations is not None and options.relaxation is not None:
        relaxation = options.relaxation
    count = jnp.zeros((), cost.dtype)
    if last is None:
        last = options.num_iterations or 1
        fixed = jax.lax.stop_gradient(cost)
        rounding = _rounding(_moments(options, (fixed,))[1], jax.lax.stop_gradient(epsilon))
    else:
        before = options
        if options.num_iterations is not None:
            last = min(last, options.num_iterations)
            before = options._replace(num_iterations=options.num_iterations - last)
        fixed = jax.lax.stop_gradient(((cost,), a, b, epsilon, f, g))
        f, g, count, rounding, _ = jax.lax.stop_gradient(_potentials(before, *fixed, ()))
    if options.symmetric:
        f = log_domain.scan_symmetric(cost, f, a, epsilon, last)
        g = f
    else:
        f, g = log_domain.scan_updates(cost, f, g, a, b, epsilon, last, relaxation)
    p = log_domain.plan(cost, f, g, a, b, epsilon)
    rows, cols = jnp.sum(p, axis=1), jnp.sum(p, axis=0)
    error = jnp.sum(jnp.abs(rows - a)) + jnp.sum(jnp.abs(cols - b))
    dual = jnp.sum(a * f) + jnp.sum(b * g) - epsilon * (jnp.sum(p) - 1)
    return Outcome(f, g, dual, jnp.sum(p * cost), error, count + last, rounding)
