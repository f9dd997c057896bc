"""Losses between two samples that are built from entropic transport."""

from collections.abc import Sequence
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from genjax import checks
from genjax.transport.costs import cosine, squared_euclidean
from genjax.transport.problem import COSTS
from genjax.transport.sinkhorn import (
    Limits,
    make_method,
    sinkhorn,
    sinkhorn_from_cost,
    solve_clouds,
)
from genjax.typing import CostFn

Potentials = tuple[Array, Array]


class SinkhornLoss(NamedTuple):
    """value: <P_L, C>, to minimise. marginal_error: L1, of P_L."""

    value: Float[Array, ""]
    marginal_error: Float[Array, ""]


class SinkhornDivergence(NamedTuple):
    """value = cross - (self_x + self_y) / 2.

    marginal_error is the largest of the three problems', converged whether all three are. `init`
    holds their potentials: pass it as `init` to warm-start the next call.
    """

    value: Float[Array, ""]
    cross: Float[Array, ""]
    self_x: Float[Array, ""]
    self_y: Float[Array, ""]
    marginal_error: Float[Array, ""]
    converged: Bool[Array, ""]
    init: tuple[Potentials, Potentials, Potentials]


class MinibatchEnergy(NamedTuple):
    """value = between - within_x - within_y, each a sum of costs <P, C> with OT-GAN's weights."""

    value: Float[Array, ""]
    between: Float[Array, ""]
    within_x: Float[Array, ""]
    within_y: Float[Array, ""]
    marginal_error: Float[Array, ""]


def sinkhorn_loss(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    epsilon: ArrayLike,
    num_iterations: int,
    cost_fn: CostFn = squared_euclidean,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
) -> SinkhornLoss:
    """<P_L, C> after L iterations, differentiated through all of them.

    The Sinkhorn loss of Genevay, Peyre and Cuturi (2018), without their debiasing terms: C is
    cost_fn(x, y) and may hold learned parameters. Memory of the reverse pass: O(n m + L (n + m)).
    Raises as `sinkhorn` does.

    >>> x = jnp.array([[0.0], [1.0]])
    >>> sinkhorn_loss(x, x + 1, epsilon=0.01, num_iterations=50).value
    Array(0.995, dtype=float32)
    """
    result = sinkhorn(
        x,
        y,
        epsilon=epsilon,
        cost_fn=cost_fn,
        a=a,
        b=b,
        num_iterations=num_iterations,
        gradient="unroll",
    )
    return SinkhornLoss(result.cost, jax.lax.stop_gradient(result.marginal_error))


def sinkhorn_divergence(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    epsilon: ArrayLike,
    cost_fn: CostFn = squared_euclidean,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    init: tuple[Potentials, Potentials, Potentials] | None = None,
    chunk_size: int | None = None,
    **limits: Unpack[Limits],
) -> SinkhornDivergence:
    """Debiased transport: OT(x, y) - (OT(x, x) + OT(y, y)) / 2, with OT the value of `sinkhorn`.

    Zero for equal clouds, gradient and all, and not negative for the costs |x - y|^p, p <= 2
    (Feydy et al. 2019, eq. 3): to rounding, at any tolerance. The cost must be symmetric. The self
    terms take the symmetric update, and their potentials are the cross term's first guess.
    Gradients are the envelope's. Raises as `sinkhorn` does.

    >>> x, y = jax.random.normal(jax.random.key(0), (2, 64, 2))
    >>> loss = lambda x: sinkhorn_divergence(x, y, epsilon=0.1).value
    >>> jax.grad(loss)(x).shape
    (64, 2)
    """
    method = make_method("envelope", init, chunk_size, **limits)
    same = method._replace(symmetric=True)
    start: Sequence[Potentials | None] = (None, None, None) if init is None else init
    self_x = solve_clouds(x, x, cost_fn, same, epsilon=epsilon, a=a, b=a, init=start[1])
    self_y = solve_clouds(y, y, cost_fn, same, epsilon=epsilon, a=b, b=b, init=start[2])
    # At the potentials of the self problems the divergence is a squared kernel distance, epsilon/2
    # |a e^f - b e^g|^2: with them as a bound it stays >= 0 at any tolerance, and 0 for equal
    # clouds, which the self problems solve as they are (Feydy et al. 2019, theorem 1's proof).
    guess = (self_x.potentials[0], self_y.potentials[0])
    cross = solve_clouds(
        x, y, cost_fn, method, epsilon=epsilon, a=a, b=b, init=start[0], guess=guess
    )
    results = (cross, self_x, self_y)
    value = cross.value - (self_x.value + self_y.value) / 2
    # The three values are larger than their difference: it is taken point by point.
    exact = jnp.sum(cross.a * (cross.potentials[0] - guess[0]))
    exact = exact + jnp.sum(cross.b * (cross.potentials[1] - guess[1]))
    exact = exact + cross.slack - (self_x.slack + self_y.slack) / 2
    if cost_fn in COSTS:  # exp(-C / epsilon) is positive definite: what is below 0 is rounding
        exact = jnp.maximum(exact, 0)
    exact = jnp.where(jnp.isfinite(value), exact, value)
    return SinkhornDivergence(
        value=value + jax.lax.stop_gradient(exact - value),
        cross=cross.value,
        self_x=self_x.value,
        self_y=self_y.value,
        marginal_error=jnp.max(jnp.stack([r.marginal_error for r in results])),
        converged=cross.converged & self_x.converged & self_y.converged,
        init=(cross.potentials, self_x.potentials, self_y.potentials),
    )


def minibatch_energy_distance(
    x: Float[Array, "n *event"],
    x2: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    y2: Float[Array, "m *event"],
    *,
    epsilon: ArrayLike,
    cost_fn: CostFn = cosine,
    gradient: str = "envelope",
    **limits: Unpack[Limits],
) -> MinibatchEnergy:
    """OT-GAN's distance between two independent minibatches of each law.

    W(x, y) + W(x, y2) + W(x2, y) + W(x2, y2) - 2 W(x, x2) - 2 W(y, y2), with W = <P, C>
    (Salimans et al. 2018, eq. 7). The plan is a constant of the gradient, as in the paper, unless
    `gradient` is "implicit" or "unroll". Raises ValueError where shapes do not fit, and as
    `sinkhorn` does.

    >>> x, x2, y, y2 = jax.random.normal(jax.random.key(0), (4, 32, 8))
    >>> minibatch_energy_distance(x, x2, y, y2, epsilon=0.1).value.shape
    ()
    """
    checks.same_shape(x=x, x2=x2)
    checks.same_shape(y=y, y2=y2)
    pairs = [(x, y), (x, y2), (x2, y), (x2, y2), (x, x2), (y, y2)]
    costs = [cost_fn(u, v) for u, v in pairs]

    def solve(cost: Array) -> tuple[Array, Array]:
        result = sinkhorn_from_cost(
            cost,
            epsilon=epsilon,
            gradient=gradient,
            **limits,
        )
        return result.cost, jax.lax.stop_gradient(result.marginal_error)

    if x.shape[0] == y.shape[0]:
        values, errors = jax.vmap(solve)(jnp.stack(costs))  # six problems in one loop
    else:
        values, errors = (jnp.stack(z) for z in zip(*map(solve, costs), strict=True))
    between, within_x, within_y = jnp.sum(values[:4]), 2 * values[4], 2 * values[5]
    return MinibatchEnergy(
        between - within_x - within_y, between, within_x, within_y, jnp.max(errors)
    )
