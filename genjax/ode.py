"""Ordinary differential equations dy/dt = f(args, y, t): solvers, adjoints, traces of Jacobians.

y is an array or a tree of arrays, t a scalar. Explicit Runge-Kutta methods take equal steps in one
scan; adaptive ones are diffrax's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from genjax import checks
from genjax.numerics import at_least_float32, hoisted, linearize, sum_event

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
    """Raise ValueError or TypeError for options that `solve` does not take.

    >>> check_solver("rk4", 20, (0.0, 1.0))
    """
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
    of the solver's), also for what the field closes over. Leaves narrower than float32 become
    float32, in which a small step does not vanish; the others keep their dtype. Raises ValueError
    for an unknown method or gradient, no interval, or a field of another shape, TypeError for
    leaves that are not floating, ImportError where diffrax is missing, RuntimeError where
    `max_steps` do not reach the end (NaN where the call is traced).

    >>> decay = lambda rate, y, t: -rate * y
    >>> solve(decay, 1.0, jnp.ones(2), (0.0, 1.0)).round(4)
    Array([0.3679, 0.3679], dtype=float32)
    """
    check_solver(method, num_steps, times, gradient)
    jax.tree.map(lambda leaf: checks.floating("what is carried along a field", leaf), y)
    y = jax.tree.map(at_least_float32, y)
    if gradient == "adjoint":
        field, args = _hoisted(field, args, y)
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
                y = jax.tree.map(lambda a, b, w=weight: a + (h * w * b).astype(a.dtype), y, k)
        return y

    def step(y: Any, i: Array) -> tuple[Any, None]:
        t, slopes = times[0] + h * i.astype(dtype), []
        for row, node in zip(rk.a, rk.c, strict=True):
            now = moved(y, row, slopes)
            slopes.append(field(now, jnp.asarray(t + node * h, dtype)))
            jax.tree.map(_same_shape, slopes[-1], y)
        return moved(y, rk.b, slopes), None

    # The scan itself keeps the compiler from merging the two computations of a step.
    step = jax.checkpoint(step, prevent_cse=False) if recompute else step
    return jax.lax.scan(step, y, jnp.arange(num_steps))[0]


def _same_shape(slope: Array, y: Array) -> None:
    # Another shape could broadcast in silence.
    checks.shape("what the field returns", slope, y.shape)


def _hoisted(field: FieldFn, args: Any, y: Any) -> tuple[FieldFn, Any]:
    """The field with all traced arrays that it closes over, integers too, among its arguments."""
    t = jnp.zeros((), jax.tree.leaves(y)[0].dtype)
    pure, closed = hoisted(field, args, y, t)
    return lambda everything, y, t: pure(everything[0], y, t, *everything[1]), (args, closed)


