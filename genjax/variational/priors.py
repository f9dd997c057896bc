"""Priors richer than N(0, I): mixtures of Gaussians, and the VampPrior.

A prior is any log-density of z: `elbo(..., prior=lambda z: vamp_log_prob(encode, u, z))`, or the
log_prob of a flow or of an autoregressive model. The bound stays one whether the prior is learnt
while q moves or fitted afterwards on samples of q.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.likelihoods import gaussian_log_prob
from genjax.numerics import at_least_float32
from genjax.randomness import indexed_keys
from genjax.typing import EncoderFn, PRNGKey

__all__ = ["mixture_log_prob", "mixture_sample", "vamp_log_prob"]

BLOCK = 128  # components at once
NO_WEIGHT = -1e30  # finite, so that a block of nothing but these has a gradient without NaN


def mixture_log_prob(
    z: Float[Array, "batch *latent"],
    means: Float[Array, "components *latent"],
    log_vars: Float[Array, "components *latent"],
    *,
    logits: Float[Array, " components"] | None = None,
    block: int = BLOCK,
) -> Float[Array, " batch"]:
    """Log density of a mixture of diagonal Gaussians, in nats, summed over the latent axes.

    log p(z) = log sum_k w_k N(z; m_k, s_k^2),  w = softmax(logits), by default 1 / K each.

    So many components as `block` are evaluated at once, and again in the backward pass: the memory
    is [batch, block, latent] for any K. Raises ValueError where shapes do not fit, and for concrete
    means that are not finite.

    >>> means, log_vars = jnp.array([[-1.0], [1.0]]), jnp.zeros((2, 1))
    >>> mixture_log_prob(jnp.zeros((1, 1)), means, log_vars).round(3)
    Array([-1.419], dtype=float32)
    """
    checks.min_rank("z", z, 1)
    checks.min_rank("means", means, 1)
    checks.not_empty("means", means)
    checks.same_shape(means=means, log_vars=log_vars)
    checks.same_event(z=z, means=means)
    checks.finite("means", means)
    checks.integer("block", block, 1)
    num = len(means)
    if logits is None:
        logits = jnp.zeros(num, at_least_float32(means).dtype)
    checks.shape("logits", logits, (num,))
    log_weights = jnp.maximum(jax.nn.log_softmax(at_least_float32(logits)), NO_WEIGHT)
    z, means, log_vars = (at_least_float32(x) for x in (z, means, log_vars))
    blocks = -(-num // block)
    size = -(-num // blocks)

    def split(x: Array, fill: float) -> Array:
        widths = ((0, blocks * size - num), *((0, 0),) * (x.ndim - 1))
        padded = jnp.pad(x, widths, constant_values=fill)
        return padded.reshape(blocks, size, *x.shape[1:])

    @jax.checkpoint
    def one(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        log_weights, means, log_vars = part
        scores = jax.vmap(_components, (0, None, None))(z, means, log_vars) + log_weights[None]
        return jnp.logaddexp(total, jax.nn.logsumexp(scores, axis=1)), None

    parts = (split(log_weights, NO_WEIGHT), split(means, 0.0), split(log_vars, 0.0))
    first, rest = jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)
    scores = jax.vmap(_components, (0, None, None))(z, *first[1:]) + first[0][None]
    total = jax.nn.logsumexp(scores, axis=1)
    return jax.lax.scan(one, total, rest)[0] if blocks > 1 else total


def _components(z: Array, means: Array, log_vars: Array) -> Array:
    """log N(z; m_k, s_k^2) `[components]` of one z."""
    return gaussian_log_prob(jnp.broadcast_to(z[None], means.shape), means, log_vars)


def mixture_sample(
    key: PRNGKey,
    means: Float[Array, "components *latent"],
    log_vars: Float[Array, "components *latent"],
    num: int,
    *,
    logits: Float[Array, " components"] | None = None,
) -> Float[Array, "num *latent"]:
    """Draw from the mixture of `mixture_log_prob`: a component k, then m_k + s_k noise.

    Row i depends on (key, i) alone. Raises ValueError where shapes do not fit.

    >>> means, log_vars = jnp.array([[-1.0], [1.0]]), jnp.zeros((2, 1))
    >>> mixture_sample(jax.random.key(0), means, log_vars, 5).shape
    (5, 1)
    """
    checks.integer("num", num, 1)
    checks.min_rank("means", means, 1)
    checks.not_empty("means", means)
    checks.same_shape(means=means, log_vars=log_vars)
    means, log_vars = at_least_float32(means), at_least_float32(log_vars)
    logits = jnp.zeros(len(means), means.dtype) if logits is None else at_least_float32(logits)
    checks.shape("logits", logits, (len(means),))

    def one(key: PRNGKey) -> Array:
        key_k, key_z = jax.random.split(key)
        k = jax.random.categorical(key_k, logits)
        noise = jax.random.normal(key_z, means.shape[1:], means.dtype)
        return means[k] + jnp.exp(0.5 * log_vars[k]) * noise

    return jax.vmap(one)(indexed_keys(key, num))


def vamp_log_prob(
    encode: EncoderFn,
    pseudo_inputs: Float[Array, "components *event"],
    z: Float[Array, "batch *latent"],
    *,
    logits: Float[Array, " components"] | None = None,
    block: int = BLOCK,
) -> Float[Array, " batch"]:
    """Log density of the VampPrior, in nats: the encoder's own posteriors of K pseudo-inputs.

    log p(z) = log sum_k w_k q(z|u_k): Tomczak and Welling, "VAE with a VampPrior", 2018, eq. (9),
    with w = 1/K unless `logits` are given. The u_k are trained, started at data (K = 500). The
    gradient reaches the encoder through q(z|x) and through every q(z|u_k): nothing is stopped. Keep
    the u_k in the range of the data (clip, or a hard tanh), where the encoder has been trained. The
    encoder is called once. Raises ValueError as `mixture_log_prob` does.

    >>> encode = lambda x: (x[:, :2], jnp.zeros((len(x), 2)))
    >>> pseudo_inputs = jax.random.normal(jax.random.key(0), (10, 4))
    >>> vamp_log_prob(encode, pseudo_inputs, jnp.zeros((3, 2))).shape
    (3,)
    """
    checks.min_rank("pseudo_inputs", pseudo_inputs, 1)
    checks.not_empty("pseudo_inputs", pseudo_inputs)
    mean, log_var = encode(pseudo_inputs)
    checks.same_batch(**{"pseudo_inputs": pseudo_inputs, "encode(pseudo_inputs)": mean})
    return mixture_log_prob(z, mean, log_var, logits=logits, block=block)
