"""2-D densities with an exact log-density and an exact sampler, pure jax.

Moons and swiss roll are defined as equal-weight mixtures of many Gaussians centred along the curve,
closer to each other than their standard deviation; pinwheel is an area-preserving twist of five
Gaussians. So every `log_prob` here is normalised exactly, and `sample` draws from that very law.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import LOG_2PI, at_least_float32
from genjax.typing import PRNGKey

Points = Float[Array, "n 2"]


@runtime_checkable
class Density(Protocol):
    """What every 2-D density offers."""

    def sample(self, key: PRNGKey, n: int) -> Points: ...

    def log_prob(self, x: Points) -> Float[Array, " n"]: ...


@dataclass(frozen=True)
class GaussianMixture:
    """1/K sum_k N(x; means_k, std^2 I): equal weights, one standard deviation."""

    means: np.ndarray = field(repr=False)
    std: float

    def sample(self, key: PRNGKey, n: int) -> Points:
        """Draw n points, float32 [n, 2]."""
        key_mode, key_noise = jax.random.split(key)
        modes = jax.random.randint(key_mode, (n,), 0, len(self.means), jnp.int32)
        noise = jax.random.normal(key_noise, (n, 2), jnp.float32)
        return jnp.asarray(self.means, jnp.float32)[modes] + self.std * noise

    def log_prob(self, x: Points) -> Float[Array, " n"]:
        """Log-density [n], nats."""
        x = at_least_float32(x)
        scaled = (x[:, None, :] - jnp.asarray(self.means, x.dtype)[None]) / self.std
        exponents = -0.5 * jnp.sum(scaled**2, axis=-1)
        constant = LOG_2PI + 2 * math.log(self.std) + math.log(len(self.means))
        return jax.nn.logsumexp(exponents, axis=1) - constant


@dataclass(frozen=True)
class Checkerboard:
    """Uniform on the cells of a board over [-half, half]^2 whose row and column have equal parity.

    log p = -log(area of those cells) on them, -inf elsewhere.
    """

    cells: int = 4
    half: float = 4.0

    def __post_init__(self) -> None:
        checks.integer("cells", self.cells, 2)
        if self.cells % 2:
            raise ValueError(f"cells must be even, got {self.cells}")

    def sample(self, key: PRNGKey, n: int) -> Points:
        """Draw n points, float32 [n, 2]."""
        key_cell, key_place = jax.random.split(key)
        cell = jax.random.randint(key_cell, (n,), 0, self.cells**2 // 2, jnp.int32)
        row, pair = cell // (self.cells // 2), cell % (self.cells // 2)
        corner = jnp.stack([2 * pair + row % 2, row], axis=1).astype(jnp.float32)
        place = jax.random.uniform(key_place, (n, 2), jnp.float32)
        return (corner + place) * (2 * self.half / self.cells) - self.half

    def log_prob(self, x: Points) -> Float[Array, " n"]:
        """Log-density [n], nats; -inf off the board's filled cells."""
        place = (x + self.half) * (self.cells / (2 * self.half))
        cell = jnp.floor(place)
        inside = jnp.all((cell >= 0) & (cell < self.cells), axis=1)
        filled = inside & (jnp.sum(cell, axis=1) % 2 == 0)
        log_density = jnp.where(filled, -math.log(2 * self.half**2), -jnp.inf)
        return jnp.where(jnp.any(jnp.isnan(x), axis=1), jnp.nan, log_density).astype(x.dtype)


@dataclass(frozen=True)
class Pinwheel:
    """Arms of a Gaussian N((radius, 0), diag(radial^2, tangential^2)), turned and then twisted.

    The twist turns v by the angle rate * |v|. It keeps |v|, so its Jacobian has determinant 1 and

        p(x) = 1/K sum_k N(R(-2 pi k / K - rate |x|) x; (radius, 0), diag(radial^2, tangential^2)).
    """

    arms: int = 5
    radius: float = 2.0
    radial: float = 0.6
    tangential: float = 0.2
    rate: float = 0.75

    def sample(self, key: PRNGKey, n: int) -> Points:
        """Draw n points, float32 [n, 2]."""
        key_arm, key_noise = jax.random.split(key)
        arm = jax.random.randint(key_arm, (n,), 0, self.arms, jnp.int32)
        noise = jax.random.normal(key_noise, (n, 2), jnp.float32)
        v = noise * jnp.array([[self.radial, self.tangential]], jnp.float32)
        v = v + jnp.array([[self.radius, 0.0]], jnp.float32)
        angle = arm * (2 * math.pi / self.arms) + self.rate * jnp.sqrt(jnp.sum(v**2, axis=1))
        return _rotate(v, angle)

    def log_prob(self, x: Points) -> Float[Array, " n"]:
        """Log-density [n], nats."""
        twist = self.rate * jnp.sqrt(jnp.maximum(jnp.sum(x**2, axis=1), jnp.finfo(x.dtype).tiny))
        turns = np.arange(self.arms) * (2 * math.pi / self.arms)
        v = jnp.stack([_rotate(x, -twist - float(turn)) for turn in turns])
        along, across = (v[..., 0] - self.radius) / self.radial, v[..., 1] / self.tangential
        constant = LOG_2PI + math.log(self.radial * self.tangential * self.arms)
        return jax.nn.logsumexp(-0.5 * (along**2 + across**2), axis=0) - constant


def _rotate(v: Array, angle: Array) -> Array:
    """Turn each v [n, 2] by its angle [n], counterclockwise."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([cos * v[:, 0] - sin * v[:, 1], sin * v[:, 0] + cos * v[:, 1]], axis=1)


def _ring(count: int, radius: float) -> np.ndarray:
    angles = 2 * np.pi * np.arange(count) / count
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _grid(side: int, spacing: float) -> np.ndarray:
    line = spacing * (np.arange(side) - (side - 1) / 2)
    return np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)


def _moons(count: int, radius: float) -> np.ndarray:
    t = np.pi * (np.arange(count) + 0.5) / count
    upper = np.stack([np.cos(t) - 0.5, np.sin(t) - 0.25], axis=1)
    return radius * np.concatenate([upper, -upper])


def _swiss_roll(count: int, radius: float) -> np.ndarray:
    # Equal steps of t = 1.5 pi .. 4.5 pi along (t cos t, t sin t), as in scikit-learn's.
    t = 1.5 * np.pi * (1 + 2 * (np.arange(count) + 0.5) / count)
    return radius * np.stack([t * np.cos(t), t * np.sin(t)], axis=1) / (4.5 * np.pi)


DENSITIES: dict[str, GaussianMixture | Checkerboard | Pinwheel] = {
    "8gaussians": GaussianMixture(_ring(8, 2.0), 0.2),
    "25gaussians": GaussianMixture(_grid(5, 2.0), 0.05),
    "moons": GaussianMixture(_moons(128, 2.0), 0.2),
    "swissroll": GaussianMixture(_swiss_roll(256, 4.0), 0.15),
    "checkerboard": Checkerboard(),
    "pinwheel": Pinwheel(),
}
