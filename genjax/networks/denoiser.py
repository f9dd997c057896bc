"""Networks of (x_t, t): embeddings of time and class, and a residual MLP denoiser."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.networks.mlp import drop
from genjax.numerics import at_least_float32
from genjax.typing import PRNGKey


def fourier_features(
    t: Float[Array, " batch"], num: int, *, min_frequency: float = 0.25, max_frequency: float = 16.0
) -> Float[Array, "batch num"]:
    """[cos(2 pi f t), sin(2 pi f t)] at num / 2 frequencies f, equally spaced in the logarithm.

    For t of order 1: a time in [0, 1], or EDM's log(sigma) / 4. Float32 whatever the type of t.
    """
    checks.integer("num", num, 2)
    if num % 2:
        raise ValueError(f"num must be even (a cosine and a sine of each frequency), got {num}")
    steps = jnp.linspace(math.log(min_frequency), math.log(max_frequency), num // 2)
    angle = 2 * math.pi * jnp.exp(steps)[None, :] * at_least_float32(t)[:, None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class Conditioning(nn.Module):
    """One vector of time and class: an MLP of the time's features plus a row for the class.

    features: its size. num_classes: number of labels; label num_classes, and no label, mean "no
    class", which has a row of its own (for classifier-free guidance).
    """

    features: int
    num_classes: int | None = None
    num_frequencies: int = 32
    dtype: Any = None

    @nn.compact
    def __call__(
        self, t: Float[Array, " batch"], label: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch features"]:
        checks.rank("t", t, 1)
        if label is not None and self.num_classes is None:
            raise ValueError("label is given, but the network has num_classes=None")
        h = fourier_features(t, 2 * self.num_frequencies)
        h = nn.Dense(self.features, dtype=self.dtype)(h)
        h = nn.Dense(self.features, dtype=self.dtype)(nn.silu(h))
        if self.num_classes is not None:
            if label is None:
                label = jnp.full(t.shape, self.num_classes)
            rows = nn.Embed(self.num_classes + 1, self.features, dtype=self.dtype)
            h = h + rows(label)
        return nn.silu(h)


class MLPDenoiser(nn.Module):
    """Residual MLP of (x_t, t, label), the output shaped like x.

    h <- h + W2 dropout(silu(scale * norm(W1 silu(norm(h))) + shift)), scale and shift from time
    and class, `depth` times. The output starts at 0, so that an EDM-preconditioned denoiser starts
    at c_skip x. dropout: share of hidden units dropped where a key is given.
    """

    width: int = 256
    depth: int = 3
    num_classes: int | None = None
    embedding: int = 128
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *event"],
        t: Float[Array, " batch"],
        label: Int[Array, " batch"] | None = None,
        *,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch *event"]:
        embedded = Conditioning(self.embedding, self.num_classes, dtype=self.dtype)(t, label)
        flat = x.reshape(x.shape[0], -1)
        h = nn.Dense(self.width, dtype=self.dtype)(flat)
        for i in range(self.depth):
            modulation = nn.Dense(2 * self.width, dtype=self.dtype)(embedded)
            scale, shift = jnp.split(modulation, 2, axis=-1)
            y = nn.Dense(self.width, dtype=self.dtype)(nn.silu(self._norm(h)))
            y = nn.silu(self._norm(y) * (1 + scale) + shift)
            y = drop(y, self.dropout, dropout_key, i)
            h = h + nn.Dense(self.width, dtype=self.dtype)(y)
        zero = nn.initializers.zeros
        out = nn.Dense(flat.shape[1], dtype=self.dtype, kernel_init=zero)(nn.silu(self._norm(h)))
        return out.reshape(x.shape)

    def _norm(self, h: Array) -> Array:
        """Layer normalisation without parameters, statistics in float32."""
        wide = at_least_float32(h)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        return (centred / jnp.sqrt(variance + 1e-6)).astype(h.dtype)
