"""Continuous flows: dx/dt = v(x, t), with the log-determinant as the integral of the divergence.

d log p / dt = -tr(dv/dx) along a path (Chen et al., 2018, theorem 1). Data sits at the later time,
the base at the earlier one.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import ode
from genjax.flows.bijections.base import Bijection, Number, zero_log_det
from genjax.typing import Params

__all__ = ["continuous_flow", "solve", "solve_with_log_det"]

# (params, x [batch, *event], t [batch]) -> dx/dt [batch, *event], each example for itself
FieldFn: TypeAlias = Callable[[Params, Array, Array], Array]


def solve(
    field: FieldFn,
    params: Params,
    x: Float[Array, "batch *event"],
    *,
    times: tuple[Number, Number] = (0.0, 1.0),
    num_steps: int = 20,
    method: str = "rk4",
    rtol: Number = 1e-5,
    atol: Number = 1e-5,
) -> Float[Array, "batch *event"]:
    """Carry x along dx/dt = field(params, x, t) from times[0] to times[1].

    `method` is euler, midpoint, heun or rk4 (`num_steps` equal steps in one scan), or dopri5 or
    tsit5 (adaptive to rtol, atol, by diffrax, then `num_steps` is not read). Raises as `ode.solve`.

    >>> solve(lambda params, x, t: params * x, 1.0, jnp.ones((1, 2))).round(4)
    Array([[2.7183, 2.7183]], dtype=float32)
    """

    def slope(params: Params, x: Array, t: Array) -> Array:
        return field(params, x, jnp.full(x.shape[:1], t))

    return ode.solve(
        slope, params, x, times, num_steps=num_steps, method=method, rtol=rtol, atol=atol
    )


def solve_with_log_det(
    field: FieldFn,
    params: Params,
    x: Float[Array, "batch *event"],
    *,
    probe: Float[Array, "batch *event"] | None = None,
    times: tuple[Number, Number] = (0.0, 1.0),
    num_steps: int = 20,
    method: str = "rk4",
    rtol: Number = 1e-5,
    atol: Number = 1e-5,
    gradient: str = "backprop",
) -> tuple[Float[Array, "batch *event"], Float[Array, " batch"]]:
    """Carry x along the field; return the end and log |det d end / dx| = integral of tr(dv/dx).

    The trace is exact, or Hutchinson's with one `probe` for the whole solve. `gradient` is
    "backprop" (through the steps, each computed again on the way back) or "adjoint" (the backward
    equation of Chen et al., 2018, section 2): see `ode.solve`. Other arguments as in `solve`.

    >>> y, log_det = solve_with_log_det(lambda params, x, t: params * x, 1.0, jnp.ones((1, 2)))
    >>> log_det.round(4)
    Array([2.], dtype=float32)
    """

    def slope(params: Params, y: tuple[Array, Array], t: Array) -> tuple[Array, Array]:
        at = jnp.full(x.shape[:1], t)
        return ode.divergence(lambda z: field(params, z, at), y[0], probe)

    return ode.solve(
        slope, params, (x, zero_log_det(x)), times, num_steps=num_steps, method=method,
        rtol=rtol, atol=atol, gradient=gradient, recompute=True,
    )  # fmt: skip


def continuous_flow(
    field: FieldFn,
    *,
    probe: Float[Array, "batch *event"] | None = None,
    times: tuple[Number, Number] = (0.0, 1.0),
    num_steps: int = 20,
    method: str = "rk4",
    rtol: Number = 1e-5,
    atol: Number = 1e-5,
    gradient: str = "backprop",
) -> Bijection:
    """A continuous flow as a bijection: data at times[1] to base at times[0], and back.

    `field(params, x, t)` and its parameters are those of `solve_with_log_det`, as are the other
    arguments.

    >>> flow = continuous_flow(lambda params, x, t: params * x)
    >>> y, log_det = flow.forward(1.0, jnp.ones((1, 2)))
    >>> y.round(4), log_det.round(4)
    (Array([[0.3679, 0.3679]], dtype=float32), Array([-2.], dtype=float32))
    """
    ode.check_solver(method, num_steps, times, gradient)
    run = functools.partial(
        solve_with_log_det, field, probe=probe, num_steps=num_steps, method=method,
        rtol=rtol, atol=atol, gradient=gradient,
    )  # fmt: skip
    return Bijection(
        lambda params, x: run(params, x, times=(times[1], times[0])),
        lambda params, z: run(params, z, times=times),
    )
