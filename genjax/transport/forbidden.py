"""Pairs that may not be matched: infinite entries of a cost.

The solver sees a finite bar in their place, so high that in a problem that has a plan no mass
crosses it. Mass that does is told by the value: with a plan,

    value <= max C + epsilon KL(P | a b^T) <= max C + epsilon log min(n, m),

over the pairs that are allowed, and a share s across the bar costs s BAR times the width of that.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genjax import checks

BAR = 1e4  # widths above the largest cost that is allowed


def barred(cost: Array, epsilon: Array) -> tuple[Array, Array, tuple[Array, Array]]:
    """The cost with a bar for what is infinite.

    And of the pairs that are allowed the largest value of a problem with a plan, and two sizes: the
    mean less the least cost, and the mean of |C|.
    """
    open_pairs = cost != jnp.inf
    fixed = jax.lax.stop_gradient(cost)
    top = jnp.max(jnp.where(open_pairs, fixed, -jnp.inf))
    low = jnp.min(fixed)
    some = low < jnp.inf
    top, low = jnp.where(some, top, 0), jnp.where(some, low, 0)
    entropy = jax.lax.stop_gradient(epsilon) * math.log(min(cost.shape))
    width = top - low + entropy + jax.lax.stop_gradient(epsilon)
    count = jnp.maximum(jnp.sum(open_pairs.astype(cost.dtype)), 1)
    spread = jnp.sum(jnp.where(open_pairs, fixed - low, 0)) / count
    sizes = spread, jnp.sum(jnp.where(open_pairs, jnp.abs(fixed), 0)) / count
    # Of equal costs the width is epsilon's, which may be below the rounding of the value.
    most = top + entropy + 0.01 * width + 8 * jnp.finfo(cost.dtype).eps * jnp.abs(top)
    return jnp.where(open_pairs, cost, top + BAR * width), most, sizes


def refuse_isolated(cost: Any, a: Any, b: Any) -> None:
    """Raise ValueError where a row or column that has weight may be matched with nothing."""
    if not all(map(checks.is_concrete, (cost, a, b))):
        return
    none = np.asarray(cost) == np.inf
    for name, weights, axis in (("row", a, 1), ("column", b, 0)):
        alone = none.all(axis) & (np.ones(1, bool) if weights is None else np.asarray(weights) > 0)
        if alone.any():
            raise ValueError(
                f"cost must allow some pair for what has weight: {name} {int(alone.argmax())} is "
                f"infinite throughout, and {int(alone.sum()) - 1} more"
            )
