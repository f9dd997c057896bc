"""Element-wise transformers: what coupling and autoregressive maps do to one number at a time.

A transformer takes raw parameters from a conditioner, `size` for every number, stacked on the
last axis but one; raw parameters of zero give the identity.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax import checks
from genjax.flows.bijections.base import Number, bounded, pinned

__all__ = ["Transformer", "affine", "rational_quadratic", "standardise"]


class Transformer(NamedTuple):
    """`(raw [..., size, d], x [..., d]) -> (y [..., d], log |dy/dx| [..., d])`, both ways."""

    forward: Callable[[Array, Array], tuple[Array, Array]]
    inverse: Callable[[Array, Array], tuple[Array, Array]]
    size: int


def affine(bound: Number = 2.0) -> Transformer:
    """y = x exp(s) + t, with the log-scale s = bound tanh(raw / bound).

    Dinh et al. (2017), eqs (7)-(8). raw[0] is the log-scale, raw[1] the shift.

    >>> shift_and_scale = affine()
    >>> flow = elementwise(shift_and_scale)
    >>> flow.forward(jnp.zeros((shift_and_scale.size, 3)), jnp.ones((2, 3)))[0]
    Array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
    """
    checks.positive("bound", bound)

    def forward(raw: Array, x: Array) -> tuple[Array, Array]:
        s = bounded(raw[..., 0, :], bound)
        return x * jnp.exp(s) + raw[..., 1, :], s

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        s = bounded(raw[..., 0, :], bound)
        return (y - raw[..., 1, :]) * jnp.exp(-s), -s

    return Transformer(forward, inverse, 2)


def standardise(bound: Number = 2.0) -> Transformer:
    """y = (x - mu) exp(-alpha), with the log-scale alpha = bound tanh(raw / bound).

    The same maps as `affine`, in the terms of an autoregressive model: mu is the mean of x.
    raw[0] is the log-scale, raw[1] is mu.

    >>> transformer = standardise()
    >>> transformer.size
    2
    """
    checks.positive("bound", bound)

    def forward(raw: Array, x: Array) -> tuple[Array, Array]:
        alpha = bounded(raw[..., 0, :], bound)
        return (x - raw[..., 1, :]) * jnp.exp(-alpha), -alpha

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        alpha = bounded(raw[..., 0, :], bound)
        return y * jnp.exp(alpha) + raw[..., 1, :], alpha

    return Transformer(forward, inverse, 2)


class _Bin(NamedTuple):
    """The bin of each x: left end, width, bottom, height, and the two slopes at its ends."""

    left: Array
    width: Array
    bottom: Array
    height: Array
    slope_left: Array
    slope_right: Array

    @property
    def slope(self) -> Array:
        """Of the bin's diagonal, s in the paper."""
        return self.height / self.width

    @property
    def bend(self) -> Array:
        """slope_left + slope_right - 2 s: 0 where the spline is a line."""
        return self.slope_left + self.slope_right - 2 * self.slope

    def value(self, z: Array) -> Array:
        """y at the place z in [0, 1] of the bin, eq. (4)."""
        s = self.slope
        top = self.height * (s * z**2 + self.slope_left * z * (1 - z))
        return self.bottom + top / (s + self.bend * z * (1 - z))

    def place(self, y: Array) -> Array:
        """z in [0, 1] where the value is y, eqs (6)-(8)."""
        s, bend, rise = self.slope, self.bend, y - self.bottom
        a = self.height * (s - self.slope_left) + rise * bend
        b = self.height * self.slope_left - rise * bend
        c = -s * rise
        # The discriminant is positive for a monotone spline; rounding may take it to 0.
        root = jnp.sqrt(jnp.maximum(b**2 - 4 * a * c, 1e-30))
        return pinned(2 * c / (-b - root), 0, 1)

    def log_slope(self, z: Array) -> Array:
        """log dy/dx at the place z, eq. (5)."""
        s = self.slope
        top = self.slope_right * z**2 + 2 * s * z * (1 - z) + self.slope_left * (1 - z) ** 2
        return 2 * jnp.log(s) + jnp.log(top) - 2 * jnp.log(s + self.bend * z * (1 - z))


