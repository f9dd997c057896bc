"""Sinkhorn in the log domain: the reference iteration, and the quantities read off potentials.

The plan is P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon), with potentials in units of the cost.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Matrix = Float[Array, "n m"]
Rows = Float[Array, " n"]
Cols = Float[Array, " m"]
Scalar = Float[Array, ""]


def log_weights(a: Rows) -> Rows:
    """log a, with -inf for a zero weight and a gradient of 0 there, not NaN."""
    positive = a > 0
    # NaN weights go through the logarithm and stay NaN.
    return jnp.where(a == 0, -jnp.inf, jnp.log(jnp.where(positive, a, jnp.where(a == 0, 1, a))))


def row_update(cost: Matrix, g: Cols, log_b: Cols, epsilon: Scalar) -> Rows:
    """f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon): the rows of P then sum to a."""
    return -epsilon * jax.nn.logsumexp((g[None, :] - cost) / epsilon + log_b[None, :], axis=1)


def col_update(cost: Matrix, f: Rows, log_a: Rows, epsilon: Scalar) -> Cols:
    """g_j = -epsilon log sum_i a_i exp((f_i - C_ij) / epsilon): the columns of P then sum to b."""
    return -epsilon * jax.nn.logsumexp((f[:, None] - cost) / epsilon + log_a[:, None], axis=0)


def relax(old: Array, new: Array, relaxation: float | Array) -> Array:
    """Move past the update: (1 - w) old + w new, with 1 < w < 2 for over-relaxation."""
    if isinstance(relaxation, int | float) and relaxation == 1:
        return new
    return old + relaxation * (new - old)


def scan_updates(
    cost: Matrix,
    f: Rows,
    g: Cols,
    a: Rows,
    b: Cols,
    epsilon: Scalar,
    num_iterations: int,
    relaxation: float = 1.0,
) -> tuple[Rows, Cols]:
    """Run a fixed number of iterations, each updating f and then g from the new f.

    Both at once from old values would oscillate (the Jacobi iteration). The reverse pass keeps the
    potentials of every iteration, O(L (n + m)), and recomputes the exponentials: memory O(n m).
    """
    log_a, log_b = log_weights(a), log_weights(b)

    @jax.checkpoint
    def iteration(cost, potentials):
        f, g = potentials
        f = relax(f, row_update(cost, g, log_b, epsilon), relaxation)
        g = relax(g, col_update(cost, f, log_a, epsilon), relaxation)
        return f, g

    def body(potentials, _):
        return iteration(cost, potentials), None

    return jax.lax.scan(body, (f, g), None, length=num_iterations)[0]


def symmetric_update(cost: Matrix, f: Rows, log_a: Rows, epsilon: Scalar) -> Rows:
    """The mean of f and its update, for one cloud against itself (Feydy et al. 2019, eq. 25)."""
    return (f + row_update(cost, f, log_a, epsilon)) / 2


def scan_symmetric(cost: Matrix, f: Rows, a: Rows, epsilon: Scalar, num_iterations: int) -> Rows:
    """Run a fixed number of symmetric updates."""
    log_a = log_weights(a)

    @jax.checkpoint
    def body(f, _):
        return symmetric_update(cost, f, log_a, epsilon), None

    return jax.lax.scan(body, f, None, length=num_iterations)[0]


def density_exponent(cost: Matrix, f: Rows, g: Cols, epsilon: Scalar) -> Matrix:
    """(f_i + g_j - C_ij) / epsilon, the logarithm of P_ij / (a_i b_j).

    Where P has mass f_i + g_j is nearly C_ij: the rounding of that sum, not the sum itself, sets
    the accuracy at small epsilon. It is recovered (Knuth's two-sum) and added back.
    """
    row, col = f[:, None], g[None, :]
    total = row + col
    part = total - row
    rounding = (row - (total - part)) + (col - part)
    return ((total - cost) + rounding) / epsilon


def plan(cost: Matrix, f: Rows, g: Cols, a: Rows, b: Cols, epsilon: Scalar) -> Matrix:
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon); rows and columns of zero weight are 0."""
    weights = log_weights(a)[:, None] + log_weights(b)[None, :]
    return jnp.exp(density_exponent(cost, f, g, epsilon) + weights)
