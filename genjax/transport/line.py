"""Exact transport on the line, where sorting is optimal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.transport.sinkhorn import normalised

__all__ = ["LineTransport", "transport_1d"]


class LineTransport(NamedTuple):
    """value: W_p^p. a, b: the weights, of sum 1.

    The plan moves mass[k] from x[rows[k]] to y[cols[k]], k < n + m; plan() is its matrix [n, m].
    """

    value: Float[Array, ""]
    rows: Int[Array, " n_plus_m"]
    cols: Int[Array, " n_plus_m"]
    mass: Float[Array, " n_plus_m"]
    a: Float[Array, " n"]
    b: Float[Array, " m"]

    def plan(self) -> Float[Array, "n m"]:
        """The plan [n, m]: at most n + m - 1 entries are not 0."""
        empty = jnp.zeros((len(self.a), len(self.b)), self.mass.dtype)
        return empty.at[self.rows, self.cols].add(self.mass)


def transport_1d(
    x: Float[Array, " n"],
    y: Float[Array, " m"],
    *,
    p: float | int = 2,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
) -> LineTransport:
    """Exact optimal transport between weighted points of the line, for the cost |x - y|^p.

    value = W_p^p = integral_0^1 |F^-1(u) - G^-1(u)|^p du, with the quantiles of both samples
    (Peyre and Cuturi 2019, section 2.6), in O((n + m) log(n + m)); the unit is that of x to the
    power p. a, b: weights, uniform by default, divided by their sums.

    Equal points keep their order, and points of weight 0 get nothing. The gradient for x and y is
    that of the pairing, p |x - y|^(p - 1) times its mass, 0 between equal points; that for the
    weights is a pair of dual potentials, less a constant. Several lines at once: `jax.vmap`. Raises
    ValueError or TypeError for shapes and weights that do not fit, and for p < 1, for which sorting
    is not optimal.

        transport_1d(x, y, p=1).value

    >>> float(transport_1d(jnp.array([0.0, 1.0]), jnp.array([3.0, 2.0])).value)
    4.0
    """
    for name, z in (("x", x), ("y", y)):
        checks.rank(name, z, 1)
        checks.not_empty(name, z)
        checks.floating(name, z)
    checks.at_least("p", p, 1)
    dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    x, y = jnp.asarray(x).astype(dtype), jnp.asarray(y).astype(dtype)
    n, m, uniform = len(x), len(y), a is None and b is None
    a, b = normalised("a", a, n, dtype), normalised("b", b, m, dtype)
    order_x, order_y = (jnp.argsort(jax.lax.stop_gradient(z), stable=True) for z in (x, y))
    if uniform and n * m < 2**31:  # whole numbers, in units of 1 / (n m)
        ends = jnp.concatenate([m * jnp.arange(1, n + 1), n * jnp.arange(1, m + 1)])
    else:
        ends = jnp.concatenate([jnp.cumsum(a[order_x]), jnp.cumsum(b[order_y])])
    # In order of their ends: how many points of either side are used up before each piece.
    order = jnp.argsort(jax.lax.stop_gradient(ends), stable=True)
    of_x = (order < n).astype(jnp.int32)
    rows = order_x[jnp.minimum(jnp.cumsum(of_x) - of_x, n - 1)]
    cols = order_y[jnp.minimum(jnp.cumsum(1 - of_x) - (1 - of_x), m - 1)]
    mass = jnp.diff(ends[order], prepend=0)
    mass = mass.astype(dtype) / (n * m) if mass.dtype != dtype else mass
    return LineTransport(jnp.sum(mass * _power(x[rows] - y[cols], p)), rows, cols, mass, a, b)


def _power(d: Array, p: float | int) -> Array:
    """|d|^p, with gradient 0 at 0."""
    if p == 2:
        return jnp.square(d)
    zero = d == 0  # where jnp.abs has slope 1
    return jnp.where(zero, 0, jnp.abs(jnp.where(zero, 1, d)) ** p)
