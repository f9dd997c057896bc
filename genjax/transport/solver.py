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
WILD = 1e6  # stands for the error of such a column
HOPELESS = 0.5  # marginal error, after two sweeps, at which a start is given up for a rung above
CHECK = 8  # sweeps between looks at the rate
GROWTH = 3.0  # of the error over CHECK sweeps, beyond which relaxation is reduced
SMOOTH = 0.03  # of the spread: the epsilon above which annealing is not needed
CLIMB = 2  # rungs above it, for clouds that two Gaussians describe badly
EASE = 4.0  # the spectral gap is taken as EASE epsilon / spread until the rate has been seen


class Solved(NamedTuple):
    """Potentials, the number of sweeps, and a lower bound of the value."""

    potentials: Potentials
    count: Array
    bound: Array


class Stage(NamedTuple):
    """Numbers that one stage hands to the next, conditions as 0 or 1; the first four stay."""

    epsilon: Any
    spread: Any  # of the cost
    goal: Any  # the marginal error to reach at rung 0
    limit: Any  # of sweeps
    rung: Any  # -1 for that of the ladder's start
    trial: Any  # the start is one that may prove useless
    level: Any = 1  # the epsilon of this stage, once it has begun
    finished: Any = 0  # stages finished since the last restart: extrapolation needs two
    count: Any = 0  # sweeps so far
    omega: Any = 0  # the relaxation to go on with; 0 for that of the level
    done: Any = 0


class Sweep(NamedTuple):
    """Numbers that one sweep hands to the next, conditions as 0 or 1; the first four stay."""

    goal: Any  # the marginal error to reach
    last: Any  # at the last rung
    left: Any  # sweeps until the limit
    trial: Any
    omega: Any  # relaxation
    steps: Any = 0
    phase: Any = 0  # steps modulo CHECK
    error: Any = jnp.inf  # L1, of the columns; WILD or more where scalings are too large
    mark: Any = jnp.inf  # the error at the last look at the rate
    done: Any = 0

    @property
    def useless(self) -> Any:
        return (self.trial > 0) & (self.steps == 2) & (self.error > HOPELESS)

    @property
    def plain(self) -> Any:
        """Whether the next sweep is not relaxed.

        Relaxed sweeps leave neither marginal exact, and their error overstates the distance to
        convergence: a plain sweep looks now and then, and must confirm the goal.
        """
        near = (self.phase == 0) & (self.error / 30 <= self.goal) & (self.last > 0)
        return (self.steps < 2) | (self.error <= self.goal) | near


class Kernel(NamedTuple):
    """exp((base_j - C_ij - peak_i) / level), stored in blocks or None, to be formed again."""

    blocks: Blocks
    rows: Array
    base: Array
    peak: Array
    level: Array
    stored: Array | None


def pack(numbers: Any, like: Array) -> Array:
    """Numbers as one vector; `Sweep(*vector)` gives them back."""
    return jnp.stack([jnp.asarray(z).astype(like.dtype) for z in numbers])


def anneal(method: Method, problem: Problem, scales: Scales) -> Solved:
    """Potentials whose rows are exact, and whose columns are to the tolerance."""
    epsilon, g = problem.epsilon, problem.start[1]
    gaussian = method.cost_fn is squared_euclidean and not method.warm
    near = served = epsilon > jnp.inf
    bound = jnp.full_like(epsilon, -jnp.inf)
    goal, enough = goal_of(method, scales, epsilon)
    if gaussian:
        g = of_moments(problem, _highest(epsilon, scales.spread, gaussian))
    if problem.guess is not None:
        at = Potentials(problem.guess[1], jnp.zeros_like(g), problem.guess[0], ~near)
        seen = read(method, problem, at, scales.large)
        bound = seen.value
        served = seen.error <= enough
        if not method.warm:
            near = seen.error <= HOPELESS
            g = jnp.where(near, problem.guess[1], g)
    limit: Any = method.max_iterations
    rung: Any = 0 if method.warm else -1
    if problem.guess is not None:
        limit, rung = jnp.where(served, 0, limit), jnp.where(near, 0, rung)
    first = Stage(epsilon, scales.spread, goal, limit, rung, trial=gaussian | method.warm | near)
    potentials, count = descend(method, problem, first, g, gaussian)
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
    return jnp.sum(y * bent, axis=1)


def _highest(epsilon: Array, spread: Array, gaussian: bool) -> Array:
    """Where to start. Where epsilon is large its own first sweeps do what the rungs above would."""
    smooth = SMOOTH * spread
    return jnp.where(epsilon < smooth, smooth if gaussian else spread / 4, epsilon)


def begin(state: Stage, gaussian: bool) -> tuple[Stage, Array, Array]:
    """The stage with its epsilon and relaxation; the ladder's step, and its highest rung.

    Rungs go from epsilon, rung 0, in equal ratios to the start, and CLIMB beyond.
    """
    height = jnp.log(_highest(state.epsilon, state.spread, gaussian) / state.epsilon)
    start = jnp.maximum(jnp.ceil(height / math.log(FACTOR) - 0.05), 0)
    step = height / jnp.maximum(start, 1)
    rung = jnp.where(state.rung < 0, start, state.rung)
    level = state.epsilon * jnp.exp(rung * step)
    gap = jnp.minimum(EASE * level / state.spread, 1)
    omega = jnp.where(state.omega > 0, state.omega, 2 / (1 + jnp.sqrt(gap)))
    top = start + (CLIMB if gaussian else 0)
    return state._replace(rung=rung, level=level, omega=omega), step, top


