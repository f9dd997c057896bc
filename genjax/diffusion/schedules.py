"""Noising processes as values: x_t = alpha(t) x_0 + sigma(t) eps, t from 0 (data) to t_max.

A process states log alpha(t), sigma(t)^2 and the inverse of its log signal-to-noise ratio. Drift
and diffusion of dx = f(t) x dt + g(t) dw follow by differentiation, never by a second formula.
"""

import dataclasses
import math
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import at_least_float32, linearize, safe_sqrt

Scalar: TypeAlias = float | int | Float[Array, ""]
Time: TypeAlias = float | int | Float[Array, "..."] | Float[np.ndarray, "..."]
T = TypeVar("T", bound=type)


def pytree(cls: T) -> T:
    """Register a frozen dataclass as a pytree of its fields; unflattening runs no checks."""
    names = [field.name for field in dataclasses.fields(cls)]

    def unflatten(_: Any, children: Any) -> Any:
        value = object.__new__(cls)
        for name, child in zip(names, children, strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_node(
        cls, lambda value: (tuple(getattr(value, name) for name in names), None), unflatten
    )
    return cls


class Process:
    """A noising process; times lie in [0, t_max], training and likelihoods in [t_min, t_max]."""

    t_min: Any
    t_max: Any

    def __post_init__(self) -> None:
        checks.positive("t_min", self.t_min)
        checks.positive("t_max", self.t_max)
        if checks.is_concrete(self.t_min) and checks.is_concrete(self.t_max):
            checks.between("t_min", self.t_min, 0, float(self.t_max))

    def log_alpha(self, t: Time) -> Float[Array, "..."]:
        """Log of the signal scale alpha(t)."""
        raise NotImplementedError

    def variance(self, t: Time) -> Float[Array, "..."]:
        """Noise variance sigma(t)^2."""
        raise NotImplementedError

    def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
        """Time t at which log_snr(t) takes the given value: the inverse of `log_snr`."""
        raise NotImplementedError

    def alpha(self, t: Time) -> Float[Array, "..."]:
        """Signal scale alpha(t)."""
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t: Time) -> Float[Array, "..."]:
        """Noise scale sigma(t); its gradient at t = 0 is 0 where the true one is infinite."""
        return safe_sqrt(self.variance(t))

    def log_snr(self, t: Time) -> Float[Array, "..."]:
        """log(alpha^2 / sigma^2); at sigma = 0 the largest value the dtype can hold, finite."""
        variance = self.variance(t)
        tiny = float(jnp.finfo(variance.dtype).tiny)
        # Not the log of a maximum, whose second derivative divides by tiny^2.
        end = variance <= tiny
        log_variance = jnp.where(end, math.log(tiny), jnp.log(jnp.where(end, 1, variance)))
        return 2 * self.log_alpha(t) - log_variance

    def noise_ratio(self, t: Time) -> Float[Array, "..."]:
        """sigma(t) / alpha(t): the noise level of x_t / alpha(t), and the clock of the samplers."""
        return self.sigma(t) * jnp.exp(-self.log_alpha(t))

    def time_of_noise_ratio(self, ratio: Time) -> Float[Array, "..."]:
        """Time t at which sigma(t) / alpha(t) takes the given value."""
        ratio = as_float(ratio)
        return self.time_of_log_snr(
            -2 * jnp.log(jnp.maximum(ratio, float(jnp.finfo(ratio.dtype).tiny)))
        )

    def drift(self, t: Time) -> Float[Array, "..."]:
        """f(t) = d log alpha / dt, the linear drift of dx = f(t) x dt + g(t) dw."""
        return derivative(self.log_alpha, t)

    def diffusion_squared(self, t: Time) -> Float[Array, "..."]:
        """g(t)^2 = d sigma^2 / dt - 2 sigma^2 d log alpha / dt (Song et al. 2021, eq. 29)."""
        return derivative(self.variance, t) - 2 * self.variance(t) * self.drift(t)

    def diffusion(self, t: Time) -> Float[Array, "..."]:
        """g(t), the diffusion coefficient."""
        return safe_sqrt(self.diffusion_squared(t))


