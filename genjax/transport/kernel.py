"""The solver behind `tolerance`: Sinkhorn in the kernel domain around absorbed potentials.

Within a stage of the annealing the potentials are F + epsilon log u and G + epsilon log v, and an
iteration is two matrix-vector products with the kernel around F and G, which is built once.
"""

import jax
import jax.numpy as jnp

from genjax.transport.log_domain import col_update, log_weights, row_update

# Scalings beyond e^30 are absorbed into the potentials, long before float32 ends.
LARGEST = 1e13


def solve(cost, a, b, epsilon, g, *, start, tolerance, max_iterations):
    """Anneal from `start` down to epsilon and iterate until the marginal error meets tolerance."""
    log_a, log_b = log_weights(a), log_weights(b)

    def sweep(state):
        kernel, goal, u, v, _, count = state
        u = 1 / (kernel @ v)
        sums = (a * u) @ kernel
        error = jnp.sum(jnp.abs(v * sums - b))
        v = jnp.where(b > 0, jnp.clip(b / sums, 1 / (LARGEST * LARGEST), LARGEST * LARGEST), 1)
        return kernel, goal, u, v, error, count + 1

    def going(state):
        _, goal, _, v, error, count = state
        inside = (jnp.max(v) < LARGEST) & (jnp.min(v) > 1 / LARGEST)
        return (error > goal) & inside & (count < max_iterations)

    def stage(state):
        g, level, _, count = state
        z = (g[None, :] - cost) / level + log_b[None, :]
        peak = jnp.max(z, axis=1)
        kernel = jnp.exp(z - peak[:, None])
        last = level <= epsilon
        goal = jnp.where(last, 0.6 * tolerance, jnp.maximum(tolerance, 0.1))
        v = jnp.ones_like(g)
        first = (kernel, goal, jnp.ones_like(a), v, jnp.asarray(jnp.inf, g.dtype), count)
        _, _, u, v, error, count = jax.lax.while_loop(going, sweep, first)
        wild = (jnp.max(v) >= LARGEST) | (jnp.min(v) <= 1 / LARGEST)
        f = level * (jnp.log(u) - peak)
        g = jax.lax.cond(
            wild,
            lambda: col_update(cost, f, log_a, level),
            lambda: g + level * jnp.log(v),
        )
        done = last & ~wild & ~(error > goal)
        error = jnp.where(done, 0, jnp.inf)
        return g, jnp.where(wild, level, jnp.maximum(level / 2, epsilon)), error, count

    def unfinished(state):
        return (state[2] > 0) & (state[3] < max_iterations)

    level = jnp.maximum(start, epsilon)
    state = (g, level, jnp.asarray(jnp.inf, g.dtype), jnp.asarray(0, jnp.int32))
    g, _, _, count = jax.lax.while_loop(unfinished, stage, state)
    return g, count


def solve_symmetric(cost, a, epsilon, f, *, tolerance, max_iterations):
    """The potential of one cloud against itself: the error halves at every symmetric update."""
    log_a = log_weights(a)

    def body(state):
        f, _, count = state
        new = row_update(cost, f, log_a, epsilon)
        # The rows of P sum to a exp((f - new) / epsilon).
        error = 2 * jnp.sum(a * jnp.abs(jnp.expm1((f - new) / epsilon)))
        return jnp.where(error > 0.6 * tolerance, (f + new) / 2, f), error, count + 1

    def unfinished(state):
        return (state[1] > 0.6 * tolerance) & (state[2] < max_iterations)

    state = (f, jnp.asarray(jnp.inf, f.dtype), jnp.asarray(0, jnp.int32))
    f, _, count = jax.lax.while_loop(unfinished, body, state)
    return f, count
