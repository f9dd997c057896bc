"""Discrete steps: DDPM's betas as a process, and the Gaussian posterior between two times."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.diffusion.schedules import Process, Scalar, Time, as_float, pytree


@pytree
@dataclasses.dataclass(frozen=True)
class DiscreteTime(Process):
    """DDPM's chain of T steps as a process on [0, 1]: log alpha_bar is linear between i / T."""

    log_alpha_bar: Float[Array, " steps"]
    t_min: Scalar
    t_max: Scalar = 1.0

    @property
    def num_steps(self) -> int:
        """Length T of the chain."""
        return self.log_alpha_bar.shape[0]

    def _table(self) -> tuple[Array, Array]:
        half = 0.5 * self.log_alpha_bar
        times = jnp.linspace(0, 1, self.num_steps + 1, dtype=half.dtype)
        return times, jnp.pad(half, (1, 0))

    def log_alpha(self, t: Time) -> Float[Array, "..."]:
        return jnp.interp(as_float(t), *self._table())

    def variance(self, t: Time) -> Float[Array, "..."]:
        return -jnp.expm1(2 * self.log_alpha(t))

    def time_of_log_snr(self, log_snr: Time) -> Float[Array, "..."]:
        times, half = self._table()
        return jnp.interp(0.5 * jax.nn.softplus(-as_float(log_snr)), -half, times)


def ddpm_betas(
    process: Process, num_steps: int, *, rule: str = "exact", max_beta: float = 0.999
) -> Float[Array, " steps"]:
    """Discrete betas of a variance-preserving process.

    "exact": beta_i = 1 - alpha(i/T)^2 / alpha((i-1)/T)^2, clipped at `max_beta` (Nichol & Dhariwal
    2021, eq. 17); "euler": beta_i = g((i-1)/(T-1))^2 / T, Ho et al. 2020's linear betas. Raises for
    a process whose alpha^2 + sigma^2 is not 1.

    >>> ddpm_betas(VariancePreserving(), 1000).shape
    (1000,)
    """
    checks.integer("num_steps", num_steps, 2)
    checks.one_of("rule", rule, ["exact", "euler"])
    checks.between("max_beta", max_beta, 0, 1)
    t = process.t_max * jnp.linspace(0.0, 1.0, 9)
    power = process.alpha(t) ** 2 + process.variance(t)
    if checks.is_concrete(power) and not jnp.all(jnp.abs(power - 1) < 1e-4):
        worst = jnp.argmax(jnp.abs(power - 1))
        raise ValueError(
            "process must preserve the variance, got alpha^2 + sigma^2 = "
            f"{power[worst]} at t = {t[worst]}"
        )
    if rule == "euler":
        return process.diffusion_squared(jnp.linspace(0.0, 1.0, num_steps)) / num_steps
    log_alpha_bar = 2 * process.log_alpha(jnp.linspace(0.0, 1.0, num_steps + 1))
    return jnp.minimum(-jnp.expm1(jnp.diff(log_alpha_bar)), max_beta)


def discrete(betas: Float[Array, " steps"]) -> DiscreteTime:
    """DDPM's process of given betas: alpha(i/T)^2 = prod_{j <= i} (1 - beta_j).

    >>> process = discrete(jnp.linspace(1e-4, 0.02, 1000))
    >>> round(float(process.alpha(jnp.array(1.0))), 4)
    0.0064
    """
    betas = as_float(betas)
    checks.rank("betas", betas, 1)
    checks.not_empty("betas", betas)
    checks.between("betas", betas, 0, 1)
    if checks.is_concrete(betas) and (betas >= 1).any():
        raise ValueError(f"betas must be below 1, where nothing of the data is left, got {betas}")
    return DiscreteTime(jnp.cumsum(jnp.log1p(-betas)), t_min=1 / betas.shape[0])


class Posterior(NamedTuple):
    """Moments of q(x_s | x_t, x_0) = N(x0_coef x_0 + xt_coef x_t, variance), s < t."""

    x0_coef: Float[Array, "..."]
    xt_coef: Float[Array, "..."]
    variance: Float[Array, "..."]
    forward_variance: Float[Array, "..."]


def posterior(process: Process, t: Time, s: Time) -> Posterior:
    """Gaussian posterior of x_s given x_t and x_0 (Ho et al. 2020, eqs 6-7, for any process).

    With r = (sigma_s / sigma_t)^2 and v = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, the
    variance of q(x_t | x_s): mean alpha_s v / sigma_t^2 x_0 + (alpha_t / alpha_s) r x_t,
    variance v r. `forward_variance` is v (Ho's beta).

    >>> round(float(posterior(VariancePreserving(), t=0.5, s=0.25).variance), 4)
    0.4391
    """
    var_t, var_s = process.variance(t), process.variance(s)
    # v / sigma_t^2 = 1 - snr_t / snr_s, without cancellation.
    fresh = -jnp.expm1(process.log_snr(t) - process.log_snr(s))
    scale = jnp.exp(process.log_alpha(t) - process.log_alpha(s))
    shrink = var_s / jnp.maximum(var_t, jnp.finfo(var_t.dtype).tiny)
    return Posterior(process.alpha(s) * fresh, scale * shrink, var_s * fresh, var_t * fresh)
