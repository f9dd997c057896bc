"""The solver behind `tolerance`: annealed, over-relaxed Sinkhorn in the kernel domain.

epsilon comes down in stages. A stage absorbs the potentials into a kernel whose row maxima are 1,
built once, and then sweeps: one pass over the kernel updates u = 1 / (K v) and gathers K^T (a u).
Potentials of the next stage are extrapolated from the last two. A scaling that leaves e^30, or
anything not finite, sends the stage back to the log domain.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax.numerics import HIGHEST
from genjax.transport import blocks as passes
from genjax.transport.blocks import Blocks
from genjax.transport.log_domain import log_weights

FACTOR = 4.0  # between the epsilons of two stages
LOOSE = 0.05  # marginal error at which a stage before the last ends
LARGEST = 1e13  # about e^30
HOPELESS = 0.5  # marginal error, after two sweeps, at which a warm start is given up
CHECK = 8  # sweeps between looks at the rate
GROWTH = 3.0  # of the error over CHECK sweeps, beyond which relaxation is reduced
SMOOTH = 0.03  # of the scale: the least epsilon for a sample, or without annealing
SAMPLE = 1024  # rows, in blocks, for the stages above it where the kernel is not stored
EASE = 4.0  # the spectral gap is taken as EASE epsilon / scale until the rate has been seen


class Problem(NamedTuple):
    """What a solve is given; `scale` is the size of the cost's variation."""

    blocks: Blocks
    a: Array
    b: Array
    epsilon: Array
    scale: Array
    goal: Array
    limit: Array
    start: Array  # the epsilon at which annealing starts


class _Stage(NamedTuple):
    f: Array
    g: Array
    before: Array  # g of the stage before, at the level before
    level: Array
    level_before: Array
    stages: Array
    count: Array
    trial: Array  # whether this is the first look at a warm start
    cautious: Array  # plain sweeps only: the last attempt left the numbers
    omega: Array
    done: Array
    closing: Array  # no sweeps: only the potentials that are still missing


class _Sweep(NamedTuple):
    u: Array
    v: Array
    reach: Array  # the largest of v and 1 / v
    error: Array
    mark: Array
    omega: Array
    done: Array
    steps: Array


