"""Bridges: diffusions from one set of examples to another, dX = b(X, t) dt + sigma dW.

A mixture of Brownian bridges between pairs (x0, x1) has the marginals of a diffusion, whose drift
is a regression as in flow matching. Independent pairs give a bridge; those of entropic transport
Schroedinger's. At sigma = 0 it is the rectified flow.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks, numerics
from genjax.flows.bijections.base import Number
from genjax.flows.matching import Pairs
from genjax.randomness import Index, indexed_normal
from genjax.typing import PRNGKey, VelocityFn

__all__ = ["bridge_matching_loss", "bridge_pairs", "bridge_sample", "brownian_bridge"]

LAST = 1 - 1e-3  # the target (x1 - x_t) / (1 - t) has no finite variance at t = 1


def brownian_bridge(
    x0: Float[Array, "batch *event"],
    x1: Float[Array, "batch *event"],
    t: Float[Array, " batch"],
    noise: Float[Array, "batch *event"],
    *,
    sigma: Number,
) -> tuple[Float[Array, "batch *event"], Float[Array, "batch *event"]]:
    """Point x_t of the bridge from x0 to x1, and the drift (x1 - x_t) / (1 - t) that leads there.

    x_t = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) z, z the standard normal `noise`; the drift is
    written as x1 - x0 - sigma sqrt(t / (1 - t)) z, without cancellation. t in [0, 0.999]. At
    sigma = 0 these are `interpolate`'s straight line and its velocity. Peluchetti 2021; Shi et al.
    2023 (arXiv:2303.16852), eq. 4.

    >>> x0, x1, t = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.array([0.5])
    >>> x_t, drift = brownian_bridge(x0, x1, t, 0 * x0, sigma=1.0)
    >>> x_t, drift
    (Array([[0.5]], dtype=float32), Array([[1.]], dtype=float32))
    """
    checks.same_shape(x0=x0, x1=x1, noise=noise)
    checks.shape("t", t, x1.shape[:1])
    checks.between("t", t, 0, LAST + 1e-6)
    checks.at_least("sigma", sigma, 0)
    x0, x1, noise = (numerics.at_least_float32(x) for x in (x0, x1, noise))
    wide = numerics.expand_to(t.astype(x1.dtype), x1)
    x_t = (1 - wide) * x0 + wide * x1 + sigma * numerics.safe_sqrt(wide * (1 - wide)) * noise
    return x_t, x1 - x0 - sigma * numerics.safe_sqrt(wide / (1 - wide)) * noise


def bridge_matching_loss(
    drift_fn: VelocityFn,
    key: PRNGKey,
    x0: Float[Array, "batch *event"],
    x1: Float[Array, "batch *event"],
    *,
    sigma: Number,
    t: Float[Array, " batch"] | None = None,
) -> tuple[Float[Array, " batch"], dict[str, Array]]:
    """|b(x_t, t) - (x1 - x_t) / (1 - t)|^2 per pair, summed over the event.

    x_t lies on the Brownian bridge between the pair, t uniform in [0, 0.999] unless given. The
    minimiser is the drift of the diffusion dX = b dt + sigma dW whose marginals are those of the
    bridges (Peluchetti 2021; Shi et al. 2023, arXiv:2303.16852, eq. 6). It carries the law of x0
    to that of x1 for any pairing, and is Schroedinger's bridge for the pairs of the entropic plan
    with cost |x - y|^2 / 2 and epsilon = sigma^2 (of the cost |x - y|^2 that `sample_pairs` gives a
    coupling, epsilon = 2 sigma^2), or for those of iterated fitting (`bridge_pairs`). Returns
    (losses [batch], {"t"}).

    >>> x0, x1 = jax.random.normal(jax.random.key(0), (2, 8, 2))
    >>> drift = lambda x, t: -x
    >>> losses, aux = bridge_matching_loss(drift, jax.random.key(1), x0, x1, sigma=1.0)
    >>> losses.shape
    (8,)
    """
    key_time, key_noise = jax.random.split(key)
    checks.same_shape(x0=x0, x1=x1)
    dtype = jnp.promote_types(x1.dtype, jnp.float32)
    if t is None:
        t = LAST * jax.random.uniform(key_time, x1.shape[:1], dtype)
    noise = jax.random.normal(key_noise, x1.shape, dtype)
    x_t, target = brownian_bridge(x0, x1, t, noise, sigma=sigma)
    predicted = numerics.at_least_float32(drift_fn(x_t, t))
    checks.shape("what drift_fn returns", predicted, x1.shape)
    return numerics.sum_event(jnp.square(predicted - target)), {"t": t}


def bridge_sample(
    drift_fn: VelocityFn,
    key: PRNGKey,
    x0: Float[Array, "batch *event"],
    *,
    sigma: Number,
    num_steps: int = 100,
    first_index: Index = 0,
) -> Float[Array, "batch *event"]:
    """Ends at t = 1 of dX = b(X, t) dt + sigma dW from x0, by Euler-Maruyama in equal steps.

    X <- X + b(X, t) h + sigma sqrt(h) z (Maruyama 1955); the noise of row i depends on (key,
    first_index + i) alone. The drift is last asked for at 1 - 1 / num_steps. In float32 at least.

    >>> drift = lambda x, t: jnp.ones_like(x)
    >>> key, x0 = jax.random.key(0), jnp.zeros((4, 2))
    >>> bridge_sample(drift, key, x0, sigma=0.1, num_steps=10).shape
    (4, 2)
    """
    checks.integer("num_steps", num_steps, 1)
    checks.at_least("sigma", sigma, 0)
    checks.floating("x0", x0)
    checks.min_rank("x0", x0, 1)
    x0, h = numerics.at_least_float32(x0), 1 / num_steps

    def step(x: Array, i: Array) -> tuple[Array, None]:
        drift = drift_fn(x, jnp.full(x.shape[:1], i * h, x.dtype))
        checks.shape("what drift_fn returns", drift, x.shape)
        noise = indexed_normal(jax.random.fold_in(key, i), x.shape, first_index, x.dtype)
        return x + h * drift.astype(x.dtype) + sigma * h**0.5 * noise, None

    return jax.lax.scan(step, x0, jnp.arange(num_steps))[0]


def bridge_pairs(
    drift_fn: VelocityFn,
    key: PRNGKey,
    x: Float[Array, "batch *event"],
    *,
    sigma: Number,
    num_steps: int = 100,
    backward: bool = False,
) -> Pairs:
    """Pairs of both ends of the diffusion: the data of the next fit in the other direction.

    Iterated Markovian fitting (Shi et al. 2023, arXiv:2303.16852, algorithm 1): fit a forward drift
    by `bridge_matching_loss(b, key, *pairs)`; simulate it from examples x of the first law; fit a
    backward one, whose time runs from x1 to x0, by `bridge_matching_loss(c, key, pairs.x1,
    pairs.x0)`; simulate that with `backward=True` from examples of the second law; and so on. The
    pairs' law converges to that of Schroedinger's bridge, and the simulated end drifts off its law
    the less, the more often the direction changes. At sigma = 0 this is reflow. No gradient flows
    into the pairs.

    >>> drift = lambda x, t: jnp.ones_like(x)
    >>> key, x = jax.random.key(0), jnp.zeros((4, 2))
    >>> pairs = bridge_pairs(drift, key, x, sigma=0.1, num_steps=10)
    >>> pairs.x1.shape
    (4, 2)
    """
    x = jax.lax.stop_gradient(numerics.at_least_float32(x))
    end = bridge_sample(drift_fn, key, x, sigma=sigma, num_steps=num_steps)
    end = jax.lax.stop_gradient(end)
    return Pairs(end, x) if backward else Pairs(x, end)
