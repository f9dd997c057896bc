"""Exact log-likelihood through the probability flow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.diffusion.samplers import at_one_time
from genjax.diffusion.schedules import Process
from genjax.numerics import LOG_2PI, at_least_float32, sum_event
from genjax.randomness import Index, indexed_rademacher
from genjax.typing import DenoiserFn, PRNGKey

# y [batch, *event] -> (value, trace of its Jacobian [batch])
TraceFn = Callable[[Callable[[Array], Array], Array], tuple[Array, Array]]


def _exact_trace(function: Callable[[Array], Array], y: Array) -> tuple[Array, Array]:
    """Value and trace from one directional derivative per dimension."""
    value, push = jax.linearize(function, y)
    basis = jnp.eye(y[0].size, dtype=y.dtype).reshape(-1, *y.shape[1:])

    def diagonal(direction: Array) -> Array:
        return sum_event(direction[None] * push(jnp.broadcast_to(direction, y.shape)))

    return value, jnp.sum(jax.vmap(diagonal)(basis), axis=0)


def _probed_trace(probes: Array) -> TraceFn:
    """Hutchinson's estimate v^T J v with the given probes [probe, batch, *event]."""

    def trace(function: Callable[[Array], Array], y: Array) -> tuple[Array, Array]:
        value, push = jax.linearize(function, y)
        return value, jnp.mean(jax.vmap(lambda v: sum_event(v * push(v)))(probes), axis=0)

    return trace


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
    """
    checks.min_rank("x", x, 2)
    checks.floating("x", x)
    checks.integer("num_steps", num_steps, 1)
    checks.integer("num_probes", num_probes, 1)
    y = at_least_float32(x)
    dims = y[0].size
    trace = _exact_trace
    if key is not None:
        shape = (y.shape[0], num_probes, *y.shape[1:])
        probes = indexed_rademacher(key, shape, first_index, y.dtype)
        trace = _probed_trace(jnp.moveaxis(probes, 1, 0))
    denoise_at = at_one_time(denoise)
    low, high = (jnp.log(process.noise_ratio(t)).astype(y.dtype) for t in _ends(process))

    def slope(u: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        t = process.time_of_log_snr(-2 * u)

        def denoised(y: Array) -> Array:
            return denoise_at(process.alpha(t) * y, t)

        value, jacobian_trace = trace(denoised, state[0])
        return state[0] - value, dims - jacobian_trace

    start = (y / process.alpha(process.t_min), jnp.zeros(y.shape[:1], y.dtype))
    if rtol is None:
        end, volume = _runge_kutta(slope, start, low, high, num_steps)
    else:
        end, volume = _adaptive(slope, start, low, high, rtol, atol)
    prior = -0.5 * (sum_event(jnp.square(end / jnp.exp(high))) + dims * (LOG_2PI + 2 * high))
    volume = volume - dims * process.log_alpha(process.t_min)
    return prior + volume, {"prior": prior, "volume": volume}


def _ends(process: Process) -> tuple:
    return process.t_min, process.t_max


def _runge_kutta(
    slope: Callable, start: tuple[Array, Array], low: Array, high: Array, num_steps: int
) -> tuple[Array, Array]:
    h = (high - low) / num_steps

    def moved(state: tuple, rate: tuple, scale: Array | float) -> tuple:
        return jax.tree.map(lambda a, b: a + scale * b, state, rate)

    def body(state: tuple, number: Array) -> tuple[tuple, None]:
        u = low + number * h
        k1 = slope(u, state)
        k2 = slope(u + 0.5 * h, moved(state, k1, 0.5 * h))
        k3 = slope(u + 0.5 * h, moved(state, k2, 0.5 * h))
        k4 = slope(u + h, moved(state, k3, h))
        rate = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
        return moved(state, rate, h), None

    return jax.lax.scan(body, start, jnp.arange(num_steps, dtype=h.dtype))[0]


def _adaptive(
    slope: Callable, start: tuple[Array, Array], low: Array, high: Array, rtol: float, atol: float
) -> tuple[Array, Array]:
    import diffrax

    checks.positive("rtol", rtol)
    checks.positive("atol", atol)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda u, state, _: slope(u, state)),
        diffrax.Dopri5(),
        low,
        high,
        None,
        start,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
    )
    assert solution.ys is not None
    return jax.tree.map(lambda leaf: leaf[0], solution.ys)
