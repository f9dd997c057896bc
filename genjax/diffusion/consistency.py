"""Consistency models: f(x, sigma), the end at sigma_min of the probability flow through x.

In the clock of `EDM`, x = x_0 + sigma z, where levels are trained in neighbouring pairs; and in
that of TrigFlow, x = cos(t) x_0 + sin(t) z with t in [0, pi / 2], where the pairs are infinitely
close.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.diffusion.schedules import Scalar
from genjax.numerics import at_least_float32, expand_to, linearize, sum_event
from genjax.randomness import indexed_normal
from genjax.typing import DenoiserFn, PRNGKey, VelocityFn

# (x [batch, *event], level or time [batch]) -> [batch, *event]
ConsistencyFn: TypeAlias = Callable[[Array, Array], Array]
MOST_LEVELS = 1281
Levels: TypeAlias = int | Int[Array, ""]


def consistency_function(
    network: DenoiserFn, *, sigma_data: Scalar = 0.5, sigma_min: Scalar = 0.002
) -> ConsistencyFn:
    """Make f of a network, with f(x, sigma_min) = x whatever the network.

        f(x, s) = c_skip x + c_out network(c_in x, log(s) / 4)
        c_skip = s_d^2 / ((s - sigma_min)^2 + s_d^2),   c_out = s_d (s - sigma_min) / sqrt(s^2 +
        s_d^2),   c_in = 1 / sqrt(s^2 + s_d^2)

    Song et al. 2023 (arXiv:2303.01469), appendix C: with s in place of s - sigma_min the boundary
    would be missed.

    >>> f = consistency_function(lambda x, t: 0 * x)
    >>> f(jnp.ones((1, 2)), jnp.array([0.002]))
    Array([[1., 1.]], dtype=float32)
    """
    checks.positive("sigma_data", sigma_data)
    checks.positive("sigma_min", sigma_min)

    def f(x: Array, sigma: Array) -> Array:
        x, sigma = at_least_float32(x), at_least_float32(sigma)
        above, total = sigma - sigma_min, jnp.sqrt(sigma**2 + sigma_data**2)
        skip, out = sigma_data**2 / (above**2 + sigma_data**2), sigma_data * above / total
        value = network(x / expand_to(total, x), 0.25 * jnp.log(sigma))
        checks.shape("what network returns", value, x.shape)
        return expand_to(skip, x) * x + expand_to(out, x) * at_least_float32(value)

    return f


def consistency_levels(
    index: Int[Array, "..."],
    num_levels: Levels,
    *,
    sigma_min: Scalar = 0.002,
    sigma_max: Scalar = 80.0,
    rho: Scalar = 7.0,
) -> Float[Array, "..."]:
    """Noise level of an index: sigma_min at 0 up to sigma_max at num_levels - 1, as EDM's grid.

    sigma_i = (sigma_min^(1/rho) + i / (N - 1) (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho (Karras
    et al. 2022, eq. 5, the other way round). `num_levels` may be traced.

    >>> consistency_levels(jnp.array([0, 9]), 10).round(3)
    Array([2.e-03, 8.e+01], dtype=float32)
    """
    if isinstance(num_levels, int):
        checks.integer("num_levels", num_levels, 2)
    low, high = (
        jnp.asarray(s, jnp.result_type(float)) ** (1 / rho) for s in (sigma_min, sigma_max)
    )
    return (low + index / (num_levels - 1) * (high - low)) ** rho


def level_probabilities(
    sigmas: Float[Array, " levels"], *, mean: Scalar = -1.1, std: Scalar = 2.0
) -> Float[Array, " pairs"]:
    """Share of each pair of neighbouring levels (i, i + 1), from log sigma ~ N(mean, std^2).

    P(i) ~ Phi((log sigma_{i+1} - mean) / std) - Phi((log sigma_i - mean) / std): Song and Dhariwal
    2023 (arXiv:2310.14189), eq. 10, which writes it with erf(. / sqrt 2).

    >>> level_probabilities(consistency_levels(jnp.arange(10), 10)).sum().round(3)
    Array(1., dtype=float32)
    """
    ends = jax.scipy.stats.norm.cdf((jnp.log(sigmas) - mean) / std)
    mass = jnp.diff(ends)
    return mass / jnp.sum(mass)


def num_levels_at(step: Levels, steps: int, *, first: int = 10, last: int = 1280) -> Int[Array, ""]:
    """Levels at a step of training: N = min(first 2^floor(step / K'), last) + 1.

    K' = floor(steps / (log2(last / first) + 1)), so that the number doubles from `first` to `last`
    over the run (Song and Dhariwal 2023, eq. 11).

    >>> int(num_levels_at(0, 1000)), int(num_levels_at(999, 1000))
    (11, 1281)
    """
    checks.integer("steps", steps, 1)
    checks.integer("first", first, 1)
    checks.integer("last", last, first)
    doublings = math.log2(last / first)
    period = max(int(steps / (doublings + 1)), 1)
    power = jnp.minimum(jnp.asarray(step) // period, math.ceil(doublings))
    return jnp.minimum(first * 2**power, last) + 1


def consistency_loss(
    function: ConsistencyFn,
    key: PRNGKey,
    x: Float[Array, "batch *event"],
    *,
    num_levels: Levels,
    index: Int[Array, " batch"] | None = None,
    noise: Float[Array, "batch *event"] | None = None,
    denoiser: DenoiserFn | None = None,
    sigma_min: Scalar = 0.002,
    sigma_max: Scalar = 80.0,
    rho: Scalar = 7.0,
    mean: Scalar = -1.1,
    std: Scalar = 2.0,
    huber: Scalar | None = None,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """Weighted distance of f at two neighbouring levels of one example with one noise.

        loss = (sqrt(|f(x + s_{i+1} z, s_{i+1}) - sg f(x_i, s_i)|^2 + c^2) - c) / (s_{i+1} - s_i)

    Improved consistency training (Song and Dhariwal 2023, arXiv:2310.14189): x_i = x + s_i z, the
    teacher is the student itself without gradient (no average), and `function` closes over one
    dropout key for both. |.|^2 is summed over the event, c = 0.00054 sqrt(dimensions) unless
    `huber` gives it. With `denoiser`, E[x_0 | x, sigma] of a finished model, x_i is one Heun step
    of the probability flow down from s_{i+1} instead: consistency distillation (Song et al. 2023,
    algorithm 2). index: i of each example, drawn by `level_probabilities` unless given.

    num_levels: as of `num_levels_at`, at most 1281 where traced. Returns (losses [batch], {"sigma",
    "distance_squared"}). Raises ValueError for shapes that disagree or an index outside.

    >>> f = consistency_function(lambda x, t: 0 * x)
    >>> losses, aux = consistency_loss(f, jax.random.key(0), jnp.ones((4, 2)), num_levels=10)
    >>> losses.shape
    (4,)
    """
    x = at_least_float32(x)
    checks.min_rank("x", x, 1)
    grid = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    key_index, key_noise = jax.random.split(key)
    if index is None:
        index = _draw_index(key_index, len(x), num_levels, mean, std, grid)
    checks.shape("index", index, x.shape[:1])
    if isinstance(num_levels, int):
        checks.between("index", index, 0, num_levels - 2)
    z = jax.random.normal(key_noise, x.shape, x.dtype) if noise is None else noise
    checks.same_shape(x=x, noise=z)
    low, high = (consistency_levels(index + i, num_levels, **grid).astype(x.dtype) for i in (0, 1))
    x_high = x + expand_to(high, x) * z
    x_low = x + expand_to(low, x) * z
    if denoiser is not None:
        x_low = stop_gradient(_heun(denoiser, x_high, high, low))
    gap = function(x_high, high) - stop_gradient(function(x_low, low))
    squared = sum_event(jnp.square(gap))
    c = 0.00054 * (x.size / len(x)) ** 0.5 if huber is None else huber
    # sqrt(q + c^2) - c without cancellation.
    distance = squared / (jnp.sqrt(squared + c**2) + c)
    return distance / (high - low), {"sigma": high, "distance_squared": squared}


def consistency_sample(
    function: ConsistencyFn,
    key: PRNGKey,
    shape: tuple[int, ...],
    *,
    sigmas: Float[Array, " steps"] | tuple[float, ...] = (80.0,),
    sigma_min: Scalar = 0.002,
) -> Float[Array, "batch *event"]:
    """Samples: f of noise at sigmas[0]; then noise is added up to each next level, and f again.

    x <- f(x + sqrt(s^2 - sigma_min^2) z, s), one pass through the network for each level (Song et
    al. 2023, algorithm 1). Row i depends on (key, i) alone. Raises ValueError unless the levels
    fall and stay above sigma_min.

    >>> f = consistency_function(lambda x, t: 0 * x)
    >>> consistency_sample(f, jax.random.key(0), (5, 2)).shape
    (5, 2)
    """
    levels = jnp.asarray(sigmas, jnp.result_type(float))
    checks.min_rank("sigmas", levels, 1)
    checks.not_empty("sigmas", levels)
    if checks.is_concrete(sigmas):
        falling = [float(s) for s in sigmas]
        if sorted(falling, reverse=True) != falling or falling[-1] <= sigma_min:
            raise ValueError(f"sigmas must fall and stay above {sigma_min}, got {falling}")

    def step(x: Array, scanned: tuple[Array, Array]) -> tuple[Array, None]:
        number, sigma = scanned
        z = indexed_normal(jax.random.fold_in(key, number), shape, 0, levels.dtype)
        noised = x + jnp.sqrt(sigma**2 - sigma_min**2) * z
        return function(noised, jnp.broadcast_to(sigma, shape[:1])).astype(levels.dtype), None

    # At the first level the sample itself is 0: its noise is all there is.
    x = jnp.zeros(shape, levels.dtype)
    return jax.lax.scan(step, x, (jnp.arange(len(levels)), levels))[0]


def trig_function(network: DenoiserFn, *, sigma_data: Scalar = 0.5) -> ConsistencyFn:
    """TrigFlow's f(x, t) = cos(t) x - sin(t) s_d F(x / s_d, t), the identity at t = 0.

    For x = cos(t) x_0 + sin(t) z, z ~ N(0, s_d^2), t in [0, pi / 2]; samples are f(s_d z, pi / 2).
    Lu and Song 2024 (arXiv:2410.11081), eq. 6.

    >>> f = trig_function(lambda x, t: 0 * x)
    >>> f(jnp.ones((1, 2)), jnp.zeros(1))
    Array([[1., 1.]], dtype=float32)
    """
    checks.positive("sigma_data", sigma_data)

    def f(x: Array, t: Array) -> Array:
        x, t = at_least_float32(x), expand_to(at_least_float32(t), x)
        value = at_least_float32(network(x / sigma_data, t.reshape(-1)))
        return jnp.cos(t) * x - jnp.sin(t) * sigma_data * value

    return f


def trig_consistency_loss(
    network: DenoiserFn,
    key: PRNGKey,
    x: Float[Array, "batch *event"],
    *,
    sigma_data: Scalar = 0.5,
    warmup: Scalar = 1.0,
    t: Float[Array, " batch"] | None = None,
    velocity_fn: VelocityFn | None = None,
    mean: Scalar = -1.0,
    std: Scalar = 1.4,
    offset: Scalar = 0.1,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """|F - sg(F + g / (|g| + offset))|^2 per example, in continuous time.

        g = -cos^2(t) (s_d F - x') - r cos(t) sin(t) (x_t + s_d F'),   x' = cos(t) z - sin(t) x_0

    g is cos(t) df/dt along the path, F' the derivative of F(x / s_d, t) along it, by one forward
    derivative; r = `warmup` grows from 0 to 1 early in training. The norm |g| is over the event.
    The loss is close to 1 all along (its gradient is what counts): watch "tangent_norm". The
    network's time features must be smooth. Lu and Song 2024 (arXiv:2410.11081), eq. 8, section 4.

    velocity_fn: (x_t, t) -> dx/dt of the probability flow, s_d times the network of a finished
    TrigFlow model: distillation instead of training. Times have log(s_d tan t) ~ N(mean, std^2)
    unless given. Returns (losses [batch], {"t", "tangent_norm"}).

    >>> network = lambda x, t: jnp.tanh(x)
    >>> losses, aux = trig_consistency_loss(network, jax.random.key(0), jnp.ones((4, 2)))
    >>> losses.shape, sorted(aux)
    ((4,), ['t', 'tangent_norm'])
    """
    x = at_least_float32(x)
    checks.min_rank("x", x, 1)
    checks.between("warmup", warmup, 0, 1)
    key_time, key_noise = jax.random.split(key)
    if t is None:
        level = mean + std * jax.random.normal(key_time, x.shape[:1], x.dtype)
        t = jnp.arctan(jnp.exp(level) / sigma_data)
    checks.shape("t", t, x.shape[:1])
    t = t.astype(x.dtype)
    z, angle = sigma_data * jax.random.normal(key_noise, x.shape, x.dtype), expand_to(t, x)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x_t, slope = cos * x + sin * z, cos * z - sin * x
    if velocity_fn is not None:
        slope = at_least_float32(velocity_fn(x_t, t))

    def ahead(r: Array) -> Array:
        """F after a time r along the path, of which the derivative is taken."""
        return at_least_float32(network((x_t + r * slope) / sigma_data, t + r))

    value, push = linearize(ahead, jnp.zeros((), x.dtype))
    change = push(jnp.ones((), x.dtype))
    tangent = -(cos**2) * (sigma_data * value - slope)
    tangent = stop_gradient(tangent - warmup * cos * sin * (x_t + sigma_data * change))
    size = jnp.sqrt(sum_event(jnp.square(tangent)))
    target = stop_gradient(value) + tangent / (expand_to(size, x) + offset)
    return sum_event(jnp.square(value - target)), {"t": t, "tangent_norm": size}


def _draw_index(key: PRNGKey, n: int, num: Levels, mean: Scalar, std: Scalar, grid: dict) -> Array:
    """Index of the lower level of each example; the number of levels may be traced."""
    most = num if isinstance(num, int) else MOST_LEVELS
    places = jnp.arange(most)
    ends = jax.scipy.stats.norm.cdf((jnp.log(consistency_levels(places, num, **grid)) - mean) / std)
    mass = jnp.where(places[:-1] < num - 1, jnp.diff(ends), 0.0)
    # By the inverse of the distribution function, exact for any number of levels.
    below = jnp.cumsum(mass)
    u = jax.random.uniform(key, (n,)) * below[-1]
    return jnp.minimum(jnp.searchsorted(below, u, side="right"), num - 2)


def _heun(denoiser: DenoiserFn, x: Array, t: Array, s: Array) -> Array:
    """One step of the probability flow dx/dsigma = (x - D) / sigma from level t to s."""
    step = expand_to(s - t, x)
    first = (x - denoiser(x, t)) / expand_to(t, x)
    end = x + step * first
    return x + step * (first + (end - denoiser(end, s)) / expand_to(s, x)) / 2