def _find(value: Array, edges: Array, tables: tuple[Array, ...]) -> _Bin:
    """Select the bin of each value by comparing with the first edges: no gather, no scatter."""
    above = value[..., None, :] >= edges
    # The first bin also takes what lies below it, so that exactly one bin is chosen.
    above = above.at[..., 0, :].set(True)
    beyond = jnp.concatenate([above[..., 1:, :], jnp.zeros_like(above[..., :1, :])], axis=-2)
    chosen = above & ~beyond
    return _Bin(*(jnp.sum(jnp.where(chosen, table, 0), axis=-2) for table in tables))


def rational_quadratic(
    bins: int = 8,
    low: Number = -6.0,
    high: Number = 6.0,
    *,
    min_bin: Number = 1e-3,
    min_slope: Number = 1e-3,
) -> Transformer:
    """Monotone rational-quadratic spline on [low, high], the identity outside.

    Durkan, Bekasov, Murray and Papamakarios (2019), eqs (4)-(8), linear tails with slope 1 at both
    ends. Raw parameters: `bins` widths, `bins` heights (softmax, at least `min_bin` of the
    interval each), `bins` - 1 inner slopes (softplus, at least `min_slope`). What lies inside the
    interval never leaves it by rounding. Gradients outside are those of the identity, never NaN.

    >>> spline = rational_quadratic()
    >>> y, log_det = elementwise(spline).forward(jnp.zeros((spline.size, 3)), jnp.ones((2, 3)))
    >>> y.round(3)
    Array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
    """
    checks.integer("bins", bins, 2)
    checks.positive("high - low", high - low)
    if not 0 < min_bin * bins < 1:
        raise ValueError(f"min_bin * bins must lie in (0, 1), got {min_bin} * {bins}")
    span = high - low
    # softplus(shift) + min_slope = 1: zero raw slopes are slope 1.
    shift = math.log(math.expm1(1 - min_slope))

    def knots(raw: Array) -> tuple[Array, Array]:
        """Sizes [..., bins, d] and the first edges [..., bins, d] of the bins."""
        sizes = span * (min_bin + (1 - min_bin * bins) * jax.nn.softmax(raw, axis=-2))
        edges = low + jnp.cumsum(sizes, axis=-2)[..., :-1, :]
        first = jnp.full_like(edges[..., :1, :], low)
        return sizes, jnp.concatenate([first, edges], axis=-2)

    def find(raw: Array, value: Array, along_y: bool) -> _Bin:
        widths, lefts = knots(raw[..., :bins, :])
        heights, bottoms = knots(raw[..., bins : 2 * bins, :])
        inner = min_slope + jax.nn.softplus(raw[..., 2 * bins :, :] + shift)
        one = jnp.ones_like(inner[..., :1, :])
        slopes = jnp.concatenate([one, inner, one], axis=-2)
        ends = slopes[..., :-1, :], slopes[..., 1:, :]
        return _find(value, bottoms if along_y else lefts, (lefts, widths, bottoms, heights, *ends))

    def forward(raw: Array, x: Array) -> tuple[Array, Array]:
        inside = (x > low) & (x < high)
        # The spline sees the clipped value only: its gradient is finite wherever x lies.
        safe = jnp.clip(x, low, high)
        b = find(raw, safe, along_y=False)
        z = pinned((safe - b.left) / b.width, 0, 1)
        return jnp.where(inside, pinned(b.value(z), low, high), x), jnp.where(
            inside, b.log_slope(z), 0
        )

    def inverse(raw: Array, y: Array) -> tuple[Array, Array]:
        inside = (y > low) & (y < high)
        safe = jnp.clip(y, low, high)
        b = find(raw, safe, along_y=True)
        z = b.place(safe)
        x = pinned(b.left + z * b.width, low, high)
        return jnp.where(inside, x, y), jnp.where(inside, -b.log_slope(z), 0)

    return Transformer(forward, inverse, 3 * bins - 1)
