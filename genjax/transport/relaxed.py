"""Unbalanced transport: the dual objective of column potentials, its ascent, its derivatives.

What moves is g alone: the best f for it is known, and gives a plan whose rows are exact,

    f = -rho_1 epsilon / (rho_1 + epsilon) log sum_j b_j exp((g_j - C_ij) / epsilon)

(Chizat et al. 2018; Sejourne et al. 2019). `unbalanced` has the public functions.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax.numerics import HIGHEST
from genjax.transport import blocks, solver
from genjax.transport.problem import LARGE

FACTOR = 4.0  # between the epsilons of two rungs
LOOSE = 0.05  # marginal error at which a rung above the last ends


class Relaxed(NamedTuple):
    """What is solved. pull: 1 / rho for the rows and the columns, 0 where the marginal is imposed.

    mass: the sums of a and b. spread: mean cost less least cost, which steers the solver.
    """

    cost: Array
    a: Array
    b: Array
    epsilon: Array
    pull: tuple[Array, Array]
    mass: tuple[Array, Array]
    spread: Array

    def exchanged(self) -> "Relaxed":
        """The same with rows and columns exchanged."""
        return self._replace(
            cost=self.cost.T, a=self.b, b=self.a, pull=self.pull[::-1], mass=self.mass[::-1]
        )


def row_update(p: Relaxed, g: Array) -> tuple[Array, Array]:
    """The best f for g, and how the mass of each row goes to the columns [n, m], sums of 1."""
    large = jax.lax.stop_gradient(p.epsilon > LARGE * p.spread)
    w, peak = blocks.row_exponentials(p.cost, g, 0.0, p.b, p.epsilon, large)
    share = p.b / p.mass[1]
    log_total = blocks.log_sum(jnp.matmul(w, share, precision=HIGHEST), large)
    f = -(peak + p.epsilon * (log_total + jnp.log(p.mass[1]))) / (1 + p.epsilon * p.pull[0])
    return f, (w + large.astype(w.dtype)) * jnp.exp(-log_total)[:, None] * share[None, :]


def plan(p: Relaxed, g: Array) -> Array:
    """The plan of g and its best f: its rows sum to a exp(-f / rho_1)."""
    f, shares = row_update(p, g)
    return (p.a * jnp.exp(-p.pull[0] * f))[:, None] * shares


def dual_terms(p: Relaxed, g: Array) -> tuple[Array, Array]:
    """What each point gives to the dual objective at g and its best f."""
    f, _ = row_update(p, g)
    return (1 + p.epsilon * p.pull[0]) * _kept(f, p.pull[0]), _kept(g, p.pull[1])


def _kept(f: Array, pull: Array) -> Array:
    """rho (1 - exp(-f / rho)), and f where rho is infinite."""
    some = pull > 0
    return jnp.where(some, -jnp.expm1(-pull * f) / jnp.where(some, pull, 1), f)


@jax.custom_jvp
def semidual(p: Relaxed, g: Array) -> Array:
    """The dual objective at g and its best f, differentiated as if g were the optimum's.

    rho_1 <a, 1 - e^(-f / rho_1)> + rho_2 <b, 1 - e^(-g / rho_2)> - epsilon (sum P - sum a b^T),
    where the rows of P sum to a e^(-f / rho_1).
    """
    rows, cols = dual_terms(p, g)
    excess = p.epsilon * p.mass[0] * (p.mass[1] - 1)
    return jnp.vdot(p.a, rows) + jnp.vdot(p.b, cols) + excess


@semidual.defjvp
def _semidual_jvp(primals, tangents):
    p, g = primals
    alive = live(p, g)  # for whoever differentiates the derivative
    return jax.jvp(lambda p: semidual.fun(p, alive), (p,), (tangents[0],))


def live(p: Relaxed, g: Array) -> Array:
    """g, with the derivatives of the optimum."""
    return g + _implicit(p, g)


@jax.custom_jvp
def _implicit(p: Relaxed, g: Array) -> Array:
    """Zeros, with the derivative of the optimal g.

    g is a fixed point, g = G(f(g)), of the updates of columns and rows. With the shares W of rows
    and V of columns, each of sum 1, and lambda = rho / (rho + epsilon) of either side,

        (1 - lambda_1 lambda_2 V W) dg = dG.
    """
    return jnp.zeros_like(g)


@_implicit.defjvp
def _implicit_jvp(primals, tangents):
    p, g = primals
    alive = live(p, g)  # for the next derivative

    def update(p):
        f, rows = row_update(p, alive)
        new, cols = row_update(p.exchanged(), f)
        return new, (rows, cols)

    _, change, (rows, cols) = jax.jvp(update, (p,), (tangents[0],), has_aux=True)
    damping = (1 + p.epsilon * p.pull[0]) * (1 + p.epsilon * p.pull[1])
    moved = jnp.matmul(cols, rows, precision=HIGHEST) / damping
    # What float32 cannot tell from 1 belongs to points that hardly exchange mass.
    unit = (1 + 4 * jnp.finfo(g.dtype).eps) * jnp.eye(len(g), dtype=g.dtype)
    # With both marginals imposed a constant is free: that of <b, dg> = 0.
    null = jnp.where(imposed(p), p.b / p.mass[1], 0)
    dg = jnp.linalg.solve(unit - moved + jnp.ones_like(g)[:, None] * null[None, :], change)
    return _implicit(p, g), dg


def imposed(p: Relaxed) -> Array:
    """Whether both marginals are imposed."""
    return (p.pull[0] == 0) & (p.pull[1] == 0)


def column_error(p: Relaxed, g: Array, new: Array) -> tuple[Array, Array]:
    """L1 error of the columns over the mean mass, if their update is `new`; and its rounding."""
    kept = p.b * jnp.exp(-p.pull[1] * g)
    gap = jnp.minimum((g - new) * (1 / p.epsilon + p.pull[1]), blocks.CEILING)
    mean = (p.mass[0] + p.mass[1]) / 2
    rounded = jnp.minimum(jnp.finfo(g.dtype).eps * jnp.abs(g) / p.epsilon, 1)
    return jnp.vdot(kept, jnp.abs(jnp.expm1(gap))) / mean, jnp.vdot(kept, rounded) / mean


def shift(p: Relaxed, f: Array, g: Array) -> Array:
    """The t for which f + t and g - t are best: the masses of rows and columns are then equal.

    With both marginals imposed all are as good: <a, f> = <b, g> then, as in `sinkhorn`.
    """
    logs = [
        jax.scipy.special.logsumexp(-r * z, b=w)
        for r, z, w in zip(p.pull, (f, g), (p.a, p.b), strict=True)
    ]
    total = p.pull[0] + p.pull[1]
    level = (jnp.vdot(p.b, g) / p.mass[1] - jnp.vdot(p.a, f) / p.mass[0]) / 2
    return jnp.where(total > 0, (logs[0] - logs[1]) / jnp.where(total > 0, total, 1), level)


class Ascent(NamedTuple):
    """What one sweep hands to the next."""

    f: Array
    g: Array
    rung: Array  # epsilon is that of the last, 0, times exp(rung step)
    count: Array  # sweeps
    steps: Array  # sweeps at this rung
    omega: Array  # relaxation: updates are taken that many times
    mark: Array  # the error when the rate was last looked at
    near: Array  # potentials are within REACH epsilon of where the stage began
    done: Array


def solve(
    p: Relaxed, tolerance: Any, max_iterations: int, guess: Array | None = None
) -> tuple[Array, Array]:
    """g, and the number of sweeps; a guess that is good enough is returned as it is."""
    height = jnp.log(jnp.maximum(p.spread / 4 / p.epsilon, 1))
    top = jnp.where(height > 0, jnp.ceil(height / math.log(FACTOR)), 0)  # 0 where it is NaN
    step = height / jnp.maximum(top, 1)

    def going(state: Ascent) -> Array:
        return ~state.done & (state.count < max_iterations)

    def stage(s: Ascent) -> Ascent:
        sweep = _sweep(p._replace(epsilon=p.epsilon * jnp.exp(s.rung * step)), s, tolerance)

        def near(z: Ascent) -> Array:
            return going(z) & z.near & (z.rung == s.rung)

        return jax.lax.while_loop(near, sweep, s._replace(near=jnp.full_like(s.near, True)))

    none, one = jnp.zeros((), jnp.int32), jnp.ones_like(p.epsilon)
    done, served = none > 0, none > 0
    if guess is not None:
        f, _ = row_update(p, guess)
        error, rounding = column_error(p, guess, row_update(p.exchanged(), f)[0])
        done = served = error <= 0.9 * tolerance + rounding
    f, g = jnp.zeros_like(p.a), jnp.zeros_like(p.b)
    start = Ascent(f, g, top, none, none, one, one, ~done, done)
    last = jax.lax.while_loop(going, stage, start)
    return last.g if guess is None else jnp.where(served, guess, last.g), last.count


def _sweep(here: Relaxed, s: Ascent, tolerance: Any) -> Callable[[Ascent], Ascent]:
    """One update of f and g at this rung, from the shares of where its stage began.

    Those are exact, and the sums of a later update are theirs times the gains since: products of
    matrices and no exponentials, while the potentials are near.
    """
    there, level = here.exchanged(), here.epsilon
    base_f, shares = row_update(here, s.g)
    base_g, shares_of_columns = row_update(there, base_f)

    def updated(side: Relaxed, base: Array, shares: Array, moved: Array) -> Array:
        gains = jnp.exp(jnp.clip(moved / level, -blocks.CEILING, blocks.CEILING))
        total = jnp.matmul(shares, gains, precision=HIGHEST)
        return base - level / (1 + level * side.pull[0]) * jnp.log(total)

    def sweep(z: Ascent) -> Ascent:
        new_f = updated(here, base_f, shares, z.g - s.g)
        row_error, row_rounding = column_error(there, z.f, new_f)
        f = z.f + z.omega * (new_f - z.f)
        new_g = updated(there, base_g, shares_of_columns, f - base_f)
        error, rounding = column_error(here, z.g, new_g)
        error, rounding = jnp.maximum(error, row_error), rounding + row_rounding
        # The update of the columns for f + moved.
        moved = jnp.where(imposed(here), 0, shift(here, f, new_g))
        new_g = new_g - moved / (1 + level * here.pull[1])
        reached = error <= jnp.where(z.rung > 0, LOOSE, 0.9 * tolerance + rounding)
        look = z.steps % solver.CHECK == 0
        better = solver.faster(z.omega, error / z.mark, z.steps <= solver.CHECK)
        f, g = f + moved, z.g + z.omega * (new_g - z.g)
        far = jnp.maximum(jnp.max(jnp.abs(f - base_f)), jnp.max(jnp.abs(g - s.g)))
        return Ascent(
            f=f,
            g=g,
            rung=jnp.where(reached, z.rung - 1, z.rung),
            count=z.count + 1,
            steps=jnp.where(reached, 0, z.steps + 1),
            omega=jnp.where(look & (z.steps > 0), better, z.omega),
            mark=jnp.where(look, error, z.mark),
            near=far < solver.REACH * level,
            done=(reached & (z.rung == 0)) | ~jnp.isfinite(error),
        )

    return sweep


def solve_symmetric(p: Relaxed, tolerance: Any, max_iterations: int) -> tuple[Array, Array]:
    """The potential of a measure against itself, by the mean of it and its update.

    The error halves at every update where exp(-C / epsilon) is positive definite.
    """

    def going(state):
        _, count, done = state
        return ~done & (count < max_iterations)

    def body(state):
        g, count, _ = state
        new, _ = row_update(p, g)
        error, rounding = column_error(p, g, new)
        # Rows of the update are exact: the columns are then half as far off, or less.
        done = (error <= 0.9 * tolerance + rounding) | ~jnp.isfinite(error)
        return jnp.where(done, g, (g + new) / 2), count + 1, done

    start = (jnp.zeros_like(p.b), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    g, count, _ = jax.lax.while_loop(going, body, start)
    return g, count
