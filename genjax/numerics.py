"""Numerics that every family needs: reductions, safe roots, broadcasting, squared distances.

Losses, statistics and sums are taken in float32 at least (float64 stays float64), whatever the
dtype of the network's output.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer, eval_jaxpr
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from genjax import checks

HIGHEST = jax.lax.Precision.HIGHEST
LOG_2PI = math.log(2 * math.pi)
# Up to this dimension squared distances are summed one coordinate at a time, which loses nothing
# where points are close; above it |x|^2 + |y|^2 - 2 <x, y> is a product of matrices.
DIRECT_DIMS = 8


def at_least_float32(x: ArrayLike) -> Float[Array, "..."]:
    """Cast to float32 what is narrower or not floating; float64 stays as it is.

    A Python number takes the type of what it meets, with 64-bit types enabled too.

    >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    x = jnp.asarray(float(x) if type(x) is float or type(x) is int else x)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return x if x.dtype == dtype else x.astype(dtype)


def sum_event(x: Float[Array, "batch *event"]) -> Float[Array, " batch"]:
    """Sum over every axis but the first, accumulated in float32 at least.

    >>> sum_event(jnp.ones((2, 3, 3)))
    Array([9., 9.], dtype=float32)
    """
    return jnp.sum(at_least_float32(x), axis=tuple(range(1, x.ndim)))


def expand_to(x: Float[Array, " batch"], like: Array) -> Float[Array, "batch ..."]:
    """Reshape `[batch]` to `[batch, 1, ..., 1]`, the rank of `like`, so that it broadcasts.

    >>> expand_to(jnp.ones(2), jnp.zeros((2, 8, 8))).shape
    (2, 1, 1)
    """
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def masked_mean(
    values: Float[Array, "*shape"], where: Bool[Array, "*shape"] | None = None
) -> Float[Array, ""]:
    """Mean of the values that `where` keeps; 0 where nothing is kept. Masked values may be NaN.

    >>> masked_mean(jnp.array([1.0, jnp.nan]), jnp.array([True, False]))
    Array(1., dtype=float32)
    """
    values = at_least_float32(values)
    if where is None:
        return jnp.mean(values) if values.size else jnp.zeros((), values.dtype)
    checks.same_shape(values=values, where=where)
    total = jnp.sum(jnp.where(where, values, 0))
    return total / jnp.maximum(jnp.sum(where.astype(values.dtype)), 1)


def log_mean_exp(x: Float[Array, "..."], axis: int | Sequence[int] = 0) -> Float[Array, "..."]:
    """log of the mean of exp(x) over `axis`, in the log domain.

    >>> log_mean_exp(jnp.array([1000.0, 1000.0]))
    Array(1000., dtype=float32)
    """
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    count = math.prod(x.shape[a] for a in axes)
    return jax.nn.logsumexp(at_least_float32(x), axis=axes) - math.log(count)


def exp_excess(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(x) - 1 - x, never negative: near 0 by its series, where the difference would cancel.

    What a divergence of two close laws is made of: KL of Gaussians, u - 1 - log u.

    >>> round(float(exp_excess(jnp.array(1e-4)) * 1e8), 3)
    0.5
    """
    near = jnp.abs(x) < 0.5
    s = jnp.where(near, x, 0)
    series = jnp.ones_like(s)
    for k in range(14, 2, -1):  # s^14 / 14! is below the rounding of float64
        series = 1 + s / k * series
    return jnp.where(near, jnp.square(s) / 2 * series, jnp.expm1(x) - x)


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Square root whose gradient at 0 is 0, not infinite; NaN of what is NaN or negative.

    >>> jax.grad(safe_sqrt)(jnp.zeros((), jnp.float32)).item()
    0.0
    """
    zero = x == 0
    root = jnp.sqrt(jnp.where(zero, 1, x))
    return jnp.where(zero, 0, root)


def safe_norm(
    x: Float[Array, "..."], axis: int | Sequence[int] | None = None, keepdims: bool = False
) -> Float[Array, "..."]:
    """Euclidean norm over `axis` whose gradient at x = 0 is 0.

    >>> jax.grad(safe_norm)(jnp.zeros(2))
    Array([0., 0.], dtype=float32)
    """
    axes = tuple(axis) if isinstance(axis, Sequence) else axis
    return safe_sqrt(jnp.sum(jnp.square(at_least_float32(x)), axis=axes, keepdims=keepdims))


def event_norm(x: Float[Array, "batch *event"]) -> Float[Array, " batch"]:
    """Euclidean norm of each example over its whole event; gradient 0 at 0.

    >>> event_norm(jnp.ones((2, 2, 2)))
    Array([2., 2.], dtype=float32)
    """
    return safe_norm(x, axis=tuple(range(1, x.ndim))) if x.ndim > 1 else jnp.abs(x)


def linearize(
    function: Callable[[Array], Any], x: Float[Array, "..."]
) -> tuple[Any, Callable[[Array], Any]]:
    """`jax.linearize`, also where `jax.custom_vjp` inside the function refuses forward mode.

    Returns (function(x), push) with push(v) = J v. There J v is the derivative of g -> J^T g, which
    is linear: reverse over reverse.

    >>> value, tangent = linearize(jnp.square, jnp.array(3.0))
    >>> value.item(), tangent(jnp.array(1.0)).item()
    (9.0, 6.0)
    """
    value, push = jax.linearize(function, x)
    if _is_linear(push, x):
        return value, push
    value, pull = jax.vjp(function, x)
    zeros = jax.tree.map(jnp.zeros_like, value)
    return value, lambda v: jax.vjp(lambda g: pull(g)[0], zeros)[1](v)[0]


def hoisted(function: Callable[..., Any], *example: Any) -> tuple[Callable[..., Any], list[Any]]:
    """The function with all traced arrays that it closes over, integers and keys too, as arguments.

    Returns (pure, closed) with pure(*args, *closed) = function(*args) for args like `example`.
    `jax.closure_convert` leaves integers and keys where they are, so that a rule of its own
    (`jax.custom_jvp`, `jax.custom_vjp`) inside `jax.lax.cond` or a loop meets another trace's.

    >>> pure, closed = hoisted(lambda x: 2 * x, jnp.ones(2))
    >>> pure(jnp.ones(2), *closed)
    Array([2., 2.], dtype=float32)
    """
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*example)
    traced = [isinstance(c, Tracer) for c in jaxpr.consts]
    known = [None if t else c for c, t in zip(jaxpr.consts, traced, strict=True)]

    def pure(*given: Any) -> Any:
        closed = iter(given[len(example) :])
        consts = [next(closed) if t else c for c, t in zip(known, traced, strict=True)]
        flat = eval_jaxpr(jaxpr.jaxpr, consts, *jax.tree.leaves(given[: len(example)]))
        return jax.tree.unflatten(jax.tree.structure(out), flat)

    return pure, [c for c, t in zip(jaxpr.consts, traced, strict=True) if t]


