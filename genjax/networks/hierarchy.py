"""Networks of a hierarchical variational autoencoder of images: one way up, one way down."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from genjax import checks
from genjax.networks.convolution import Conv
from genjax.networks.layers import drop, on_flat, patchify, unpatchify
from genjax.typing import PRNGKey

__all__ = ["ImageHierarchy", "soft_clip"]

ZERO = nn.initializers.zeros
LOG_SCALES = (-6.0, 3.0)


def soft_clip(x: Float[Array, "..."], low: float, high: float) -> Float[Array, "..."]:
    """Keep x between low and high, with a gradient everywhere: low + softplus(x - low) - softplus(
    x - high), which is x to 0.05 where it is 3 away from both.

    >>> soft_clip(jnp.array([-100.0, 100.0]), -1.0, 1.0)
    Array([-1.,  1.], dtype=float32)
    """
    x = jnp.clip(x, low - 100, high + 100)  # beyond them large terms would cancel
    return low + jax.nn.softplus(x - low) - jax.nn.softplus(x - high)


class Residual(nn.Module):
    """x + dropout(silu(W x)), W a 3x3 convolution, or one of 1x1 where the image is one pixel."""

    width: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, dropout_key: PRNGKey | None, number: int) -> Array:
        kernel = (3, 3) if x.shape[1] > 1 else (1, 1)
        return x + drop(nn.silu(Conv(self.width, kernel)(x)), self.dropout, dropout_key, number)


class Head(nn.Module):
    """Two numbers for each latent: linear in a hidden layer of the pixel's neighbourhood."""

    width: int
    latents: int
    dropout: float = 0.0
    zero: bool = False

    @nn.compact
    def __call__(self, x: Array, dropout_key: PRNGKey | None, number: int) -> tuple[Array, Array]:
        kernel = (3, 3) if x.shape[1] > 1 else (1, 1)
        h = drop(nn.silu(Conv(self.width, kernel)(x)), self.dropout, dropout_key, number)
        init = ZERO if self.zero else nn.initializers.lecun_normal()
        a, b = jnp.split(on_flat(nn.Dense(2 * self.latents, kernel_init=init), h), 2, axis=-1)
        return a, soft_clip(b, *LOG_SCALES)


