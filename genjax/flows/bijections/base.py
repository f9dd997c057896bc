"""What a bijection is, the ways to put several together, and those without parameters.

A bijection is a pair of pure functions over a parameter tree; each returns the log-determinant of
its own Jacobian over the event, one number per example. In a density, `forward` takes data
to the base and `inverse` takes the base to data; `invert` swaps the two.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks, numerics
from genjax.typing import Params

__all__ = ["Bijection", "chain", "invert", "logit", "permutation", "repeat", "rescale"]

# beartype takes no int where a float is asked for
Number: TypeAlias = float | int


class Bijection(NamedTuple):
    """Pure functions `(params, x [batch, *event]) -> (y, log |det dy/dx| [batch])`, both ways."""

    forward: Callable[[Params, Any], tuple[Any, Array]]
    inverse: Callable[[Params, Any], tuple[Any, Array]]


def both_ways(
    run: Callable[..., tuple[Any, Array]], forward: Any = False, inverse: Any = True
) -> Bijection:
    """Make a bijection of `run(params, x, direction)`, given what says the direction."""
    return Bijection(lambda p, x: run(p, x, forward), lambda p, y: run(p, y, inverse))


def zero_log_det(x: Array) -> Float[Array, " batch"]:
    """Log-determinant of a map that keeps volume: zeros [batch] of float32 at least."""
    return jnp.zeros(x.shape[0], jnp.promote_types(x.dtype, jnp.float32))


def bounded(raw: Float[Array, "..."], bound: Number) -> Float[Array, "..."]:
    """Map a raw log-scale into (-bound, bound): bound tanh(raw / bound), the identity near 0."""
    return bound * jnp.tanh(raw / bound)


def pinned(
    x: Float[Array, "..."], low: Number = -np.inf, high: Number = np.inf
) -> Float[Array, "..."]:
    """x clipped to [low, high] with the gradient of x: for what only rounding carries outside."""
    return jax.lax.stop_gradient(jnp.clip(x, low, high)) + (x - jax.lax.stop_gradient(x))


def check_tree(name: str, params: Params, shapes: Mapping[str, Sequence[int | None]]) -> None:
    """Raise TypeError or ValueError unless `params` maps exactly the names to arrays so shaped."""
    if not isinstance(params, Mapping) or set(params) != set(shapes):
        got = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise TypeError(f"{name} needs params with the keys {sorted(shapes)}, got {got}")
    for leaf, wanted in shapes.items():
        checks.shape(f"{name} params[{leaf!r}]", params[leaf], wanted)


def check_count(name: str, params: Any, count: int) -> None:
    """Raise TypeError unless `params` is a sequence of `count` trees."""
    if not isinstance(params, list | tuple) or len(params) != count:
        got = len(params) if isinstance(params, list | tuple) else type(params).__name__
        raise TypeError(f"{name} needs a sequence of {count} parameter trees, got {got}")


def chain(bijections: Sequence[Bijection]) -> Bijection:
    """Compose bijections in the order given; `params` is a sequence of as many trees.

    log |det| of the composition is the sum of those of its parts. Raises TypeError where the
    number of trees is another.

    >>> flow = chain([rescale(0.0, 2.0), rescale(0.0, 5.0)])
    >>> flow.forward([(), ()], jnp.full((1, 1), 10.0))[0]
    Array([[1.]], dtype=float32, weak_type=True)
    """
    bijections = tuple(bijections)

    def forward(params: Params, x: Any) -> tuple[Any, Array]:
        check_count("chain", params, len(bijections))
        total = zero_log_det(jax.tree.leaves(x)[0])
        for bijection, tree in zip(bijections, params, strict=True):
            x, log_det = bijection.forward(tree, x)
            total = total + log_det
        return x, total

    def inverse(params: Params, y: Any) -> tuple[Any, Array]:
        check_count("chain", params, len(bijections))
        total = zero_log_det(jax.tree.leaves(y)[0])
        for bijection, tree in zip(reversed(bijections), reversed(params), strict=True):
            y, log_det = bijection.inverse(tree, y)
            total = total + log_det
        return y, total

    return Bijection(forward, inverse)


def repeat(bijection: Bijection) -> Bijection:
    """Apply one bijection once for every row of a stacked parameter tree, in one scan.

    Every leaf of `params` has a leading axis of the depth; compilation time does not grow with it.
    The event keeps its shape. Raises ValueError where leaves disagree on the depth.

    >>> flow, params = repeat(planar()), planar_init(jax.random.key(0), 2)
    >>> params = jax.tree.map(lambda p: jnp.stack([p] * 3), params)
    >>> flow.forward(params, jnp.ones((4, 2)))[0].shape
    (4, 2)
    """

    def run(params: Params, x: Array, reverse: bool) -> tuple[Array, Array]:
        depths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(params)}
        if len(depths) != 1 or () in depths:
            raise ValueError(f"repeat needs leaves with one leading axis, got {sorted(depths)}")
        step = bijection.inverse if reverse else bijection.forward

        def body(carry: tuple[Array, Array], tree: Params) -> tuple[tuple[Array, Array], None]:
            y, log_det = step(tree, carry[0])
            return (y.astype(x.dtype), carry[1] + log_det.astype(carry[1].dtype)), None

        return jax.lax.scan(body, (x, zero_log_det(x)), params, reverse=reverse)[0]

    return both_ways(run)


def invert(bijection: Bijection) -> Bijection:
    """Swap the two directions: a flow written from base to data becomes one from data to base.

    >>> invert(rescale(0.0, 2.0)).forward((), jnp.ones((1, 1)))
    (Array([[2.]], dtype=float32), Array([0.6931], dtype=float32))
    """
    return Bijection(bijection.inverse, bijection.forward)


def check_order(order: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return `order` as an array; raise ValueError unless it holds each of 0..n-1 once."""
    index = np.asarray(order)
    if sorted(index.tolist()) != list(range(index.size)):
        raise ValueError(f"order must hold each of 0..{index.size - 1} once, got {list(order)}")
    return index.astype(np.int32)  # of 64 bits, jax mixes programs of its two modes


