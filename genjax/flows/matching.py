"""Flow matching: draw pairs, regress the velocity of the path between them, integrate it.

Time runs from noise (t = 0) to data (t = 1). Drawing pairs and regressing are two functions;
couplings come in from outside as callables of a cost matrix.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from genjax import checks, numerics
from genjax.flows import continuous
from genjax.flows.bijections.base import Number, pinned
from genjax.typing import PRNGKey, VelocityFn

__all__ = [
    "Pairs",
    "Path",
    "curvature",
    "flow_matching_loss",
    "integrate",
    "interpolate",
    "ot_path",
    "preconditioned",
    "reflow_pairs",
    "sample_pairs",
    "vp_path",
]

# cost [n, n] of (noise i, data j) -> a transport plan [n, n], or for each data point the index of
# its noise [n]
CouplingFn: TypeAlias = Callable[[Array], Array]
TimeFn: TypeAlias = Callable[[Array], Array]


class Path(NamedTuple):
    """x_t = data(t) x_1 + noise(t) x_0: the weights of the two ends as functions of t."""

    data: TimeFn
    noise: TimeFn


class Pairs(NamedTuple):
    """Matched ends of paths: x0 noise (or a source), x1 data, row by row."""

    x0: Float[Array, "batch *event"]
    x1: Float[Array, "batch *event"]


def ot_path(sigma_min: Number = 0.0) -> Path:
    """x_t = t x_1 + (1 - (1 - sigma_min) t) x_0: straight lines (Lipman et al., 2023, eq. (22)).

    sigma_min = 0 is the rectified flow of Liu, Gong and Liu (2023), eq. (1).

    >>> x0, x1, t = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.array([0.25])
    >>> interpolate(ot_path(), x0, x1, t)[0]
    Array([[0.25]], dtype=float32)
    """
    checks.between("sigma_min", sigma_min, 0, 1)
    return Path(lambda t: t, lambda t: 1 - (1 - sigma_min) * t)


def vp_path(beta_min: Number = 0.1, beta_max: Number = 20.0) -> Path:
    """Variance-preserving path: data weight a = exp(-B(1 - t) / 2), noise weight sqrt(1 - a^2).

    B(s) = beta_min s + (beta_max - beta_min) s^2 / 2 (Lipman et al., 2023, eq. (18)). The noise
    weight has an infinite slope at t = 1: s is kept above 1e-5, as Song et al. (2021) train, and
    the velocity there is that at 1e-5.

    >>> x0, x1, t = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.array([1.0])
    >>> interpolate(vp_path(), x0, x1, t)[0].round(3)
    Array([[1.]], dtype=float32)
    """
    checks.positive("beta_min", beta_min)
    checks.at_least("beta_max", beta_max, beta_min)

    def integral(t: Array) -> Array:
        s = pinned(1 - t, 1e-5)
        return beta_min * s + 0.5 * (beta_max - beta_min) * s**2

    return Path(
        lambda t: jnp.exp(-0.5 * integral(t)),
        lambda t: jnp.sqrt(-jnp.expm1(-integral(t))),
    )


def interpolate(
    path: Path,
    x0: Float[Array, "batch *event"],
    x1: Float[Array, "batch *event"],
    t: Float[Array, " batch"],
) -> tuple[Float[Array, "batch *event"], Float[Array, "batch *event"]]:
    """Return the point x_t and the velocity dx_t/dt of the path from x0 to x1 at time t.

    velocity = data'(t) x_1 + noise'(t) x_0 (Lipman et al., 2023, eq. (15)), in float32 at least.

    >>> x0, x1 = jnp.zeros((1, 1)), jnp.full((1, 1), 4.0)
    >>> x_t, velocity = interpolate(ot_path(), x0, x1, jnp.array([0.25]))
    >>> x_t, velocity
    (Array([[1.]], dtype=float32), Array([[4.]], dtype=float32))
    """
    checks.same_shape(x0=x0, x1=x1)
    checks.shape("t", t, x1.shape[:1])
    x0, x1 = numerics.at_least_float32(x0), numerics.at_least_float32(x1)
    t = t.astype(jnp.promote_types(x0.dtype, x1.dtype))

    def at(t: Array) -> Array:
        return (
            numerics.expand_to(path.data(t), x1) * x1 + numerics.expand_to(path.noise(t), x0) * x0
        )

    x_t, push = numerics.linearize(at, t)
    return x_t, push(jnp.ones_like(t))


def preconditioned(
    network: VelocityFn, *, path: Path | None = None, sigma_data: Number = 0.5
) -> VelocityFn:
    """Make a velocity of a network that only gives what a linear field leaves.

    With the path's weights a = data(t), b = noise(t), their slopes a', b', the data's standard
    deviation s and S = a^2 s^2 + b^2, the variance of x_t:

        v(x, t) = (a a' s^2 + b b') / S x + s (a' b - a b') / sqrt(S) network(x / sqrt(S), t)

    The first term is the best linear field; for data of N(0, s^2) it is the velocity, and for any
    of that variance the network's input and target have variance 1 at every t. The form that
    Karras et al. (2022), eq. (7), give a denoiser, for a velocity: noise as wide as the event need
    not pass through the network, which pays where a narrow one meets many pixels.

    >>> field = preconditioned(lambda x, t: 0 * x, sigma_data=1.0)
    >>> field(jnp.ones((3, 2)), jnp.array([0.0, 0.5, 1.0]))[:, 0]
    Array([-1.,  0.,  1.], dtype=float32)
    """
    checks.positive("sigma_data", sigma_data)
    path = ot_path() if path is None else path

    def velocity(x: Array, t: Array) -> Array:
        checks.shape("t", t, x.shape[:1])
        x, t = numerics.at_least_float32(x), numerics.at_least_float32(t)
        (a, slope_a), (b, slope_b) = (numerics.linearize(weight, t) for weight in path)
        da, db = slope_a(jnp.ones_like(t)), slope_b(jnp.ones_like(t))
        variance = (a * sigma_data) ** 2 + b**2
        skip = (a * da * sigma_data**2 + b * db) / variance
        scale, out = variance**-0.5, sigma_data * (da * b - a * db) * variance**-0.5
        skip, scale, out = (numerics.expand_to(c, x) for c in (skip, scale, out))
        return skip * x + out * numerics.at_least_float32(network(scale * x, t))

    return velocity


def sample_pairs(
    key: PRNGKey,
    x1: Float[Array, "batch *event"],
    *,
    x0: Float[Array, "batch *event"] | None = None,
    coupling: CouplingFn | None = None,
    label: Int[Array, " batch"] | None = None,
) -> Pairs:
    """Match every data point with a noise: standard normal unless `x0` is given.

    Without `coupling` rows are matched as they come (independent). `coupling` takes the squared
    distances [n, n] and returns either the index of the noise for each data point, or a plan, from
    whose columns the noise of each data point is drawn (Tong et al., 2024, section 3.2). Data and
    labels keep their order.

    With `label` noise i belongs to the class of data i, and pairs stay within the class: the
    coupling is called class by class. Traced labels have no known sizes, so there it is called
    once, with pairs across classes 8 max(C) dearer and the whole shifted so that the mean over
    the matrix is that over the pairs within classes (an epsilon relative to it stays right).

    Raises ValueError where shapes disagree, a column of the plan has no mass or is not finite, or
    an index lies outside; where that is traced, the noise of that data point is NaN.

    >>> pairs = sample_pairs(jax.random.key(0), jnp.ones((8, 2)))
    >>> pairs.x0.shape, pairs.x1.shape
    ((8, 2), (8, 2))
    """
    key_noise, key_pair = jax.random.split(key)
    if x0 is None:
        dtype = x1.dtype if jnp.issubdtype(x1.dtype, jnp.floating) else jnp.float32
        x0 = jax.random.normal(key_noise, x1.shape, dtype)
    checks.same_shape(x0=x0, x1=x1)
    n = x1.shape[0]
    if label is not None:
        checks.shape("label", label, (n,))
    if coupling is None or n == 0:
        return Pairs(x0, x1)
    flat0, flat1 = x0.reshape(n, -1), x1.reshape(n, -1)
    cost = numerics.squared_distances(flat0, flat1)
    if label is None:
        mass = _plan(coupling, cost)
    elif checks.is_concrete(label):
        mass = jnp.zeros((n, n))
        for kind in np.unique(label):
            block = np.ix_(*[np.flatnonzero(np.asarray(label) == kind)] * 2)
            mass = mass.at[block].set(_plan(coupling, cost[block]))
    else:
        apart = label[:, None] != label[None, :]
        # A crossing pair costs 7 max(C) more than the worst within the class that replaces it;
        # a larger step would take digits from the costs.
        far = jnp.where(apart, 8 * jnp.max(cost) + jnp.finfo(cost.dtype).tiny, cost)
        far = far - (jnp.mean(far) - jnp.mean(cost, where=~apart))
        mass = jnp.where(apart, 0, _plan(coupling, far))
    usable = jnp.all(jnp.isfinite(mass), axis=0) & jnp.any(mass > 0, axis=0)
    if checks.is_concrete(usable) and not jnp.all(usable):
        raise ValueError(
            f"the coupling must give each data point an index in [0, n) or a column of finite mass "
            f"above 0: it gave {n - int(jnp.sum(usable))} of {n} neither"
        )
    logits = jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1)), -jnp.inf)
    drawn = jnp.asarray(x0)[jax.random.categorical(key_pair, logits, axis=0)]
    usable = usable.reshape((n,) + (1,) * (x0.ndim - 1))
    return Pairs(jnp.where(usable, drawn, jnp.nan), x1)


def _plan(coupling: CouplingFn, cost: Array) -> Array:
    """What the coupling returns, as a plan [n, n]: an index is a column with one 1, or none."""
    n, matched = cost.shape[0], coupling(cost)
    if jnp.issubdtype(matched.dtype, jnp.integer):
        checks.shape("coupling's indices", matched, (n,))
        return jax.nn.one_hot(matched, n, axis=0)
    checks.shape("coupling's plan", matched, (n, n))
    return matched


def flow_matching_loss(
    velocity_fn: VelocityFn,
    key: PRNGKey,
    x0: Float[Array, "batch *event"],
    x1: Float[Array, "batch *event"],
    *,
    path: Path | None = None,
    t: Float[Array, " batch"] | None = None,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """|v(x_t, t) - dx_t/dt|^2 per pair, summed over the event, at one uniform time each.

    Conditional flow matching (Lipman et al., 2023, eq. (9)); with the default straight path the
    rectified-flow loss (Liu et al., 2023, eq. (1)). Times are drawn unless given. Returns
    (losses [batch], {"t", "speed" = |dx_t/dt|^2}).

    >>> x0, x1 = jax.random.normal(jax.random.key(0), (2, 8, 2))
    >>> losses, aux = flow_matching_loss(lambda x, t: -x, jax.random.key(1), x0, x1)
    >>> losses.shape, sorted(aux)
    ((8,), ['speed', 't'])
    """
    path = ot_path() if path is None else path
    if t is None:
        t = jax.random.uniform(key, x1.shape[:1], jnp.promote_types(x1.dtype, jnp.float32))
    # The point is rounded once, at the end, so that it belongs to the time that is heard.
    x_t, velocity = interpolate(path, x0, x1, t)
    narrow = x1.dtype if jnp.issubdtype(x1.dtype, jnp.floating) else x_t.dtype
    predicted = numerics.at_least_float32(velocity_fn(x_t.astype(narrow), t))
    checks.shape("what velocity_fn returns", predicted, x1.shape)
    error = predicted - velocity
    losses = numerics.sum_event(jnp.square(error))
    return losses, {"t": t, "speed": numerics.sum_event(jnp.square(velocity))}


def integrate(
    velocity_fn: VelocityFn,
    x0: Float[Array, "batch *event"],
    *,
    times: tuple[Number, Number] = (0.0, 1.0),
    num_steps: int = 100,
    method: str = "euler",
) -> Float[Array, "batch *event"]:
    """Follow the velocity from times[0] to times[1]: samples, when x0 is noise at time 0.

    The same methods as `continuous.solve`; in float32 at least.

    >>> integrate(lambda x, t: jnp.ones_like(x), jnp.zeros((1, 2)))
    Array([[1.0, 1.0]], dtype=float32)
    """
    return continuous.solve(
        lambda _, x, t: velocity_fn(x, t), None, x0, times=times, num_steps=num_steps, method=method
    )


def reflow_pairs(
    velocity_fn: VelocityFn,
    x0: Float[Array, "batch *event"],
    *,
    num_steps: int = 100,
    method: str = "euler",
) -> Pairs:
    """Pair each noise with the end of its own path, (x0, ODE(x0)): data for one more round.

    Liu, Gong and Liu (2023), algorithm 1. No gradient flows into the pairs.

    >>> pairs = reflow_pairs(lambda x, t: jnp.ones_like(x), jnp.zeros((1, 2)))
    >>> pairs.x1
    Array([[1.0, 1.0]], dtype=float32)
    """
    x0 = jax.lax.stop_gradient(x0)
    return Pairs(
        x0, jax.lax.stop_gradient(integrate(velocity_fn, x0, num_steps=num_steps, method=method))
    )


def curvature(
    velocity_fn: VelocityFn, x0: Float[Array, "batch *event"], *, num_steps: int = 100
) -> Float[Array, " batch"]:
    """Integral over t of |(X_1 - X_0) - v(X_t, t)|^2 along each path: 0 where it is straight.

    The straightness S of Liu et al. (2023), section 3.2, by Euler steps.

    >>> curvature(lambda x, t: jnp.ones_like(x), jnp.zeros((2, 2))).round(3)
    Array([0., 0.], dtype=float32)
    """
    checks.integer("num_steps", num_steps, 1)
    checks.min_rank("x0", x0, 1)
    checks.floating("x0", x0)
    x0, h = numerics.at_least_float32(x0), 1 / num_steps

    def step(x: Array, i: Array) -> tuple[Array, Array]:
        v = velocity_fn(x, jnp.full(x.shape[:1], i * h, x.dtype))
        checks.shape("what velocity_fn returns", v, x.shape)
        return x + h * v.astype(x.dtype), v

    x1, velocities = jax.lax.scan(step, x0, jnp.arange(num_steps))
    gaps = jnp.square((x1 - x0)[None] - velocities)
    return jnp.mean(jnp.sum(gaps.reshape(*gaps.shape[:2], -1), axis=-1), axis=0)
