"""A velocity field of vectors: residual MLP of the point, Fourier features of time, the label."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.networks.mlp import drop
from genjax.typing import PRNGKey


class VelocityMLP(nn.Module):
    """v(x, t) of the shape of x; events are flattened, times lie in [0, 1].

    h <- h + W2 silu(W1 h + T(t) + L(label)), `depth` times. With `classes`, the label `classes`
    stands for none. The last layer starts at 0.
    """

    width: int = 128
    depth: int = 3
    frequencies: int = 8
    classes: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *event"],
        t: Float[Array, " batch"],
        *,
        label: Int[Array, " batch"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch *event"]:
        checks.shape("t", t, (x.shape[0],))
        if label is not None and not self.classes:
            raise ValueError("labels came, but the network has classes=0")
        if label is not None:
            checks.shape("label", label, (x.shape[0],))
        angles = math.pi * t[:, None] * jnp.arange(1, self.frequencies + 1, dtype=x.dtype)[None]
        told = [t[:, None], jnp.sin(angles), jnp.cos(angles)]
        if self.classes:
            label = jnp.full(x.shape[:1], self.classes) if label is None else label
            told.append(nn.one_hot(label, self.classes + 1, dtype=x.dtype))
        # One product gives what every layer hears of time and label.
        told = nn.Dense(self.width * self.depth)(jnp.concatenate(told, axis=1))
        told = jnp.split(told, self.depth, axis=1)
        flat = x.reshape(x.shape[0], -1)
        h = nn.Dense(self.width)(flat)
        for i in range(self.depth):
            inner = nn.silu(nn.Dense(self.width)(h) + told[i])
            h = h + nn.Dense(self.width)(drop(inner, self.dropout, dropout_key, i))
        out = nn.Dense(flat.shape[1], kernel_init=nn.initializers.zeros_init())(nn.silu(h))
        return out.reshape(x.shape)
