"""Exact log-likelihood through the probability flow."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks, ode
from genjax.diffusion.samplers import at_one_time
from genjax.diffusion.schedules import Process
from genjax.numerics import LOG_2PI, at_least_float32, sum_event
from genjax.randomness import Index, indexed_rademacher
from genjax.typing import DenoiserFn, PRNGKey


def log_likelihood(
    denoise: DenoiserFn,
    x: Float[Array, "batch *event"],
    *,
    process: Process,
    key: PRNGKey | None = None,
    num_probes: int = 1,
    num_steps: int = 64,
    rtol: float | None = None,
    atol: float = 1e-5,
    first_index: Index = 0,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """log p(x) in nats by the instantaneous change of variables (Song et al. 2021, eq. 39).

    In y = x / alpha and u = log(sigma / alpha): dy/du = y - D, and
    log p(x) = log N(y_T; 0, (sigma_T / alpha_T)^2 I) + int (d - tr dD/dy) du - d log alpha(t_min),
    from t_min, where x is taken to lie, to t_max. Without a key the trace is exact (d directional
    derivatives); with one it is Hutchinson's, unbiased, `num_probes` Rademacher probes held for
    the whole solve, row i's a function of (key, first_index + i). `num_steps` steps of Runge-Kutta
    4, equal in u; with `rtol`, adaptive Dormand-Prince through diffrax instead.
    Returns (log p [batch], aux: "prior", "volume", both [batch]).

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> x = jax.random.normal(jax.random.key(0), (4, 2))
    >>> log_p, aux = log_likelihood(denoise, x, process=EDM())
    >>> log_p.shape
    (4,)
    """
    checks.min_rank("x", x, 2)
    checks.floating("x", x)
    checks.integer("num_steps", num_steps, 1)
    checks.integer("num_probes", num_probes, 1)
    y = at_least_float32(x)
    dims = y[0].size
    probes = None
    if key is not None:
        shape = (y.shape[0], num_probes, *y.shape[1:])
        probes = jnp.moveaxis(indexed_rademacher(key, shape, first_index, y.dtype), 1, 0)
    denoise_at = at_one_time(denoise)
    low, high = (
        jnp.log(process.noise_ratio(t)).astype(y.dtype) for t in (process.t_min, process.t_max)
    )

    def slope(_: None, state: tuple[Array, Array], u: Array) -> tuple[Array, Array]:
        t = process.time_of_log_snr(-2 * u)

        def denoised(y: Array) -> Array:
            return denoise_at((process.alpha(t) * y).astype(y.dtype), t)

        value, jacobian_trace = ode.divergence(denoised, state[0], probes)
        return state[0] - value, dims - jacobian_trace

    log_alpha = process.log_alpha(process.t_min).astype(y.dtype)
    start = (y * jnp.exp(-log_alpha), jnp.zeros(y.shape[:1], y.dtype))
    method, rtol = ("rk4", 1.0) if rtol is None else ("dopri5", rtol)
    end, volume = ode.solve(
        slope, None, start, (low, high), num_steps=num_steps, method=method, rtol=rtol, atol=atol
    )
    prior = -0.5 * (sum_event(jnp.square(end / jnp.exp(high))) + dims * (LOG_2PI + 2 * high))
    volume = volume - dims * log_alpha
    return prior + volume, {"prior": prior, "volume": volume}