def solve(
    problem: Problem, g: Array, *, anneal: bool | None, relaxation: float | None, stored: bool
) -> tuple[Array, Array, Array]:
    """Potentials of marginal error `goal`, the rows exact, and the number of sweeps.

    anneal: start above epsilon, or at it; None for at it, and above if g proves of no use.
    stored: keep the kernel of a stage, or form it again in every sweep.
    """
    blocks, a, b, epsilon = problem.blocks, problem.a, problem.b, problem.epsilon
    rows, a_rows, log_b = blocks.rows(), blocks.split(a, 0.0), log_weights(b)
    start = jnp.maximum(problem.start, epsilon)

    def first_omega(level: Array) -> Array:
        if relaxation is not None:
            return jnp.full_like(level, relaxation)
        gap = jnp.minimum(EASE * level / problem.scale, 1)
        return 2 / (1 + jnp.sqrt(jnp.where(gap > 0, gap, 1)))

    def stage(state: _Stage) -> _Stage:
        level = state.level
        last = level <= epsilon
        goal = jnp.where(last, problem.goal, jnp.maximum(LOOSE, problem.goal))
        h = state.g + level * log_b
        kernel, peak = passes.build(blocks, h, level) if stored else (rows, jnp.zeros_like(a_rows))
        step, part = _sample(a_rows, ~last & (level > SMOOTH * problem.scale))

        def products(u: Array, v: Array, omega: Array) -> tuple[Array, Array]:
            if stored:
                u, cols = passes.kernel_products(kernel, a_rows, u, v, omega)
                return u, cols * v
            return _streamed_products(blocks, rows, part, u, h, v, level, omega, step)

        def rows_potential(u: Array) -> Array:
            return blocks.join(level * jnp.log(u) - peak if stored else level * u)

        def sweep(s: _Sweep) -> _Sweep:
            # Relaxed sweeps leave neither marginal exact: at the goal a plain one must confirm.
            # They also hide how near it is, so that a plain one looks now and then.
            near = (s.steps % CHECK == 0) & (s.error <= 30 * goal) & last
            plain = (s.steps < 2) | (s.error <= goal) | near | state.cautious
            omega = jnp.where(plain, 1, s.omega)
            u, cols = products(s.u, s.v, omega)
            error = jnp.sum(jnp.abs(cols - b))
            done = plain & (error <= goal)
            held = done | state.closing | (b == 0)
            v = passes.relaxed(s.v, jnp.where(held, 1, cols / jnp.where(held, 1, b)), omega)
            v = jnp.where(held, s.v, v)
            look = s.steps % CHECK == CHECK - 1
            omega = s.omega
            if relaxation is None:
                early = s.steps < CHECK
                omega = jnp.where(look, _faster(s.omega, error / s.mark, early), omega)
            mark = jnp.where(look | (s.steps < 2), error, s.mark)
            reach = jnp.max(jnp.maximum(v, 1 / v))
            return _Sweep(u, v, reach, error, mark, omega, done, s.steps + 1)

        def going(s: _Sweep) -> Array:
            hopeless = state.trial & (s.steps == 2) & (s.error > HOPELESS)
            # A loose stage ends on any sweep, the last one on a plain one.
            short = ~last & (s.error <= goal)
            left = s.steps + state.count < problem.limit
            going_on = ~s.done & ~short & ~hopeless & (s.reach < LARGEST) & left
            # Without the kernel one more sweep makes the rows exact.
            return jnp.where(state.closing, s.steps < (0 if stored else 1), going_on)

        def log_step() -> tuple[Array, Array]:
            # At the end only columns of zero weight are missing, which took no part, and the rows
            # where there are no sweeps left.
            f = passes.row_update(blocks, state.g, b, level) if stored else rows_potential(s.u)
            g = passes.col_update(blocks, f, a if stored else blocks.join(part), level)
            return f, jnp.where((b == 0) != state.closing, state.g, g)

        zero, infinite = jnp.zeros_like(level), jnp.full_like(level, jnp.inf)
        first = _Sweep(
            u=jnp.ones_like(a_rows),
            v=jnp.ones_like(b),
            reach=zero + 1,
            error=infinite,
            mark=infinite,
            omega=state.omega,
            done=zero > 1,
            steps=jnp.zeros_like(state.count),
        )
        s = jax.lax.while_loop(going, sweep, first)
        tame = s.reach < LARGEST
        sound = jnp.isfinite(s.error) & jnp.isfinite(s.reach)
        f, g = jax.lax.cond(
            sound & ~state.closing,
            lambda: (rows_potential(s.u), state.g + level * jnp.log(s.v)),
            log_step,
        )
        useless = state.trial & (s.steps == 2) & (s.error > HOPELESS)
        again = ~tame | useless
        above = jnp.minimum(level * FACTOR, start)  # a warm start that is of no use at this level
        stages = jnp.ceil(jnp.log(level / epsilon) / jnp.log(FACTOR) - 0.05)
        below = level * (epsilon / level) ** (1 / jnp.maximum(stages, 1))
        below = jnp.where(stages > 1, below, epsilon)
        below = jnp.where(useless, above, jnp.where(tame, below, level))
        # g varies smoothly with epsilon: extrapolate linearly to the next one.
        slope = (below - level) / jnp.where(state.stages > 0, level - state.level_before, 1)
        ahead = g + slope * (g - state.before)
        onward = tame & ~last & (state.stages > 0)
        done = state.closing | (last & s.done)
        taken = jnp.where(state.closing, state.count, state.count + s.steps)
        missing = jnp.where(done, jnp.any(b == 0), taken >= problem.limit)
        closing = missing & ~state.closing
        return _Stage(
            f=f,
            g=jnp.where(onward, ahead, g),
            before=g,
            level=jnp.where(closing, epsilon, below),
            level_before=level,
            stages=jnp.where(again, 0, state.stages + 1),
            count=taken,
            trial=useless & (above < start),
            cautious=~sound,
            omega=jnp.where(tame | useless | ~sound, first_omega(below), s.omega),
            done=done,
            closing=closing,
        )

    def unfinished(state: _Stage) -> Array:
        return state.closing | (~state.done & (state.count < problem.limit))

    no = epsilon > jnp.inf
    count = jnp.zeros((), jnp.int32)
    first = _Stage(
        f=jnp.zeros_like(a),
        g=g,
        before=g,
        level=start if anneal else epsilon,
        level_before=start,
        stages=count,
        count=count,
        trial=~no if anneal is None else no,
        cautious=no,
        omega=first_omega(epsilon if anneal is not True else start),
        done=no,
        closing=problem.limit <= 0,
    )
    state = jax.lax.while_loop(unfinished, stage, first)
    return state.f, state.g, state.count


