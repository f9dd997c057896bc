"""Mean velocities: flows whose samples take one step, or a few.

u(x, t, s) = 1 / (s - t) times the integral of v(x_r, r) from r = t to s along the flow's path
through x at time t, so that x_s = x_t + (s - t) u(x_t, t, s), exactly, for any two times. Time runs
from noise (t = 0) to data (t = 1), as in `matching`; the papers' runs the other way, which changes
signs. At s = t the mean velocity is the velocity.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from genjax import checks, numerics
from genjax.flows.bijections.base import Number
from genjax.flows.matching import interpolate, ot_path
from genjax.typing import PRNGKey, VelocityFn

__all__ = ["mean_flow_loss", "mean_flow_sample", "mean_flow_times", "shortcut_loss"]

# (x [batch, *event], t [batch], s [batch]) -> [batch, *event]
MeanVelocityFn: TypeAlias = Callable[[Array, Array, Array], Array]


def mean_flow_times(
    key: PRNGKey, num: int, *, equal: Number = 0.5, ends: Number = 0.3, num_steps: int = 1
) -> tuple[Float[Array, " num"], Float[Array, " num"]]:
    """Draw pairs of times t <= s in [0, 1] for `mean_flow_loss`.

    Two uniform times in their order; then t = 0 and s = 1, each with probability `ends`, because a
    single step asks for u(x, 0, 1), which pairs inside (0, 1) never touch; then s = t with
    probability `equal`, which is the flow-matching part of the loss. Geng et al. 2025
    (arXiv:2505.13447), section 4.3, draw logit-normal times and have no ends. num_steps: that of
    the sampler; both times then lie in one of so many equal parts of [0, 1], in whose place the
    above is said of the whole, so that nothing longer than a step is learnt.

    >>> t, s = mean_flow_times(jax.random.key(0), 8)
    >>> bool((t <= s).all())
    True
    """
    checks.integer("num", num, 0)
    checks.integer("num_steps", num_steps, 1)
    checks.between("equal", equal, 0, 1)
    checks.between("ends", ends, 0, 1)
    key_times, key_ends, key_equal, key_part = jax.random.split(key, 4)
    t, s = jnp.sort(jax.random.uniform(key_times, (2, num)), axis=0)
    at_start, at_end = jax.random.bernoulli(key_ends, jnp.float32(ends), (2, num))
    t, s = jnp.where(at_start, 0.0, t), jnp.where(at_end, 1.0, s)
    if num_steps > 1:
        part = jax.random.randint(key_part, (num,), 0, num_steps)
        t, s = (part + t) / num_steps, (part + s) / num_steps
    return t, jnp.where(jax.random.bernoulli(key_equal, jnp.float32(equal), (num,)), t, s)


def mean_flow_loss(
    mean_velocity_fn: MeanVelocityFn,
    key: PRNGKey,
    x0: Float[Array, "batch *event"],
    x1: Float[Array, "batch *event"],
    *,
    t: Float[Array, " batch"] | None = None,
    s: Float[Array, " batch"] | None = None,
    velocity_fn: VelocityFn | None = None,
    power: Number = 0.75,
    offset: Number = 1e-3,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """|u(x_t, t, s) - target|^2 / sg[(|u - target|^2 + offset)^power] per pair.

        target = sg[v + (s - t) du/dt],   du/dt = d_x u v + d_t u,   v = x1 - x0

    The identity that d/dt of (s - t) u = x_s - x_t gives (Geng et al. 2025, arXiv:2505.13447,
    eqs. 6 to 11, with the time of this room); du/dt is one forward derivative along (v, 1, 0), or
    two reverse ones where the network has `jax.custom_vjp` in it. At
    s = t this is flow matching. Noise x0 and data x1 are paired row by row, on straight lines.
    Squared norms are sums over the event; `power` 0 leaves them as they are, at 1 every loss is
    nearly 1 (its gradient is that of log |e|^2): watch `squared_error`.

    velocity_fn: the marginal velocity v(x, t), where it is known: the target is then exact, the
    loss is 0 at the true mean velocity, and a finished flow is distilled. Times are drawn by
    `mean_flow_times` unless both are given. The network must be smooth in t: forward derivatives
    of high-frequency time features are large. Returns (losses [batch], {"squared_error", "t",
    "s"}). Raises ValueError for one time without the other, or known times with t > s.

    >>> u = lambda x, t, s: -x
    >>> x0, x1 = jax.random.normal(jax.random.key(0), (2, 8, 2))
    >>> losses, aux = mean_flow_loss(u, jax.random.key(1), x0, x1)
    >>> losses.shape, sorted(aux)
    ((8,), ['s', 'squared_error', 't'])
    """
    checks.same_shape(x0=x0, x1=x1)
    checks.between("power", power, 0, 1)
    checks.positive("offset", offset)
    t, s = _given_times(t, s, x1.shape[:1]) or mean_flow_times(key, x1.shape[0])
    x_t, velocity = interpolate(ot_path(), x0, x1, t)
    if velocity_fn is not None:
        velocity = _returned("velocity_fn", velocity_fn(x_t, t), x_t)

    t, s = t.astype(x_t.dtype), s.astype(x_t.dtype)

    def ahead(r: Array) -> Array:
        """u after a time r along the path, of which the derivative is taken."""
        x = x_t + r * velocity
        return _returned("mean_velocity_fn", mean_velocity_fn(x, t + r, s), x)

    predicted, push = numerics.linearize(ahead, jnp.zeros((), x_t.dtype))
    along = push(jnp.ones((), x_t.dtype))
    target = stop_gradient(velocity + numerics.expand_to(s - t, along) * along)
    squared = numerics.sum_event(jnp.square(predicted - target))
    weight = stop_gradient((squared + offset) ** -jnp.asarray(power, squared.dtype))
    return weight * squared, {"squared_error": squared, "t": t, "s": s}


def shortcut_loss(
    mean_velocity_fn: MeanVelocityFn,
    key: PRNGKey,
    x0: Float[Array, "batch *event"],
    x1: Float[Array, "batch *event"],
    *,
    halvings: int = 7,
    consistency: Number = 0.25,
    t: Float[Array, " batch"] | None = None,
    s: Float[Array, " batch"] | None = None,
    target_fn: MeanVelocityFn | None = None,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """|u(x_t, t, s) - target|^2 per pair, summed over the event; one long step is two of half.

        target = x1 - x0                                          where s = t
               = sg[u(x_t, t, m) + u(x_m, m, s)] / 2              where s > t
        m = (t + s) / 2,   x_m = x_t + (m - t) u(x_t, t, m)

    Frans et al. 2024 (arXiv:2410.12557), eqs. 4 and 5: no derivative of the network is taken. With
    probability `consistency` the step s - t is 1, 1/2, ..., 2^-(halvings - 1), and t a whole number
    of steps; else s = t. The halves of the shortest step (or of a given one no longer) are steps of
    the flow itself, u(x, t, t). target_fn: the network that the targets come from, such as the one
    of the averaged weights; by default the trained one. Returns (losses [batch], {"t", "s"}).

    >>> u = lambda x, t, s: -x
    >>> x0, x1 = jax.random.normal(jax.random.key(0), (2, 8, 2))
    >>> losses, aux = shortcut_loss(u, jax.random.key(1), x0, x1)
    >>> losses.shape
    (8,)
    """
    checks.same_shape(x0=x0, x1=x1)
    checks.integer("halvings", halvings, 1)
    checks.between("consistency", consistency, 0, 1)
    times = _given_times(t, s, x1.shape[:1])
    t, s = times or _dyadic_times(key, x1.shape[0], halvings, consistency)
    x_t, velocity = interpolate(ot_path(), x0, x1, t)
    target_fn = mean_velocity_fn if target_fn is None else target_fn
    t, s = t.astype(x_t.dtype), s.astype(x_t.dtype)
    middle, shortest = (t + s) / 2, s - t <= 1.001 * 2.0 ** -(halvings - 1)
    # Of the shortest step both halves are asked for at s = t.
    ends = jnp.where(shortest, t, middle), jnp.where(shortest, middle, s)
    first = _returned("target_fn", target_fn(x_t, t, ends[0]), x_t)
    x_m = x_t + numerics.expand_to(middle - t, x_t) * first
    second = _returned("target_fn", target_fn(x_m, middle, ends[1]), x_t)
    same = numerics.expand_to(s - t, x_t) <= 0
    target = stop_gradient(jnp.where(same, velocity, (first + second) / 2))
    predicted = _returned("mean_velocity_fn", mean_velocity_fn(x_t, t, s), x_t)
    return numerics.sum_event(jnp.square(predicted - target)), {"t": t, "s": s}


def mean_flow_sample(
    mean_velocity_fn: MeanVelocityFn,
    x0: Float[Array, "batch *event"],
    *,
    num_steps: int = 1,
    times: tuple[Number, Number] = (0.0, 1.0),
) -> Float[Array, "batch *event"]:
    """Follow the flow from times[0] to times[1] in equal steps: x <- x + (s - t) u(x, t, s).

    From noise to samples by default (Geng et al. 2025, eq. 12). Steps of an exact mean velocity
    compose: any number of them ends at the same point. In float32 at least. Raises ValueError for
    `num_steps` below 1 or times that do not increase.

    >>> u = lambda x, t, s: jnp.ones_like(x)
    >>> mean_flow_sample(u, jnp.zeros((1, 2)))
    Array([[1., 1.]], dtype=float32)
    """
    checks.integer("num_steps", num_steps, 1)
    checks.floating("x0", x0)
    checks.min_rank("x0", x0, 1)
    if checks.is_concrete(times[0]) and checks.is_concrete(times[1]) and times[0] >= times[1]:
        raise ValueError(f"times must increase, got {times}")
    x0 = numerics.at_least_float32(x0)
    grid = jnp.linspace(times[0], times[1], num_steps + 1, dtype=x0.dtype)

    def step(x: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
        t, s = (jnp.broadcast_to(end, x.shape[:1]) for end in ends)
        mean = _returned("mean_velocity_fn", mean_velocity_fn(x, t, s), x)
        return x + (ends[1] - ends[0]) * mean.astype(x.dtype), None

    return jax.lax.scan(step, x0, (grid[:-1], grid[1:]))[0]


def _dyadic_times(key: PRNGKey, num: int, halvings: int, share: Number) -> tuple[Array, Array]:
    """t, and s = t or t plus a step of 2^-k that t is a multiple of."""
    key_share, key_level, key_place, key_time = jax.random.split(key, 4)
    steps = 2 ** jax.random.randint(key_level, (num,), 0, halvings)
    place = jax.random.randint(key_place, (num,), 0, steps)
    long = jax.random.bernoulli(key_share, jnp.float32(share), (num,))
    t = jnp.where(long, place / steps, jax.random.uniform(key_time, (num,)))
    return t, jnp.where(long, (place + 1) / steps, t)


def _given_times(
    t: Array | None, s: Array | None, shape: tuple[int, ...]
) -> tuple[Array, Array] | None:
    """Both times, checked; None where neither is given."""
    if (t is None) != (s is None):
        raise ValueError(f"t and s must be given together, got only {'s' if t is None else 't'}")
    if t is None or s is None:
        return None
    checks.shape("t", t, shape)
    checks.shape("s", s, shape)
    if checks.is_concrete(t) and checks.is_concrete(s) and np.any(np.asarray(t) > np.asarray(s)):
        raise ValueError("times must have t <= s, got t > s: noise is at 0, data at 1")
    return t, s


def _returned(name: str, value: Array, like: Array) -> Array:
    """What a network returned, in float32 at least, of the shape of its input."""
    checks.shape(f"what {name} returns", value, like.shape)
    return numerics.at_least_float32(value)
