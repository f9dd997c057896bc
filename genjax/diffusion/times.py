"""Training times: how t is drawn, evenly spread over the batch."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax import checks
from genjax.diffusion.schedules import Process, Scalar
from genjax.randomness import low_discrepancy
from genjax.typing import PRNGKey

# (key, batch size) -> times [batch]
TimesFn: TypeAlias = Callable[[PRNGKey, int], Array]


def uniform_times(process: Process, *, spread: bool = True) -> TimesFn:
    """Times uniform in [t_min, t_max]; evenly spread over the batch unless `spread` is False.

    >>> uniform_times(VariancePreserving())(jax.random.key(0), 4).shape
    (4,)
    """

    def times(key: PRNGKey, num: int) -> Array:
        u = low_discrepancy(key, num) if spread else jax.random.uniform(key, (num,))
        return jnp.clip(
            process.t_min + u * (process.t_max - process.t_min), process.t_min, process.t_max
        )

    return times


def discrete_times(num_steps: int) -> TimesFn:
    """Times uniform in {1/T, 2/T, ..., 1}: DDPM's steps, evenly spread over the batch.

    >>> times = discrete_times(10)(jax.random.key(0), 4) * 10
    >>> bool(abs(times - times.round()).max() < 1e-4)
    True
    """
    checks.integer("num_steps", num_steps, 1)
    return lambda key, num: (jnp.floor(low_discrepancy(key, num) * num_steps) + 1) / num_steps


def edm_times(
    process: Process, *, mean: Scalar = -1.2, std: Scalar = 1.2, spread: bool = True
) -> TimesFn:
    """Times at which log(sigma / alpha) ~ N(mean, std^2), clipped to the process' range.

    Karras et al. 2022, Table 1.

    >>> edm_times(EDM())(jax.random.key(0), 4).shape
    (4,)
    """
    checks.positive("std", std)

    def times(key: PRNGKey, num: int) -> Array:
        log_ratio = mean + std * _normal(key, num, spread)
        t = process.time_of_noise_ratio(jnp.exp(log_ratio))
        return jnp.clip(t, process.t_min, process.t_max)

    return times


def logit_normal_times(
    process: Process, *, mean: Scalar = 0.0, std: Scalar = 1.0, spread: bool = True
) -> TimesFn:
    """Times with log(t / (1 - t)) ~ N(mean, std^2), clipped to the process' range.

    Esser et al. 2024, section 3.1, in our clock, where 1 is noise: for `RectifiedFlow` these are
    `edm_times` of the same mean and std. For processes on [0, 1].

    >>> logit_normal_times(RectifiedFlow())(jax.random.key(0), 4).shape
    (4,)
    """
    checks.positive("std", std)

    def times(key: PRNGKey, num: int) -> Array:
        t = jax.nn.sigmoid(mean + std * _normal(key, num, spread))
        return jnp.clip(t, process.t_min, process.t_max)

    return times


def _normal(key: PRNGKey, num: int, spread: bool) -> Array:
    u = low_discrepancy(key, num) if spread else jax.random.uniform(key, (num,))
    eps = jnp.finfo(u.dtype).eps
    return jax.scipy.special.ndtri(jnp.clip(u, eps, 1 - eps))
