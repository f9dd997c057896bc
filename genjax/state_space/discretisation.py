"""From x' = A x + B u to x_t = A_bar x_{t-1} + B_bar u_t, with steps dt.

Zero-order hold takes u as constant between two positions; the bilinear rule is Tustin's, which maps
the left half plane onto the unit disk.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Complex, Float, Inexact

from genjax import checks
from genjax.state_space import _checks

__all__ = ["bilinear", "zoh"]

Discretisation = Literal["zoh", "bilinear"]
LOWEST = -1e4  # log of an A_bar that is 0: exp of it is 0, and 0 times it is no NaN


def zoh(
    eigenvalues: Complex[Array, "*#channels pairs"],
    b: Inexact[Array, "*#channels pairs"],
    dt: float | Float[Array, "..."],
) -> tuple[Complex[Array, "..."], Complex[Array, "..."]]:
    """A_bar = exp(dt A), B_bar = (exp(dt A) - 1) / A B of a diagonal A; dt B where A is 0.

    dt: [*channels], above 0. Raises ValueError for Re A > 0 and steps that are not above 0.

    >>> a_bar, b_bar = zoh(jnp.array([-1.0 + 0j]), jnp.ones(1), 0.5)
    >>> a_bar.real.round(4), b_bar.real.round(4)
    (Array([0.6065], dtype=float32), Array([0.3935], dtype=float32))
    """
    eigenvalues, dt, b = _checks.fit(eigenvalues, dt, b=b)
    return _zoh(eigenvalues, dt[..., None], b)


def _zoh(a: Array, dt: Array, b: Array) -> tuple[Array, Array]:
    return jnp.exp(dt * a), dt * b * relative_expm1(dt * a)


def relative_expm1(z: Array) -> Array:
    """(exp(z) - 1) / z, 1 at 0, with its derivatives there: near 0 the quotient's cancel."""
    near = jnp.abs(z) < 0.05
    small, series = jnp.where(near, z, 0), jnp.ones_like(z)
    for n in range(8, 1, -1):
        series = 1 + small / n * series
    far = jnp.where(near, 1, z)
    return jnp.where(near, series, jnp.expm1(far) / far)


def bilinear(
    eigenvalues: Complex[Array, "*#channels pairs"],
    b: Inexact[Array, "*#channels pairs"],
    dt: float | Float[Array, "..."],
) -> tuple[Complex[Array, "..."], Complex[Array, "..."]]:
    """A_bar = (1 + dt A / 2) / (1 - dt A / 2), B_bar = dt B / (1 - dt A / 2) of a diagonal A.

    dt: [*channels], above 0. Raises as `zoh`.

    >>> a_bar, b_bar = bilinear(jnp.array([-1.0 + 0j]), jnp.ones(1), 0.5)
    >>> a_bar.real.round(4)
    Array([0.6], dtype=float32)
    """
    eigenvalues, dt, b = _checks.fit(eigenvalues, dt, b=b)
    half = dt[..., None] * eigenvalues / 2
    return (1 + half) / (1 - half), dt[..., None] * b / (1 - half)


def discretise(kind: Discretisation, a: Array, dt: Array, b: Array) -> tuple[Array, Array, Array]:
    """A_bar, B_bar and log A_bar: powers are exponentials of multiples of the logarithm, whose
    error does not grow with the power as that of a product does."""
    checks.one_of("discretisation", kind, ("zoh", "bilinear"))
    if kind == "zoh":
        return *_zoh(a, dt[..., None], b), dt[..., None] * a
    half = dt[..., None] * a / 2
    zero = half == -1
    log_up = jnp.where(zero, LOWEST, jnp.log1p(jnp.where(zero, 0, half)))
    return (1 + half) / (1 - half), dt[..., None] * b / (1 - half), log_up - jnp.log1p(-half)


def inner(p: Array, x: Array) -> Array:
    """p^* x over all states, from one of each conjugate pair: real, [..., 1]."""
    return 2 * jnp.sum(jnp.real(jnp.conj(p) * x), axis=-1, keepdims=True)


def dplr_solve(x: Array, a: Array, p: Array, dt: Array) -> Array:
    """(I - dt / 2 A)^-1 x for A = diag(a) - p p^*, by Woodbury's identity in O(N)."""
    half = dt[..., None] / 2
    d = 1 / (1 - half * a)
    y, q = d * x, d * p
    return y - q * (half * inner(p, y) / (1 + half * inner(p, q)))


def dplr_advance(x: Array, a: Array, p: Array, dt: Array) -> Array:
    """A_bar x = (I - dt / 2 A)^-1 (I + dt / 2 A) x, in O(N)."""
    return dplr_solve(x + dt[..., None] / 2 * (a * x - p * inner(p, x)), a, p, dt)
