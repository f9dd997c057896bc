"""Iterations that need no annealing: one cloud against itself, and a fixed number of updates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax.numerics import HIGHEST
from genjax.transport import blocks as passes
from genjax.transport import solver
from genjax.transport.problem import Method, Problem, Scales
from genjax.transport.reading import Potentials, read


def self_transport(method: Method, problem: Problem, scales: Scales) -> solver.Solved:
    """The potential of one cloud against itself, by the mean of it and its update.

    The error halves at every update where the kernel is positive definite; the rows of P sum to
    a exp((f - update) / epsilon), which is the marginal error, counted for rows and columns.
    """
    blocks, a, epsilon = problem.blocks(method), problem.a, problem.epsilon
    goal, limit = (
        solver.goal_of(method, scales, epsilon)[0],
        jnp.where(scales.sound, method.max_iterations, 0),
    )
    infinite = jnp.full_like(epsilon, jnp.inf)

    def unfinished(state):
        return (state[2] > goal) & (state[3] < limit)

    def stage(state):
        base, gain, _, count = state
        base = base + gain
        kernel = solver.absorb(blocks, a, base, epsilon)

        def update(gain: Array) -> Array:
            """The update of base + gain, less base."""
            v = a * jnp.exp(gain / epsilon)
            sums = jnp.einsum("kij,j->ki", kernel.stored, v, precision=HIGHEST)
            return -(blocks.join(kernel.peak + epsilon * jnp.log(sums)) + base)

        def streamed(gain: Array) -> Array:
            return passes.row_update(blocks, base + gain, a, epsilon, scales.large) - base

        def body(state):
            gain, _, count = state
            new = update(gain) if method.chunk_size is None else streamed(gain)
            error = jnp.abs(jnp.expm1(jnp.where(a > 0, gain - new, 0) / epsilon))
            error = 2 * passes.sums(a, error)[0]
            return jnp.where(error > goal, (gain + new) / 2, gain), error, count + 1

        def going(state):
            near = jnp.max(jnp.abs(state[0])) < solver.REACH * epsilon
            return unfinished((base, *state)) & near

        gain, error, count = jax.lax.while_loop(going, body, (0 * base, infinite, count))
        return base, gain, error, count

    f = problem.start[0]
    start = (f, jnp.zeros_like(f), infinite, jnp.zeros((), jnp.int32))
    base, gain, _, count = jax.lax.while_loop(unfinished, stage, start)
    found = Potentials(base, gain, base + gain, jnp.full_like(scales.sound, True))
    return solver.Solved(found, count, jnp.full_like(epsilon, -jnp.inf))


def fixed(method: Method, problem: Problem, scales: Scales) -> solver.Solved:
    """That many plain updates of g and then f, differentiable; symmetric ones for one cloud.

    The reverse pass keeps the potentials of every iteration, and recomputes the exponentials.
    """
    blocks, epsilon, large = problem.blocks(method), problem.epsilon, scales.large
    if method.chunk_size is None and method.cost_fn is not None:
        blocks = passes.make((method.cost_fn(*problem.arrays),), None, None)

    @jax.checkpoint
    def iteration(blocks_arrays, f, a, b, epsilon):
        seen = blocks._replace(arrays=blocks_arrays)
        if method.symmetric:
            f = (f + passes.row_update(seen, f, a, epsilon, large)) / 2
            return f, f
        g = passes.col_update(seen, f, a, epsilon, large)
        return passes.row_update(seen, g, b, epsilon, large), g

    def body(state, _):
        return iteration(blocks.arrays, state[0], problem.a, problem.b, epsilon), None

    count = jnp.asarray(method.num_iterations, jnp.int32)
    bound = jnp.full_like(epsilon, -jnp.inf)
    (f, g), _ = jax.lax.scan(body, problem.start, None, length=method.num_iterations)
    own = jnp.full_like(large, True) if method.symmetric else None
    found = Potentials(g, jnp.zeros_like(g), f if method.symmetric else None, own)
    if problem.guess is not None and method.warm:
        at = Potentials(problem.guess[1], jnp.zeros_like(g), problem.guess[0], ~(large & ~large))
        bound = read(method, problem, at, large).value
    return solver.Solved(found, count, bound)
