"""Maps over channels: actnorm, invertible 1x1, squeeze, and factoring out (Glow's parts).

Channels are the last axis, so each also takes plain vectors [batch, d].
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array

from genjax import checks, numerics
from genjax.flows.bijections.base import (
    Bijection,
    both_ways,
    bounded,
    check_count,
    check_order,
    check_tree,
    zero_log_det,
)
from genjax.typing import Params

__all__ = [
    "actnorm",
    "actnorm_init",
    "multi_scale",
    "plu",
    "plu_init",
    "random_rotation",
    "split",
    "squeeze",
]

# Channels are scaled by at most e^10 and at least e^-10.
_BOUND = 10.0


def _positions(x: Array) -> int:
    """Number of places per example that share one set of channels."""
    checks.min_rank("x", x, 2)
    return math.prod(x.shape[1:-1])


def _spread(value: Array, x: Array) -> Array:
    """[c] to [1, ..., 1, c], the rank of x."""
    return value.reshape((1,) * (x.ndim - 1) + (-1,))


def actnorm_init(x: Array) -> Params:
    """Set actnorm from a first batch, so that each channel leaves with mean 0 and variance 1.

    A channel that is constant up to rounding keeps its scale. Raises ValueError where a standard
    deviation lies outside (e^-10, e^10); where that is traced, its log-scale is NaN.

    >>> x = jax.random.normal(jax.random.key(0), (64, 3)) * 5
    >>> y, _ = actnorm().forward(actnorm_init(x), x)
    >>> y.std(0).round(2)
    Array([1., 1., 1.], dtype=float32)
    """
    checks.min_rank("x", x, 2)
    checks.not_empty("x", x)
    axes = tuple(range(x.ndim - 1))
    x = numerics.at_least_float32(x)
    mean, std = jnp.mean(x, axis=axes), jnp.std(x, axis=axes)
    constant = std <= 8 * jnp.finfo(x.dtype).eps * jnp.abs(mean)
    log_scale = -jnp.log(jnp.where(constant, 1, std))
    if checks.is_concrete(log_scale):
        _check_scales("the standard deviations of x", log_scale)
    log_scale = jnp.where(jnp.abs(log_scale) < _BOUND, log_scale, jnp.nan)
    return {"shift": -mean, "log_scale": _BOUND * jnp.arctanh(log_scale / _BOUND)}


def _check_scales(name: str, log_scale: np.ndarray | Array) -> None:
    if not np.all(np.abs(log_scale) < _BOUND):
        got = np.exp(np.abs(np.asarray(log_scale)).max())
        raise ValueError(
            f"{name} must lie in (e^-{_BOUND:g}, e^{_BOUND:g}), got one a factor {got:.3g} from 1"
        )


def actnorm() -> Bijection:
    """y = (x + shift) exp(s), per channel; log |det| = h w sum s.

    Kingma and Dhariwal (2018), table 1; s = 10 tanh(log_scale / 10), so scales stay within e^10.
    Parameters: {"shift" [c], "log_scale" [c]}, from `actnorm_init`.

    >>> x = jax.random.normal(jax.random.key(0), (64, 3)) + 7
    >>> y, log_det = actnorm().forward(actnorm_init(x), x)
    >>> abs(y.mean(0)).round(2)
    Array([0., 0., 0.], dtype=float32)
    """

    def run(params: Params, x: Array, reverse: bool) -> tuple[Array, Array]:
        count = _positions(x)
        check_tree("actnorm", params, {"shift": x.shape[-1:], "log_scale": x.shape[-1:]})
        s = bounded(params["log_scale"], _BOUND)
        shift, scale = _spread(params["shift"], x), _spread(jnp.exp(-s if reverse else s), x)
        y = x * scale - shift if reverse else (x + shift) * scale
        return y, zero_log_det(x) + (-count if reverse else count) * jnp.sum(s)

    return both_ways(run)


def plu_init(weight: np.ndarray) -> tuple[tuple[int, ...], Params]:
    """Factor a matrix W [c, c] into a permutation, kept fixed, and the parameters of `plu`.

    Raises ValueError where W is not square or is singular, and where a pivot of its LU factors
    lies outside (e^-10, e^10), the scales that `plu` can hold.

    >>> order, params = plu_init(random_rotation(0, 3))
    >>> sorted(order)
    [0, 1, 2]
    """
    weight = np.asarray(weight, dtype=np.float64)
    if weight.ndim != 2 or weight.shape[0] != weight.shape[1]:
        raise ValueError(f"weight must be a square matrix, got shape {weight.shape}")
    p, lower, upper = map(np.asarray, scipy.linalg.lu(weight))
    scale = np.diag(upper)
    if np.any(np.abs(scale) < 1e-12):
        raise ValueError("weight is singular: a 1x1 map by it has no inverse")
    _check_scales("the pivots of weight", np.log(np.abs(scale)))
    raw = _BOUND * np.arctanh(np.log(np.abs(scale)) / _BOUND)
    parts = {
        "lower": np.tril(lower, -1),
        "upper": np.triu(upper, 1),
        "log_scale": raw,
        "sign": np.sign(scale),
    }
    order = tuple(int(i) for i in np.argmax(p, axis=1))
    return order, {name: jnp.asarray(value, jnp.float32) for name, value in parts.items()}


def random_rotation(seed: int, channels: int) -> np.ndarray:
    """Draw an orthogonal matrix [c, c] in numpy (QR of a normal one), as Glow starts from.

    Drawn outside of any trace: its factors fix a permutation, which is structure.

    >>> w = random_rotation(0, 3)
    >>> bool(abs(w @ w.T - jnp.eye(3)).max() < 1e-5)
    True
    """
    normal = np.random.default_rng(seed).normal(size=(channels, channels))
    return np.linalg.qr(normal)[0]


def plu(order: Sequence[int] | np.ndarray) -> Bijection:
    """y = x W^T over channels with W = P L (U + diag(sign e^s)); log |det| = h w sum s.

    Kingma and Dhariwal (2018), section 3.2: `order` is the fixed permutation P (row i of P L is
    row order[i] of L), the signs carry no gradient, s = 10 tanh(log_scale / 10). Parameters:
    {"lower", "upper" [c, c], "log_scale", "sign" [c]}, from `plu_init`; of the two matrices only
    the strict triangles are read.

    >>> order, params = plu_init(random_rotation(0, 3))
    >>> y, log_det = plu(order).forward(params, jnp.ones((2, 4, 4, 3)))
    >>> log_det.round(3)
    Array([0., 0.], dtype=float32)
    """
    index = check_order(order)
    size = index.size

    def run(params: Params, x: Array, reverse: bool) -> tuple[Array, Array]:
        count = _positions(x)
        if x.shape[-1] != size:
            raise ValueError(f"the last axis must be {size} long, got shape {x.shape}")
        square, vector = (size, size), (size,)
        shapes = {"lower": square, "upper": square, "log_scale": vector, "sign": vector}
        check_tree("plu", params, shapes)
        s = bounded(params["log_scale"], _BOUND)
        diagonal = jax.lax.stop_gradient(jnp.sign(params["sign"])) * jnp.exp(s)
        eye = jnp.eye(size, dtype=s.dtype)
        lower = jnp.tril(params["lower"], -1) + eye
        upper = jnp.triu(params["upper"], 1) + jnp.diag(diagonal)
        if reverse:
            # Solve once against the permuted identity: c is small, the batch is not.
            middle = jax.scipy.linalg.solve_triangular(lower, eye[np.argsort(index)], lower=True)
            weight = jax.scipy.linalg.solve_triangular(upper, middle)
        else:
            weight = jnp.matmul(lower, upper, precision=numerics.HIGHEST)[index]
        y = jnp.einsum("...j,ij->...i", x, weight, precision=numerics.HIGHEST)
        return y, zero_log_det(x) + (-count if reverse else count) * jnp.sum(s)

    return both_ways(run)


def squeeze(factor: int = 2) -> Bijection:
    """Trade space for channels: [b, h, w, c] to [b, h / f, w / f, f f c]; volume is kept.

    Raises ValueError where the event is no image or a side is not a multiple of the factor.

    >>> squeeze().forward((), jnp.ones((1, 4, 4, 3)))[0].shape
    (1, 2, 2, 12)
    """
    checks.integer("factor", factor, 2)

    def forward(_: Params, x: Array) -> tuple[Array, Array]:
        if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"squeeze({factor}) needs [batch, h, w, c] with h and w multiples of {factor}, "
                f"got {x.shape}"
            )
        b, h, w, c = x.shape
        y = x.reshape(b, h // factor, factor, w // factor, factor, c).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(b, h // factor, w // factor, factor**2 * c), zero_log_det(x)

    def inverse(_: Params, y: Array) -> tuple[Array, Array]:
        if y.ndim != 4 or y.shape[-1] % factor**2:
            raise ValueError(
                f"the inverse of squeeze({factor}) needs [batch, h, w, c] with c a multiple of "
                f"{factor**2}, got {y.shape}"
            )
        b, h, w, c = y.shape
        x = y.reshape(b, h, w, factor, factor, c // factor**2).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h * factor, w * factor, c // factor**2), zero_log_det(y)

    return Bijection(forward, inverse)


def split() -> Bijection:
    """x to (z_list, log_det) with z_list = [left half, right half] of the last axis; no parameters.

    Raises ValueError where the last axis is odd.

    >>> (kept, rest), log_det = split().forward((), jnp.ones((2, 4, 4, 6)))
    >>> kept.shape, rest.shape
    ((2, 4, 4, 3), (2, 4, 4, 3))
    """

    def forward(_: Params, x: Array) -> tuple[list[Array], Array]:
        if x.shape[-1] % 2:
            raise ValueError(f"split needs an even last axis, got shape {x.shape}")
        return jnp.split(x, 2, axis=-1), zero_log_det(x)

    def inverse(_: Params, z_list: Sequence[Array]) -> tuple[Array, Array]:
        check_count("the inverse of split", z_list, 2)
        return jnp.concatenate(z_list, axis=-1), zero_log_det(z_list[0])

    return Bijection(forward, inverse)


def multi_scale(levels: Sequence[Bijection]) -> Bijection:
    """Run the levels in turn; after each but the last factor out half of the last axis.

    x to (z_list, log_det), one z per level, the first factored out first (Dinh et al., 2017,
    section 3.6). `params` is a sequence of one tree per level. Raises TypeError where the number
    of trees or of z is not that of the levels.
    """
    levels, cut = tuple(levels), split()

    def forward(params: Params, x: Array) -> tuple[list[Array], Array]:
        check_count("multi_scale", params, len(levels))
        total, z_list = zero_log_det(x), []
        for i, (level, tree) in enumerate(zip(levels, params, strict=True)):
            x, log_det = level.forward(tree, x)
            total = total + log_det
            if i < len(levels) - 1:
                (x, out), _ = cut.forward(None, x)
                z_list.append(out)
        return [*z_list, x], total

    def inverse(params: Params, z_list: Sequence[Array]) -> tuple[Array, Array]:
        check_count("multi_scale", params, len(levels))
        if not isinstance(z_list, list | tuple) or len(z_list) != len(levels):
            raise TypeError(f"multi_scale needs a list of {len(levels)} arrays, one per level")
        x, total = z_list[-1], zero_log_det(z_list[-1])
        for i in reversed(range(len(levels))):
            if i < len(levels) - 1:
                x, _ = cut.inverse(None, [x, z_list[i]])
            x, log_det = levels[i].inverse(params[i], x)
            total = total + log_det
        return x, total

    return Bijection(forward, inverse)
