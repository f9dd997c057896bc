"""Iterations that need no annealing: one cloud against itself, and a fixed number of updates."""

import jax
import jax.numpy as jnp

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
    goal, _ = solver.goal_of(method, scales, epsilon)
    infinite = jnp.full_like(epsilon, jnp.inf)

    def unfinished(state):
        return (state[2] > goal) & (state[3] < method.max_iterations)

    def stage(state):
        base = state[0] + state[1]
        kernel = solver.absorb(blocks, a, base, epsilon, method.chunk_size)

        def body(state):
            _, gain, _, count = state
            if kernel.stored is None:
                new = passes.row_update(blocks, base + gain, a, epsilon, scales.large) - base
            else:
                v = a * jnp.exp(gain / epsilon)
                sums = jnp.einsum("kij,j->ki", kernel.stored, v, precision=HIGHEST)
                new = -(blocks.join(kernel.peak + epsilon * jnp.log(sums)) + base)
            off = jnp.abs(jnp.expm1(jnp.where(a > 0, gain - new, 0) / epsilon))
            error = 2 * passes.sums(a, off)[0]
            return base, jnp.where(error > goal, (gain + new) / 2, gain), error, count + 1

        def going(state):
            return unfinished(state) & (jnp.max(jnp.abs(state[1])) < solver.REACH * epsilon)

        return jax.lax.while_loop(going, body, (base, 0 * base, infinite, state[3]))

    f = problem.start[0]
    start = (f, jnp.zeros_like(f), infinite, jnp.zeros((), jnp.int32))
    base, gain, _, count = jax.lax.while_loop(unfinished, stage, start)
    found = Potentials(base, gain, base + gain, jnp.full_like(scales.large, True))
    return solver.Solved(found, count, -infinite)


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

    (f, g), _ = jax.lax.scan(body, problem.start, None, length=method.num_iterations)
    own, bound = jnp.full_like(large, True), jnp.full_like(epsilon, -jnp.inf)
    found = Potentials(g, 0 * g, *((f, own) if method.symmetric else ()))
    if problem.guess is not None and method.warm:
        at = Potentials(problem.guess[1], 0 * g, problem.guess[0], own)
        bound = read(method, problem, at, large).value
    return solver.Solved(found, jnp.asarray(method.num_iterations), bound)