def descend(
    method: Method, problem: Problem, first: Stage, g: Array, gaussian: bool
) -> tuple[Potentials, Array]:
    """Stages from the first rung down to the last, until that is done; and the number of sweeps."""
    blocks = problem.blocks(method)

    def stage(carry):
        start, base, log_v, vector = carry
        state, step, top = begin(Stage(*vector), gaussian)
        kernel = absorb(blocks, problem.b, start, state.level, method.chunk_size)
        found, sweep = sweep_until(problem, kernel, state)
        new, share = choose_next(state, Sweep(*sweep), step, top)
        after, before = start + state.level * found, base + Stage(*vector).level * log_v
        return after + share * (after - before), start, found, pack(new, g)

    def going(carry):
        state = Stage(*carry[3])
        return (state.done == 0) & (state.count < state.limit)

    _, base, log_v, vector = jax.lax.while_loop(going, stage, (g, g, 0 * g, pack(first, g)))
    last = Stage(*vector)
    # Where the sweeps ran out above epsilon the gain is not small beside it.
    above, gain = last.level > last.epsilon, last.level * log_v
    return Potentials(jnp.where(above, base + gain, base), jnp.where(above, 0, gain)), last.count


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


def products(kernel: Kernel, a: Array, au: Array, bv: Array, omega: Array) -> tuple[Array, Array]:
    """Relax u towards 1 / (K (b v)), and return a u with K^T (a u): one pass over the kernel."""

    def body(cols, block):
        some, a, au, rows, peak = block
        if some is None:
            some = _kernel(kernel.blocks.cost(rows), kernel.base, peak, kernel.level)
        held = a > 0
        ratio = au / jnp.where(held, a, 1) * jnp.matmul(some, bv, precision=HIGHEST)
        au = au * jnp.exp(-omega * jnp.log(jnp.where(held, ratio, 1)))
        return cols + jnp.matmul(au, some, precision=HIGHEST), au

    rows = None if kernel.stored is not None else kernel.rows
    xs = (kernel.stored, a, au, rows, kernel.peak)
    cols, au = passes.scan(body, jnp.zeros_like(bv), xs, kernel.blocks.count)
    return au, cols


def sweep_until(problem: Problem, kernel: Kernel, state: Stage) -> tuple[Array, Array]:
    """Sweep until the stage's goal is met, the scalings are too large, or the start is useless.

    Returns log v and the packed `Sweep`.
    """
    a, b = kernel.blocks.split(problem.a, 0.0), problem.b

    def sweep(carry):
        au, log_v, bv, vector = carry
        s = Sweep(*vector)
        omega = jnp.where(s.plain, 1, s.omega)
        au, cols = products(kernel, a, au, bv, omega)
        log_v = log_v - omega * (log_v + jnp.log(cols))
        off = jnp.where(jnp.abs(log_v) < REACH, jnp.abs(bv * cols - b), WILD)
        new = _count(s, jnp.sum(off))
        return au, log_v, b * jnp.exp(log_v), pack(new, log_v)

    def going(carry):
        s = Sweep(*carry[3])
        # A stage above the last rung ends on any sweep, the last one on a plain one.
        met = (s.done > 0) | ((s.last == 0) & (s.error <= s.goal))
        return ~met & ~s.useless & ((s.error < WILD) | (s.steps == 0)) & (s.steps < s.left)

    last = state.rung == 0
    goal = jnp.where(last, state.goal, jnp.maximum(LOOSE, state.goal))
    first = Sweep(goal, last, state.limit - state.count, state.trial, state.omega)
    start = (a, 0 * kernel.base, b, pack(first, b))
    _, log_v, _, vector = jax.lax.while_loop(going, sweep, start)
    return log_v, vector


def _count(s: Sweep, error: Array) -> Sweep:
    look = s.phase == CHECK - 1
    return s._replace(
        omega=jnp.where(look, _faster(s.omega, error / s.mark, s.steps < CHECK), s.omega),
        steps=s.steps + 1,
        phase=jnp.where(look, 0, s.phase + 1),
        error=error,
        mark=jnp.where(look | (s.steps < 2), error, s.mark),
        done=s.plain & (error <= s.goal),
    )


def choose_next(state: Stage, s: Sweep, step: Array, top: Array) -> tuple[Stage, Array]:
    """Down a rung, up if the start was of no use, or the same again if scalings grew too large.

    g varies smoothly with epsilon, and is extrapolated linearly from two rungs to the next: returns
    the share of its last change that is added, too.
    """
    tame = s.error < WILD
    useless = tame & s.useless
    onward = tame & ~useless
    down = onward & (state.rung > 0)
    rung = state.rung + jnp.where(useless, 1, jnp.where(down, -1, 0))
    rung = jnp.minimum(rung, top)
    new = state._replace(
        rung=rung,
        finished=jnp.where(onward, state.finished + 1, 0),
        count=state.count + s.steps,
        trial=useless & (rung < top),
        omega=jnp.where(tame, 0, s.omega),
        done=(s.done > 0) & (s.last > 0) | ~jnp.isfinite(s.error),
    )
    return new, jnp.where(down & (state.finished > 0), jnp.exp(-step), 0)


def _faster(omega: Array, decay: Array, early: Array) -> Array:
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
