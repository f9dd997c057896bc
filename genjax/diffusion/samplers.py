"""Sampling: one scan of a pure step over a grid of times, or an adaptive probability flow.

Sample i is a function of (key, i): its noise at each step comes from the key with the step and i
folded in, so that a batch, its chunks and its shards agree.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from genjax import checks, ode
from genjax.diffusion.denoising import check_times, same_shape
from genjax.diffusion.multistep import dpm_solver_step, unipc_step
from genjax.diffusion.schedules import Process, Time
from genjax.diffusion.steps import DenoiseAt, Move, StepFn, heun_step
from genjax.numerics import at_least_float32
from genjax.randomness import Index, indexed_normal
from genjax.typing import DenoiserFn, PRNGKey


def initial_noise(
    key: PRNGKey,
    shape: Sequence[int],
    *,
    process: Process,
    t: Time | None = None,
    first_index: Index = 0,
) -> Float[Array, "batch *event"]:
    """The start of every sampler: N(0, sigma(t)^2 I), not N(0, I); t is t_max by default.

    (The notes start variance-exploding Algorithms 3 and 4 from N(0, I), a slip.)

    >>> initial_noise(jax.random.key(0), (1000,), process=EDM()).std().round(-1)
    Array(80., dtype=float32)
    """
    noise = indexed_normal(jax.random.fold_in(key, 0), shape, first_index)
    return process.sigma(process.t_max if t is None else t) * noise


def sample(
    denoise: DenoiserFn,
    key: PRNGKey,
    shape: Sequence[int],
    *,
    process: Process,
    times: Float[Array, " steps_plus_one"],
    step: StepFn = heun_step,
    x_init: Float[Array, "batch *event"] | None = None,
    first_index: Index = 0,
) -> Float[Array, "batch *event"]:
    """Samples [batch, *event]: fold `step` over the decreasing `times` in one scan.

    `denoise` maps (x_t [batch, *event], t [batch]) to E[x_0 | x_t]. `x_init` at times[0] replaces
    the start in N(0, sigma(times[0])^2 I). Where the times end at 0 the last step returns the
    denoised mean; where they end above, a sample of that noise level. `first_index` is the index
    of row 0: chunks that state it agree with the whole. Options of a step come by
    `functools.partial`, for example partial(ddim_step, eta=1.0). Raises where times do not
    decrease within [0, t_max], are too few, or the denoiser changes the shape.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process, key = EDM(), jax.random.key(0)
    >>> times = time_grid(process, 16)
    >>> x = sample(denoise, key, (2000, 1), process=process, times=times)
    >>> bool(abs(x.std() - 1) < 0.1)
    True
    """
    return _sample(denoise, key, shape, process, times, step, x_init, first_index, False)


def trajectory(
    denoise: DenoiserFn,
    key: PRNGKey,
    shape: Sequence[int],
    *,
    process: Process,
    times: Float[Array, " steps_plus_one"],
    step: StepFn = heun_step,
    x_init: Float[Array, "batch *event"] | None = None,
    first_index: Index = 0,
) -> Float[Array, "steps_plus_one batch *event"]:
    """The states of `sample` at every time, the start first.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> process = EDM()
    >>> times = time_grid(process, 8)
    >>> trajectory(denoise, jax.random.key(0), (5, 2), process=process, times=times).shape
    (9, 5, 2)
    """
    return _sample(denoise, key, shape, process, times, step, x_init, first_index, True)


def _sample(
    denoise: DenoiserFn,
    key: PRNGKey,
    shape: Sequence[int],
    process: Process,
    times: Array,
    step: StepFn,
    x_init: Array | None,
    first_index: Index,
    keep: bool,
) -> Array:
    shape, times = tuple(shape), jnp.asarray(times)
    checks.at_least("number of axes of shape", len(shape), 1)
    check_grid(times, step, process)
    if x_init is None:
        x_init = initial_noise(key, shape, process=process, t=times[0], first_index=first_index)
    checks.shape("x_init", x_init, shape)
    x_init = at_least_float32(x_init)
    denoising_step = functools.partial(step, at_one_time(denoise))
    options = {"process": process, "first_index": first_index, "keep": keep}
    return scan_steps(denoising_step, key, x_init, times.astype(x_init.dtype), **options)


def scan_steps(
    step: Callable[[PyTree, Move], tuple[PyTree, PyTree]],
    key: PRNGKey,
    x: PyTree,
    times: Float[Array, " steps_plus_one"],
    *,
    process: Any = None,
    first_index: Index = 0,
    keep: bool = False,
) -> PyTree:
    """Fold `step` over `times` in the one scan that every sampler is.

    step(x, move) -> (x at s, estimate of x_0), which the next step is given as
    `move.denoised_before`, and the one after that as `move.denoised_earlier`. x is a pytree of
    arrays [batch, ...] of floats, tokens or masks; both values have its structure and shapes, and
    its dtype, which floats are cast to (else scan raises TypeError). Step k has the key
    fold_in(key, k + 1); fold_in(key, 0) is the start's. With `keep` the states at every time, the
    start first.

    >>> step = lambda x, move: (x + (move.s - move.t), x)
    >>> scan_steps(step, jax.random.key(0), jnp.zeros(1), jnp.array([0.0, 1.0, 3.0]))
    Array([3.], dtype=float32)
    """

    def cast(new: Array, old: Array) -> Array:
        return new.astype(old.dtype) if jnp.issubdtype(old.dtype, jnp.floating) else new

    def body(carry: tuple, now: tuple) -> tuple:
        (x, before), (t, s, number) = carry, now
        step_key = jax.random.fold_in(key, number + 1)
        value = step(x, Move(t, s, process, step_key, first_index, *before))
        moved, denoised = jax.tree.map(cast, value, (x, x))
        return (moved, (denoised, t, *before[:2])), (moved if keep else None)

    x = jax.tree.map(jnp.asarray, x)
    start = (x, 2 * (jax.tree.map(jnp.zeros_like, x), times[0]))
    numbers = jnp.arange(times.shape[0] - 1)
    (end, _), states = jax.lax.scan(body, start, (times[:-1], times[1:], numbers))
    if not keep:
        return end
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), x, states)


def at_one_time(denoise: DenoiserFn) -> DenoiseAt:
    """The denoiser at a scalar time, its output checked and cast to the state's dtype."""

    def at(x: Array, t: Array) -> Array:
        value = denoise(x, jnp.broadcast_to(t, x.shape[:1]).astype(x.dtype))
        same_shape(value, x)
        return value.astype(x.dtype)

    return at