class ImageHierarchy(nn.Module):
    """Features, priors, posteriors and merges of levels of latents, the top one first.

    Level i has `latents[i]` numbers at each of sides[i] x sides[i] places; a side is a multiple of
    the one above, and of the image's a divisor. sides of 1 make it fully connected. width:
    channels of all that is hidden. depth: residual layers between two levels. dropout: share of
    hidden units dropped where a key is given. shape: [height, width, numbers] of what `decode`
    gives.

    Methods, each with a `dropout_key` or None: `features(x)` gives a list; `prior(i, h)`,
    `posterior(i, h, feature)` and `merge(i, h, z)` are those of a `genjax.variational.Level`, with
    log scales kept between -6 and 3; `decode(h)` gives [batch, *shape]. Every prior starts at
    N(0, I). Raises ValueError for sides that do not fit.
    """

    shape: Sequence[int]
    latents: Sequence[int] = (8, 8, 8)
    sides: Sequence[int] = (1, 1, 1)
    width: int = 256
    depth: int = 1
    dropout: float = 0.0

    def setup(self) -> None:
        checks.integer("depth", self.depth, 1)
        self._check_sides()
        num, width = len(self.sides), self.width
        rate = self.dropout
        self.stem = nn.Dense(width)
        self.downs = [nn.Dense(width) for _ in range(num - 1)]
        self.ups = [
            nn.Dense(width * (b // a) ** 2)
            for a, b in zip(self.sides, self.sides[1:], strict=False)
        ]
        self.rising = [
            [Residual(width, dropout=rate) for _ in range(self.depth)] for _ in range(num)
        ]
        self.falling = [
            [Residual(width, dropout=rate) for _ in range(self.depth)] for _ in range(num)
        ]
        self.priors = [Head(width, n, dropout=rate, zero=True) for n in self.latents[1:]]
        self.posteriors = [Head(width, n, dropout=rate) for n in self.latents]
        self.merges = [nn.Dense(width) for _ in range(num)]
        self.out = nn.Dense(self.shape[2] * math.prod(n // self.sides[-1] for n in self.shape[:2]))

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Array:
        """All of it once, with the latents at their priors' means: for `init`."""
        features = self.features(x)
        h: Any = None
        for i in range(len(self.sides)):
            mean = self.posterior(i, h, features[i])[0]
            h = self.merge(i, h, mean if i == 0 else self.prior(i, h)[0])
        return self.decode(h)

    def features(
        self, x: Float[Array, "batch height width channels"], *, dropout_key: PRNGKey | None = None
    ) -> list[Array]:
        """One feature for each level, top first, from the image upwards."""
        h, found = on_flat(self.stem, self._shrink(x, self.sides[-1])), []
        for i in reversed(range(len(self.sides))):
            h = self._residuals(self.rising[i], h, dropout_key, 3 * i)
            found.insert(0, h)
            if i:
                h = nn.silu(on_flat(self.downs[i - 1], self._shrink(h, self.sides[i - 1])))
        return found

    def prior(self, i: int, h: Array, *, dropout_key: PRNGKey | None = None) -> tuple[Array, Array]:
        """Mean and log variance of p(z_i|h), i at least 1."""
        mean, log_s = self.priors[i - 1](h, self._key(dropout_key, 1), i)
        return mean, 2 * log_s

    def posterior(
        self, i: int, h: Array | None, feature: Array, *, dropout_key: PRNGKey | None = None
    ) -> tuple[Array, Array]:
        """dm and dlog_s of q(z_i|h, x) in units of the prior."""
        x = feature if h is None else jnp.concatenate([h, feature], axis=-1)
        return self.posteriors[i](x, self._key(dropout_key, 2), i)

    def merge(
        self, i: int, h: Array | None, z: Array, *, dropout_key: PRNGKey | None = None
    ) -> Array:
        """What the next level sees, at its own side."""
        new = on_flat(self.merges[i], z)
        h = self._residuals(self.falling[i], new if h is None else h + new, dropout_key, 3 * i + 1)
        if i + 1 == len(self.sides):
            return h
        side, factor = self.sides[i + 1], self.sides[i + 1] // self.sides[i]
        tokens = on_flat(self.ups[i], h).reshape(len(h), -1, self.width * factor**2)
        return unpatchify(tokens, factor, (side, side, self.width))

    def decode(self, h: Array) -> Float[Array, "batch height width numbers"]:
        """The numbers of every pixel."""
        tokens = on_flat(self.out, nn.silu(h)).reshape(len(h), self.sides[-1] ** 2, -1)
        return unpatchify(tokens, self.shape[0] // self.sides[-1], tuple(self.shape))

    def _shrink(self, x: Array, side: int) -> Array:
        """Patches of the image as the channels of a smaller one."""
        return patchify(x, x.shape[1] // side).reshape(len(x), side, side, -1)

    def _residuals(self, layers: Sequence[Residual], h: Array, key: Any, number: int) -> Array:
        for j, layer in enumerate(layers):
            h = layer(h, self._key(key, 3 + j), number)
        return h

    def _key(self, key: PRNGKey | None, part: int) -> PRNGKey | None:
        return None if key is None else jax.random.fold_in(key, part)

    def _check_sides(self) -> None:
        sides, (height, width, _) = tuple(self.sides), self.shape
        if len(sides) != len(self.latents) or not sides:
            raise ValueError(
                f"sides and latents must be as many, got {sides} and {tuple(self.latents)}"
            )
        fits = all(b % a == 0 for a, b in zip(sides, (*sides[1:], height), strict=True))
        if height != width or not fits:
            raise ValueError(
                f"sides must be multiples of the ones above and divide a square image's, got "
                f"{sides} for {height}x{width}"
            )
