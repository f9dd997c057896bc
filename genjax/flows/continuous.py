"""Continuous flows: dx/dt = v(x, t), with the log-determinant as the integral of the divergence.

d log p / dt = -tr(dv/dx) along a path (Chen et al., 2018, theorem 1). Data sits at the later time,
the base at the earlier one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks, numerics
from genjax.flows.bijections.base import Bijection, Number, zero_log_det
from genjax.typing import Params

# (params, x [batch, *event], t [batch]) -> dx/dt [batch, *event], each example for itself
FieldFn: TypeAlias = Callable[[Params, Array, Array], Array]


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: stage matrix, weights, nodes."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]


METHODS = {
    "euler": Tableau(((),), (1.0,), (0.0,)),
    "midpoint": Tableau(((), (0.5,)), (0.0, 1.0), (0.0, 0.5)),
    "heun": Tableau(((), (1.0,)), (0.5, 0.5), (0.0, 1.0)),
    "rk4": Tableau(
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
        (0.0, 0.5, 0.5, 1.0),
    ),
}
ADAPTIVE = ("dopri5", "tsit5")


def _of_shape(v: Array, x: Array) -> Array:
    """v, where it has the shape of x: another one could broadcast in silence."""
    checks.shape("what the field returns", v, x.shape)
    return v


def divergence(
    field: Callable[[Array], Array],
    x: Float[Array, "batch *event"],
    probe: Float[Array, "batch *event"] | None = None,
) -> tuple[Float[Array, "batch *event"], Float[Array, " batch"]]:
    """Evaluate a field and its divergence tr(dv/dx), exactly or by one probe.

    Exact: one forward derivative per dimension. With a probe e, E[e e^T] = I, Hutchinson's
    estimate e^T (dv/dx) e, unbiased (Grathwohl et al., 2019, eq. (7)).
    """
    if probe is not None:
        checks.same_shape(probe=probe, x=x)
        v, along = jax.jvp(field, (x,), (probe,))
        return _of_shape(v, x), numerics.sum_event(probe * along)
    v, push = jax.linearize(field, x)
    _of_shape(v, x)
    count = x.size // x.shape[0]

    def diagonal(i: Array | int) -> Array:
        unit = (jnp.arange(count) == i).astype(x.dtype).reshape(1, *x.shape[1:])
        return numerics.sum_event(push(jnp.broadcast_to(unit, x.shape)) * unit)

    if count <= 8:
        # Plain matrix products: under vmap their gradients become products over two axes, slow.
        return v, sum((diagonal(i) for i in range(1, count)), start=diagonal(0))
    # Eight directions at a time: the memory does not grow with the dimension.
    return v, jnp.sum(jax.lax.map(diagonal, jnp.arange(count), batch_size=8), axis=0)


def _integrate(
    slope: Callable[[Any, Array], Any],
    y: Any,
    times: tuple[Number, Number],
    steps: int,
    rk: Tableau,
    recompute: bool,
) -> Any:
    """Take equal steps of a tree of arrays, in one scan; `slope(y, t [batch])` is a tree alike.

    `recompute`: on the way back a step is computed again, in the memory of one step.
    """
    h = (times[1] - times[0]) / steps

    def move(y: Any, weights: tuple[float, ...], slopes: list[Any]) -> Any:
        for weight, k in zip(weights, slopes, strict=True):
            if weight:
                y = jax.tree.map(lambda a, b, w=weight: a + h * w * b, y, k)
        return y

    def step(y: Any, i: Array) -> tuple[Any, None]:
        first = jax.tree.leaves(y)[0]
        t, slopes = times[0] + h * i.astype(first.dtype), []
        for row, node in zip(rk.a, rk.c, strict=True):
            when = jnp.full(first.shape[:1], t + node * h, first.dtype)
            slopes.append(slope(move(y, row, slopes), when))
        return jax.tree.map(lambda new, old: new.astype(old.dtype), move(y, rk.b, slopes), y), None

    # The scan itself keeps the compiler from merging the two computations of a step.
    step = jax.checkpoint(step, prevent_cse=False) if recompute else step
    return jax.lax.scan(step, y, jnp.arange(steps))[0]


def _check_solver(method: str, steps: int, times: tuple[Number, Number]) -> None:
    checks.one_of("method", method, [*METHODS, *ADAPTIVE])
    checks.integer("steps", steps, 1)
    if len(times) != 2 or times[0] == times[1]:
        raise ValueError(f"times must be two different numbers (from, to), got {times}")


def solve(
    field: FieldFn,
    params: Params,
    x: Float[Array, "batch *event"],
    *,
    times: tuple[Number, Number] = (0.0, 1.0),
    steps: int = 20,
    method: str = "rk4",
    rtol: Number = 1e-5,
    atol: Number = 1e-5,
) -> Float[Array, "batch *event"]:
    """Carry x along dx/dt = field(params, x, t) from times[0] to times[1].

    `method` is euler, midpoint, heun or rk4 (`steps` equal steps in one scan), or dopri5 or tsit5
    (adaptive to rtol, atol, by diffrax, then `steps` is not read). Raises ValueError for an
    unknown method or no interval, ImportError where diffrax is missing.
    """
    _check_solver(method, steps, times)
    if method in ADAPTIVE:
        return _adaptive(field, params, x, times, method, (rtol, atol), "backprop")
    rk = METHODS[method]
    slope = lambda x, t: _of_shape(field(params, x, t), x)  # noqa: E731
    return _integrate(slope, x, times, steps, rk, recompute=False)


def solve_with_log_det(
    field: FieldFn,
    params: Params,
    x: Float[Array, "batch *event"],
    *,
    probe: Float[Array, "batch *event"] | None = None,
    times: tuple[Number, Number] = (0.0, 1.0),
    steps: int = 20,
    method: str = "rk4",
    rtol: Number = 1e-5,
    atol: Number = 1e-5,
    gradient: str = "backprop",
) -> tuple[Float[Array, "batch *event"], Float[Array, " batch"]]:
    """Carry x along the field; return the end and log |det d end / dx| = integral of tr(dv/dx).

    The trace is exact, or Hutchinson's with one `probe` for the whole solve. `gradient` is
    "backprop" (through the steps: the exact gradient of what was computed) or "adjoint" (the
    backward equation of Chen et al., 2018, section 2, with memory that does not grow with the
    steps; it differs from the former by the solver's error). Other arguments as in `solve`.
    """
    _check_solver(method, steps, times)
    checks.one_of("gradient", gradient, ["backprop", "adjoint"])

    def augmented(p: Params, y: tuple[Array, Array], t: Array) -> tuple[Array, Array]:
        return divergence(lambda z: field(p, z, t), y[0], probe)

    if method in ADAPTIVE:
        start = (x, zero_log_det(x))
        return _adaptive(augmented, params, start, times, method, (rtol, atol), gradient)
    if gradient == "adjoint":
        return _adjoint(field, params, x, probe, times, steps, METHODS[method])
    return _fixed(field, params, x, probe, times, steps, METHODS[method])


def _fixed(
    field: FieldFn,
    params: Params,
    x: Array,
    probe: Array | None,
    times: tuple[Number, Number],
    steps: int,
    rk: Tableau,
) -> tuple[Array, Array]:
    """Path and trace together: where the field is evaluated, its derivative is at hand.

    The second derivatives of a step's traces are taken at once, from a step computed again.
    """

    def slope(y: tuple[Array, Array], t: Array) -> tuple[Array, Array]:
        return divergence(lambda z: field(params, z, t), y[0], probe)

    return _integrate(slope, (x, zero_log_det(x)), times, steps, rk, recompute=True)


def _adjoint(
    field: FieldFn,
    params: Params,
    x: Array,
    probe: Array | None,
    times: tuple[Number, Number],
    steps: int,
    rk: Tableau,
) -> tuple[Array, Array]:
    """The same values as `_fixed`; the gradient from the adjoint equation, solved backwards."""
    # Zeros where there is no probe, so that the backward pass has one signature.
    has_probe, probe = probe is not None, jnp.zeros_like(x) if probe is None else probe

    @jax.custom_vjp
    def run(params: Params, x: Array, probe: Array) -> tuple[Array, Array]:
        return _fixed(field, params, x, probe if has_probe else None, times, steps, rk)

    def run_forward(params: Params, x: Array, probe: Array) -> tuple:
        end, log_det = run(params, x, probe)
        return (end, log_det), (params, end, probe)

    def run_backward(saved: tuple, cotangents: tuple[Array, Array]) -> tuple:
        params, end, probe = saved
        x_bar, log_det_bar = cotangents
        h = -(times[1] - times[0]) / steps

        def slope(x: Array, x_bar: Array, t: Array) -> tuple:
            def both(p: Params, z: Array) -> tuple[Array, Array]:
                return divergence(lambda y: field(p, y, t), z, probe if has_probe else None)

            (v, div), pull = jax.vjp(both, params, x)
            p_bar, z_bar = pull((x_bar, log_det_bar.astype(div.dtype)))
            return v, *jax.tree.map(jnp.negative, (z_bar, p_bar))

        def step(carry: tuple, i: Array) -> tuple[tuple, None]:
            t, slopes = times[1] + h * i.astype(end.dtype), []
            for row, node in zip(rk.a, rk.c, strict=True):
                x_now, bar_now = carry[0], carry[1]
                for weight, k in zip(row, slopes, strict=True):
                    x_now, bar_now = x_now + h * weight * k[0], bar_now + h * weight * k[1]
                slopes.append(slope(x_now, bar_now, jnp.full(end.shape[:1], t + node * h, t.dtype)))
            for weight, k in zip(rk.b, slopes, strict=True):
                carry = jax.tree.map(
                    lambda y, s, w=weight: (y + h * w * s).astype(y.dtype), carry, k
                )
            return carry, None

        start = (end, x_bar, jax.tree.map(jnp.zeros_like, params))
        (_, x_bar, p_bar), _ = jax.lax.scan(step, start, jnp.arange(steps))
        return p_bar, x_bar, jnp.zeros_like(probe)

    run.defvjp(run_forward, run_backward)
    return run(params, x, probe)


def _adaptive(
    field: Callable,
    params: Params,
    y: Array | tuple[Array, Array],
    times: tuple[Number, Number],
    method: str,
    tolerance: tuple[Number, Number],
    gradient: str,
) -> Any:
    """Solve with step-size control by diffrax; one step size for the whole batch."""
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(f"method={method!r} needs diffrax: install the extra `ode`") from error
    first = jax.tree.leaves(y)[0]

    def slope(t: Any, y: Any, p: Any) -> Any:
        return field(p, y, jnp.full(first.shape[:1], t, first.dtype))

    solver = {"dopri5": diffrax.Dopri5, "tsit5": diffrax.Tsit5}[method]()
    adjoint = {
        "backprop": diffrax.RecursiveCheckpointAdjoint,
        "adjoint": diffrax.BacksolveAdjoint,
    }[gradient]()
    rtol, atol = tolerance
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(slope),
        solver,
        times[0],
        times[1],
        None,
        y,
        args=params,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        adjoint=adjoint,
        max_steps=4096,
    )
    return jax.tree.map(lambda leaf: leaf[-1], solution.ys)


def continuous_flow(
    field: FieldFn,
    *,
    probe: Float[Array, "batch *event"] | None = None,
    times: tuple[Number, Number] = (0.0, 1.0),
    steps: int = 20,
    method: str = "rk4",
    rtol: Number = 1e-5,
    atol: Number = 1e-5,
    gradient: str = "backprop",
) -> Bijection:
    """A continuous flow as a bijection: data at times[1] to base at times[0], and back.

    `field(params, x, t)` and its parameters are those of `solve_with_log_det`, as are the other
    arguments.
    """
    _check_solver(method, steps, times)

    def run(params: Params, x: Array, interval: tuple[Number, Number]) -> tuple[Array, Array]:
        return solve_with_log_det(
            field,
            params,
            x,
            probe=probe,
            times=interval,
            steps=steps,
            method=method,
            rtol=rtol,
            atol=atol,
            gradient=gradient,
        )

    return Bijection(lambda p, x: run(p, x, (times[1], times[0])), lambda p, y: run(p, y, times))
