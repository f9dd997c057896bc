"""Models whose coefficients change from position to position: linear, selective and SSD scans.

All take an initial state and return the last one. `where` masks [batch, length]: a masked position
leaves the state as it is and its inputs may be anything. Its output is 0, that of `linear_scan` the
state.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from genjax import checks
from genjax.numerics import HIGHEST, at_least_float32
from genjax.state_space import _checks
from genjax.state_space.discretisation import relative_expm1
from genjax.state_space.steps import gated

__all__ = ["linear_scan", "selective_scan", "ssd"]

Method = Literal["sequential", "associative"]


def _method(method: Method | None) -> Method:
    """One position after another on CPU, where it is several times faster; else in log steps."""
    if method is None:
        return "sequential" if jax.default_backend() == "cpu" else "associative"
    checks.one_of("method", method, ("sequential", "associative"))
    return method


def linear_scan(
    a: Inexact[Array, "batch length *features"],
    b: Inexact[Array, "batch length *features"],
    h0: Inexact[Array, "batch *features"] | None = None,
    *,
    where: Bool[Array, "batch length"] | None = None,
    method: Method | None = None,
) -> tuple[Inexact[Array, "batch length *features"], Inexact[Array, "batch *features"]]:
    """h_t = a_t h_{t-1} + b_t element by element: (all h_t, the last one). h0 is 0 by default.

    method: "sequential" or "associative", by (a, b).(a', b') = (a a', a' b + b'); by default the
    first on CPU and the second elsewhere. A masked position repeats the state before it. Raises
    ValueError by name for shapes that do not fit.

    >>> a, b = jnp.full((1, 4, 1), 0.5), jnp.ones((1, 4, 1))
    >>> h, last = linear_scan(a, b)
    >>> h[0, :, 0]
    Array([1.   , 1.5  , 1.75 , 1.875], dtype=float32)
    """
    _checks.length("a", a)
    checks.same_shape(a=a, b=b)
    _checks.state(h0, (len(a), *a.shape[2:]))
    _checks.mask(where, a.shape[:2])
    a, b = at_least_float32(a), at_least_float32(b)
    if where is not None:
        seen = where.reshape(where.shape + (1,) * (a.ndim - 2))
        a, b = jnp.where(seen, a, 1), jnp.where(seen, b, 0)
    kind = jnp.result_type(a, b) if h0 is None else jnp.result_type(a, b, h0)
    h0 = jnp.zeros((len(a), *a.shape[2:]), kind) if h0 is None else h0.astype(kind)
    h = _scan(jnp.moveaxis(a, 1, 0).astype(kind), jnp.moveaxis(b, 1, 0).astype(kind), h0, method)
    return jnp.moveaxis(h, 0, 1), h[-1]


def _scan(a: Array, b: Array, h0: Array, method: Method | None) -> Array:
    """The states [length, ...] of coefficients [length, ...]."""
    if _method(method) == "associative":
        b = b.at[0].add(a[0] * h0)
        return jax.lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b))[1]

    def step(h: Array, ab: tuple[Array, Array]) -> tuple[Array, Array]:
        h = ab[0] * h + ab[1]
        return h, h

    return jax.lax.scan(step, h0, (a, b))[1]


def _by_chunks(
    run: Callable[[Any, Any], tuple[Any, Any]], h0: Array, inputs: Any, chunk: int
) -> tuple[Array, Array]:
    """Scan run(h, [chunk, ...]) -> (h, y [chunk, ...]) over inputs [length, ...], each chunk
    recomputed in the backward pass; zeros pad the last one. Returns (y [length, ...], h)."""
    length = len(jax.tree.leaves(inputs)[0])
    count = -(-length // chunk)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, count * chunk - length),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(count, chunk, *x.shape[1:])

    h, y = jax.lax.scan(jax.checkpoint(run), h0, jax.tree.map(cut, inputs))
    return y.reshape(count * chunk, *y.shape[2:])[:length], h


def selective_scan(
    u: Float[Array, "batch length channels"],
    dt: Float[Array, "batch length channels"],
    A: Float[Array, "channels states"],
    B: Float[Array, "batch length states"],
    C: Float[Array, "batch length states"],
    D: Float[Array, " channels"] | None = None,
    z: Float[Array, "batch length channels"] | None = None,
    *,
    h0: Float[Array, "batch channels states"] | None = None,
    where: Bool[Array, "batch length"] | None = None,
    chunk: int | None = None,
    discretisation: Literal["delta", "zoh"] = "delta",
    method: Method | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch channels states"]]:
    """Mamba's scan, h_t = exp(dt_t A) h_{t-1} + B_bar_t u_t, y_t = (<C_t, h_t> + D u_t) silu(z_t).

    B_bar_t = dt_t B_t as in the released code ("delta"), or (exp(dt_t A) - 1) / A B_t as in the
    paper's equation (4) ("zoh"). dt is after its softplus; one of 0 leaves the state as it is.
    States are formed one chunk of positions at a time, and again in the backward pass, so that
    memory is batch * channels * states * (length / chunk + chunk); chunk is 16 by default where
    `method` is sequential, 64 where it is associative. Returns (y, last state), y in the type of
    u. Gu & Dao 2023 (arXiv:2312.00752), Algorithm 2. Raises ValueError by name for shapes that do
    not fit, A above 0, steps below 0.

    >>> u, dt, A = jnp.ones((2, 16, 3)), jnp.full((2, 16, 3), 0.1), -jnp.ones((3, 4))
    >>> y, h = selective_scan(u, dt, A, jnp.ones((2, 16, 4)), jnp.ones((2, 16, 4)))
    >>> y.shape, h.shape
    ((2, 16, 3), (2, 3, 4))
    """
    _check_selective(u, dt, A, B, C, D, z)
    _checks.state(h0, (len(u), *A.shape))
    _checks.mask(where, u.shape[:2])
    _checks.decays(A, dt, where)
    method = _method(method)
    chunk = (16 if method == "sequential" else 64) if chunk is None else chunk
    checks.integer("chunk", chunk, 1)
    checks.one_of("discretisation", discretisation, ("delta", "zoh"))
    dtype, (u, dt, B, C) = u.dtype, (at_least_float32(x) for x in (u, dt, B, C))
    if where is not None:
        u, dt, B, C = (jnp.where(where[..., None], x, 0) for x in (u, dt, B, C))
        z = z if z is None else jnp.where(where[..., None], z, 0)
    kind = jnp.result_type(u, dt, B, C, at_least_float32(A))
    h0 = jnp.zeros((len(u), *A.shape), kind) if h0 is None else h0.astype(kind)
    # Channels last, whole vectors of them. Products are einsums, so that their transposes, which
    # sum over channels, are products of matrices too: a sum along the last axis is much slower.
    rates = jnp.swapaxes(at_least_float32(A), 0, 1)

    def coefficients(dt: Array, u: Array, B: Array) -> tuple[Array, Array]:
        rate = dt[..., None, :] * rates.reshape((1,) * (dt.ndim - 1) + rates.shape)
        drive = jnp.einsum("...n,...c->...nc", B, dt * u, precision=HIGHEST)
        drive = drive * relative_expm1(rate) if discretisation == "zoh" else drive
        return jnp.exp(rate), drive

    def read(C: Array, h: Array) -> Array:
        return jnp.einsum("...n,...nc->...c", C, h, precision=HIGHEST)

    # Of a position the backward pass keeps the state alone; its coefficients are formed again.
    @partial(jax.checkpoint, prevent_cse=False)
    def step(h: Array, now: Any) -> tuple[Array, Array]:
        dt, u, B, C = now
        a, b = coefficients(dt, u, B)
        h = a * h + b
        return h, read(C, h)

    def run(h: Array, inputs: Any) -> tuple[Array, Array]:
        if method == "sequential":
            return jax.lax.scan(step, h, inputs)
        dt, u, B, C = inputs
        h = _scan(*coefficients(dt, u, B), h, method)
        return h[-1], read(C, h)

    by_time = tuple(jnp.swapaxes(x, 0, 1) for x in (dt, u, B, C))
    y, h = _by_chunks(run, jnp.swapaxes(h0, 1, 2), by_time, min(chunk, u.shape[1]))
    y = gated(jnp.swapaxes(y, 0, 1), u, D, z)
    return _shown(y, where).astype(dtype), jnp.swapaxes(h, 1, 2)


def _check_selective(u: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any) -> None:
    _checks.length("u", u)
    checks.rank("u", u, 3)
    checks.floating("u", u)
    checks.shape("A", A, (u.shape[2], None))
    checks.same_shape(u=u, dt=dt)
    for name, x in {"B": B, "C": C}.items():
        checks.shape(name, x, (*u.shape[:2], A.shape[1]))
    if D is not None:
        checks.shape("D", D, u.shape[2:])
    if z is not None:
        checks.same_shape(u=u, z=z)


def _shown(y: Array, where: Array | None) -> Array:
    """The outputs, 0 where masked."""
    if where is None:
        return y
    return jnp.where(where.reshape(where.shape + (1,) * (y.ndim - 2)), y, 0)


def ssd(
    x: Float[Array, "batch length heads dim"],
    dt: Float[Array, "batch length heads"],
    A: Float[Array, " heads"],
    B: Float[Array, "batch length groups states"],
    C: Float[Array, "batch length groups states"],
    *,
    D: Float[Array, " heads"] | None = None,
    chunk: int = 64,
    h0: Float[Array, "batch heads dim states"] | None = None,
    where: Bool[Array, "batch length"] | None = None,
) -> tuple[Float[Array, "batch length heads dim"], Float[Array, "batch heads dim states"]]:
    """Mamba-2's scan, h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t.

    A is one number for each head, at most 0; B and C are shared by the heads of a group, and head h
    reads group h // (heads / groups). Inside a chunk it is the masked product
    (L o C B^T) (dt x), L_ij = exp(sum of dt A over j < k <= i), between chunks a recurrence of
    their states. The sums in the exponents are formed before exp: quotients of exp(cumsum)
    underflow. Returns (y, last state), y in the type of x. Dao & Gu 2024 (arXiv:2405.21060),
    Listing 1. Raises ValueError by name for shapes that do not fit, A above 0, steps below 0.

    >>> x, dt, B = jnp.ones((2, 16, 3, 5)), jnp.full((2, 16, 3), 0.1), jnp.ones((2, 16, 1, 4))
    >>> y, h = ssd(x, dt, -jnp.ones(3), B, B, chunk=8)
    >>> y.shape, h.shape
    ((2, 16, 3, 5), (2, 3, 5, 4))
    """
    groups, states = _check_ssd(x, dt, A, B, C, D)
    batch, length, heads, dim = x.shape
    _checks.state(h0, (batch, heads, dim, states))
    _checks.mask(where, x.shape[:2])
    _checks.decays(A, dt, where)
    checks.integer("chunk", chunk, 1)
    dtype, (x, dt, B, C) = x.dtype, (at_least_float32(v) for v in (x, dt, B, C))
    if where is not None:
        x, dt, B, C = (_shown(v, where) for v in (x, dt, B, C))
    chunk = min(chunk, length)
    count = -(-length // chunk)
    kind = jnp.result_type(x, dt, B, C, at_least_float32(A))
    h0 = jnp.zeros((batch, heads, dim, states), kind) if h0 is None else h0.astype(kind)

    def cut(v: Array, *tail: int) -> Array:
        v = jnp.pad(v, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (v.ndim - 2))
        return v.reshape(batch, count, chunk, *tail)

    # A stack, for its gradient is a sum of slices: one along the heads' axis is slow on CPU.
    def each(v: Array) -> Array:
        return jnp.stack([v] * (heads // groups), axis=3)

    # Positions before features, heads before positions: products of matrices, copied once.
    split = (groups, heads // groups)
    steps = jnp.moveaxis(cut(dt, *split), 2, -1)  # [b c g r q]
    cells = jnp.moveaxis(cut(x, *split, dim), 2, -2)
    B, C = (jnp.moveaxis(cut(v, groups, states), 2, -2) for v in (B, C))
    logs = steps * at_least_float32(A).reshape(1, 1, *split, 1)
    # Inside a chunk; steps and D are in the weights, which are fewer than the inputs.
    scores = jnp.einsum("bcgin,bcgjn->bcgij", C, B, precision=HIGHEST)
    weights = each(scores) * jnp.exp(_segment_sums(logs)) * steps[..., None, :]
    if D is not None:
        weights = weights + D.reshape(1, 1, *split, 1, 1) * jnp.eye(chunk)[None, None, None, None]
    y = jnp.einsum("bcgrij,bcgrjp->bcgrip", weights, cells, precision=HIGHEST)
    # What each chunk adds to the state, and the state at the start of each.
    written = each(B) * (jnp.exp(_sums_to_end(logs)) * steps)[..., None]
    added = jnp.einsum("bcgrjp,bcgrjn->bcgrpn", cells, written, precision=HIGHEST)
    totals = jnp.cumsum(logs, axis=-1)

    def advance(h: Array, scanned: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, new = scanned
        return decay[..., None, None] * h + new, h

    decays = jnp.moveaxis(jnp.exp(totals[..., -1]), 1, 0)
    by_chunk = (decays, jnp.moveaxis(added, 1, 0))
    h, starts = jax.lax.scan(advance, h0.reshape(batch, *split, dim, states), by_chunk)
    read = each(C) * jnp.exp(totals)[..., None]
    starts = jnp.moveaxis(starts, 0, 1)
    y = y + jnp.einsum("bcgrin,bcgrpn->bcgrip", read, starts, precision=HIGHEST)
    y = jnp.moveaxis(y, -2, 2).reshape(batch, count * chunk, heads, dim)[:, :length]
    return _shown(y, where).astype(dtype), h.reshape(batch, heads, dim, states)


def _check_ssd(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> tuple[int, int]:
    """Groups and states of the inputs of `ssd`."""
    _checks.length("x", x)
    checks.rank("x", x, 4)
    checks.floating("x", x)
    checks.rank("B", B, 4)
    heads = x.shape[2]
    checks.shape("A", A, (heads,))
    checks.shape("dt", dt, x.shape[:3])
    checks.shape("B", B, (*x.shape[:2], None, None))
    checks.same_shape(B=B, C=C)
    if D is not None:
        checks.shape("D", D, (heads,))
    groups, states = B.shape[2:]
    if heads % groups:
        raise ValueError(f"heads must be a multiple of groups = {groups}, got {heads}")
    return groups, states


def _segment_sums(logs: Array) -> Array:
    """sum of logs over j < k <= i as [..., i, j], -inf above the diagonal.

    Each is a sum of its own terms: differences of running sums would lose what is small beside a
    large step before it.
    """
    size = logs.shape[-1]
    i, j = jnp.arange(size)[:, None], jnp.arange(size)[None]
    lead = (1,) * (logs.ndim - 1)
    below = (i > j).reshape(*lead, size, size)
    sums = jnp.cumsum(jnp.where(below, logs[..., :, None], 0), axis=-2)
    return jnp.where((i >= j).reshape(*lead, size, size), sums, -jnp.inf)


def _sums_to_end(logs: Array) -> Array:
    """sum of logs over k > j, for each j."""
    later = jnp.flip(jnp.cumsum(jnp.flip(logs, -1), axis=-1), -1)
    return jnp.concatenate([later[..., 1:], jnp.zeros_like(later[..., :1])], axis=-1)
