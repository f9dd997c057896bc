"""From a problem to potentials: annealed, over-relaxed Sinkhorn in the kernel domain.

`anneal` comes down a ladder of epsilons. At each rung one stage absorbs the column potential into a
kernel whose row maxima are 1, and sweeps: one pass over the kernel updates the row scaling
u = 1 / (K (b v)) and gathers the columns v K^T (a u). The start of the next rung is extrapolated
from the last two.

Scalars travel through the loops as one vector (`pack`): the compiler makes a program of every
array that a loop carries, however small, and takes as long for a number as for a matrix.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax.numerics import HIGHEST
from genjax.transport import blocks as passes
from genjax.transport.blocks import Blocks
from genjax.transport.costs import squared_euclidean
from genjax.transport.problem import Method, Problem, Scales, moments
from genjax.transport.reading import Potentials, read

FACTOR = 4.0  # between the epsilons of two rungs, at most
LOOSE = 0.05  # marginal error at which a stage above the last rung ends
REACH = 30.0  # of the logarithm of a scaling, beyond which it is absorbed
HOPELESS = 0.5  # marginal error, after two sweeps, at which a start is given up for a rung above
CHECK = 8  # sweeps between looks at the rate
GROWTH = 3.0  # of the error over CHECK sweeps, beyond which relaxation is reduced
SMOOTH = 0.03  # of the spread: the epsilon above which annealing is not needed
EASE = 4.0  # the spectral gap is taken as EASE epsilon / spread until the rate has been seen


class Solved(NamedTuple):
    """Potentials, the number of sweeps, and a lower bound of the value."""

    potentials: Potentials
    count: Array
    bound: Array


class Ladder(NamedTuple):
    """Numbers of the whole solve. The epsilon of rung k is epsilon exp(k step)."""

    epsilon: Any  # at the last rung, 0
    step: Any
    top: Any  # the first rung
    ease: Any  # the spectral gap over epsilon
    goal: Any  # the marginal error to reach at the last rung
    limit: Any  # of sweeps


class Stage(NamedTuple):
    """Numbers that one stage hands to the next; conditions are 0 or 1."""

    rung: Any
    level: Any  # the epsilon of the stage before
    finished: Any  # stages finished since the last restart: extrapolation needs two
    count: Any  # sweeps so far
    trial: Any  # the start is one that may prove useless
    omega: Any  # the relaxation to start with
    done: Any


class Sweep(NamedTuple):
    """Numbers that one sweep hands to the next."""

    steps: Any
    error: Any
    mark: Any  # the error at the last look at the rate
    reach: Any  # of the scalings: 1 where they are too large
    omega: Any
    done: Any


class Kernel(NamedTuple):
    """exp((base_j - C_ij - peak_i) / level), stored in blocks or None, to be formed again."""

    blocks: Blocks
    rows: Array
    base: Array
    peak: Array
    level: Array
    stored: Array | None


def pack(numbers: Any, like: Array) -> Array:
    """The fields as one vector; `Sweep(*vector)` gives them back."""
    return jnp.stack([jnp.asarray(z).astype(like.dtype) for z in numbers])


def anneal(method: Method, problem: Problem, scales: Scales) -> Solved:
    """Potentials whose rows are exact, and whose columns are to the tolerance."""
    epsilon, g = problem.epsilon, problem.start[1]
    smooth = jnp.maximum(SMOOTH * scales.spread, epsilon)
    near = served = epsilon > jnp.inf
    bound = jnp.full_like(epsilon, -jnp.inf)
    goal, enough = goal_of(method, scales, epsilon)
    if method.cost_fn is squared_euclidean and not method.warm:
        g = of_moments(problem, smooth)
    if problem.guess is not None:
        at = Potentials(problem.guess[1], jnp.zeros_like(g), problem.guess[0], ~near)
        seen = read(method, problem, at, scales.large)
        bound = seen.value
        served = seen.error <= enough
        if not method.warm:
            near = seen.error <= HOPELESS
            g = jnp.where(near, problem.guess[1], g)
    # Where epsilon is large the first sweeps at it do what the rungs above it would.
    height = jnp.where(epsilon < smooth, jnp.log(scales.spread / 4 / epsilon), 0)
    top = jnp.maximum(jnp.ceil(height / math.log(FACTOR) - 0.05), 0)
    step = height / jnp.maximum(top, 1)
    if method.warm:
        rung = 0 * top
    elif method.cost_fn is squared_euclidean:
        rung = jnp.round(jnp.log(smooth / epsilon) / jnp.maximum(step, 1))
    else:
        rung = top
    ladder = Ladder(
        epsilon=epsilon,
        step=step,
        top=top,
        ease=EASE / jnp.maximum(scales.spread, jnp.finfo(epsilon.dtype).eps * epsilon),
        goal=goal,
        limit=jnp.where(scales.sound & ~served, method.max_iterations, 0),
    )
    potentials, count = descend(method, problem, ladder, jnp.where(near, 0, rung), g)
    if problem.guess is not None:
        f, g = problem.guess
        potentials = Potentials(
            base=jnp.where(served, g, potentials.base),
            gain=jnp.where(served, 0, potentials.gain),
            f=f,
            own=served,
        )
    return Solved(potentials, count, bound)


def goal_of(method: Method, scales: Scales, epsilon: Array) -> tuple[Array, Array]:
    """The marginal error to reach, with room for what is rounded; and what is good enough.

    Potentials are rounded too. Where epsilon is large marginal errors are small by themselves, of
    order spread / epsilon, and the goal with them.
    """
    tiny = jnp.finfo(epsilon.dtype).eps
    room = scales.rounding + tiny * scales.spread / (4 * epsilon)
    small = jnp.clip(scales.spread / epsilon, 8 * tiny / method.tolerance, 1)
    goal = jnp.maximum(0.95 * method.tolerance - room, 0.3 * method.tolerance) * small
    if method.sharp:
        goal = jnp.maximum(goal / 20, jnp.minimum(goal, 4 * room))
        return goal, goal
    return goal, jnp.maximum((method.tolerance - scales.rounding) * small, goal)


def of_moments(problem: Problem, level: Array) -> Array:
    """The column potential of two Gaussians with the clouds' moments, coordinate by coordinate.

    For variances s, t and the covariance k of the optimal coupling, k (k + level / 2) = s t, it is
    (1 - k / t) (y - mean y)^2 + 2 (mean y - mean x) (y - mean y) (Janati et al. 2020).
    """
    (mean_x, s), (mean_y, t) = moments(problem)
    y = problem.arrays[1] - mean_y[None, :]
    slope = 2 * s / (jnp.sqrt(4 * s * t + level * level / 4) + level / 2)
    bent = y * (1 - slope)[None, :] + 2 * (mean_y - mean_x)[None, :]
    return jnp.matmul(y * bent, jnp.ones_like(t), precision=HIGHEST)


def level_of(ladder: Ladder, rung: Array) -> Array:
    """The epsilon of a rung."""
    return ladder.epsilon * jnp.exp(rung * ladder.step)


def omega_of(ladder: Ladder, level: Array) -> Array:
    """The relaxation to start with at an epsilon."""
    gap = jnp.minimum(ladder.ease * level, 1)
    return 2 / (1 + jnp.sqrt(jnp.where(gap > 0, gap, 1)))


def descend(
    method: Method, problem: Problem, ladder: Ladder, rung: Array, g: Array
) -> tuple[Potentials, Array]:
    """Stages from a rung down to the last, until that one is done; and the number of sweeps."""
    blocks, packed = problem.blocks(method), pack(ladder, g)

    def stage(carry):
        start, base, log_v, vector = carry
        ladder, state = Ladder(*packed), Stage(*vector)
        kernel = absorb(blocks, problem.b, start, level_of(ladder, state.rung), method.chunk_size)
        found, sweep = sweep_until(problem, kernel, packed, vector)
        before = base + state.level * log_v
        after = start + kernel.level * found
        new, keep = choose_next(ladder, state, kernel.level, Sweep(*sweep))
        # g varies smoothly with epsilon: extrapolate linearly from two rungs to the next.
        ahead = after + keep * (after - before)
        return ahead, start, found, pack(new, g)

    def going(carry):
        state, ladder = Stage(*carry[3]), Ladder(*packed)
        return (state.done == 0) & (state.count < ladder.limit)

    level = level_of(ladder, rung)
    trial = rung < ladder.top
    first = Stage(rung, level, 0, 0, trial, omega_of(ladder, level), 0)
    start = (g, g, jnp.zeros_like(g), pack(first, g))
    _, base, log_v, vector = jax.lax.while_loop(going, stage, start)
    last = Stage(*vector)
    # Where the sweeps ran out above epsilon the gain is not small beside it.
    above, gain = last.level > ladder.epsilon, last.level * log_v
    whole = jnp.where(above, base + gain, base)
    return Potentials(whole, jnp.where(above, 0, gain)), last.count


def absorb(
    blocks: Blocks, b: Array, base: Array, level: Array, chunk_size: int | None = None
) -> Kernel:
    """Put a column potential into a kernel whose row maxima are 1; not stored in chunks."""
    rows = blocks.rows()

    def build(_, rows):
        cost = blocks.cost(rows)
        peak = passes.row_peak(cost, base, b)
        return None, (_kernel(cost, base, peak, level) if chunk_size is None else None, peak)

    kernel, peak = passes.scan(build, None, rows, blocks.count)[1]
    return Kernel(blocks, rows, base, peak, level, kernel)


def _kernel(cost: Array, base: Array, peak: Array, level: Array) -> Array:
    z = (base[None, :] - cost) - peak[:, None]
    return jnp.exp(jnp.clip(z / level, passes.FLOOR, passes.CEILING))


def products(kernel: Kernel, problem: Problem, log_u: Array, log_v: Array, omega: Array):
    """Relax u towards 1 / (K (b v)) and gather K^T (a u): one pass over the kernel.

    Returns log u, the logarithm of the ratio v K^T (a u), and how far the columns are from b.
    """
    once = jax.lax.optimization_barrier  # what several products use is formed once
    weighted = once(problem.b * jnp.exp(log_v))

    def body(cols, block):
        some, a, log_u, rows, peak = block
        if some is None:
            some = _kernel(kernel.blocks.cost(rows), kernel.base, peak, kernel.level)
        ratio = log_u + jnp.log(jnp.matmul(some, weighted, precision=HIGHEST))
        log_u = once(log_u - omega * ratio)
        return cols + jnp.matmul(a * jnp.exp(log_u), some, precision=HIGHEST), log_u

    rows = None if kernel.stored is not None else kernel.rows
    a = kernel.blocks.split(problem.a, 0.0)
    xs = (kernel.stored, a, log_u, rows, kernel.peak)
    cols, log_u = passes.scan(body, jnp.zeros_like(log_v), xs, kernel.blocks.count)
    return log_u, log_v + jnp.log(cols), jnp.abs(weighted * cols - problem.b)


def sweep_until(problem: Problem, kernel: Kernel, packed: Array, stage: Array):
    """Sweep until the stage's goal is met, the scalings are too large, or the start is useless.

    Returns log v and the packed `Sweep`.
    """

    def sweep(carry):
        log_u, log_v, vector = carry
        ladder, state, s = Ladder(*packed), Stage(*stage), Sweep(*vector)
        omega = jnp.where(_plain(ladder, state, s), 1, s.omega)
        log_u, ratio, short = products(kernel, problem, log_u, log_v, omega)
        log_v = log_v - omega * ratio
        far = log_v / REACH
        for _ in range(4):  # a sum of 16th powers stands for the maximum
            far = jnp.square(far)
        error, reach = passes.sums(jnp.ones_like(log_v), short, far)
        return log_u, log_v, pack(_judge(ladder, state, s, error, reach), log_v)

    def going(carry):
        ladder, state, s = Ladder(*packed), Stage(*stage), Sweep(*carry[2])
        # A stage above the last rung ends on any sweep, the last one on a plain one.
        met = (s.done > 0) | ((state.rung > 0) & (s.error <= _goal(ladder, state)))
        left = s.steps + state.count < ladder.limit
        return ~met & ~_useless(state, s) & (s.reach < 1) & left

    log_v = jnp.zeros_like(kernel.base)
    first = pack(Sweep(0, jnp.inf, jnp.inf, 0, Stage(*stage).omega, 0), log_v)
    start = (jnp.zeros_like(kernel.peak), log_v, first)
    _, log_v, last = jax.lax.while_loop(going, sweep, start)
    return log_v, last


def _goal(ladder: Ladder, state: Stage) -> Array:
    return jnp.where(state.rung == 0, ladder.goal, jnp.maximum(LOOSE, ladder.goal))


def _plain(ladder: Ladder, state: Stage, s: Sweep) -> Array:
    """Whether this sweep is not relaxed.

    Relaxed sweeps leave neither marginal exact, and their error overstates the distance to
    convergence: a plain sweep looks now and then, and must confirm the goal.
    """
    goal = _goal(ladder, state)
    near = (s.steps % CHECK == 0) & (s.error <= 30 * goal) & (state.rung == 0)
    return (s.steps < 2) | (s.error <= goal) | near


def _judge(ladder: Ladder, state: Stage, s: Sweep, error: Array, reach: Array) -> Sweep:
    look = s.steps % CHECK == CHECK - 1
    return Sweep(
        steps=s.steps + 1,
        error=error,
        mark=jnp.where(look | (s.steps < 2), error, s.mark),
        reach=reach,
        omega=jnp.where(look, faster(s.omega, error / s.mark, s.steps < CHECK), s.omega),
        done=_plain(ladder, state, s) & (error <= _goal(ladder, state)),
    )


def _useless(state: Stage, s: Sweep) -> Array:
    return (state.trial > 0) & (s.steps == 2) & (s.error > HOPELESS)


def choose_next(ladder: Ladder, state: Stage, level: Array, s: Sweep) -> tuple[Stage, Array]:
    """Down a rung, up if the start was of no use, or the same again if scalings grew too large.

    Returns the share of the last change of potentials by which the next start is extrapolated too.
    """
    tame = s.reach < 1
    useless = tame & _useless(state, s)
    onward = tame & ~useless
    last = state.rung == 0
    rung = state.rung + jnp.where(useless, 1, jnp.where(onward & ~last, -1, 0))
    rung = jnp.minimum(rung, ladder.top)
    new = Stage(
        rung=rung,
        level=level,
        finished=jnp.where(onward, state.finished + 1, 0),
        count=state.count + s.steps,
        trial=useless & (rung < ladder.top),
        omega=jnp.where(tame, omega_of(ladder, level_of(ladder, rung)), s.omega),
        done=(last & (s.done > 0)) | ~jnp.isfinite(s.error),
    )
    extrapolate = onward & ~last & (state.finished > 0)
    return new, jnp.where(extrapolate, jnp.exp(-ladder.step), 0)


def faster(omega: Array, decay: Array, early: Array) -> Array:
    """The relaxation that suits the decay of the error over CHECK sweeps (Young 1954).

    At rate r and factor w the plain iteration's rate is (r + w - 1)^2 / (r w^2). Where r = w - 1
    the relaxation is past its best and the rate says nothing: it stays. An error that stands still
    (potentials on their way to the next pair that binds) asks for the most; one that grows for
    less.
    """
    rate = jnp.sqrt(jnp.sqrt(jnp.sqrt(jnp.minimum(decay, 1))))  # CHECK is 8
    plain = jnp.square(rate + omega - 1) / (rate * omega * omega)
    better = 2 / (1 + jnp.sqrt(1 - jnp.clip(plain, 0, 0.9999)))
    # Only part of the way to 2 at a time: the first sweeps of a stage mislead.
    better = jnp.minimum(better, omega + jnp.where(early, 0.2, 0.5) * (2 - omega))
    new = jnp.where(rate > omega - 1 + 0.01, jnp.maximum(better, omega), omega)
    return jnp.where(decay < GROWTH, new, 1 + 0.7 * (omega - 1))
