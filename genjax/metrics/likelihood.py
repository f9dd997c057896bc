"""Test likelihood in nats and bits per dimension: one interface for every family."""

# ruff: noqa: PT028  (a function whose name starts with test_, but no test)

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import at_least_float32, log_mean_exp, safe_sqrt
from genjax.typing import PRNGKey


@runtime_checkable
class Dequantiser(Protocol):
    """What is needed of a scaling between levels and real numbers: `genjax.data.Scaling` has it."""

    def dequantise(self, key: PRNGKey, x: Any) -> Array: ...

    @property
    def log_det_per_dim(self) -> float: ...


class Likelihood(NamedTuple):
    """log_likelihood: mean over the examples, nats. bits_per_dim: of that mean. standard_error:
    of log_likelihood over examples, nats. per_example: nats [n]."""

    log_likelihood: Float[Array, ""]
    bits_per_dim: Float[Array, ""]
    standard_error: Float[Array, ""]
    per_example: Float[Array, " n"]


def bits_per_dim(
    log_likelihood: Float[Array, "..."] | Float[np.ndarray, "..."] | float | int,
    num_dims: int,
    *,
    log_det_per_dim: float | int | Float[Array, ""] = 0.0,
) -> Float[Array, "..."]:
    """-(log_likelihood / num_dims + log_det_per_dim) / log 2, elementwise.

    `log_likelihood` is in nats, summed over the event. For levels 0..L-1 scaled onto [a, b] the
    density's `log_det_per_dim` is log((b - a) / L), `Scaling.log_det_per_dim`: + 8 bits for 256
    levels on [0, 1], + 7 on [-1, 1]. Theis et al. 2016, section 3.1.

    >>> float(bits_per_dim(-69.3147, num_dims=50))
    2.0
    """
    checks.integer("num_dims", num_dims, least=1)
    nats = at_least_float32(jnp.asarray(log_likelihood))
    return -(nats / num_dims + log_det_per_dim) / math.log(2)


def test_log_likelihood(
    log_prob: Callable[[PRNGKey, Array], Array],
    key: PRNGKey,
    x: Array | np.ndarray,
    *,
    scaling: Dequantiser | None = None,
    batch_size: int = 256,
    num_draws: int = 1,
    estimator: str = "bound",
) -> Likelihood:
    """Estimate the log-likelihood of a test set, nats per example, batch after batch.

    `log_prob(key, y [batch, *event]) -> [batch]` gives log p(y) in nats of data as the model sees
    it (or a lower bound, as an IWAE does; what comes out is then a lower bound too). With a
    `scaling`, x holds levels [n, *event], y_k is its k-th dequantisation and the result speaks of
    the levels, with l_k = log p(y_k) + D log_det_per_dim over K = `num_draws`:

        estimator="bound":       1/K sum_k l_k           <= log P(x) in expectation, for every K
        estimator="importance":  log 1/K sum_k exp l_k   <= log P(x), rising to it with K

    Without, x is continuous and goes to `log_prob` as it is, K times with another key. The noise
    of example i is that of fold_in(key, i): it does not depend on `batch_size`. Compile with
    `jax.jit` around the whole call. Raises ValueError on an empty x, NaN in it, or losses of the
    wrong shape.

    >>> log_prob = lambda key, y: -(y**2).sum(-1) / 2
    >>> test_log_likelihood(log_prob, jax.random.key(0), jnp.ones((5, 2))).log_likelihood
    Array(-1., dtype=float32)
    """
    checks.one_of("estimator", estimator, ("bound", "importance"))
    checks.integer("batch_size", batch_size, least=1)
    checks.integer("num_draws", num_draws, least=1)
    checks.min_rank("x", x, 2)
    checks.not_empty("x", x)
    if scaling is None:
        checks.floating("x", x)
        checks.finite("x", x)
    size, num_dims = x.shape[0], math.prod(x.shape[1:])
    batch_size = min(batch_size, size)
    num_batches = -(-size // batch_size)
    log_det = 0.0 if scaling is None else scaling.log_det_per_dim
    noise_key, model_key = jax.random.split(key)

    def one_draw(inputs: tuple[Array, Array, Array]) -> Array:
        draw, batch, indices = inputs
        x_batch = x_padded[indices]
        if scaling is not None:
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(noise_key, i), draw))
            x_batch = jax.vmap(scaling.dequantise)(keys(indices), x_batch)
        draw_key = jax.random.fold_in(jax.random.fold_in(model_key, batch), draw)
        nats = log_prob(draw_key, x_batch)
        checks.shape("what log_prob returns", nats, (batch_size,))
        return at_least_float32(nats)

    def one_batch(inputs: tuple[Array, Array]) -> Array:
        batch, indices = inputs
        draws = jax.lax.map(lambda draw: one_draw((draw, batch, indices)), jnp.arange(num_draws))
        return log_mean_exp(draws) if estimator == "importance" else jnp.mean(draws, axis=0)

    # The last batch repeats the last example to be full; the repeats are cut off again.
    x_padded = jnp.asarray(x)
    indices = jnp.minimum(jnp.arange(num_batches * batch_size), size - 1)
    nats = jax.lax.map(
        one_batch, (jnp.arange(num_batches), indices.reshape(num_batches, batch_size))
    )
    per_example = nats.reshape(-1)[:size] + num_dims * log_det
    mean = jnp.mean(per_example)
    spread = safe_sqrt(jnp.var(per_example, ddof=1)) if size > 1 else jnp.full_like(mean, jnp.nan)
    bits = bits_per_dim(mean, num_dims)
    return Likelihood(mean, bits, spread / math.sqrt(size), per_example)


# The name says what it computes; pytest must not take it for a test where it is imported.
vars(test_log_likelihood)["__test__"] = False
