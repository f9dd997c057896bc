"""Models whose coefficients do not change: their kernels, and convolution with them.

Eigenvalues, b and c are complex [*channels, pairs], one of each conjugate pair, and dt [*channels]
is the step; an axis of channels that one lacks is taken from the others. A kernel is real,
[*channels, length]. With A_bar and B_bar of `zoh` or `bilinear`,

    K_l = 2 Re sum_n c_n (A_bar^l B_bar)_n,      y_t = sum_{l <= t} K_l u_{t - l}.

The factor 2, the step and B are in the kernel, once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float, Inexact
from scipy.fft import next_fast_len

from genjax import checks
from genjax.numerics import HIGHEST, at_least_float32
from genjax.state_space import _checks
from genjax.state_space.discretisation import (
    Discretisation,
    discretise,
    dplr_advance,
    dplr_solve,
)
from genjax.state_space.steps import dplr_step, recur, s4d_step

__all__ = [
    "FLOAT32_LENGTH",
    "causal_convolution",
    "dplr_convolution",
    "dplr_kernel",
    "s4d_convolution",
    "s4d_kernel",
    "short_convolution",
]

# The longest kernel in single precision: a rounded A_bar is off by a part in 2^24 at every step, so
# that the phase of its powers is lost where a state does not decay.
FLOAT32_LENGTH = 65_536


def s4d_kernel(
    eigenvalues: Complex[Array, "*#channels pairs"],
    b: Inexact[Array, "*#channels pairs"],
    c: Inexact[Array, "*#channels pairs"],
    dt: float | Float[Array, "..."],
    length: int,
    *,
    discretisation: Discretisation = "zoh",
) -> Float[Array, "*channels length"]:
    """Kernel of a diagonal model, K_l = 2 Re sum_n c_n B_bar_n A_bar_n^l.

    The Vandermonde matrix in two levels, A_bar^(i M + j) = A_bar^(i M) A_bar^j: two tables of about
    sqrt(length) powers and one product of matrices instead of `length` exponentials for each state.
    Gu, Goel, Gupta, Re 2022 (arXiv:2206.11893). Right to 1e-5 in complex64 up to 16,384 positions.
    Raises for real eigenvalues, Re A > 0, steps that are not above 0, shapes that do not fit, and
    lengths over `FLOAT32_LENGTH` in complex64.

    >>> s4d_kernel(s4d_lin(64), jnp.ones(32), jnp.ones(32), 0.01, 1024).shape
    (1024,)
    """
    a, dt, b, c = _checks.fit(eigenvalues, dt, b=b, c=c)
    _check_length(length, a)
    _, b_bar, log_a = discretise(discretisation, a, dt, b)
    return _vandermonde(2 * c * b_bar, log_a, length)


def _check_length(length: int, a: Array) -> None:
    checks.integer("length", length, 1)
    if a.dtype == jnp.complex64 and length > FLOAT32_LENGTH:
        raise ValueError(
            f"length must be at most {FLOAT32_LENGTH} in complex64, got {length}: give complex128 "
            "eigenvalues (with jax.enable_x64), or scan the steps"
        )


def _tables(log_a: Array, length: int) -> tuple[Array, Array]:
    """A^(i M) [..., pairs, ceil(length / M)] and A^j [..., pairs, M]."""
    block = 1 << (max(length - 1, 1).bit_length() + 1) // 2
    real = jnp.finfo(log_a.dtype).dtype
    shape = (1,) * log_a.ndim + (-1,)
    big = (block * jnp.arange(-(-length // block), dtype=real)).reshape(shape)
    small = jnp.arange(block, dtype=real).reshape(shape)
    return jnp.exp(log_a[..., None] * big), jnp.exp(log_a[..., None] * small)


def _vandermonde(weights: Array, log_a: Array, length: int) -> Array:
    """Re sum_n weights_n A_n^l for l < length; weights may have more leading axes than A."""
    big, small = _tables(log_a, length)
    lead = (1,) * (weights.ndim - log_a.ndim)
    big, small = (x.reshape(lead + x.shape) for x in (big, small))
    big = big * weights[..., None]
    # Re(x y) of complex tables as one real product.
    rows = jnp.concatenate([jnp.real(big), -jnp.imag(big)], axis=-2)
    columns = jnp.concatenate([jnp.real(small), jnp.imag(small)], axis=-2)
    kernel = jnp.matmul(jnp.swapaxes(rows, -1, -2), columns, precision=HIGHEST)
    return kernel.reshape(*kernel.shape[:-2], -1)[..., :length]


def dplr_kernel(
    eigenvalues: Complex[Array, "*#channels pairs"],
    p: Inexact[Array, "*#channels pairs"],
    b: Inexact[Array, "*#channels pairs"],
    c: Inexact[Array, "*#channels pairs"],
    dt: float | Float[Array, "..."],
    length: int,
) -> Float[Array, "*channels length"]:
    """S4's kernel: A = diag(eigenvalues) - p p^*, discretised by the bilinear rule.

    As products: A_bar^j B_bar and C A_bar^(i M) by doubling, log2(length) products of real N x N
    matrices for each channel and one product of the two tables. Algorithm 1 of Gu, Goel, Re 2022
    (arXiv:2111.00396) evaluates a generating function at the roots of unity instead: its poles lie
    so near to the circle that complex64 loses three digits and more, and it needs
    C (I - A_bar^L) where a step needs C. A_bar is a contraction, so that products lose nothing.
    c is C itself. Raises as `s4d_kernel` does.

    >>> start = dplr(64)
    >>> dplr_kernel(*start[:3], jnp.ones(64) @ start.basis, 0.01, 1024).shape
    (1024,)
    """
    a, dt, p, b, c = _checks.fit(eigenvalues, dt, p=p, b=b, c=c)
    _check_length(length, a)
    matrix = _real_matrix(a, p, dt)
    driven = _coordinates(dplr_solve(dt[..., None] * b, a, p, dt))
    return _krylov_kernel(driven, matrix, _reading(c), length)


def _coordinates(x: Array) -> Array:
    """The real coordinates [Re x, Im x] of a state."""
    return jnp.concatenate([jnp.real(x), jnp.imag(x)], axis=-1)


def _state_of(x: Array) -> Array:
    real, imag = jnp.split(x, 2, axis=-1)
    return jax.lax.complex(real, imag)


def _reading(c: Array) -> Array:
    """2 Re <c, x> as a real inner product with the coordinates of x."""
    return 2 * jnp.concatenate([jnp.real(c), -jnp.imag(c)], axis=-1)


def _real_matrix(a: Array, p: Array, dt: Array) -> Array:
    """A_bar on coordinates that are rows, [..., states, states]: x <- x @ matrix."""
    pairs = a.shape[-1]
    unit = jnp.concatenate([jnp.eye(pairs), 1j * jnp.eye(pairs)]).astype(a.dtype)
    unit = unit.reshape((1,) * (a.ndim - 1) + unit.shape)
    parts = (a[..., None, :], p[..., None, :], dt[..., None])
    return _coordinates(dplr_advance(unit, *parts))


def _krylov(x: Array, matrix: Array, count: int) -> tuple[Array, Array]:
    """x, x A, x A^2, ... as rows [..., M, states], M the power of 2 from `count` on, and A^M."""
    rows = x[..., None, :]
    while rows.shape[-2] < count:
        rows = jnp.concatenate([rows, jnp.matmul(rows, matrix, precision=HIGHEST)], axis=-2)
        matrix = jnp.matmul(matrix, matrix, precision=HIGHEST)
    return rows, matrix


def _krylov_kernel(x: Array, matrix: Array, reading: Array, length: int) -> Array:
    """<reading, x A^l> for l < length; x may have more leading axes than the matrix."""
    lead = (1,) * (x.ndim - reading.ndim)
    matrix, reading = (v.reshape(lead + v.shape) for v in (matrix, reading))
    inner, matrix = _krylov(x, matrix, 1 << (length - 1).bit_length() // 2)
    count = -(-length // inner.shape[-2])
    outer, _ = _krylov(reading, jnp.swapaxes(matrix, -1, -2), count)
    kernel = jnp.matmul(outer[..., :count, :], jnp.swapaxes(inner, -1, -2), precision=HIGHEST)
    return kernel.reshape(*kernel.shape[:-2], -1)[..., :length]


def causal_convolution(
    u: Float[Array, "batch length channels"], kernel: Float[Array, "channels taps"]
) -> Float[Array, "batch length channels"]:
    """y_t = sum_{l <= t} K_l u_{t - l} of each channel, by FFTs padded so that nothing wraps.

    Computed in float32 at least, returned in the type of u. Raises ValueError unless u is [batch,
    length, channels] with a length of at least 1, and kernel [channels, taps].

    >>> u = jnp.array([[[1.0], [0.0], [0.0]]])
    >>> causal_convolution(u, jnp.array([[1.0, 0.5, 0.25]]))[0, :, 0].round(4)
    Array([1.  , 0.5 , 0.25], dtype=float32)
    """
    length = _checks.length("u", u)
    checks.rank("u", u, 3)
    checks.floating("u", u)
    checks.shape("kernel", kernel, (u.shape[2], None))
    kernel = kernel[:, :length]
    size = next_fast_len(length + kernel.shape[1] - 1, real=True)
    wide = jnp.swapaxes(at_least_float32(u), 1, 2)
    product = jnp.fft.rfft(wide, size) * jnp.fft.rfft(at_least_float32(kernel), size)[None]
    y = jnp.fft.irfft(product, size)[..., :length]
    return jnp.swapaxes(y, 1, 2).astype(u.dtype)


def s4d_convolution(
    u: Float[Array, "batch length channels"],
    eigenvalues: Complex[Array, "*#channels pairs"],
    b: Inexact[Array, "*#channels pairs"],
    c: Inexact[Array, "*#channels pairs"],
    dt: float | Float[Array, "..."],
    *,
    d: Any = None,
    h0: Complex[Array, "batch channels pairs"] | None = None,
    where: Bool[Array, "batch length"] | None = None,
    discretisation: Discretisation = "zoh",
) -> tuple[Float[Array, "batch length channels"], Complex[Array, "batch channels pairs"]]:
    """A diagonal model on whole sequences, (y, last state): what `s4d_step` gives one by one.

    h0: the state before the first position, 0 by default; d: [channels], adds d u. The last state
    costs as much again, and nothing under jit where it is not used. With `where` the steps are
    scanned: a masked position leaves the state as it is, which no convolution does, and its output
    is 0. Raises as `s4d_kernel`, and ValueError by name for a mask or h0 of another shape.

    >>> u, c = jnp.ones((2, 16, 3)), jnp.ones((3, 4))
    >>> y, state = s4d_convolution(u, s4d_lin(8), jnp.ones(4), c, jnp.full(3, 0.1))
    >>> y.shape, state.shape
    ((2, 16, 3), (2, 3, 4))
    """
    a, dt, b, c = _model(u, h0, where, eigenvalues, dt, b=b, c=c)
    length = u.shape[1]
    if where is not None or length == 1:
        h0 = _start(h0, a, u)
        options = {"d": d, "discretisation": discretisation}
        y, h = recur(lambda h, u: s4d_step(h, u, a, b, c, dt, **options), h0, u, where)
        return y.astype(u.dtype), h
    a_bar, b_bar, log_a = discretise(discretisation, a, dt, b)
    _check_length(length, a)
    y = causal_convolution(at_least_float32(u), _vandermonde(2 * c * b_bar, log_a, length))
    # h = sum_s A^s v_s with v the sequence read backwards, in the two levels of the kernel.
    big, small = _tables(log_a, length)
    blocks, block = big.shape[-1], small.shape[-1]
    v = jnp.pad(at_least_float32(u)[:, ::-1], ((0, 0), (0, blocks * block - length), (0, 0)))
    v = v.reshape(len(u), blocks, block, -1)
    h = jnp.einsum("bijc,cnj->bicn", v.astype(a.dtype), small, precision=HIGHEST)
    h = b_bar[None] * jnp.einsum("bicn,cni->bcn", h, big, precision=HIGHEST)
    if h0 is not None:
        first = 2 * c[None] * a_bar[None] * h0
        y = y + jnp.swapaxes(_vandermonde(first, log_a, length), 1, 2)
        h = h + jnp.exp(length * log_a)[None] * h0
    return _with_skip(y, d, u), h


def dplr_convolution(
    u: Float[Array, "batch length channels"],
    eigenvalues: Complex[Array, "*#channels pairs"],
    p: Inexact[Array, "*#channels pairs"],
    b: Inexact[Array, "*#channels pairs"],
    c: Inexact[Array, "*#channels pairs"],
    dt: float | Float[Array, "..."],
    *,
    d: Any = None,
    h0: Complex[Array, "batch channels pairs"] | None = None,
    where: Bool[Array, "batch length"] | None = None,
) -> tuple[Float[Array, "batch length channels"], Complex[Array, "batch channels pairs"]]:
    """S4 on whole sequences, (y, last state): what `dplr_step` gives one by one.

    Options, masks and errors as for `s4d_convolution`.

    >>> start = dplr(8)
    >>> c = jnp.ones((3, 8)) @ start.basis
    >>> y, state = dplr_convolution(jnp.ones((2, 16, 3)), *start[:3], c, jnp.full(3, 0.1))
    >>> y.shape
    (2, 16, 3)
    """
    a, dt, p, b, c = _model(u, h0, where, eigenvalues, dt, p=p, b=b, c=c)
    length = u.shape[1]
    if where is not None or length == 1:
        h0 = _start(h0, a, u)
        y, h = recur(lambda h, u: dplr_step(h, u, a, p, b, c, dt, d=d), h0, u, where)
        return y.astype(u.dtype), h
    _check_length(length, a)
    matrix, reading = _real_matrix(a, p, dt), _reading(c)
    driven = _coordinates(dplr_solve(dt[..., None] * b, a, p, dt))
    y = causal_convolution(at_least_float32(u), _krylov_kernel(driven, matrix, reading, length))
    # Blocks of inputs at the front of which zeros are put: h <- h A^M + sum_j u_j (B A^(M-1-j)).
    inner, power = _krylov(driven, matrix, 1 << (length - 1).bit_length() // 2)
    block = inner.shape[-2]
    first = (length - 1) % block + 1
    v = jnp.pad(at_least_float32(u), ((0, 0), (block - first, 0), (0, 0)))
    v = v.reshape(len(u), -1, block, v.shape[-1])
    v = jnp.einsum("bijc,cjn->ibcn", v, inner[..., ::-1, :], precision=HIGHEST)
    start = v[0]
    if h0 is not None:
        free = _coordinates(dplr_advance(h0, a[None], p[None], dt[None]))
        y = y + jnp.swapaxes(_krylov_kernel(free, matrix, reading, length), 1, 2)
        start = start + _krylov(free, matrix[None], first)[0][..., first - 1, :]

    def advance(h: Array, v: Array) -> tuple[Array, None]:
        return jnp.einsum("bcn,cnm->bcm", h, power, precision=HIGHEST) + v, None

    h, _ = jax.lax.scan(advance, start, v[1:])
    return _with_skip(y, d, u), _state_of(h)


def _model(
    u: Any, h0: Any, where: Any, eigenvalues: Any, dt: Any, **vectors: Any
) -> tuple[Array, ...]:
    """The parameters as [channels, ...] of u, everything checked."""
    _checks.length("u", u)
    checks.rank("u", u, 3)
    checks.floating("u", u)
    parts = _checks.fit(eigenvalues, dt, **vectors)
    channels, pairs = u.shape[2], parts[0].shape[-1]
    if parts[0].shape[:-1] not in ((), (channels,)):
        found = parts[0].shape[:-1]
        raise ValueError(f"u must have the channels {found} of the parameters, got {channels}")
    _checks.state(h0, (len(u), channels, pairs))
    _checks.mask(where, u.shape[:2])
    a, dt, *others = parts
    full = (channels, pairs)
    wide = (jnp.broadcast_to(x, full) for x in others)
    return jnp.broadcast_to(a, full), jnp.broadcast_to(dt, (channels,)), *wide


def _start(h0: Any, a: Array, u: Array) -> Array:
    """The state before the first position, in the type that steps give."""
    kind = jnp.result_type(a, at_least_float32(u))
    return jnp.zeros((len(u), *a.shape), kind) if h0 is None else h0.astype(kind)


def _with_skip(y: Array, d: Any, u: Array) -> Array:
    if d is not None:
        y = y + jnp.broadcast_to(jnp.asarray(d), u.shape[2:])[None, None] * u
    return y.astype(u.dtype)


def short_convolution(
    x: Float[Array, "batch length channels"],
    weight: Float[Array, "taps channels"],
    bias: Float[Array, " channels"] | None = None,
    *,
    tail: Float[Array, "batch before channels"] | None = None,
    where: Bool[Array, "batch length"] | None = None,
) -> tuple[Float[Array, "batch length channels"], Float[Array, "batch before channels"]]:
    """Causal convolution of each channel with K taps, y_t = sum_k weight_k x_{t + 1 - K + k}.

    The last tap is that of the present position. tail: the K - 1 inputs before x, 0 by default.
    Positions that `where` masks do not exist: the others see each other as if they stood side by
    side, and the tail that is returned holds the last inputs that are not masked. Returns
    (y, tail), y 0 where masked. Raises ValueError by name for shapes that do not fit.

    >>> y, tail = short_convolution(jnp.ones((1, 5, 2)), jnp.ones((3, 2)))
    >>> y[0, :, 0]
    Array([1., 2., 3., 3., 3.], dtype=float32)
    """
    length = _checks.length("x", x)
    checks.floating("x", x)
    checks.shape("weight", weight, (None, x.shape[2]))
    before = len(weight) - 1
    if tail is None:
        tail = jnp.zeros((len(x), before, x.shape[2]), x.dtype)
    checks.shape("tail", tail, (len(x), before, x.shape[2]))
    _checks.mask(where, x.shape[:2])
    rank, ends = None, jnp.full(len(x), length)
    if where is not None:
        x = jnp.where(where[..., None], x, 0)
        order = jnp.argsort(~where, axis=1, stable=True)
        x = jnp.take_along_axis(x, order[..., None], axis=1)
        rank, ends = jnp.maximum(jnp.cumsum(where, axis=1) - 1, 0), jnp.sum(where, axis=1)
    seen = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    y = jnp.zeros_like(x)
    for k in range(before + 1):
        y = y + seen[:, k : k + length] * weight[None, None, k]
    y = y if bias is None else y + bias[None, None]
    if where is None or rank is None:
        return y, seen[:, length:]
    y = jnp.take_along_axis(y, rank[..., None], axis=1)
    last = ends[:, None] + jnp.arange(before)[None]
    tail = jnp.take_along_axis(seen, last[..., None], axis=1)
    return jnp.where(where[..., None], y, 0), tail