def permutation(order: Sequence[int] | np.ndarray) -> Bijection:
    """Reorder the last axis: y[..., i] = x[..., order[i]]; takes no parameters (None).

    Raises ValueError where `order` is not a permutation or the axis has another length.

    >>> permutation([2, 0, 1]).forward((), jnp.array([[1.0, 2.0, 3.0]]))[0]
    Array([[3., 1., 2.]], dtype=float32)
    """
    index = check_order(order)
    back = np.argsort(index).astype(np.int32)
    reversal = np.array_equal(index, np.arange(index.size)[::-1])

    def move(_: Params, x: Array, by: np.ndarray) -> tuple[Array, Array]:
        if x.shape[-1] != index.size:
            raise ValueError(f"the last axis must be {index.size} long, got shape {x.shape}")
        # A reversal is a stride, not a gather.
        return (x[..., ::-1] if reversal else x[..., by]), zero_log_det(x)

    return both_ways(move, index, back)


def rescale(low: Number, high: Number, new_low: Number = 0.0, new_high: Number = 1.0) -> Bijection:
    """Map [low, high] to [new_low, new_high] linearly; takes no parameters (None).

    With low = 0, high = levels it carries dequantised integers (x + u) to the unit interval:
    log |det| = -D log(levels). What lies in the one interval never leaves the other by rounding.
    Raises ValueError unless both intervals have positive length.

    >>> rescale(0.0, 2.0).forward((), jnp.ones((1, 1)))
    (Array([[0.5]], dtype=float32), Array([-0.6931], dtype=float32))
    """
    checks.positive("high - low", high - low)
    checks.positive("new_high - new_low", new_high - new_low)
    scale = float(new_high - new_low) / float(high - low)

    ends, new_ends = (low, high), (new_low, new_high)

    def run(x: Array, a: float, old: tuple, new: tuple) -> tuple[Array, Array]:
        y = (x - old[0]) * a + new[0]
        y = jnp.where((x >= old[0]) & (x <= old[1]), pinned(y, *new), y)
        return y, zero_log_det(x) + math.log(a) * math.prod(x.shape[1:])

    return Bijection(
        lambda _, x: run(x, scale, ends, new_ends), lambda _, y: run(y, 1 / scale, new_ends, ends)
    )


def logit(alpha: Number = 0.05) -> Bijection:
    """Carry the unit interval to the line: y = log(s / (1 - s)), s = alpha + (1 - 2 alpha) x.

    log |dy/dx| = log(1 - 2 alpha) - log s - log(1 - s), summed over the event; no parameters.
    Dinh, Sohl-Dickstein and Bengio (2017), section 4.1, in the symmetric form that keeps both
    ends finite. Raises ValueError unless 0 < alpha < 1/2.

    >>> y, log_det = logit().forward((), jnp.full((1, 2), 0.5))
    >>> y.round(4)
    Array([[0., 0.]], dtype=float32)
    """
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha must lie in (0, 0.5), got {alpha}")
    width, log_width = 1 - 2 * alpha, math.log(1 - 2 * alpha)

    def forward(_: Params, x: Array) -> tuple[Array, Array]:
        s = alpha + width * x
        log_s, log_rest = jnp.log(s), jnp.log1p(-s)
        return log_s - log_rest, numerics.sum_event(log_width - log_s - log_rest)

    def inverse(_: Params, y: Array) -> tuple[Array, Array]:
        x = (jax.nn.sigmoid(y) - alpha) / width
        return x, numerics.sum_event(jax.nn.log_sigmoid(y) + jax.nn.log_sigmoid(-y) - log_width)

    return Bijection(forward, inverse)
