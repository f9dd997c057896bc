"""Ordinary differential equations dy/dt = f(args, y, t): solvers, adjoints, traces of Jacobians.

y is an array or a tree of arrays, t a scalar. Explicit Runge-Kutta methods take equal steps in one
scan; adaptive ones are diffrax's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from genjax import checks
from genjax.numerics import sum_event

Number: TypeAlias = float | int | Float[Array, ""]
Times: TypeAlias = tuple[Number, Number]
# (args, y, t []) -> dy/dt, a tree like y
FieldFn: TypeAlias = Callable[[Any, Any, Array], Any]


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


def check_solver(method: str, num_steps: int, times: Times, gradient: str = "backprop") -> None:
    """Raise ValueError or TypeError for options that `solve` does not take."""
    checks.one_of("method", method, [*METHODS, *ADAPTIVE])
    checks.integer("num_steps", num_steps, 1)
    checks.one_of("gradient", gradient, ["backprop", "adjoint"])
    concrete = all(map(checks.is_concrete, times))
    if len(times) != 2 or (concrete and times[0] == times[1]):
        raise ValueError(f"times must be two different numbers (from, to), got {times}")


def solve(
    field: FieldFn,
    args: PyTree,
    y: PyTree,
    times: Times,
    *,
    num_steps: int = 20,
    method: str = "rk4",
    rtol: Number = 1e-5,
    atol: Number = 1e-5,
    gradient: str = "backprop",
    recompute: bool = False,
    max_steps: int = 4096,
) -> PyTree:
    """Carry y along dy/dt = field(args, y, t) from times[0] to times[1].

    `method` is euler, midpoint, heun or rk4 (`num_steps` equal steps in one scan), or dopri5 or
    tsit5 (at most `max_steps` steps adapted to rtol and atol, one size for all of y; needs the
    extra `ode`). `gradient` is "backprop" (through the steps: the exact gradient of what was
    computed; with `recompute` in the memory of one step) or "adjoint" (the backward equation of
    Chen et al., 2018, section 2: memory that does not grow with the steps, an error of the order
    of the solver's). Each leaf keeps its dtype. Raises ValueError for an unknown method or
    gradient, no interval, or a field of another shape, ImportError where diffrax is missing.
    """
    check_solver(method, num_steps, times, gradient)
    if method in ADAPTIVE:
        return _adaptive(field, args, y, times, method, (rtol, atol), gradient, max_steps)
    if gradient == "adjoint":
        return _adjoint(field, args, y, times, num_steps, METHODS[method])
    along = lambda y, t: field(args, y, t)  # noqa: E731
    return _runge_kutta(along, y, times, num_steps, METHODS[method], recompute)


def _runge_kutta(
    field: Callable[[Any, Array], Any],
    y: Any,
    times: Times,
    num_steps: int,
    rk: Tableau,
    recompute: bool = False,
) -> Any:
    dtype = jax.tree.leaves(y)[0].dtype
    h = (times[1] - times[0]) / num_steps

    def moved(y: Any, weights: tuple[float, ...], slopes: list[Any]) -> Any:
        for weight, k in zip(weights, slopes, strict=True):
            if weight:
                y = jax.tree.map(lambda a, b, w=weight: a + h * w * b, y, k)
        return y

    def step(y: Any, i: Array) -> tuple[Any, None]:
        t, slopes = times[0] + h * i.astype(dtype), []
        for row, node in zip(rk.a, rk.c, strict=True):
            now = moved(y, row, slopes)
            slopes.append(field(now, jnp.asarray(t + node * h, dtype)))
            jax.tree.map(_same_shape, slopes[-1], y)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), moved(y, rk.b, slopes), y), None

    # The scan itself keeps the compiler from merging the two computations of a step.
    step = jax.checkpoint(step, prevent_cse=False) if recompute else step
    return jax.lax.scan(step, y, jnp.arange(num_steps))[0]


def _same_shape(slope: Array, y: Array) -> None:
    # Another shape could broadcast in silence.
    checks.shape("what the field returns", slope, y.shape)


def _adjoint(field: FieldFn, args: Any, y: Any, times: Times, num_steps: int, rk: Tableau) -> Any:
    """The same values as `_runge_kutta`; the gradient from the adjoint equation, run backwards.

    With a = dL/dy: da/dt = -a^T df/dy and dL/dargs = integral of a^T df/dargs dt.
    """
    # What the field closes over becomes an argument, so that it can be differentiated.
    pure, consts = jax.closure_convert(field, args, y, jnp.zeros((), jax.tree.leaves(y)[0].dtype))

    def closed(args: Any, y: Any, t: Array) -> Any:
        return pure(args[0], y, t, *args[1])

    @jax.custom_vjp
    def run(args: Any, y: Any) -> Any:
        return _runge_kutta(lambda y, t: closed(args, y, t), y, times, num_steps, rk)

    def run_forward(args: Any, y: Any) -> tuple[Any, Any]:
        end = run(args, y)
        return end, (args, end)

    def run_backward(saved: tuple[Any, Any], y_bar: Any) -> tuple[Any, Any]:
        args, end = saved

        def back(state: tuple[Any, Any, Any], t: Array) -> tuple[Any, Any, Any]:
            value, pull = jax.vjp(lambda args, y: closed(args, y, t), args, state[0])
            bars = pull(jax.tree.map(lambda bar, v: bar.astype(v.dtype), state[1], value))
            args_bar, y_bar = jax.tree.map(jnp.negative, bars)
            return value, y_bar, args_bar

        start = (end, y_bar, jax.tree.map(jnp.zeros_like, args))
        _, y_bar, args_bar = _runge_kutta(back, start, (times[1], times[0]), num_steps, rk)
        return args_bar, y_bar

    run.defvjp(run_forward, run_backward)
    return run((args, consts), y)


def _adaptive(
    field: FieldFn,
    args: Any,
    y: Any,
    times: Times,
    method: str,
    tolerance: tuple[Number, Number],
    gradient: str,
    max_steps: int,
) -> Any:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(f"method={method!r} needs diffrax: install the extra `ode`") from error
    rtol, atol = tolerance
    checks.positive("rtol", rtol)
    checks.positive("atol", atol)
    dtype = jax.tree.leaves(y)[0].dtype
    solver = {"dopri5": diffrax.Dopri5, "tsit5": diffrax.Tsit5}[method]()
    adjoint = {
        "backprop": diffrax.RecursiveCheckpointAdjoint,
        "adjoint": diffrax.BacksolveAdjoint,
    }[gradient]()
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(args, y, jnp.asarray(t, dtype))),
        solver,
        times[0],
        times[1],
        None,
        y,
        args=args,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        adjoint=adjoint,
        max_steps=max_steps,
    )
    return jax.tree.map(lambda leaf: leaf[-1], solution.ys)


def divergence(
    field: Callable[[Array], Array],
    x: Float[Array, "batch *event"],
    probe: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, "batch *event"], Float[Array, " batch"]]:
    """Evaluate a field and its divergence tr(dv/dx) per example, exactly or by probes.

    Exact: one forward derivative per dimension. With a probe e `[batch, *event]`,
    E[e e^T] = I, Hutchinson's estimate e^T (dv/dx) e, unbiased (Grathwohl et al., 2019, eq. (7));
    with several, `[probes, batch, *event]`, the mean of theirs.
    """
    if probe is not None and probe.ndim == x.ndim:
        checks.same_shape(probe=probe, x=x)
        v, along = jax.jvp(field, (x,), (probe,))
        checks.shape("what the field returns", v, x.shape)
        return v, sum_event(probe * along)
    v, push = jax.linearize(field, x)
    checks.shape("what the field returns", v, x.shape)
    if probe is not None:
        checks.shape("probe", probe, (None, *x.shape))
        return v, jnp.mean(jax.vmap(lambda e: sum_event(e * push(e)))(probe), axis=0)
    count = x.size // x.shape[0]

    def diagonal(i: Array | int) -> Array:
        unit = (jnp.arange(count) == i).astype(x.dtype).reshape(1, *x.shape[1:])
        return sum_event(push(jnp.broadcast_to(unit, x.shape)) * unit)

    if count <= 8:
        # Plain matrix products: under vmap their gradients become products over two axes, slow.
        return v, sum((diagonal(i) for i in range(1, count)), start=diagonal(0))
    # Eight directions at a time: the memory does not grow with the dimension.
    return v, jnp.sum(jax.lax.map(diagonal, jnp.arange(count), batch_size=8), axis=0)