def as_float(t: Time) -> Array:
    """An array of float32 at least; a Python number takes the precision of what it meets."""
    if isinstance(t, float | int):
        return jnp.asarray(float(t))  # weakly typed: no float64 beside float32 data under x64
    return at_least_float32(jnp.asarray(t))


def derivative(function: Any, t: Time) -> Array:
    t = as_float(t)
    return linearize(function, t)[1](jnp.ones_like(t))


@pytree
@dataclasses.dataclass(frozen=True)
class VarianceExploding(Process):
    """alpha = 1, sigma^2 = s_min^2 ((s_max / s_min)^(2 t) - 1) (Song et al. 2021, eqs 9, 29)."""

    sigma_min: Scalar = 0.01
    sigma_max: Scalar = 50.0
    t_min: Scalar = 1e-5
    t_max: Scalar = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("sigma_min", self.sigma_min)
        checks.positive("sigma_max", self.sigma_max)
        if checks.is_concrete(self.sigma_min) and checks.is_concrete(self.sigma_max):
            checks.at_least("sigma_max", self.sigma_max, float(self.sigma_min))
            checks.positive("sigma_max - sigma_min", self.sigma_max - self.sigma_min)

    def _log_ratio(self) -> Array:
        return jnp.log(as_float(self.sigma_max) / self.sigma_min)

    def log_alpha(self, t: Time) -> Float[Array, "..."]:
        return jnp.zeros_like(as_float(t))

    def variance(self, t: Time) -> Float[Array, "..."]:
        return as_float(self.sigma_min) ** 2 * jnp.expm1(2 * as_float(t) * self._log_ratio())

    def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
        variance = jnp.exp(-as_float(log_snr))
        return jnp.log1p(variance / as_float(self.sigma_min) ** 2) / (2 * self._log_ratio())


@pytree
@dataclasses.dataclass(frozen=True)
class VariancePreserving(Process):
    """alpha = exp(-B / 2), sigma^2 = 1 - exp(-B), B the integral of b_min + t (b_max - b_min).

    Song et al. 2021, eqs 11 and 29.
    """

    beta_min: Scalar = 0.1
    beta_max: Scalar = 20.0
    t_min: Scalar = 1e-5
    t_max: Scalar = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("beta_min", self.beta_min)
        checks.positive("beta_max", self.beta_max)

    def _integral(self, t: Time) -> Array:
        t = as_float(t)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def _time_of_integral(self, integral: Array) -> Array:
        slope = self.beta_max - self.beta_min
        # Where beta falls to nearly 0, rounding must not take its square below.
        root = safe_sqrt(jnp.maximum(self.beta_min**2 + 2 * slope * integral, 0))
        return 2 * integral / (self.beta_min + root)

    def log_alpha(self, t: Time) -> Float[Array, "..."]:
        return -0.5 * self._integral(t)

    def variance(self, t: Time) -> Float[Array, "..."]:
        return -jnp.expm1(-self._integral(t))

    def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
        return self._time_of_integral(jax.nn.softplus(-as_float(log_snr)))


@pytree
@dataclasses.dataclass(frozen=True)
class SubVariancePreserving(VariancePreserving):
    """alpha = exp(-B / 2), sigma = 1 - exp(-B) (Song et al. 2021, eqs 12, 29)."""

    t_min: Scalar = 1e-3

    def variance(self, t: Time) -> Float[Array, "..."]:
        return jnp.expm1(-self._integral(t)) ** 2

    def sigma(self, t: Time) -> Float[Array, "..."]:
        return -jnp.expm1(-self._integral(t))

    def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
        # sigma / alpha = exp(B/2) - exp(-B/2) = 2 sinh(B / 2).
        ratio = jnp.exp(-0.5 * as_float(log_snr))
        return self._time_of_integral(2 * jnp.arcsinh(0.5 * ratio))


