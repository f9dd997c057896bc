"""One entry of the tables: how to call a public function on arrays of floats."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# What law 1 does to the points of an entry.
CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda x: x,
    "scale 1e-3": lambda x: 1e-3 * x,
    "scale 1e3": lambda x: 1e3 * x,
    "offset 1e3": lambda x: x + 1e3,
    "an outlier at 1e4": lambda x: np.where(np.arange(x.size).reshape(x.shape) == 1, 1e4, x),
    "one axis 300 times the other": lambda x: x * np.geomspace(1, 1 / 300, x.shape[-1]),
}
BASE = ("as it is",)


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """call(*data) -> a tree of arrays; all data are floats that a user may differentiate by.

    order: how often, 0 where what is returned is whole numbers, or drawn. changes: to the data, at
    which float32 is compared with float64. rows: the first axes are examples, of which there may be
    none, one, or copies. masked: call(*data) with everything masked. wide: of the type that jax
    draws in, or that statistics are summed in, whatever that of the data.
    """

    call: Callable[..., Any]
    data: tuple[np.ndarray, ...]
    order: int = 2
    changes: tuple[str, ...] = BASE
    rows: bool = True
    masked: Callable[..., Any] | None = None
    wide: bool = False

    def numbers(self, *data: Any) -> list[jax.Array]:
        """The floating leaves of what is returned."""
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(self.call(*data))]
        return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]

    def total(self, *data: Any) -> jax.Array:
        """One number: the values, each with a weight of its own."""
        parts = [
            jnp.sum(jnp.cos(jnp.arange(x.size, dtype=x.real.dtype)) * x.ravel().real)
            for x in self.numbers(*data)
        ]
        return sum(parts[1:], parts[0])

    def everything(self, *data: Any) -> dict[str, Any]:
        """Values, gradient, and the second derivative along the data, both ways."""
        found: dict[str, Any] = {"values": self.numbers(*data)}
        if not self.order:
            return found
        where = tuple(range(len(data)))
        gradient = jax.grad(self.total, argnums=where)
        found["gradient"] = gradient(*data)
        if self.order > 1:
            ones = tuple(jnp.ones_like(x) for x in data)
            found["forward over reverse"] = jax.jvp(gradient, data, ones)[1]
            found["reverse over reverse"] = jax.grad(
                lambda *data: sum(jnp.sum(g) for g in gradient(*data)), argnums=where
            )(*data)
        return found


def normals(seed: int, *shape: int) -> np.ndarray:
    """Fixed standard normals, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of(call: Callable[..., Any], *data: np.ndarray, **options: Any) -> Entry:
    """An entry, its data in float32."""
    return Entry(call, tuple(np.asarray(x, np.float32) for x in data), **options)


X, Y, Z = (normals(i, 4, 3) for i in (1, 2, 3))
W = normals(4, 3, 3) / 2
UNIT = np.random.default_rng(5).uniform(0.05, 0.95, (4, 3)).astype(np.float32)
T = np.array([0.2, 0.4, 0.6, 0.8], np.float32)
ALL = tuple(CHANGES)
SCALES = ALL[:3]