def _faster(omega: Array, decay: Array, early: Array) -> Array:
    """The relaxation that suits the decay of the error over CHECK sweeps (Young 1954).

    At rate r and factor w the plain iteration's rate is (r + w - 1)^2 / (r w^2). Where r = w - 1
    the relaxation is past its best and the rate says nothing: it stays. An error that stands still
    (potentials on their way to the next pair that binds) asks for the most; one that grows for
    less.
    """
    rate = jnp.minimum(decay, 1) ** (1 / CHECK)
    plain = jnp.square(rate + omega - 1) / (rate * omega * omega)
    better = 2 / (1 + jnp.sqrt(1 - jnp.clip(plain, 0, 0.9999)))
    # Only part of the way to 2 at a time: the first sweeps of a stage mislead.
    better = jnp.minimum(better, omega + jnp.where(early, 0.2, 0.5) * (2 - omega))
    new = jnp.where(rate > omega - 1 + 0.01, jnp.maximum(better, omega), omega)
    return jnp.where(decay < GROWTH, new, 1 + 0.7 * (omega - 1))


def scan_updates(
    blocks: Blocks, f: Array, g: Array, a: Array, b: Array, epsilon: Array, length: int, same: bool
) -> tuple[Array, Array]:
    """The fixed-length iteration without the matrix; the symmetric one for `same`."""

    def body(state, _):
        f, g = state
        new = passes.row_update(blocks, g, b, epsilon)
        if same:
            f = (f + new) / 2
            return (f, f), None
        return (new, passes.col_update(blocks, new, a, epsilon)), None

    return jax.lax.scan(body, (f, f if same else g), None, length=length)[0]


def _sample(a_rows: Array, wanted: Array) -> tuple[Array, Array]:
    """Every how many blocks make a sample, or 1 if it is not wanted, and the weights in it."""
    count, size = a_rows.shape
    step = max(count * size // SAMPLE, 1)
    total = jnp.sum(a_rows[::step])
    some = (jnp.arange(count) % step == 0)[:, None]
    wanted = wanted & (total > 0)
    part = jnp.where(wanted, jnp.where(some, a_rows / jnp.where(wanted, total, 1), 0), a_rows)
    return jnp.where(wanted, step, 1), part


def _streamed_products(blocks, rows, a_rows, f, h, v, epsilon, omega, step):
    """A sweep that forms each block of the kernel and lets it go: u holds f / epsilon here."""
    h = h + epsilon * jnp.log(v)

    def body(k, state):
        k, (cols, f) = k * step, state
        some, a, old = (jax.lax.dynamic_index_in_dim(z, k, 0, False) for z in (rows, a_rows, f))
        kernel, peak = passes.row_kernel(blocks.cost(some), h, epsilon)
        new = -(peak / epsilon + jnp.log(jnp.sum(kernel, axis=1)))
        new = jnp.where(omega == 1, new, old + omega * (new - old))
        cols = cols + (a * jnp.exp(new + peak / epsilon)) @ kernel
        return cols, jax.lax.dynamic_update_index_in_dim(f, new, k, 0)

    count = (blocks.count + step - 1) // step
    cols, f = jax.lax.fori_loop(0, count, body, (jnp.zeros_like(v), f))
    return f, cols


def solve_symmetric(problem: Problem, f: Array, *, stored: bool) -> tuple[Array, Array]:
    """The potential of one cloud against itself, by the mean of it and its update.

    The error halves at every update where the kernel is positive definite; the rows of P sum to
    a exp((f - update) / epsilon), which is the marginal error, counted for rows and columns.
    """
    blocks, a, epsilon = problem.blocks, problem.a, problem.epsilon
    log_a = log_weights(a)

    def absorb(state):
        base, _, count = state
        if stored:
            kernel, peak = passes.build(blocks, base + epsilon * log_a, epsilon)

        def update(f: Array) -> Array:
            if not stored:
                return passes.row_update(blocks, f, a, epsilon)
            v = jnp.exp((f - base) / epsilon)
            sums = jnp.einsum("kij,j->ki", kernel, v, precision=HIGHEST)
            return -blocks.join(peak + epsilon * jnp.log(sums))

        def body(state):
            f, _, count = state
            new = update(f)
            error = jnp.abs(jnp.expm1(jnp.where(a > 0, f - new, 0) / epsilon))
            error = 2 * jnp.sum(a * error)
            return jnp.where(error > problem.goal, (f + new) / 2, f), error, count + 1

        def going(state):
            near = jnp.max(jnp.abs(state[0] - base)) < 30 * epsilon
            return unfinished(state) & near

        return jax.lax.while_loop(going, body, (base, jnp.full_like(epsilon, jnp.inf), count))

    def unfinished(state):
        return (state[1] > problem.goal) & (state[2] < problem.limit)

    start = (f, jnp.full_like(epsilon, jnp.inf), jnp.zeros((), jnp.int32))
    f, _, count = jax.lax.while_loop(unfinished, absorb, start)
    return f, count