@pytree
@dataclasses.dataclass(frozen=True)
class Cosine(Process):
    """alpha = cos(u(t)) / cos(u(0)), u = (t + s) / (1 + s) pi / 2, sigma^2 = 1 - alpha^2.

    Nichol & Dhariwal 2021, eq. 17. alpha(1) = 0, so t_max stays below 1.
    """

    offset: Scalar = 0.008
    t_min: Scalar = 1e-5
    t_max: Scalar = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("offset", self.offset)
        checks.between("t_max", self.t_max, 0, 1)

    def _angle(self, t: Time) -> Array:
        return (0.5 * math.pi) * (as_float(t) + self.offset) / (1 + self.offset)

    def log_alpha(self, t: Time) -> Float[Array, "..."]:
        # cos(u) as the sine of the complement, which keeps its digits where alpha vanishes.
        cosine = jnp.sin((0.5 * math.pi) * (1 - as_float(t)) / (1 + self.offset))
        cosine = jnp.maximum(cosine, float(jnp.finfo(cosine.dtype).tiny))
        return jnp.log(cosine) - jnp.log(jnp.cos(self._angle(0.0)))

    def variance(self, t: Time) -> Float[Array, "..."]:
        # 1 - cos(u)^2 / cos(u0)^2 = sin(u - u0) sin(u + u0) / cos(u0)^2, with u - u0 from t: a
        # difference of the angles is not 0 at t = 0 where a compiler fuses one of them.
        turn, start = (0.5 * math.pi) * as_float(t) / (1 + self.offset), self._angle(0.0)
        return jnp.sin(turn) * jnp.sin(turn + 2 * start) / jnp.cos(start) ** 2

    def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
        log_snr, start = as_float(log_snr), self._angle(0.0)
        c, s = jnp.cos(start), jnp.sin(start)
        variance = jax.nn.sigmoid(-log_snr)
        sine = jnp.sqrt(variance * c**2 + s**2)
        cosine = jnp.exp(0.5 * jax.nn.log_sigmoid(log_snr)) * c
        # sin(u - u0) = variance cos(u0)^2 / sin(u + u0): no difference, so never below 0.
        turn = jnp.arctan2(variance * c**2 / (sine * c + cosine * s), cosine * c + sine * s)
        return turn * (1 + self.offset) / (0.5 * math.pi)


@pytree
@dataclasses.dataclass(frozen=True)
class EDM(Process):
    """alpha = 1, sigma(t) = t from `t_min` to `t_max` (Karras et al. 2022, Table 1)."""

    t_min: Scalar = 0.002
    t_max: Scalar = 80.0

    def log_alpha(self, t: Time) -> Float[Array, "..."]:
        return jnp.zeros_like(as_float(t))

    def variance(self, t: Time) -> Float[Array, "..."]:
        return as_float(t) ** 2

    def sigma(self, t: Time) -> Float[Array, "..."]:
        return as_float(t)

    def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
        return jnp.exp(-0.5 * as_float(log_snr))


@pytree
@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Process):
    """alpha = 1 - t, sigma = t: the straight path of flow matching (Liu, Gong & Liu 2023)."""

    t_min: Scalar = 1e-3
    t_max: Scalar = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        # At 1 the signal is gone and log alpha infinite.
        checks.positive("1 - t_max", 1 - self.t_max)

    def log_alpha(self, t: Time) -> Float[Array, "..."]:
        return jnp.log1p(-as_float(t))

    def variance(self, t: Time) -> Float[Array, "..."]:
        return as_float(t) ** 2

    def sigma(self, t: Time) -> Float[Array, "..."]:
        return as_float(t)

    def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
        return jax.nn.sigmoid(-0.5 * as_float(log_snr))
