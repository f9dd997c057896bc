"""Costs between two point clouds: each maps x [n, d] and y [m, d] to a matrix [n, m].

Any callable of that shape is a cost. Those here accumulate in float32 at least (float64 stays
float64), ask for HIGHEST precision in their products, and have finite gradients where x = y.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import HIGHEST, at_least_float32, safe_norm, safe_sqrt

# Up to this dimension the differences are formed one coordinate at a time, which loses nothing
# where x and y are close; above it |x|^2 + |y|^2 - 2 <x, y> is a matrix product.
DIRECT_DIMS = 8


def _points(x: Array, y: Array) -> tuple[Array, Array]:
    """Check two point clouds and widen them to one dtype."""
    checks.rank("x", x, 2)
    checks.rank("y", y, 2)
    checks.same_event(x=x, y=y)
    x, y = at_least_float32(x), at_least_float32(y)
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return x.astype(dtype), y.astype(dtype)


def centred(x: Array, y: Array) -> tuple[Array, Array]:
    """Subtract the mean of y from both clouds: distances stay, their rounding shrinks."""
    centre = jax.lax.stop_gradient(jnp.mean(y, axis=0, keepdims=True))
    return x - centre, y - centre


@jax.custom_jvp
def _squared_distances(x: Array, y: Array) -> Array:
    if x.shape[1] <= DIRECT_DIMS:
        total = jnp.zeros((x.shape[0], y.shape[0]), x.dtype)
        for k in range(x.shape[1]):
            total = total + jnp.square(x[:, k, None] - y[None, :, k])
        return total
    x, y = centred(x, y)
    product = jnp.matmul(x, y.T, precision=HIGHEST)
    squares = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None, :]
    # Rounding may take a vanishing distance below 0.
    return jnp.maximum(squares - 2 * product, 0)


@_squared_distances.defjvp
def _squared_distances_jvp(primals, tangents):
    # d|x_i - y_j|^2 = 2 <x_i - y_j, dx_i - dy_j>, as products of matrices: the reverse pass forms
    # no [n, m, d] array, and the clip at 0 does not cut the gradient. The 2 and the signs are at
    # the points, so that it forms no other [n, m] matrix either.
    x, y = primals
    dx, dy = tangents
    xc, yc = (2 * z for z in centred(x, y))
    rows = jnp.sum(xc * dx, axis=1)[:, None] + jnp.matmul(dx, -yc.T, precision=HIGHEST)
    cols = jnp.sum(yc * dy, axis=1)[None, :] + jnp.matmul(-xc, dy.T, precision=HIGHEST)
    return _squared_distances(x, y), rows + cols


def squared_euclidean(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x_i - y_j|^2, never negative. Raises ValueError where the shapes are not [n, d], [m, d]."""
    return _squared_distances(*_points(x, y))


def euclidean(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """|x_i - y_j|, with gradient 0 where the points coincide.

    Above eight dimensions the distance comes from a matrix product: distances below about 3e-4 of
    the clouds' scale are rounding in float32. Raises ValueError where shapes do not fit.
    """
    return safe_sqrt(_squared_distances(*_points(x, y)))


def cosine(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """1 - <x_i, y_j> / (|x_i| |y_j|), in [0, 2]; a zero vector is at distance 1 from all.

    The cost of OT-GAN (Salimans et al. 2018). Raises ValueError where shapes do not fit.
    """
    x, y = _points(x, y)

    def unit(z: Array) -> Array:
        norm = safe_norm(z, axis=1, keepdims=True)
        return z / jnp.where(norm > 0, norm, 1)

    return 1 - jnp.matmul(unit(x), unit(y).T, precision=HIGHEST)
