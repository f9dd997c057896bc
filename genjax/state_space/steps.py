"""One position of each model: (state, inputs) -> (output, state), and a scan over positions.

States have a leading batch axis and fixed shapes, so that they serve as the cache of a generator.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Inexact

from genjax import checks
from genjax.numerics import at_least_float32
from genjax.state_space import _checks
from genjax.state_space.discretisation import (
    Discretisation,
    discretise,
    dplr_advance,
    dplr_solve,
    relative_expm1,
)

__all__ = ["conv_step", "dplr_step", "recur", "s4d_step", "selective_step", "ssd_step"]


def s4d_step(
    state: Complex[Array, "batch *channels pairs"],
    u: Float[Array, "batch *channels"],
    eigenvalues: Complex[Array, "*#channels pairs"],
    b: Inexact[Array, "*#channels pairs"],
    c: Inexact[Array, "*#channels pairs"],
    dt: float | Float[Array, "..."],
    *,
    d: Any = None,
    discretisation: Discretisation = "zoh",
) -> tuple[Float[Array, "batch *channels"], Complex[Array, "batch *channels pairs"]]:
    """One position of a diagonal model: x <- A_bar x + B_bar u, y = 2 Re <c, x> + d u.

    Parameters as for `s4d_kernel`; d: [*channels] or None. Returns (y, state). Raises as
    `s4d_kernel` does, and ValueError for a state of another shape.

    >>> state = jnp.zeros((2, 3, 4), jnp.complex64)
    >>> options = s4d_lin(8), jnp.ones(4), jnp.ones((3, 4)), jnp.full(3, 0.1)
    >>> y, state = s4d_step(state, jnp.ones((2, 3)), *options)
    >>> y.shape
    (2, 3)
    """
    a, dt, b, c = _checks.fit(eigenvalues, dt, b=b, c=c)
    _fits(state, u, a)
    a_bar, b_bar, _ = discretise(discretisation, a, dt, b)
    state = a_bar[None] * state + b_bar[None] * at_least_float32(u)[..., None]
    return _read(state, c, d, u), state


def dplr_step(
    state: Complex[Array, "batch *channels pairs"],
    u: Float[Array, "batch *channels"],
    eigenvalues: Complex[Array, "*#channels pairs"],
    p: Inexact[Array, "*#channels pairs"],
    b: Inexact[Array, "*#channels pairs"],
    c: Inexact[Array, "*#channels pairs"],
    dt: float | Float[Array, "..."],
    *,
    d: Any = None,
) -> tuple[Float[Array, "batch *channels"], Complex[Array, "batch *channels pairs"]]:
    """One position of S4 in O(N): x <- (I - dt/2 A)^-1 ((I + dt/2 A) x + dt b u), y = 2 Re <c, x>.

    A = diag(eigenvalues) - p p^*; the inverse by Woodbury's identity. c is C itself, not the
    C (I - A_bar^L) that some implementations train. Returns (y, state); d as for `s4d_step`. Gu,
    Goel, Re 2022 (arXiv:2111.00396), section 2.3.

    >>> start, state = dplr(8), jnp.zeros((2, 3, 4), jnp.complex64)
    >>> c = jnp.ones((3, 8)) @ start.basis
    >>> y, state = dplr_step(state, jnp.ones((2, 3)), *start[:3], c, jnp.full(3, 0.1))
    >>> y.shape
    (2, 3)
    """
    a, dt, p, b, c = (x[None] for x in _checks.fit(eigenvalues, dt, p=p, b=b, c=c))
    _fits(state, u, a[0])
    driven = dplr_solve(dt[..., None] * b, a, p, dt)
    state = dplr_advance(state, a, p, dt) + driven * at_least_float32(u)[..., None]
    return _read(state, c[0], d, u), state


def _fits(state: Any, u: Any, a: Array) -> None:
    checks.shape("state", state, (None, *a.shape))
    checks.shape("u", u, (len(state), *a.shape[:-1]))


def _read(state: Array, c: Array, d: Any, u: Array) -> Array:
    y = 2 * jnp.sum(jnp.real(c[None] * state), axis=-1)
    return y if d is None else y + jnp.broadcast_to(jnp.asarray(d), u.shape[1:])[None] * u


def selective_step(
    state: Float[Array, "batch channels states"],
    u: Float[Array, "batch channels"],
    dt: Float[Array, "batch channels"],
    A: Float[Array, "channels states"],
    B: Float[Array, "batch states"],
    C: Float[Array, "batch states"],
    D: Float[Array, " channels"] | None = None,
    z: Float[Array, "batch channels"] | None = None,
    *,
    discretisation: str = "delta",
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch channels states"]]:
    """One position of Mamba's `selective_scan`, whose docstring has the formula: (y, state).

    >>> u, dt, A, B = jnp.ones((2, 3)), jnp.ones((2, 3)), -jnp.ones((3, 4)), jnp.ones((2, 4))
    >>> y, state = selective_step(jnp.zeros((2, 3, 4)), u, dt, A, B, B)
    >>> y.round(3)[0]
    Array([4., 4., 4.], dtype=float32)
    """
    _checks.decays(A, dt)
    checks.one_of("discretisation", discretisation, ("delta", "zoh"))
    checks.shape("state", state, (len(u), *np.shape(A)))
    checks.shape("u", u, np.shape(state)[:2])
    checks.same_shape(u=u, dt=dt)
    for name, x in {"B": B, "C": C}.items():
        checks.shape(name, x, (len(u), np.shape(A)[-1]))
    u, dt, B, C = (at_least_float32(x) for x in (u, dt, B, C))
    rate = dt[..., None] * A[None]
    drive = (dt * u)[..., None] * B[:, None]
    if discretisation == "zoh":
        drive = drive * relative_expm1(rate)
    state = jnp.exp(rate) * state + drive
    return gated(jnp.sum(state * C[:, None], axis=-1), u, D, z), state


def ssd_step(
    state: Float[Array, "batch heads dim states"],
    x: Float[Array, "batch heads dim"],
    dt: Float[Array, "batch heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "batch groups states"],
    C: Float[Array, "batch groups states"],
    *,
    D: Float[Array, " heads"] | None = None,
) -> tuple[Float[Array, "batch heads dim"], Float[Array, "batch heads dim states"]]:
    """One position of Mamba-2's `ssd`, whose docstring has the formula: (y, state).

    >>> x, dt, A, B = jnp.ones((2, 3, 5)), jnp.ones((2, 3)), -jnp.ones(3), jnp.ones((2, 1, 4))
    >>> y, state = ssd_step(jnp.zeros((2, 3, 5, 4)), x, dt, A, B, B)
    >>> y.shape
    (2, 3, 5)
    """
    _checks.decays(A, dt)
    heads, groups = x.shape[1], B.shape[1]
    checks.shape("A", A, (heads,))
    checks.shape("dt", dt, x.shape[:2])
    checks.shape("B", B, (len(x), None, None))
    checks.same_shape(B=B, C=C)
    checks.shape("state", state, (*x.shape, B.shape[-1]))
    if heads % groups:
        raise ValueError(f"heads must be a multiple of groups = {groups}, got {heads}")
    x, dt, B, C = (at_least_float32(v) for v in (x, dt, B, C))
    B, C = (jnp.repeat(v, heads // groups, axis=1) for v in (B, C))
    decay = jnp.exp(dt * A[None])[..., None, None]
    state = decay * state + (dt[..., None] * x)[..., None] * B[:, :, None]
    y = jnp.sum(state * C[:, :, None], axis=-1)
    return y if D is None else y + D[None, :, None] * x, state


def conv_step(
    tail: Float[Array, "batch before channels"],
    x: Float[Array, "batch channels"],
    weight: Float[Array, "taps channels"],
    bias: Float[Array, " channels"] | None = None,
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch before channels"]]:
    """One position of `short_convolution`; tail: the taps - 1 inputs before x. Returns (y, tail).

    The last tap is that of the present position.

    >>> y, tail = conv_step(jnp.ones((1, 2, 3)), jnp.ones((1, 3)), jnp.ones((3, 3)))
    >>> y
    Array([[3., 3., 3.]], dtype=float32)
    """
    checks.shape("tail", tail, (len(x), len(weight) - 1, x.shape[1]))
    seen = jnp.concatenate([tail, x[:, None].astype(tail.dtype)], axis=1)
    y = jnp.sum(seen * weight[None], axis=1)
    return (y if bias is None else y + bias[None]), seen[:, 1:]


def gated(y: Array, u: Array, D: Array | None, z: Array | None) -> Array:
    """(y + D u) silu(z), with the last axis for channels."""
    if D is not None:
        y = y + D.reshape((1,) * (u.ndim - 1) + D.shape) * u
    return y if z is None else y * jax.nn.silu(at_least_float32(z))


def recur(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    inputs: Any,
    where: Bool[Array, "batch length"] | None = None,
) -> tuple[Any, Any]:
    """Apply step(state, inputs at t) -> (output, state) to each position in one scan.

    inputs: a pytree of [batch, length, ...]. At positions that `where` masks the state stays as it
    is, and the output is 0. Returns (outputs [batch, length, ...], the last state).

    >>> step = lambda h, u: (h + u, h + u)
    >>> y, h = recur(step, jnp.zeros(1), jnp.array([[1.0, 2.0, 3.0]]))
    >>> y, h
    (Array([[1., 3., 6.]], dtype=float32), Array([6.], dtype=float32))
    """
    if where is not None:
        _checks.mask(where, np.shape(jax.tree.leaves(inputs)[0])[:2])

    def keep(seen: Any, new: Any, old: Any) -> Any:
        def pick(n: Array, o: Array) -> Array:
            return jnp.where(seen.reshape(seen.shape + (1,) * (n.ndim - 1)), n, o)

        return jax.tree.map(pick, new, old)

    def body(state: Any, scanned: Any) -> Any:
        now, seen = scanned
        if seen is None:
            out, state = step(state, now)
            return state, out
        # Masked inputs are 0 before the step: NaN there would reach the gradient.
        now = keep(seen, now, jax.tree.map(jnp.zeros_like, now))
        out, new = step(state, now)
        return keep(seen, new, state), keep(seen, out, jax.tree.map(jnp.zeros_like, out))

    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (inputs, where))
    state, outputs = jax.lax.scan(body, state, by_time)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs), state
