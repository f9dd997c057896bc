"""Costs between two point clouds: each maps x [n, d] and y [m, d] to a matrix [n, m].

Any callable of that shape is a cost. Those here accumulate in float32 at least (float64 stays
float64), ask for HIGHEST precision in their products, and have finite gradients where x = y.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import at_least_float32, safe_norm, safe_sqrt, squared_distances


def squared_euclidean(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x_i - y_j|^2, never negative. Raises ValueError where the shapes are not [n, d], [m, d].

    >>> squared_euclidean(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]]))
    Array([[25.]], dtype=float32)
    """
    return squared_distances(x, y)


def euclidean(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x_i - y_j|, with gradient 0 where the points coincide.

    Above eight dimensions the distance comes from a matrix product: distances below about 3e-4 of
    the clouds' scale are rounding in float32. Raises ValueError where shapes do not fit.

    >>> euclidean(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]]))
    Array([[5.]], dtype=float32)
    """
    return safe_sqrt(squared_distances(x, y))


def cosine(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """1 - <x_i, y_j> / (|x_i| |y_j|), in [0, 2]; a zero vector is at distance 1 from all.

    The cost of OT-GAN (Salimans et al. 2018). Raises ValueError where shapes do not fit.

    >>> cosine(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0], [3.0, 0.0]]))
    Array([[1., 0.]], dtype=float32)
    """
    checks.rank("x", x, 2)
    checks.rank("y", y, 2)
    checks.same_event(x=x, y=y)

    def unit(z: Array) -> tuple[Array, Array]:
        z = at_least_float32(z)
        # Squares of what is far from 1 overflow or vanish.
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(z), axis=1, keepdims=True, initial=0))
        z = z / jnp.where(largest > 0, largest, 1)
        norm = safe_norm(z, axis=1, keepdims=True)
        return z / jnp.where(norm > 0, norm, 1), norm[:, 0] > 0

    # |u - v|^2 / 2 of unit vectors, which loses nothing where 1 - <u, v> cancels.
    (u, some), (v, others) = unit(x), unit(y)
    return jnp.where(some[:, None] & others[None], squared_distances(u, v) / 2, 1)