def _adjoint(field: FieldFn, args: Any, y: Any, times: Times, num_steps: int, rk: Tableau) -> Any:
    """The same values as `_runge_kutta`; the gradient from the adjoint equation, run backwards.

    With a = dL/dy: da/dt = -a^T df/dy and dL/dargs = integral of a^T df/dargs dt, for the
    arguments that have a gradient (integers and keys have none).
    """
    leaves, tree = jax.tree.flatten(args)
    moving = [jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact) for leaf in leaves]

    def joined(args: list[Any], fixed: list[Any], y: Any, t: Array) -> Any:
        parts = iter(args), iter(fixed)
        return field(tree.unflatten(next(parts[not m]) for m in moving), y, t)

    @jax.custom_vjp
    def run(args: list[Any], fixed: list[Any], y: Any) -> Any:
        return _runge_kutta(lambda y, t: joined(args, fixed, y, t), y, times, num_steps, rk)

    def run_forward(args: list[Any], fixed: list[Any], y: Any) -> tuple[Any, Any]:
        end = run(args, fixed, y)
        return end, (args, fixed, end)

    def run_backward(saved: tuple[Any, Any, Any], y_bar: Any) -> tuple[Any, None, Any]:
        args, fixed, end = saved

        def back(state: tuple[Any, Any, Any], t: Array) -> tuple[Any, Any, Any]:
            value, pull = jax.vjp(lambda args, y: joined(args, fixed, y, t), args, state[0])
            bars = pull(jax.tree.map(lambda bar, v: bar.astype(v.dtype), state[1], value))
            args_bar, y_bar = jax.tree.map(jnp.negative, bars)
            return value, y_bar, args_bar

        start = (end, y_bar, [jnp.zeros_like(at_least_float32(leaf)) for leaf in args])
        _, y_bar, args_bar = _runge_kutta(back, start, (times[1], times[0]), num_steps, rk)
        return jax.tree.map(lambda bar, leaf: bar.astype(leaf.dtype), args_bar, args), None, y_bar

    run.defvjp(run_forward, run_backward)
    split = [
        [jnp.asarray(x) for x, m in zip(leaves, moving, strict=True) if m == w] for w in (1, 0)
    ]
    return run(*split, y)


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
    for name, value in zip(("rtol", "atol"), tolerance, strict=True):
        checks.positive(name, value)
    # Under 64 bits numbers of another dtype would change that of the steps.
    dtype = jax.tree.leaves(y)[0].dtype
    start, stop, rtol, atol = (jnp.asarray(x, dtype) for x in (*times, *tolerance))
    solver = {"dopri5": diffrax.Dopri5, "tsit5": diffrax.Tsit5}[method]()
    adjoint = {
        "backprop": diffrax.RecursiveCheckpointAdjoint,
        "adjoint": diffrax.BacksolveAdjoint,
    }[gradient]()
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(args, y, jnp.asarray(t, dtype))),
        solver,
        start,
        stop,
        None,
        y,
        args=args,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        adjoint=adjoint,
        max_steps=max_steps,
        throw=False,  # it would raise by a callback to the host, which cannot be exported
    )
    done = solution.result == diffrax.RESULTS.successful
    if checks.is_concrete(done) and not bool(done):
        raise RuntimeError(
            f"method {method!r} did not reach t = {float(stop):g} within max_steps = {max_steps}"
        )
    return jax.tree.map(
        lambda leaf, old: jnp.where(done, leaf[-1], jnp.nan).astype(old.dtype), solution.ys, y
    )


def divergence(
    field: Callable[[Array], Array],
    x: Float[Array, "batch *event"],
    probe: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, "batch *event"], Float[Array, " batch"]]:
    """Evaluate a field and its divergence tr(dv/dx) per example, exactly or by probes.

    Exact: one forward derivative per dimension. With a probe e `[batch, *event]`,
    E[e e^T] = I, Hutchinson's estimate e^T (dv/dx) e, unbiased (Grathwohl et al., 2019, eq. (7));
    with several, `[probes, batch, *event]`, the mean of theirs. A field with a `jax.custom_vjp`
    function is differentiated in reverse. Raises TypeError for integers.

    >>> value, trace = divergence(lambda x: 3 * x, jnp.ones((2, 5)))
    >>> trace
    Array([15., 15.], dtype=float32)
    """
    checks.floating("x", x)
    probe = None if probe is None else probe.astype(x.dtype)
    if probe is not None and probe.ndim == x.ndim:
        checks.same_shape(probe=probe, x=x)
        v, push = linearize(field, x)
        checks.shape("what the field returns", v, x.shape)
        return v, sum_event(probe * push(probe))
    v, push = linearize(field, x)
    checks.shape("what the field returns", v, x.shape)
    if probe is not None:
        checks.shape("probe", probe, (None, *x.shape))
        return v, jnp.mean(jax.vmap(lambda e: sum_event(e * push(e)))(probe), axis=0)
    count = math.prod(x.shape[1:])

    def diagonal(i: Array | int) -> Array:
        unit = (jnp.arange(count) == i).astype(x.dtype).reshape(1, *x.shape[1:])
        return sum_event(push(jnp.broadcast_to(unit, x.shape)) * unit)

    if count <= 8:
        # Plain matrix products: under vmap their gradients become products over two axes, slow.
        return v, sum((diagonal(i) for i in range(1, count)), start=diagonal(0))
    # Eight directions at a time: the memory does not grow with the dimension.
    return v, jnp.sum(jax.lax.map(diagonal, jnp.arange(count), batch_size=8), axis=0)
