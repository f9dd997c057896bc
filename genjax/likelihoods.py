"""Log-likelihoods log p(x | parameters) in nats, summed over the event: `[batch]`.

Discrete ones take whole numbers 0 .. levels - 1; their values are log probabilities, those of the
Gaussians log densities.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from genjax import checks
from genjax.numerics import LOG_2PI, at_least_float32, sum_event

__all__ = [
    "bernoulli_log_likelihood",
    "categorical_log_likelihood",
    "gaussian_log_likelihood",
    "gaussian_log_prob",
    "logistic_log_likelihood",
    "logistic_mixture_log_likelihood",
    "standard_normal_log_prob",
    "token_log_probs",
]

Levels = Int[Array, "batch *event"] | UInt[Array, "batch *event"]
# PixelCNN++: below this scale (in units of [-1, 1]) a logistic is narrower than any bin.
MIN_LOG_SCALE = -7.0
# Above this one the share of a bin is its width over 4 scales to float32; from 87 on it would be 0.
MAX_LOG_SCALE = 60.0


def gaussian_log_prob(
    x: Float[Array, "batch *event"],
    mean: Float[Array, "batch *event"],
    log_var: Float[Array, "batch *event"],
) -> Float[Array, " batch"]:
    """Log density of a diagonal Gaussian, in nats, summed over the event.

    log N(x; m, s^2) = -1/2 sum [ (x - m)^2 / s^2 + log s^2 + log 2 pi ].

    Raises ValueError where the shapes differ.

    >>> gaussian_log_prob(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.zeros((1, 2))).round(4)
    Array([-1.8379], dtype=float32)
    """
    checks.same_shape(x=x, mean=mean, log_var=log_var)
    x, mean, log_var = at_least_float32(x), at_least_float32(mean), at_least_float32(log_var)
    distance = jnp.square((x - mean) * jnp.exp(-0.5 * log_var))
    return -0.5 * sum_event(distance + log_var + LOG_2PI)


def standard_normal_log_prob(x: Float[Array, "batch *event"]) -> Float[Array, " batch"]:
    """Log density of the standard normal, -1/2 sum (x^2 + log 2 pi), in nats over the event.

    >>> standard_normal_log_prob(jnp.zeros((1, 2))).round(4)
    Array([-1.8379], dtype=float32)
    """
    checks.min_rank("x", x, 1)
    return -0.5 * sum_event(jnp.square(at_least_float32(x)) + LOG_2PI)


def gaussian_log_likelihood(
    x: Float[Array, "batch *event"],
    mean: Float[Array, "batch *event"],
    log_var: float | int | Float[Array, "..."] = 0.0,
) -> Float[Array, " batch"]:
    """Log density in nats of x under a Gaussian of fixed or learned variance.

    -1/2 sum [ (x - m)^2 / s^2 + log s^2 + log 2 pi ]. `log_var` = log s^2 is a number, one value
    per element of the event, or one per element of the batch: anything that broadcasts to x.
    Raises ValueError where x and mean differ in shape or `log_var` does not broadcast.

    >>> gaussian_log_likelihood(jnp.zeros((1, 2)), jnp.zeros((1, 2))).round(4)
    Array([-1.8379], dtype=float32)
    """
    checks.same_shape(x=x, mean=mean)
    log_var = at_least_float32(log_var)
    try:
        log_var = jnp.broadcast_to(log_var, x.shape)
    except ValueError:
        raise ValueError(
            f"log_var must broadcast to x {x.shape}, got shape {log_var.shape}"
        ) from None
    return gaussian_log_prob(x, mean, log_var)


def bernoulli_log_likelihood(
    x: Float[Array, "batch *event"] | Bool[Array, "batch *event"] | Levels,
    logits: Float[Array, "batch *event"],
) -> Float[Array, " batch"]:
    """Log probability of binary x in nats: sum [ x l - softplus(l) ], l the logit of a one.

    A sure logit, +-infinity, gives 0 where it is right and -infinity where it is wrong.
    x between 0 and 1 gives the cross-entropy used for grey values, which is no log-likelihood of
    them. Raises ValueError where shapes differ or concrete x lies outside [0, 1].

    >>> bernoulli_log_likelihood(jnp.array([[1.0, 0.0]]), logits=jnp.zeros((1, 2))).round(4)
    Array([-1.3863], dtype=float32)
    """
    checks.same_shape(x=x, logits=logits)
    checks.between("x", x, 0, 1)
    x, logits = at_least_float32(x), at_least_float32(logits)
    # Two terms, of which none cancels; 0 times the infinite surprise of what did not happen is 0.
    one, zero = jax.nn.softplus(-logits), jax.nn.softplus(logits)
    one = jnp.where((x == 0) & jnp.isinf(one), 0, one)
    zero = jnp.where((x == 1) & jnp.isinf(zero), 0, zero)
    return -sum_event(x * one + (1 - x) * zero)


def categorical_log_likelihood(
    x: Levels, logits: Float[Array, "batch *event levels"]
) -> Float[Array, " batch"]:
    """Log probability in nats of whole x: sum log softmax(logits)[x], levels on the last axis.

    Raises TypeError unless x holds integers, ValueError where shapes or concrete values do not fit.

    >>> categorical_log_likelihood(jnp.array([[0, 3]]), jnp.zeros((1, 2, 4))).round(4)
    Array([-2.7726], dtype=float32)
    """
    checks.min_rank("logits", logits, 2)
    checks.same_shape(**{"x": x, "logits without the last axis": logits[..., 0]})
    _check_levels(x, logits.shape[-1])
    log_probs = jax.nn.log_softmax(at_least_float32(logits))
    return sum_event(_at(log_probs, x))


def token_log_probs(
    logits: Float[Array, "batch time vocabulary"],
    tokens: Int[Array, "batch time"] | UInt[Array, "batch time"],
) -> Float[Array, "batch time"]:
    """Log probability in nats of each token, logit - log sum exp(logits): one number a token.

    No array of log probabilities [batch, time, vocabulary] is kept, and logits in bfloat16 are
    summed in float32. Logits may be -infinity where a token cannot come. Raises TypeError unless
    tokens are integers, ValueError where shapes or concrete tokens do not fit.

    >>> token_log_probs(jnp.zeros((1, 2, 4)), jnp.array([[0, 3]]))
    Array([[-1.3863, -1.3863]], dtype=float32)
    """
    checks.rank("logits", logits, 3)
    checks.shape("tokens", tokens, logits.shape[:2])
    _check_levels(tokens, logits.shape[-1])
    return at_least_float32(_at(logits, tokens)) - jax.nn.logsumexp(
        at_least_float32(logits), axis=-1
    )


def _at(table: Array, index: Array) -> Array:
    """The entry of the last axis at each index; NaN outside, so that a wrong one is seen under jit.

    That is jnp's gather, but for negative indices, which count from the end.
    """
    index = jnp.where(index < 0, table.shape[-1], index.astype(int))
    return jnp.take_along_axis(table, index[..., None], axis=-1)[..., 0]


def logistic_log_likelihood(
    x: Levels,
    mean: Float[Array, "batch *event"],
    log_scale: Float[Array, "batch *event"],
    *,
    levels: int,
) -> Float[Array, " batch"]:
    """Log probability in nats of whole numbers x under a discretised logistic.

    P(x) = sigmoid((c + h - m) / s) - sigmoid((c - h - m) / s), with bin centres
    c = 2 x / (levels - 1) - 1 in [-1, 1], half widths h = 1 / (levels - 1), and the first and the
    last bin open to infinity, so that the probabilities sum to 1: Salimans et al., "PixelCNN++",
    2017, eq. (2). Mean and scale are in units of [-1, 1]; log_scale is kept above -7 as there.
    Raises as `categorical_log_likelihood` does.

    >>> x = jnp.array([[0, 255]])
    >>> logistic_log_likelihood(x, jnp.zeros((1, 2)), jnp.zeros((1, 2)), levels=256).shape
    (1,)
    """
    checks.same_shape(x=x, mean=mean, log_scale=log_scale)
    return sum_event(log_bins(x, mean, log_scale, levels))


def logistic_mixture_log_likelihood(
    x: Levels,
    logits: Float[Array, "batch *event components"],
    means: Float[Array, "batch *event components"],
    log_scales: Float[Array, "batch *event components"],
    *,
    levels: int,
) -> Float[Array, " batch"]:
    """Log probability in nats of whole x under a mixture of discretised logistics per element.

    sum log sum_k softmax(logits)_k P_k(x), each P_k as in `logistic_log_likelihood`, the components
    on the last axis. Raises as `categorical_log_likelihood` does.

    >>> x, zeros = jnp.array([[0, 255]]), jnp.zeros((1, 2, 5))
    >>> logistic_mixture_log_likelihood(x, zeros, zeros, zeros, levels=256).shape
    (1,)
    """
    checks.min_rank("logits", logits, 2)
    checks.same_shape(logits=logits, means=means, log_scales=log_scales)
    checks.same_shape(**{"x": x, "logits without the last axis": logits[..., 0]})
    log_weights = jax.nn.log_softmax(at_least_float32(logits))
    log_probs = log_bins(jnp.broadcast_to(x[..., None], logits.shape), means, log_scales, levels)
    return sum_event(jax.nn.logsumexp(log_weights + log_probs, axis=-1))


def log_bins(x: Array, mean: Array, log_scale: Array, levels: int) -> Float[Array, "*batch"]:
    """Log probability of each element's bin under a logistic; no tail needs a special case.

    log[sigmoid(b) - sigmoid(a)] = -softplus(-b) - softplus(a) + log(1 - exp(a - b)), and b - a is
    the bin's width over the scale whatever the level, so nothing cancels.
    """
    checks.integer("levels", levels, 2)
    _check_levels(x, levels)
    mean, log_scale = at_least_float32(mean), at_least_float32(log_scale)
    half = 1 / (levels - 1)
    inverse = jnp.exp(-jnp.clip(log_scale, MIN_LOG_SCALE, MAX_LOG_SCALE))
    centred = x.astype(mean.dtype) * (2 * half) - 1 - mean
    log_below = -jax.nn.softplus(-(centred + half) * inverse)
    log_above = -jax.nn.softplus((centred - half) * inverse)
    log_width = jnp.log(-jnp.expm1(-2 * half * inverse))
    wider = jnp.maximum(log_scale - MAX_LOG_SCALE, 0)
    inside = log_below + log_above + log_width - wider
    return jnp.where(x == 0, log_below, jnp.where(x == levels - 1, log_above, inside))


def _check_levels(x: Array, levels: int) -> None:
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"x must hold whole numbers 0 .. {levels - 1}, got dtype {x.dtype}")
    checks.between("x", x, 0, levels - 1)
