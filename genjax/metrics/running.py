"""Mean and covariance of features that come batch by batch, on one host or on several."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from genjax import checks
from genjax.metrics._pairs import Features, Scalar, in_float64, widest
from genjax.metrics.distances import Matrix, Moments, Vector
from genjax.numerics import HIGHEST

Mask: TypeAlias = Bool[Array, " n"] | Bool[np.ndarray, " n"]


class RunningMoments(NamedTuple):
    """Number of rows, their mean [d], and the sum of outer products around it [d, d].

    Sums of x and of x x^T would cancel where the mean is large beside the spread; these do not.
    """

    count: Scalar
    mean: Vector
    scatter: Matrix


@in_float64
def init_moments(width: int) -> RunningMoments:
    """The moments of no row.

    >>> state = update_moments(init_moments(2), jnp.ones((3, 2)))
    >>> int(state.count)
    3
    """
    checks.integer("width", width, 1)
    zeros = jnp.zeros(width, widest())
    return RunningMoments(jnp.zeros((), widest()), zeros, jnp.zeros((width, width), widest()))


@in_float64
def update_moments(
    state: RunningMoments, x: Features, *, where: Mask | None = None
) -> RunningMoments:
    """Take in the rows of x [n, d] that `where` keeps, all without it; an empty batch is nothing.

    In float64 where the call is not traced, else in float32 at least. Raises ValueError for another
    width and for NaN in concrete rows that are kept.

    >>> state = update_moments(init_moments(2), jnp.array([[0.0, 1.0], [2.0, 1.0]]))
    >>> state.mean
    array([1., 1.])
    """
    checks.rank("x", x, 2)
    checks.floating("x", x)
    checks.shape("x", x, (None, state.mean.shape[0]))
    keep = jnp.ones(x.shape[0], bool) if where is None else jnp.asarray(where)
    checks.shape("where", keep, x.shape[:1])
    x = jnp.where(keep[:, None], jnp.asarray(x, state.mean.dtype), 0)
    checks.finite("x", x)
    count = jnp.sum(keep, dtype=x.dtype)
    mean = jnp.sum(x, axis=0) / jnp.maximum(count, 1)
    shifted = jnp.where(keep[:, None], x - mean[None], 0)
    scatter = jnp.dot(shifted.T, shifted, precision=HIGHEST)
    return merge_moments(state, RunningMoments(count, mean, scatter))


@in_float64
def merge_moments(*states: RunningMoments) -> RunningMoments:
    """The moments of all rows of several states, as if they had come in one: in any order.

        n = sum n_i,   m = sum n_i m_i / n,   S = sum S_i + n_i (m_i - m) (m_i - m)^T

    Chan, Golub, LeVeque 1983. Raises ValueError without a state and where widths differ.

    >>> a = update_moments(init_moments(1), jnp.array([[0.0], [1.0]]))
    >>> b = update_moments(init_moments(1), jnp.array([[5.0]]))
    >>> merge_moments(a, b).mean
    array([2.])
    """
    if not states:
        raise ValueError("merge_moments needs at least one state, got none")
    for state in states[1:]:
        checks.shape("mean", state.mean, states[0].mean.shape)
    counts, means, scatters = (jnp.stack(parts) for parts in zip(*states, strict=True))
    total = jnp.sum(counts)
    share = counts / jnp.maximum(total, 1)
    # Around the first mean: the mean of equal means is that mean, whatever its size.
    mean = means[0] + jnp.sum(share[:, None] * (means - means[:1]), axis=0)
    far = means - mean[None]
    between = jnp.einsum("k,ki,kj->ij", counts, far, far, precision=HIGHEST)
    return RunningMoments(total, mean, jnp.sum(scatters, axis=0) + between)


def merge_processes(state: RunningMoments) -> RunningMoments:
    """The moments of the rows of all processes of a distributed run; each gets the same.

    Every process must call it. For concrete states, not inside `jax.jit`.

    >>> state = merge_processes(update_moments(init_moments(1), jnp.ones((3, 1))))
    >>> int(state.count)
    3
    """
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return state
    with jax.enable_x64(True):  # or float64 would travel as float32
        everyone = jax.tree.map(np.asarray, multihost_utils.process_allgather(state))
    return merge_moments(
        *(RunningMoments(*(part[i] for part in everyone)) for i in range(jax.process_count()))
    )


def compute_moments(state: RunningMoments) -> Moments:
    """Mean and covariance, divided by n - 1: what `frechet_distance` takes in place of features.

    Raises ValueError for fewer than 2 rows; under `jax.jit` the covariance is then 0.

    >>> state = update_moments(init_moments(1), jnp.array([[0.0], [2.0]]))
    >>> compute_moments(state).covariance
    array([[2.]])
    """
    checks.at_least("number of rows for a covariance", state.count, 2)
    divisor = state.count - 1
    if not checks.is_concrete(divisor):
        divisor = jnp.maximum(divisor, 1)
    return Moments(state.mean, state.scatter / divisor)
