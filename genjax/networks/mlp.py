"""Fully connected networks: of vectors, and of (x_t, t, label)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.networks import layers
from genjax.networks.layers import drop
from genjax.typing import PRNGKey

__all__ = ["MLP", "ResidualMLP", "TimeMLP"]


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


class TimeMLP(nn.Module):
    """Residual MLP of (x_t, t, label), shaped like x: a velocity field or a denoiser.

    With norm "none", h <- h + W2 silu(W1 h + shift), `depth` times: shift is linear in `harmonics`
    of t in [0, 1] and in the one-hot label. With norm "layer", h <- h + W2 silu((1 + scale)
    norm(W1 silu(norm(h))) + shift), norm a layer norm without parameters: scale and shift are
    linear in the vector of `Conditioning`, of size `embedding`, made from t of order 1. The label
    `classes`, and no label, stand for none. end: a second time, for mean velocities u(x, t, end):
    the features of end - t stand beside those of t, or are added to them. The output starts at 0,
    so that an EDM-preconditioned denoiser starts at c_skip x. dropout: share of the silu's outputs
    dropped where a key is given.
    """

    width: int = 128
    depth: int = 3
    norm: Literal["none", "layer"] = "none"
    classes: int | None = None
    num_harmonics: int = 8
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
        end: Float[Array, " batch"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch *event"]:
        checks.shape("t", t, (x.shape[0],))
        checks.one_of("norm", self.norm, ("none", "layer"))
        normed = self.norm == "layer"
        dense = partial(nn.Dense, dtype=self.dtype)
        norm = layers.Norm(use_scale=False)
        flat = x.reshape(x.shape[0], -1)
        if normed:
            condition = layers.Conditioning(self.embedding, self.classes, dtype=self.dtype)
            embedded = condition(t, label)
            if end is not None:
                embedded = embedded + layers.Conditioning(self.embedding, dtype=self.dtype)(end - t)
            shifts = []
        else:
            # One product gives the shifts of all the layers.
            features = self._harmonics_and_label(t, label).astype(x.dtype)
            if end is not None:
                checks.shape("end", end, t.shape)
                step = layers.harmonics(end - t, self.num_harmonics).astype(x.dtype)
                features = jnp.concatenate([features, step], axis=1)
            shifts = jnp.split(dense(self.width * self.depth)(features), self.depth, axis=1)
        h = dense(self.width)(flat)
        for i in range(self.depth):
            if normed:
                scale, shift = jnp.split(dense(2 * self.width)(embedded), 2, axis=-1)
                y = dense(self.width)(nn.silu(norm(h)))
                y = norm(y) * (1 + scale) + shift
            else:
                y = dense(self.width)(h) + shifts[i]
            y = drop(nn.silu(y), self.dropout, dropout_key, i)
            h = h + dense(self.width)(y)
        h = nn.silu(norm(h) if normed else h)
        return dense(flat.shape[1], kernel_init=nn.initializers.zeros)(h).reshape(x.shape)

    def _harmonics_and_label(self, t: Array, label: Array | None) -> Array:
        features = layers.harmonics(t, self.num_harmonics)
        label = layers.labels_or_null(self.classes, label, len(t))
        if self.classes is None:
            return features
        one_hot = nn.one_hot(label, self.classes + 1, dtype=features.dtype)
        return jnp.concatenate([features, one_hot], axis=1)
