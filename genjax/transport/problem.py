"""What a solve is given: `Problem` holds the arrays, `Method` what is static."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genjax.numerics import DIRECT_DIMS, HIGHEST
from genjax.transport import blocks
from genjax.transport.blocks import Blocks
from genjax.transport.costs import cosine, euclidean, squared_euclidean

# Costs that are symmetric and cheap to form again, block by block.
COSTS = (squared_euclidean, euclidean, cosine)
LARGE = 30.0  # times the spread of the cost: above it exp(-C / epsilon) is nearly 1 everywhere


class Method(NamedTuple):
    """How to solve.

    cost_fn: cost_fn(x, y, ...) on the arrays of the problem; None where they are (cost,).
    gradient: "envelope", "implicit" or "unroll".
    num_iterations: a fixed number of plain updates; None for the annealed solver.
    warm: potentials to start from were given.
    symmetric: both clouds and weights are the same, and the potentials too.
    sharp: go further than the tolerance: the derivative for epsilon has its error, not its square.
    floor: the cost was computed with the rounding of numbers at least that large; None where the
    matrix itself is what was asked about.
    """

    cost_fn: Callable | None
    gradient: str = "envelope"
    num_iterations: int | None = None
    tolerance: float = 1e-3
    max_iterations: int = 10_000
    chunk_size: int | None = None
    warm: bool = False
    symmetric: bool = False
    sharp: bool = False
    floor: float | None = None


class Problem(NamedTuple):
    """What to solve; every field may be differentiated but `start` and `guess`.

    arrays: (cost,), or (x, y, ...) for the method's cost_fn. start: potentials (f, g) to start
    from. guess: potentials that bound the value from below, are returned where they meet the
    tolerance, and are started from where nothing else is known; or None. sizes: mean less least
    cost, and mean of |C|, of the pairs that are allowed, where some may be forbidden.
    """

    arrays: tuple[Array, ...]
    a: Array
    b: Array
    epsilon: Array
    start: tuple[Array, Array]
    guess: tuple[Array, Array] | None = None
    sizes: tuple[Array, Array] | None = None

    def blocks(self, method: Method) -> Blocks:
        return blocks.make(self.arrays, method.cost_fn, method.chunk_size)


class Scales(NamedTuple):
    """Sizes that steer the solver.

    spread: how much the cost varies. rounding: what the rounding of the cost may add to the
    marginal error. large: epsilon is above LARGE times the spread. sound: everything is finite.
    """

    spread: Array
    rounding: Array
    large: Array
    sound: Array


def measure(method: Method, problem: Problem) -> Scales:
    """The sizes of a problem."""
    epsilon = problem.epsilon
    spread, size = _spread(method, problem)
    return Scales(
        spread=spread,
        rounding=jnp.finfo(size.dtype).eps * size / epsilon,
        large=epsilon > LARGE * spread,
        sound=jnp.isfinite(spread) & (epsilon > 0),
    )


def _spread(method: Method, problem: Problem) -> tuple[Array, Array]:
    """How much the cost varies, and its size where it is rounded."""
    cost_fn, arrays = method.cost_fn, problem.arrays
    if cost_fn is squared_euclidean:
        (mean_x, s), (mean_y, t) = moments(problem)
        between = jnp.square(mean_x - mean_y)
        spread, size = blocks.sums(jnp.ones_like(s), s + t, s + t + between)
        # Differences lose nothing but the last digit of a cost that is small where the plan is.
        return spread, size - spread / 2 if len(s) <= DIRECT_DIMS else size
    if problem.sizes is not None:
        spread, size = problem.sizes
        return spread, 0 * size if method.floor is None else jnp.maximum(size, method.floor)
    sample = arrays[0]
    if cost_fn is not None:
        # A sample of rows stands for the rest: as many as a block has, where the cost was traced
        # for one.
        n, m = arrays[0].shape[0], arrays[1].shape[0]
        count = min(n, 64) if cost_fn in COSTS else blocks.rows(n, m, method.chunk_size)
        sample = cost_fn(arrays[0][np.arange(count) * n // count], *arrays[1:])
    mean = jnp.mean(sample)
    if method.floor is None:
        return mean - jnp.min(sample), jnp.zeros_like(mean)
    return mean - jnp.min(sample), jnp.maximum(jnp.mean(jnp.abs(sample)), method.floor)


def moments(problem: Problem) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Mean and variance of every coordinate, for x and for y."""

    def moments_of(z: Array, weights: Array) -> tuple[Array, Array]:
        mean = jnp.matmul(weights, z, precision=HIGHEST)
        return mean, jnp.matmul(weights, jnp.square(z - mean[None, :]), precision=HIGHEST)

    x, y = problem.arrays
    return moments_of(x, problem.a), moments_of(y, problem.b)