def has_forward_mode(function: Callable[[Array], Any], x: Float[Array, "..."]) -> bool:
    """Whether forward mode passes through the function: not through `jax.custom_vjp` in it.

    >>> has_forward_mode(jnp.sin, jnp.ones(2))
    True
    """
    return _is_linear(jax.linearize(function, x)[1], x)


def _is_linear(push: Callable[[Array], Any], x: Array) -> bool:
    # A rule without forward mode shows where what was recorded of it is differentiated again.
    try:
        jax.eval_shape(lambda v: jax.jvp(push, (v,), (v,)), x)
    except NotImplementedError:
        return False
    return True


def centred(*points: ArrayLike) -> tuple[Array, ...]:
    """Subtract the mean of the first `[n, d]` from all of them, in float32 at least.

    Distances stay, their rounding shrinks; no gradient flows through the mean.

    >>> x, y = centred(jnp.array([[1000.0]]), jnp.array([[1002.0]]))
    >>> (y - x).round(3)
    Array([[2.]], dtype=float32)
    """
    arrays = [at_least_float32(x) for x in points]
    first = jax.lax.stop_gradient(arrays[0])
    share = jnp.full((len(first),), 1 / max(len(first), 1), first.dtype)
    mean = jnp.matmul(share, first, precision=HIGHEST)[None, :]
    return tuple(x - mean for x in arrays)


def squared_distances(
    x: Float[Array, "n d"],
    y: Float[Array, "m d"],
    *,
    norms: tuple[Float[Array, " n"], Float[Array, " m"]] | None = None,
) -> Float[Array, "n m"]:
    """|x_i - y_j|^2, never negative, in float32 at least and HIGHEST precision.

    Up to `DIRECT_DIMS` dimensions coordinate by coordinate, above as a product of matrices around
    the mean of y. With `norms`, the squared norms of x and y that a caller of many blocks takes
    once, always as a product, of points that the caller has centred. Gradients are exact, also
    where rounding took a distance to 0. Raises ValueError unless x is [n, d] and y [m, d].

    >>> squared_distances(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]]))
    Array([[25.]], dtype=float32)
    """
    checks.rank("x", x, 2)
    checks.rank("y", y, 2)
    checks.same_event(x=x, y=y)
    x, y = at_least_float32(x), at_least_float32(y)
    dtype = jnp.promote_types(x.dtype, y.dtype)
    x, y = x.astype(dtype), y.astype(dtype)
    return _squared_distances(x, y) if norms is None else _by_products(x, y, *norms)


def _by_products(x: Array, y: Array, norms_x: Array, norms_y: Array) -> Array:
    products = jnp.matmul(x, y.T, precision=HIGHEST)
    # Rounding may take a vanishing distance below 0.
    return jnp.maximum(norms_x[:, None] + norms_y[None, :] - 2 * products, 0)


@jax.custom_jvp
def _squared_distances(x: Array, y: Array) -> Array:
    if x.shape[1] <= DIRECT_DIMS:
        total = jnp.zeros((x.shape[0], y.shape[0]), x.dtype)
        for k in range(x.shape[1]):
            total = total + jnp.square(x[:, k, None] - y[None, :, k])
        return total
    y, x = centred(y, x)
    return _by_products(x, y, jnp.sum(x * x, axis=1), jnp.sum(y * y, axis=1))


@_squared_distances.defjvp
def _squared_distances_jvp(primals, tangents):
    # d|x_i - y_j|^2 = 2 <x_i - y_j, dx_i - dy_j>, as products of matrices: the reverse pass forms
    # no [n, m, d] array, and the clip at 0 does not cut the gradient. The 2 and the signs are at
    # the points, so that it forms no other [n, m] matrix either.
    x, y = primals
    dx, dy = tangents
    yc, xc = (2 * z for z in centred(y, x))
    rows = jnp.sum(xc * dx, axis=1)[:, None] + jnp.matmul(dx, -yc.T, precision=HIGHEST)
    cols = jnp.sum(yc * dy, axis=1)[None, :] + jnp.matmul(-xc, dy.T, precision=HIGHEST)
    return _squared_distances(x, y), rows + cols
