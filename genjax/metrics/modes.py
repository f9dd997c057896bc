"""How a sample spreads over the known modes of a mixture: mode collapse as numbers.

Every function is jittable and vmaps over seeds. `std` is the standard deviation of each mode.
"""

from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from genjax import checks
from genjax.metrics._pairs import check_features, nan_unless_finite
from genjax.numerics import at_least_float32

Samples: TypeAlias = Float[Array, "n d"] | Float[np.ndarray, "n d"]
Means: TypeAlias = Float[Array, "modes d"] | Float[np.ndarray, "modes d"]
Scale: TypeAlias = float | int | Float[Array, ""]


def modes_covered(
    samples: Samples, means: Means, std: Scale, *, sigmas: Scale = 3, least: int = 1
) -> Int[Array, ""]:
    """Number of modes with at least `least` samples within `sigmas` standard deviations.

    A sample counts for its nearest mode. Srivastava et al. 2017 (VEEGAN), section 4.1. Raises
    ValueError on NaN; under `jax.jit` a sample of NaN counts for no mode.

    >>> means = jnp.array([[0.0, 0.0], [9.0, 9.0]])
    >>> int(modes_covered(jnp.zeros((5, 2)), means, 0.1))
    1
    """
    nearest, good = _assign(samples, means, std, sigmas)
    checks.integer("least", least, least=1)
    counts = jnp.zeros(means.shape[0], jnp.int32).at[nearest].add(good.astype(jnp.int32))
    return jnp.sum(counts >= least, dtype=jnp.int32)


def high_quality_share(
    samples: Samples, means: Means, std: Scale, *, sigmas: Scale = 3
) -> Float[Array, ""]:
    """Share of samples within `sigmas` standard deviations of the nearest mode.

    In two dimensions the mixture itself scores 1 - exp(-sigmas^2 / 2), 0.9889 at 3.

    >>> means = jnp.array([[0.0, 0.0], [9.0, 9.0]])
    >>> float(high_quality_share(jnp.array([[0.0, 0.1], [5.0, 5.0]]), means, 0.1))
    0.5
    """
    _, good = _assign(samples, means, std, sigmas)
    return jnp.mean(good, dtype=jnp.float32)


def reverse_kl_modes(samples: Samples, means: Means) -> Float[Array, ""]:
    """KL(shares of the samples by nearest mode || equal shares), nats, from 0 to log(modes).

    The logarithm is of the samples' shares alone: a lost mode costs a finite amount. Under
    `jax.jit` NaN gives NaN.

    >>> means = jnp.array([[0.0, 0.0], [9.0, 9.0]])
    >>> round(float(reverse_kl_modes(jnp.zeros((5, 2)), means)), 4)
    0.6931
    """
    nearest, _ = _assign(samples, means, 1.0, 1.0)
    share = jnp.zeros(means.shape[0], jnp.float32).at[nearest].add(1.0) / samples.shape[0]
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0))
    return nan_unless_finite(jnp.log(float(means.shape[0])) - entropy, jnp.asarray(samples))


def _assign(
    samples: Samples, means: Means, std: Scale, sigmas: Scale
) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """Nearest mode of each sample, and whether it lies within `sigmas` standard deviations."""
    check_features(1, samples=samples, means=means)
    checks.positive("std", std)
    checks.positive("sigmas", sigmas)
    samples = at_least_float32(jnp.asarray(samples))
    means = jnp.asarray(means, samples.dtype)
    # Not |x|^2 - 2 x.m + |m|^2, whose rounding, eps |m|^2, may exceed a narrow mode's variance.
    distances = jnp.sum((samples[:, None] - means[None]) ** 2, axis=-1)
    return jnp.argmin(distances, axis=1), jnp.min(distances, axis=1) <= (sigmas * std) ** 2
