"""Fully connected networks on the last axis."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from genjax.typing import PRNGKey


class MLP(nn.Module):
    """Dense layers with an activation between them; the last one is linear.

    features: the width of every layer, the output's last. dropout: share of hidden units set to 0
    where a key is given; without a key the network is deterministic.
    """

    features: Sequence[int]
    activation: Callable[[Array], Array] = nn.silu
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch dim"], *, dropout_key: PRNGKey | None = None
    ) -> Float[Array, "*batch out"]:
        for i, width in enumerate(self.features[:-1]):
            x = self.activation(nn.Dense(width)(x))
            x = drop(x, self.dropout, dropout_key, i)
        return nn.Dense(self.features[-1])(x)


class ResidualMLP(nn.Module):
    """Dense layers of one width, each added to its input, between two linear maps.

    Easier to train deep than `MLP`, with the same options: h <- h + dropout(activation(W h + b)),
    `depth` hidden layers in all.
    """

    width: int
    depth: int
    features: int
    activation: Callable[[Array], Array] = nn.silu
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch dim"], *, dropout_key: PRNGKey | None = None
    ) -> Float[Array, "*batch out"]:
        for i in range(self.depth):
            h = self.activation(nn.Dense(self.width)(x))
            h = drop(h, self.dropout, dropout_key, i)
            x = h if i == 0 else x + h
        return nn.Dense(self.features)(x)


def drop(x: Array, rate: float, key: PRNGKey | None, layer: int) -> Array:
    """Apply dropout with a key of the layer's own; the identity where `key` is None."""
    if key is None or rate == 0:
        return x
    return nn.Dropout(rate)(x, deterministic=False, rng=jax.random.fold_in(key, layer))


def on_flat(layer: Callable[[Array], Array], x: Float[Array, "*batch features"]) -> Array:
    """Apply a dense layer with the leading axes taken together.

    XLA on CPU is several times slower where the gradient for the weights sums over two axes.
    """
    y = layer(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])
