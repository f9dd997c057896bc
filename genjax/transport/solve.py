"""One solve and its derivatives: at fixed potentials, through all iterations, or through the last.

Each returns (f, g, value, <P, C>, marginal error, number of iterations as a float).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from genjax.transport import kernel, log_domain


class Options(NamedTuple):
    """What is static in a solve."""

    num_iterations: int | None
    tolerance: float
    max_iterations: int
    anneal: bool
    relaxation: float | None
    symmetric: bool = False


def read(cost, f, g, a, b, epsilon):
    """The dual objective (the value, once converged), <P, C> and the marginal error."""
    p = log_domain.plan(cost, f, g, a, b, epsilon)
    total = jnp.sum(p * cost)
    dual = jnp.sum(a * f) + jnp.sum(b * g) - epsilon * (jnp.sum(p) - 1)
    return dual, total, log_domain.marginal_error(p, a, b)


def potentials(options: Options, cost, a, b, epsilon, f, g):
    """Run the solver that the options name; returns potentials and the number of iterations."""
    if options.num_iterations is not None and options.symmetric:
        f = log_domain.scan_symmetric(cost, f, a, epsilon, options.num_iterations)
        return f, f, jnp.asarray(options.num_iterations, cost.dtype)
    if options.num_iterations is not None:
        relaxation = 1.0 if options.relaxation is None else options.relaxation
        f, g = log_domain.scan_updates(
            cost, f, g, a, b, epsilon, options.num_iterations, relaxation
        )
        return f, g, jnp.asarray(options.num_iterations, cost.dtype)
    if options.symmetric:
        f, count = kernel.solve_symmetric(
            cost,
            a,
            epsilon,
            f,
            tolerance=options.tolerance,
            max_iterations=options.max_iterations,
        )
        return f, f, count.astype(cost.dtype)
    start = jnp.mean(cost) / 4 if options.anneal else epsilon
    g, count = kernel.solve(
        cost,
        a,
        b,
        epsilon,
        g,
        start=start,
        tolerance=options.tolerance,
        max_iterations=options.max_iterations,
    )
    log_b = log_domain.log_weights(b)
    f = log_domain.row_update(cost, g, log_b, epsilon)
    g = g + (jnp.sum(a * f) - jnp.sum(b * g)) / 2
    return log_domain.row_update(cost, g, log_b, epsilon), g, count.astype(cost.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def envelope(options: Options, cost, a, b, epsilon, f, g):
    """Solve, with the derivative of the value at fixed potentials (the envelope theorem)."""
    f, g, count = potentials(options, cost, a, b, epsilon, f, g)
    return (f, g, *read(cost, f, g, a, b, epsilon), count)


@functools.partial(envelope.defjvp, symbolic_zeros=True)
def _envelope_jvp(options: Options, primals, tangents):
    cost, a, b, epsilon, *_ = primals
    out = envelope(options, *primals)
    f, g, value, total, error, count = out

    def along(gradient, tangent):
        if isinstance(tangent, SymbolicZero):
            return jnp.zeros((), value.dtype)
        return jnp.sum(gradient() * tangent)

    moved = along(lambda: log_domain.plan(cost, f, g, a, b, epsilon), tangents[0])
    # The value's derivatives at the optimum: P for the cost, f and g for the weights, and the
    # divergence KL(P | a b^T) for epsilon.
    change = along(lambda: f, tangents[1]) + along(lambda: g, tangents[2])
    change = change + along(lambda: (value - total) / epsilon, tangents[3])
    zeros = [jnp.zeros_like(o) for o in (f, g, error, count)]
    return out, (zeros[0], zeros[1], moved + change, moved, zeros[2], zeros[3])


def differentiated(options: Options, gradient, last, cost, a, b, epsilon, f, g):
    """Solve with the derivative through all the iterations, or through the last ones only."""
    if gradient == "last":
        before = options
        if options.num_iterations is not None:
            before = options._replace(num_iterations=max(options.num_iterations - last, 0))
            last = min(last, options.num_iterations)
        fixed = [jax.lax.stop_gradient(z) for z in (cost, a, b, epsilon, f, g)]
        f, g, count = potentials(before, *fixed)
        f, g = jax.lax.stop_gradient((f, g))
    else:
        count, last = jnp.zeros((), cost.dtype), options.num_iterations
    relaxation = 1.0
    if options.num_iterations is not None and options.relaxation is not None:
        relaxation = options.relaxation
    f, g = log_domain.scan_updates(cost, f, g, a, b, epsilon, last, relaxation)
    return (f, g, *read(cost, f, g, a, b, epsilon), count + last)
