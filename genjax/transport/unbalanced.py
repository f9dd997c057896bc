"""Entropic transport between measures of any mass: marginals are asked for, not imposed.

    value = min_P <P, C> + epsilon KL(P | a b^T) + rho_1 KL(P 1 | a) + rho_2 KL(P^T 1 | b)

with KL(p | q) = sum p log(p / q) - p + q (Chizat et al. 2018; Sejourne et al. 2019).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from genjax import checks
from genjax.numerics import HIGHEST, at_least_float32
from genjax.transport.costs import squared_euclidean
from genjax.transport.problem import COSTS
from genjax.transport.relaxed import (
    Relaxed,
    column_error,
    dual_terms,
    imposed,
    live,
    plan,
    row_update,
    semidual,
    shift,
    solve,
    solve_symmetric,
)
from genjax.transport.sinkhorn import checked_clouds
from genjax.typing import CostFn

__all__ = [
    "UnbalancedDivergence",
    "UnbalancedResult",
    "unbalanced_divergence",
    "unbalanced_sinkhorn",
]


class UnbalancedResult(NamedTuple):
    """What `unbalanced_sinkhorn` returns.

    value: the optimum. f, g: potentials, P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon), for
    which P 1 = a exp(-f / rho_1) and P^T 1 = b exp(-g / rho_2). plan(): P [n, m].
    marginal_error: how far P is from these two equations, in L1, over the mean mass of a and b.
    converged: whether it is at most the tolerance, with room for rounding.
    """

    value: Float[Array, ""]
    marginal_error: Float[Array, ""]
    num_iterations: Int[Array, ""]
    converged: Bool[Array, ""]
    columns: Array  # g, a constant of every gradient
    problem: Relaxed

    @property
    def f(self) -> Float[Array, " n"]:
        return self._potentials()[0]

    @property
    def g(self) -> Float[Array, " m"]:
        return self._potentials()[1]

    def plan(self) -> Float[Array, "n m"]:
        """The plan [n, m], with the derivatives of the optimum."""
        return plan(self.problem, live(self.problem, self.columns))

    def _potentials(self) -> tuple[Array, Array]:
        p, g = self.problem, live(self.problem, self.columns)
        f, _ = row_update(p, g)
        level = jnp.where(imposed(p), shift(p, f, g), 0)
        return f + level, g - level


class UnbalancedDivergence(NamedTuple):
    """value = cross - (self_x + self_y) / 2 + epsilon / 2 (mass of a - mass of b)^2."""

    value: Float[Array, ""]
    cross: Float[Array, ""]
    self_x: Float[Array, ""]
    self_y: Float[Array, ""]
    marginal_error: Float[Array, ""]
    converged: Bool[Array, ""]


def unbalanced_sinkhorn(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    epsilon: ArrayLike,
    marginal_penalty: ArrayLike | tuple[ArrayLike, ArrayLike],
    cost_fn: CostFn = squared_euclidean,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    tolerance: float | int = 1e-3,
    max_iterations: int = 10_000,
) -> UnbalancedResult:
    """Entropic transport that may create and destroy mass, at a price per unit.

    value = min_P <P, C> + epsilon KL(P | a b^T) + rho_1 KL(P 1 | a) + rho_2 KL(P^T 1 | b), with
    C = cost_fn(x, y) and KL(p | q) = sum p log(p / q) - p + q (Chizat et al. 2018; Sejourne et al.
    2019, definition 1). Costs, epsilon and the penalties share a unit; a and b, uniform of mass 1
    by default, may have any mass.

    marginal_penalty: rho, or (rho_1, rho_2); infinity imposes that marginal, and both give
    `sinkhorn`. Mass travels as far as costs of about 2 rho.
    The potentials are updated in turn, f = -rho_1 epsilon / (rho_1 + epsilon) log sum_j b_j
    exp((g_j - C_ij) / epsilon), on a ladder of epsilons, with the best constant moved between them
    at each sweep (Sejourne et al. 2022), until `tolerance` or `max_iterations` sweeps.

    The gradient of the value is the envelope's, P for the cost; f, g and plan() have the
    derivatives of the optimum, by the implicit function theorem (a dense linear solve of size m,
    done only where they are asked for). Narrow dtypes are computed in float32. Raises ValueError
    or TypeError for shapes, weights or options that do not fit, and for masses that differ where
    both marginals are imposed.

    >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [9.0]])
    >>> result = unbalanced_sinkhorn(x, y, epsilon=0.1, marginal_penalty=1.0)
    >>> bool(result.plan().sum() < 1)
    True
    """
    p = _problem(x, y, cost_fn, epsilon, _pair(marginal_penalty), a, b)
    checks.positive("tolerance", tolerance)
    checks.integer("max_iterations", max_iterations, 1)
    g, count = solve(jax.lax.stop_gradient(p), tolerance, max_iterations)
    return _result(p, g, count, tolerance)


def unbalanced_divergence(
    x: Float[Array, "n *event"],
    y: Float[Array, "m *event"],
    *,
    epsilon: ArrayLike,
    marginal_penalty: ArrayLike,
    cost_fn: CostFn = squared_euclidean,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    tolerance: float | int = 1e-3,
    max_iterations: int = 10_000,
) -> UnbalancedDivergence:
    """Debiased unbalanced transport, 0 for equal measures.

    value = OT(x, y) - (OT(x, x) + OT(y, y)) / 2 + epsilon / 2 (sum a - sum b)^2, with OT the value
    of `unbalanced_sinkhorn` at one penalty (Sejourne et al. 2019, definition 2). Not negative for
    the costs |x - y|^p, p <= 2, at any tolerance; the gradient for equal measures is 0 to a
    thousandth of it. The cost must be symmetric, and gives the unit. Raises as
    `unbalanced_sinkhorn` does.

    >>> x = jax.random.normal(jax.random.key(0), (32, 2))
    >>> result = unbalanced_divergence(x, x + 1, epsilon=0.1, marginal_penalty=1.0)
    >>> bool(result.value > 0)
    True
    """
    checks.rank("marginal_penalty", marginal_penalty, 0)
    checks.positive("tolerance", tolerance)
    checks.integer("max_iterations", max_iterations, 1)
    both = (marginal_penalty, marginal_penalty)
    cross = _problem(x, y, cost_fn, epsilon, both, a, b)
    own = [
        _problem(z, z, cost_fn, epsilon, both, weights, weights) for z, weights in ((x, a), (y, b))
    ]
    # Their plans are symmetric at the optimum, and the gradient is then 0 for equal measures.
    alone = [
        solve_symmetric(jax.lax.stop_gradient(p), 1e-3 * tolerance, max_iterations) for p in own
    ]
    guess = alone[1][0]
    g, count = solve(jax.lax.stop_gradient(cross), tolerance, max_iterations, guess)
    # At the potentials of the self problems the divergence is a squared kernel distance.
    better = semidual(cross, guess) >= semidual(cross, g)
    g = jnp.where(jax.lax.stop_gradient(better), guess, g)
    self_x, self_y = (_result(p, *found, tolerance) for p, found in zip(own, alone, strict=True))
    results = (_result(cross, g, count, tolerance), self_x, self_y)
    (mass_a, mass_b), epsilon = cross.mass, cross.epsilon
    value = results[0].value - (self_x.value + self_y.value) / 2
    value = value + epsilon / 2 * jnp.square(mass_a - mass_b)
    # The values are larger than their difference: it is taken point by point.
    (f, g), of_x, of_y = (dual_terms(r.problem, r.columns) for r in results)
    exact = jnp.vdot(cross.a, f - sum(of_x) / 2) + jnp.vdot(cross.b, g - sum(of_y) / 2)
    exact = exact + epsilon * (mass_b - mass_a) / 2
    if cost_fn in COSTS:  # exp(-C / epsilon) is positive definite: what is below 0 is rounding
        exact = jnp.maximum(exact, 0)
    exact = jnp.where(jnp.isfinite(value), exact, value)
    return UnbalancedDivergence(
        value + jax.lax.stop_gradient(exact - value),
        *(r.value for r in results),
        marginal_error=jnp.max(jnp.stack([r.marginal_error for r in results])),
        converged=jnp.all(jnp.stack([r.converged for r in results])),
    )


def _result(p: Relaxed, g: Array, count: Array, tolerance: Any) -> UnbalancedResult:
    fixed = jax.lax.stop_gradient(p)
    f, _ = row_update(fixed, g)
    error, rounding = column_error(fixed, g, row_update(fixed.exchanged(), f)[0])
    sound = jnp.isfinite(error) & (p.epsilon > 0)
    return UnbalancedResult(
        value=jnp.where(sound, semidual(p, g), jnp.nan),
        marginal_error=jnp.where(sound, error, jnp.nan),
        num_iterations=count,
        converged=error <= tolerance + rounding,
        columns=g,
        problem=p,
    )


def _problem(
    x: Any, y: Any, cost_fn: CostFn, epsilon: Any, penalties: tuple[Any, Any], a: Any, b: Any
) -> Relaxed:
    x, y, dtype = checked_clouds(x, y, cost_fn)
    checks.rank("epsilon", epsilon, 0)
    checks.positive("epsilon", epsilon)
    for penalty in penalties:
        checks.rank("marginal_penalty", penalty, 0)
        if checks.is_concrete(penalty) and not penalty > 0:
            raise ValueError(f"marginal_penalty must be above 0, got {penalty}")
    (a, mass_a), (b, mass_b) = _weights("a", a, len(x), dtype), _weights("b", b, len(y), dtype)
    if all(checks.is_concrete(z) and z == math.inf for z in penalties):
        checks.between("sum of a / sum of b, both imposed,", mass_a / mass_b, 0.99, 1.01)
    cost = at_least_float32(cost_fn(x, y))
    mean = jnp.matmul(a / mass_a, jnp.matmul(cost, b / mass_b, precision=HIGHEST))
    seen = (a > 0)[:, None] & (b > 0)[None, :]
    spread = jax.lax.stop_gradient(mean - jnp.min(cost, where=seen, initial=jnp.inf))
    pull = tuple(1 / jnp.asarray(penalty).astype(dtype) for penalty in penalties)
    epsilon = jnp.asarray(epsilon).astype(dtype)
    return Relaxed(cost, a, b, epsilon, pull, (mass_a, mass_b), spread)  # pyright: ignore


def _weights(name: str, weights: Any, size: int, dtype: Any) -> tuple[Array, Array]:
    """The weights and their sum: uniform ones of sum 1 for None."""
    if weights is None:
        return jnp.full((size,), 1 / size, dtype), jnp.ones((), dtype)
    checks.shape(name, weights, (size,))
    checks.at_least(name, weights, 0.0)
    weights = jnp.asarray(weights).astype(dtype)
    checks.positive(f"the sum of {name}", jnp.sum(weights))
    return weights, jnp.sum(weights)


def _pair(penalty: Any) -> tuple[Any, Any]:
    """One penalty for both marginals, or one for each."""
    if not isinstance(penalty, tuple | list):
        return penalty, penalty
    if len(penalty) != 2:
        raise ValueError(f"marginal_penalty must be one number or two, got {len(penalty)}")
    return penalty[0], penalty[1]
