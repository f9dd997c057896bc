"""Time grids: the decreasing times at which a sampler calls the denoiser."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.diffusion.schedules import Process, as_float


def time_grid(
    process: Process,
    num_steps: int,
    *,
    spacing: str = "edm",
    rho: float = 7.0,
    to_zero: bool = True,
) -> Float[Array, " steps_plus_one"]:
    """Decreasing times from t_max in `num_steps` steps, to 0, or to t_min without `to_zero`.

    "uniform": equal steps in t; "log_snr": equal steps in log SNR; "edm": equal steps in
    (sigma / alpha)^(1 / rho) (Karras et al. 2022, eq. 5), each but the last 0 in [t_min, t_max].

    >>> time_grid(EDM(t_min=0.1, t_max=10.0), 4)[-2:]
    Array([0.1, 0. ], dtype=float32)
    """
    checks.integer("num_steps", num_steps, 1)
    checks.one_of("spacing", spacing, ["uniform", "log_snr", "edm"])
    checks.positive("rho", rho)
    t_max, t_min = as_float(process.t_max), as_float(process.t_min)
    if spacing == "uniform":
        return jnp.linspace(t_max, 0.0 if to_zero else t_min, num_steps + 1)
    fraction = jnp.linspace(0.0, 1.0, num_steps if to_zero else num_steps + 1)
    if spacing == "log_snr":
        start, stop = process.log_snr(t_max), process.log_snr(t_min)
        times = process.time_of_log_snr(start + fraction * (stop - start))
    else:
        start, stop = (process.noise_ratio(t) ** (1 / rho) for t in (t_max, t_min))
        times = process.time_of_noise_ratio((start + fraction * (stop - start)) ** rho)
    # The ends are known exactly: rounding must not take a time out of the range.
    times = jnp.clip(times, t_min, t_max).at[0].set(t_max)
    return jnp.append(times, 0.0) if to_zero else times.at[-1].set(t_min)