def check_grid(times: Array, step: StepFn, process: Process) -> None:
    checks.rank("times", times, 1)
    least = 2 if getattr(step, "func", step) in (dpm_solver_step, unipc_step) else 1
    if times.shape[0] < least + 1:
        raise ValueError(
            f"times must hold at least {least + 1} values for this solver ({least} steps), "
            f"got {times.shape[0]}"
        )
    check_times(times, process, "times")
    if checks.is_concrete(times):
        checks.positive("decrease of times from step to step", -jnp.diff(times))


def sample_adaptive(
    denoise: DenoiserFn,
    key: PRNGKey,
    shape: Sequence[int],
    *,
    process: Process,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
    x_init: Float[Array, "batch *event"] | None = None,
    first_index: Index = 0,
) -> Float[Array, "batch *event"]:
    """Samples of the probability flow, integrated by Dormand-Prince with adaptive steps (diffrax).

    dy/du = y - D, y = x / alpha, u = log(sigma / alpha), from t_max to t_min, then the denoised
    mean. Every sample has its own step sizes. Needs the extra `ode`.

    >>> denoise = lambda x, t: x / (1 + t[:, None] ** 2)  # of N(0, 1) under EDM
    >>> sample_adaptive(denoise, jax.random.key(0), (5, 2), process=EDM(), rtol=1e-2).shape
    (5, 2)
    """
    if x_init is None:
        x_init = initial_noise(key, shape, process=process, first_index=first_index)
    checks.shape("x_init", x_init, tuple(shape))
    x_init = at_least_float32(x_init)
    denoise_at = at_one_time(denoise)
    dtype = x_init.dtype
    start, stop = (
        jnp.log(process.noise_ratio(t)).astype(dtype) for t in (process.t_max, process.t_min)
    )

    def denoised(u: Any, y: Array) -> Array:
        t = process.time_of_log_snr(-2 * u)
        return denoise_at((process.alpha(t) * y).astype(dtype)[None], t)[0]

    def solve(y: Array) -> Array:
        end = ode.solve(
            lambda _, y, u: y - denoised(u, y), None, y, (start, stop), method="dopri5",
            rtol=rtol, atol=atol, max_steps=max_steps,
        )  # fmt: skip
        return denoised(stop, end)

    return jax.vmap(solve)((x_init / process.alpha(process.t_max)).astype(dtype))
