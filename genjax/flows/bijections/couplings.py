"""Element-wise, coupling and masked autoregressive maps, over any transformer of numbers."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genjax import checks, numerics
from genjax.flows.bijections.base import Bijection, both_ways, check_count
from genjax.flows.bijections.spline import Transformer
from genjax.typing import Params

__all__ = [
    "ConditionerFn",
    "alternating_couplings",
    "coupling",
    "elementwise",
    "masked_autoregressive",
    "masked_coupling",
]

# (params, x) -> raw parameters, the last axis `size` times that of the part to be transformed
ConditionerFn = Callable[[Params, Array], Array]


def _raw(conditioner: ConditionerFn, params: Params, x: Array, size: int, out: Array) -> Array:
    """Call the conditioner and lay its output out as [..., size, d]."""
    raw = conditioner(params, x)
    wanted = (*out.shape[:-1], size * out.shape[-1])
    if raw.shape != wanted:
        raise ValueError(f"the conditioner must return shape {wanted}, got {raw.shape}")
    return raw.reshape(*out.shape[:-1], size, out.shape[-1])


def elementwise(transformer: Transformer) -> Bijection:
    """Transform each number of the event by raw parameters of its own; log |det| = sum log |T'|.

    `params` are raw numbers [*event[:-1], size, d]. Raises ValueError for another shape.

    >>> shift_and_scale = affine()
    >>> elementwise(shift_and_scale).forward(jnp.zeros((2, 3)), jnp.ones((4, 3)))[1]
    Array([0., 0., 0., 0.], dtype=float32)
    """

    def run(params: Params, x: Array, apply: Callable) -> tuple[Array, Array]:
        wanted = (*x.shape[1:-1], transformer.size, x.shape[-1])
        checks.shape("elementwise params", params, wanted)
        y, log_det = apply(jnp.broadcast_to(params, (x.shape[0], *wanted)), x)
        return y, numerics.sum_event(log_det)

    return both_ways(run, transformer.forward, transformer.inverse)


def coupling(
    conditioner: ConditionerFn, transformer: Transformer, *, swap: bool = False
) -> Bijection:
    """Transform one half of the last axis, conditioned on the other half.

    y_a = x_a, y_b = T(x_b; conditioner(x_a)); log |det| = sum log |T'|. Dinh et al. (2017), eqs
    (4)-(8). `swap` transforms the first half instead. `conditioner(params, x_a)` returns
    `transformer.size` blocks as wide as x_b, one per raw parameter, side by side. Raises
    ValueError where the last axis is odd or the conditioner returns another shape.

    >>> flow = coupling(lambda params, a: jnp.tile(params * a, 2), affine())
    >>> y, log_det = flow.forward(0.1, jnp.ones((3, 4)))
    >>> bool(abs(flow.inverse(0.1, y)[0] - 1).max() < 1e-5)
    True
    """

    def run(params: Params, x: Array, apply: Callable) -> tuple[Array, Array]:
        a, b = _halves(x)[:: -1 if swap else 1]
        b, log_det = apply(_raw(conditioner, params, a, transformer.size, b), b)
        halves = (b, a) if swap else (a, b)
        return jnp.concatenate(halves, axis=-1), numerics.sum_event(log_det)

    return both_ways(run, transformer.forward, transformer.inverse)


def alternating_couplings(
    conditioners: Sequence[ConditionerFn], transformer: Transformer
) -> Bijection:
    """Apply couplings whose halves take turns, the second half first: Dinh et al. (2017), sec. 3.4.

    The chain of `coupling(c_0), coupling(c_1, swap=True), ...` in fewer passes: the halves are cut
    and joined once, and the log-slopes of all layers are summed once. `params` is a sequence of
    as many trees as conditioners. Raises as `coupling` does, and TypeError for another number of
    trees.

    >>> conditioner = lambda params, a: jnp.tile(params * a, 2)
    >>> flow = alternating_couplings([conditioner, conditioner], affine())
    >>> flow.forward([0.1, 0.2], jnp.ones((3, 4)))[0].shape
    (3, 4)
    """
    conditioners = tuple(conditioners)

    def run(params: Params, x: Array, reverse: bool) -> tuple[Array, Array]:
        apply = transformer.inverse if reverse else transformer.forward
        check_count("alternating_couplings", params, len(conditioners))
        halves = list(_halves(x))
        total = jnp.zeros_like(numerics.at_least_float32(halves[0]))
        turns = list(enumerate(zip(conditioners, params, strict=True)))
        for i, (conditioner, tree) in reversed(turns) if reverse else turns:
            conditioning, moved = halves[i % 2], halves[1 - i % 2]
            raw = _raw(conditioner, tree, conditioning, transformer.size, moved)
            halves[1 - i % 2], log_det = apply(raw, moved)
            total = total + log_det
        return jnp.concatenate(halves, axis=-1), numerics.sum_event(total)

    return both_ways(run)


def _halves(x: Array) -> tuple[Array, Array]:
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"coupling needs an even last axis, got shape {x.shape}")
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def masked_coupling(
    conditioner: ConditionerFn, transformer: Transformer, mask: np.ndarray
) -> Bijection:
    """Transform the numbers where `mask` is False, conditioned on those where it is True.

    `mask` is boolean with the shape of the event (a checkerboard, for instance); the conditioner
    sees the event with zeros where the mask is False and returns raw parameters for all of it.
    Raises ValueError where the mask has not the event's shape, or keeps everything or nothing.
    """
    mask = np.asarray(mask, dtype=bool)
    if mask.all() or not mask.any():
        raise ValueError("mask must keep some numbers and free others, got one value throughout")

    def run(params: Params, x: Array, apply: Callable) -> tuple[Array, Array]:
        if x.shape[1:] != mask.shape:
            raise ValueError(f"the event must have the mask's shape {mask.shape}, got {x.shape}")
        keep = jnp.broadcast_to(mask, x.shape)
        raw = _raw(conditioner, params, jnp.where(keep, x, 0), transformer.size, x)
        y, log_det = apply(raw, x)
        return jnp.where(keep, x, y), numerics.sum_event(jnp.where(keep, 0, log_det))

    return both_ways(run, transformer.forward, transformer.inverse)


def masked_autoregressive(conditioner: ConditionerFn, transformer: Transformer) -> Bijection:
    """Transform each position, conditioned on the positions before it.

    y_t = T(x_t; conditioner(x)_t), where the conditioner's output at position t (axis 1) depends
    on x at positions before t only; log |det| = sum log |T'|. Papamakarios, Pavlakou and Murray
    (2017), eq. (3). `forward` is one call of the conditioner; `inverse` is as many as there are
    positions, in one scan. Whether the conditioner is causal is not checked.

    >>> conditioner = lambda params, x: params * jnp.tile(jnp.cumsum(x, 1) - x, 2)
    >>> flow = masked_autoregressive(conditioner, affine())
    >>> y, log_det = flow.forward(0.1, jnp.ones((2, 3, 1)))
    >>> bool(abs(flow.inverse(0.1, y)[0] - 1).max() < 1e-5)
    True
    """

    def forward(params: Params, x: Array) -> tuple[Array, Array]:
        y, log_det = transformer.forward(_raw(conditioner, params, x, transformer.size, x), x)
        return y, numerics.sum_event(log_det)

    def inverse(params: Params, y: Array) -> tuple[Array, Array]:
        checks.min_rank("y", y, 2)

        def solve(x: Array) -> tuple[Array, Array]:
            return transformer.inverse(_raw(conditioner, params, x, transformer.size, y), y)

        def step(x: Array, t: Array) -> tuple[Array, None]:
            # Positions before t are already right, so position t now becomes right.
            here = jnp.arange(y.shape[1]) == t
            here = here.reshape((1, -1) + (1,) * (y.ndim - 2))
            return jnp.where(here, solve(x)[0].astype(x.dtype), x), None

        x, _ = jax.lax.scan(step, jnp.zeros_like(y), jnp.arange(y.shape[1]))
        return x, numerics.sum_event(solve(x)[1])

    return Bijection(forward, inverse)
