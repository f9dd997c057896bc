"""Losses between two samples that are built from entropic transport."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from genjax import checks
from genjax.transport.costs import cosine, squared_euclidean
from genjax.transport.sinkhorn import between, sinkhorn, sinkhorn_from_cost
from genjax.transport.solve import Options
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
    num_iterations: int | None = None,
    tolerance: float | int = 1e-3,
    max_iterations: int = 10_000,
    init: tuple[Potentials, Potentials, Potentials] | None = None,
    chunk_size: int | None = None,
) -> SinkhornDivergence:
    """Debiased transport: OT(x, y) - (OT(x, x) + OT(y, y)) / 2, with OT the value of `sinkhorn`.

    Zero for equal clouds, gradient and all, and not negative for the costs |x - y|^p, p <= 2
    (Feydy et al. 2019, eq. 3): to rounding, at any tolerance. The cost must be symmetric. The self
    terms take the symmetric update, and their potentials are the cross term's first guess.
    Gradients are the envelope's. Raises as `sinkhorn` does.
    """
    options = Options(
        num_iterations, tolerance, max_iterations, None, None, False, chunk_size=chunk_size
    )
    same = options._replace(symmetric=True)
    start: Sequence[Potentials | None] = (None, None, None) if init is None else init
    self_x = between(x, x, cost_fn, same, epsilon=epsilon, a=a, b=a, init=start[1])
    self_y = between(y, y, cost_fn, same, epsilon=epsilon, a=b, b=b, init=start[2])
    # At the potentials of the self problems the divergence is a squared kernel distance, epsilon/2
    # |a e^f - b e^g|^2: with them as a bound it stays >= 0 at any tolerance, and 0 for equal
    # clouds, which the self problems solve as they are (Feydy et al. 2019, theorem 1's proof).
    guess = (self_x.f, self_y.f)
    cross = between(x, y, cost_fn, options, epsilon=epsilon, a=a, b=b, init=start[0], guess=guess)
    results = (cross, self_x, self_y)
    return SinkhornDivergence(
        value=cross.value - (self_x.value + self_y.value) / 2,
        cross=cross.value,
        self_x=self_x.value,
        self_y=self_y.value,
        marginal_error=jnp.max(jnp.stack([r.marginal_error for r in results])),
        converged=cross.converged & self_x.converged & self_y.converged,
        init=((cross.f, cross.g), (self_x.f, self_x.g), (self_y.f, self_y.g)),
    )


def minibatch_energy_distance(
    x: Float[Array, "n *event"],
    x2: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    y2: Float[Array, "m *event"],
    *,
    epsilon: ArrayLike,
    cost_fn: CostFn = cosine,
    through_plan: bool = False,
    num_iterations: int | None = None,
    tolerance: float | int = 1e-3,
    max_iterations: int = 10_000,
) -> MinibatchEnergy:
    """OT-GAN's distance between two independent minibatches of each law.

    W(x, y) + W(x, y2) + W(x2, y) + W(x2, y2) - 2 W(x, x2) - 2 W(y, y2), with W = <P, C>
    (Salimans et al. 2018, eq. 7). The plan is a constant of the gradient, as in the paper, unless
    `through_plan`, which differentiates through the iterations and needs `num_iterations`. Raises
    ValueError where shapes do not fit, and as `sinkhorn` does.
    """
    checks.same_shape(x=x, x2=x2)
    checks.same_shape(y=y, y2=y2)
    pairs = [(x, y), (x, y2), (x2, y), (x2, y2), (x, x2), (y, y2)]
    costs = [cost_fn(u, v) for u, v in pairs]

    def solve(cost: Array) -> tuple[Array, Array]:
        result = sinkhorn_from_cost(
            cost,
            epsilon=epsilon,
            num_iterations=num_iterations,
            tolerance=tolerance,
            max_iterations=max_iterations,
            gradient="unroll" if through_plan else "envelope",
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
