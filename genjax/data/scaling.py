"""Between levels (integers 0..levels-1) and the real numbers that a model sees; one place for all.

A model of densities p(y) on the real numbers gives a probability of the levels x by uniform
dequantisation y = low + (high - low) (x + u) / levels, u ~ U[0, 1)^D:

    log P(x) >= E_u log p(y) + D log((high - low) / levels)        (nats)

Theis, van den Oord, Bethge 2016, "A note on the evaluation of generative models", section 3.1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from genjax import checks
from genjax.typing import PRNGKey

# Images come as numpy from the loader, as jax arrays inside a step.
Levels = Int[Array, "..."] | Int[np.ndarray, "..."] | UInt8[Array, "..."] | UInt8[np.ndarray, "..."]


class Scaling(NamedTuple):
    """The map of 0..levels-1 onto bins of equal width that fill [low, high)."""

    levels: int
    low: float | int = -1.0
    high: float | int = 1.0

    def dequantise(self, key: PRNGKey, x: Levels) -> Float[Array, "..."]:
        """y = low + (high - low) (x + u) / levels in float32, u uniform in (0, 1).

        u takes the midpoints of 2^15 equal cells: in float32 every y then lies strictly inside
        its bin (`to_levels` gives x back exactly) and never on `low` or `high`.
        """
        x = self._levels(x)
        cells = jax.random.bits(key, x.shape, jnp.uint16) >> 1
        return self._scale(x + (cells.astype(jnp.float32) + 0.5) / 2**15)

    def to_continuous(self, x: Levels) -> Float[Array, "..."]:
        """The bin centres y = low + (high - low) (x + 1/2) / levels, float32, without noise."""
        return self._scale(self._levels(x) + 0.5)

    def to_levels(self, y: Float[Array, "..."] | Float[np.ndarray, "..."]) -> UInt8[Array, "..."]:
        """The level whose bin holds y, uint8; what lies outside [low, high) is clipped."""
        self._check()
        checks.floating("y", y)
        unit = (jnp.asarray(y, jnp.float32) - self.low) / (self.high - self.low)
        return jnp.clip(jnp.floor(unit * self.levels), 0, self.levels - 1).astype(jnp.uint8)

    @property
    def log_det_per_dim(self) -> float:
        """log((high - low) / levels): what a log-density of y gains per dimension (nats)."""
        self._check()
        return math.log((self.high - self.low) / self.levels)

    def _scale(self, position: Array) -> Array:
        return self.low + (self.high - self.low) * (position / self.levels)

    def _levels(self, x: Levels) -> Array:
        self._check()
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"x must hold integer levels, got dtype {x.dtype}")
        if x.size:
            checks.between("x", x, 0, self.levels - 1)
        return jnp.asarray(x).astype(jnp.float32)

    def _check(self) -> None:
        checks.between("levels", self.levels, 2, 256)
        if checks.is_concrete(self.low) and not self.low < self.high:
            raise ValueError(f"low must be below high, got low={self.low} and high={self.high}")
