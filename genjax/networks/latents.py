"""What an autoencoder needs whose latents a flow models: parts of its losses, and their scale.

Rombach et al. 2022 (arXiv:2112.10752), section 3.1 and appendix G; Esser et al. 2021
(arXiv:2012.09841).
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, PyTree

from genjax import checks
from genjax.networks.convolution import Conv
from genjax.numerics import at_least_float32, safe_sqrt

__all__ = ["PatchCritic", "adaptive_weight", "latent_scale", "perceptual_distance"]


def latent_scale(z: Float[Array, "batch *event"]) -> Float[Array, ""]:
    """1 / std of one batch of latents, around its mean: latents times it have unit variance.

    sigma^2 = mean over examples, places and channels of (z - mean z)^2; the mean itself is not
    taken off (Rombach et al. 2022, appendix G). The scale belongs to the weights: latents that are
    sampled are divided by it before they are decoded. Raises ValueError for latents without a
    spread.

    >>> latent_scale(2 * jax.random.normal(jax.random.key(0), (1000, 4))).round(1)
    Array(0.5, dtype=float32)
    """
    checks.not_empty("z", z)
    z = at_least_float32(z)
    std = jnp.std(z)
    if checks.is_concrete(std):
        # That of equal latents is rounding.
        spread = jnp.where(jnp.max(z) > jnp.min(z), std, 0)
        checks.positive("the standard deviation of the latents", spread)
    return 1 / std


def perceptual_distance(
    features: Callable[[Array], Sequence[Array]],
    x: Float[Array, "batch *event"],
    y: Float[Array, "batch *event"],
) -> Float[Array, " batch"]:
    """sum over layers of the mean over places of |f(x) / |f(x)| - f(y) / |f(y)||^2.

    features: image -> maps [batch, height, width, channels] of a frozen network; each place's
    channels are divided by their norm (Zhang et al. 2018, arXiv:1801.03924, eq. 1, without learnt
    weights).

    >>> features = lambda x: [x, 2 * x]
    >>> perceptual_distance(features, jnp.ones((2, 4, 4, 3)), jnp.ones((2, 4, 4, 3)))
    Array([0., 0.], dtype=float32)
    """
    checks.same_shape(x=x, y=y)
    total = jnp.zeros(len(x))
    for a, b in zip(features(x), features(y), strict=True):
        units = []
        for z in (a, b):
            z = at_least_float32(z).reshape(len(z), -1, z.shape[-1])
            norm = safe_sqrt(jnp.sum(jnp.square(z), axis=-1, keepdims=True))
            units.append(z / (norm + 1e-10))
        gap = jnp.sum(jnp.square(units[0] - units[1]), axis=-1)
        total = total + jnp.mean(gap, axis=-1)
    return total


def adaptive_weight(
    by_reconstruction: PyTree, by_critic: PyTree, *, largest: float = 1e4
) -> Float[Array, ""]:
    """|grad reconstruction| / (|grad critic| + 1e-4), within [0, largest], without gradient.

    Both gradients for the decoder's last layer: with this weight the critic moves it about as much
    as the reconstruction does (Esser et al. 2021, eq. 7).

    >>> float(adaptive_weight({"w": jnp.ones(2)}, {"w": 2 * jnp.ones(2)}))
    0.5
    """

    def norm(tree: Any) -> Array:
        squares = [jnp.sum(jnp.square(at_least_float32(g))) for g in jax.tree.leaves(tree)]
        return safe_sqrt(sum(squares, start=jnp.zeros(())))

    weight = norm(by_reconstruction) / (norm(by_critic) + 1e-4)
    return stop_gradient(jnp.clip(weight, 0.0, largest))


class PatchCritic(nn.Module):
    """Images -> a score for every patch [batch, rows, columns]: strided convolutions.

    channels: of every halving (Isola et al. 2017, arXiv:1611.07004, without normalisation).
    """

    channels: Sequence[int] = (32, 64)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns"]:
        checks.rank("x", x, 4)
        for width in self.channels:
            x = nn.leaky_relu(Conv(width, (4, 4), stride=2)(x), 0.2)
        return Conv(1, (3, 3))(x)[..., 0]
