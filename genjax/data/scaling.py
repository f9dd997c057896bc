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

        u takes the midpoints of 2^12 equal cells. Every y lies strictly inside its bin (`to_levels`
        gives x back exactly) and never on `low` or `high`: where the range is so far from 0 that
        float32 rounds y out of it, y is the bin's centre.
        """
        x = self._levels(x)
        cells = jax.random.bits(key, x.shape, jnp.uint16) >> 4
        y = self._scale(x + (cells.astype(jnp.float32) + 0.5) / 2**12)
        # Or XLA folds low - low, and the position is that of y before it was rounded.
        y = jax.lax.optimization_barrier(y)
        # Within four roundings of an edge another program may read the neighbour.
        margin = self.levels / 2**22
        inside = jnp.abs(self._position(y) - x - 0.5) < 0.5 - margin
        return jnp.where(inside & (y > self.low) & (y < self.high), y, self._scale(x + 0.5))

    def to_continuous(self, x: Levels) -> Float[Array, "..."]:
        """The bin centres y = low + (high - low) (x + 1/2) / levels, float32, without noise."""
        return self._scale(self._levels(x) + 0.5)

    def to_levels(self, y: Float[Array, "..."] | Float[np.ndarray, "..."]) -> UInt8[Array, "..."]:
        """The level whose bin holds y, uint8; what lies outside [low, high) is clipped."""
        self._check()
        checks.floating("y", y)
        level = jnp.floor(self._position(jnp.asarray(y, jnp.float32)))
        return jnp.clip(level, 0, self.levels - 1).astype(jnp.uint8)

    @property
    def log_det_per_dim(self) -> float:
        """log((high - low) / levels): what a log-density of y gains per dimension (nats)."""
        self._check()
        return math.log((self.high - self.low) / self.levels)

    def _scale(self, position: Array) -> Array:
        return self.low + (self.high - self.low) * (position / self.levels)

    def _position(self, y: Array) -> Array:
        return (y - self.low) / (self.high - self.low) * self.levels

    def _levels(self, x: Levels) -> Array:
        self._check()
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"x must hold integer levels, got dtype {x.dtype}")
        if x.size:
            checks.between("x", x, 0, self.levels - 1)
        return jnp.asarray(x).astype(jnp.float32)

    def _check(self) -> None:
        checks.integer("levels", self.levels)
        checks.between("levels", self.levels, 2, 256)
        if checks.is_concrete(self.low) and checks.is_concrete(self.high):
            if not self.low < self.high:
                raise ValueError(f"low must be below high, got low={self.low} and high={self.high}")
            # A bin of fewer than eight float32 numbers has no room for a centre of its own.
            ends = (self.low, self.high)
            if (self.high - self.low) / self.levels < max(map(abs, ends)) / 2**20:
                raise ValueError(f"float32 cannot hold {self.levels} levels on {ends}")
