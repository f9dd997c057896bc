"""Discrete codes without a codebook: finite scalar and lookup-free quantisation.

Latents are z [batch, *grid, features], one code for each place of the grid; values are straight
through: those of the codes, with the gradient of the bounded z.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.numerics import HIGHEST, at_least_float32
from genjax.variational.quantize import check_latents, straight_through

__all__ = [
    "FiniteScalar",
    "LookupFree",
    "finite_scalar_codes",
    "finite_scalar_quantise",
    "lookup_free_codes",
    "lookup_free_quantise",
]

MAX_BITS = 16  # the mean's entropy is a sum over 2^bits codes


class FiniteScalar(NamedTuple):
    """values in [-1, 1], straight through, and index below the product of the levels."""

    values: Float[Array, "batch *grid dim"]
    index: Int[Array, "batch *grid"]


class LookupFree(NamedTuple):
    """values +-1, straight through, index of the bits, and the two entropies in nats: `entropy` of
    each example's soft codes, mean over its grid, and `usage_entropy` of their mean over all."""

    values: Float[Array, "batch *grid bits"]
    index: Int[Array, "batch *grid"]
    entropy: Float[Array, " batch"]
    usage_entropy: Float[Array, ""]


def finite_scalar_quantise(
    z: Float[Array, "batch *grid dim"], levels: Sequence[int]
) -> FiniteScalar:
    """Round each bounded feature to so many levels: codes without a codebook, and none unused.

    b = tanh(z + shift) half - offset,  code = round(b) / floor(L / 2),
    half = (L - 1)(1 + 1e-3) / 2,  offset = 1/2 for even L, else 0,  shift = artanh(offset / half)

    Mentzer et al., "Finite Scalar Quantization", 2023, whose listing has tan for artanh. (8, 6, 5)
    makes 240 codes, (8, 5, 5, 5) 1,000. index = sum_i (round(b_i) + floor(L_i / 2)) prod_{j<i} L_j,
    the first level fastest. Raises ValueError for other than one level a feature, levels below 3
    (of two `lookup_free_quantise` makes codes), more codes than an int32 counts, and concrete
    latents that are not finite.

    >>> finite_scalar_quantise(jnp.array([[0.1, -3.0]]), levels=(5, 5)).values
    Array([[ 0., -1.]], dtype=float32)
    """
    check_latents(z)
    array = _check_levels(levels, z.shape[-1])
    z = at_least_float32(z)
    shape = (1,) * (z.ndim - 1) + (-1,)
    half = (array - 1) * (1 + 1e-3) / 2
    offset = np.where(array % 2 == 0, 0.5, 0.0)
    shift, half, offset, floor = (
        jnp.asarray(v, z.dtype).reshape(shape)
        for v in (np.arctanh(offset / half), half, offset, array // 2)
    )
    bounded = jnp.tanh(z + shift) * half - offset
    # Of a thousand levels and more the margin of 1e-3 reaches beyond the last one.
    ends = -floor, jnp.asarray((array - 1) // 2, z.dtype).reshape(shape)
    rounded = jnp.clip(jax.lax.stop_gradient(jnp.round(bounded)), *ends)
    digits = (rounded + floor).astype(jnp.int32)
    places = jnp.asarray(np.cumprod([1, *array[:-1]]), jnp.int32).reshape(shape)
    values = straight_through(bounded, rounded) / floor
    return FiniteScalar(values, jnp.sum(digits * places, axis=-1))


def finite_scalar_codes(
    index: Int[Array, "*batch"], levels: Sequence[int]
) -> Float[Array, "*batch dim"]:
    """The values of `finite_scalar_quantise` that have these indices.

    >>> finite_scalar_codes(jnp.array([0, 24]), levels=(5, 5))
    Array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    """
    array = _check_levels(levels, len(levels))
    places = np.cumprod([1, *array[:-1]])
    shape = (1,) * jnp.ndim(index) + (-1,)
    sides, places, floor = (
        jnp.asarray(v, jnp.int32).reshape(shape) for v in (array, places, array // 2)
    )
    digits = (jnp.asarray(index)[..., None] // places) % sides
    return (digits - floor) / at_least_float32(floor)


def lookup_free_quantise(
    z: Float[Array, "batch *grid bits"], *, temperature: float | Float[Array, ""] = 1.0
) -> LookupFree:
    """Take the sign of each feature as a bit: 2^bits codes +-1 without a codebook.

    Yu et al., "Language Model Beats Diffusion", 2023 (arXiv:2310.05737), section 3. With
    p(c|z) ~ exp(-|z - c|^2 / temperature), in which the logit of a bit is 4 z / temperature, the
    penalty in nats E H(p(c|z)) - gamma H(E p(c|z)) makes bits sure and codes evenly used: that is
    mean(entropy) - gamma * usage_entropy. The first is a sum over bits, the second one over all
    codes, its mean taken over batch and grid. index: bit i counts 2^i where z_i > 0. Raises
    ValueError for more than 16 bits, concrete latents that are not finite and a temperature that is
    not positive.

    >>> lookup_free_quantise(jnp.array([[0.3, -2.0]])).values
    Array([[ 1., -1.]], dtype=float32)
    """
    check_latents(z)
    bits = z.shape[-1]
    checks.between("bits, the features of z,", bits, 1, MAX_BITS)
    checks.positive("temperature", temperature)
    z = at_least_float32(z)
    shape = (1,) * (z.ndim - 1) + (-1,)
    index = jnp.sum((z > 0) * jnp.asarray(2 ** np.arange(bits), jnp.int32).reshape(shape), axis=-1)
    logits = 4 * z / temperature
    log_on, log_off = -jax.nn.softplus(-logits), -jax.nn.softplus(logits)
    each = -(jax.nn.sigmoid(logits) * log_on + jax.nn.sigmoid(-logits) * log_off)
    entropy = jnp.sum(each, axis=-1).reshape(len(z), -1).mean(axis=1)
    # log p(c|z) of every code, as a product of matrices: the code's bits choose the terms.
    on = jnp.asarray((np.arange(2**bits)[None] >> np.arange(bits)[:, None]) & 1, z.dtype)
    log_p = jnp.matmul(log_on.reshape(-1, bits), on, precision=HIGHEST)
    log_p = log_p + jnp.matmul(log_off.reshape(-1, bits), 1 - on, precision=HIGHEST)
    mean = jnp.mean(jnp.exp(log_p), axis=0)
    usage = -jnp.sum(mean * jnp.log(jnp.maximum(mean, jnp.finfo(mean.dtype).tiny)))
    values = straight_through(z, jnp.where(z > 0, 1, -1).astype(z.dtype))
    return LookupFree(values, index.astype(jnp.int32), entropy, usage)


def lookup_free_codes(index: Int[Array, "*batch"], bits: int) -> Float[Array, "*batch bits"]:
    """The values of `lookup_free_quantise` that have these indices.

    >>> lookup_free_codes(jnp.array([0, 3]), bits=2).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """
    checks.integer("bits", bits, 1)
    places = jnp.arange(bits).reshape((1,) * jnp.ndim(index) + (-1,))
    return 2.0 * ((jnp.asarray(index)[..., None] >> places) & 1) - 1.0


def _check_levels(levels: Sequence[int], dim: int) -> np.ndarray:
    for level in levels:
        checks.integer("levels", level, 3)
    if len(levels) != dim:
        raise ValueError(f"levels must be one for each of {dim} features, got {tuple(levels)}")
    if math.prod(levels) >= 2**31:
        raise ValueError(f"levels must make fewer than 2^31 codes, got {tuple(levels)}")
    return np.asarray(levels)
