"""Losses that break one law each, with the law that must find it, and two that obey all."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from tests import laws

Batch = Float[Array, "batch d"]
Losses = Float[Array, " batch"]
Scalar = Float[Array, ""]


def good(x: Batch) -> Losses:
    """Sum of squares of each example, |x|^2 (Gauss 1809)."""
    checks.rank("x", x, 2)
    return jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1)


def coupled(x: Batch) -> Losses:
    return jnp.sum((x - x.mean(0, keepdims=True)) ** 2, axis=1).astype(jnp.float32)


def narrow(x: Batch) -> Losses:
    return jnp.sum(x**2, axis=1)


def reduced(x: Batch) -> Losses:
    return jnp.sum(x.astype(jnp.float32) ** 2)


def sharp(x: Batch) -> Losses:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=1)


def leaky(x: Batch) -> Losses:
    return good(x) + 0 * jnp.mean(x.astype(jnp.float32))


CALLS = []


def impure(x: Batch) -> Losses:
    CALLS.append(x)
    return good(x) + len(CALLS)


def unbatched(x: Batch) -> Losses:
    shape = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    return good(x) + jax.pure_callback(lambda x: np.zeros(len(x), np.float32), shape, x)


def permissive(x: Batch) -> Losses:
    """Sum of squares."""
    return jnp.sum(jnp.atleast_2d(x.astype(jnp.float32)) ** 2, axis=1)


def of_two(x: Batch, y: Batch) -> Scalar:
    """Squared distance of the means, |mean x - mean y|^2 (Gauss 1809)."""
    checks.same_event(x=x, y=y)
    checks.min_rank("x", x, 2)
    means = [jnp.mean(z.astype(jnp.float32), axis=0) for z in (x, y)]
    return jnp.sum(jnp.square(means[0] - means[1]))


def ordered(x: Batch, y: Batch) -> Scalar:
    return of_two(x[:2], y)


def rooted(x: Batch, y: Batch) -> Scalar:
    return jnp.sqrt(of_two(x, y))


def half(x: Batch, y: Batch) -> Scalar:
    return of_two(x, y).astype(x.dtype)


def counted(x: Batch, y: Batch) -> Scalar:
    CALLS.append(x)
    return of_two(x, y) + len(CALLS)


def lenient(x: Batch, y: Batch) -> Scalar:
    return jnp.sum((jnp.mean(x) - jnp.mean(y)) ** 2).astype(jnp.float32)


def serial(x: Batch, y: Batch) -> Scalar:
    zero = jax.pure_callback(lambda x: np.float32(0), jax.ShapeDtypeStruct((), jnp.float32), x)
    return of_two(x, y) + zero


BROKEN = {
    coupled: laws.check_depends_on_itself_alone,
    narrow: laws.check_shape_and_dtype,
    reduced: laws.check_shape_and_dtype,
    sharp: laws.check_gradient_at_extremes,
    leaky: laws.check_masking_equals_dropping,
    impure: laws.check_jit_equals_eager,
    unbatched: laws.check_vmap_over_keys,
    permissive: laws.check_errors,
}
BROKEN_OBJECTIVES = {
    half: laws.check_scalars,
    ordered: laws.check_order_is_free,
    counted: laws.check_objective_jit_equals_eager,
    serial: laws.check_vmap_over_samples,
    rooted: laws.check_objective_gradient,
    lenient: laws.check_objective_errors,
}
