"""Differentiable augmentations of real and generated images alike, and how often they are applied.

A critic of few images learns them by heart. Seen through the same random changes, real and
generated examples stay apart only where their laws do, as long as the changes can be undone in law:
that is so for p well below 1.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from genjax import checks
from genjax.numerics import at_least_float32
from genjax.randomness import indexed_keys
from genjax.typing import PRNGKey

__all__ = ["AUGMENTATIONS", "ada_update", "augment"]

Number: TypeAlias = float | int | Float[Array, ""]
# (key, image [height, width, channels]) -> image
AugmentFn: TypeAlias = Callable[[PRNGKey, Array], Array]


def _translate(key: PRNGKey, x: Array) -> Array:
    """By whole pixels, up to an eighth of each side either way; what comes in is 0."""
    reach = [max(side // 8, 1) for side in x.shape[:2]]
    most = jnp.asarray(reach)
    move = jax.random.randint(key, (2,), -most, most + 1)
    pads = [(r, r) for r in reach]
    wide = jnp.pad(x, (*pads, (0, 0)))
    return jax.lax.dynamic_slice(wide, (*(most + move), 0), x.shape)


def _turn(key: PRNGKey, x: Array) -> Array:
    """By an angle in [-15, 15] degrees and a scale in [1 / 1.1, 1.1], between pixels linearly."""
    angle, size = jax.random.uniform(key, (2,), minval=-1, maxval=1)
    angle, size = angle * jnp.pi / 12, jnp.exp(size * jnp.log(1.1))
    height, width, _ = x.shape
    row, column = jnp.meshgrid(
        jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij"
    )
    cos, sin = jnp.cos(angle) * size, jnp.sin(angle) * size
    rows = cos * row - sin * column + (height - 1) / 2
    columns = sin * row + cos * column + (width - 1) / 2
    pick = lambda plane: jax.scipy.ndimage.map_coordinates(plane, [rows, columns], 1)  # noqa: E731
    return jax.vmap(pick, in_axes=2, out_axes=2)(x)


def _flip(key: PRNGKey, x: Array) -> Array:
    """Left to right. Of p = 1 it can be undone; not for digits, whose class it changes."""
    return x[:, ::-1]


def _brightness(key: PRNGKey, x: Array) -> Array:
    """Plus a normal number of deviation 0.2."""
    return x + 0.2 * jax.random.normal(key, (), x.dtype)


def _contrast(key: PRNGKey, x: Array) -> Array:
    """Around the image's mean, times exp of a normal number of deviation 0.3."""
    mean = jnp.mean(x)
    return mean + jnp.exp(0.3 * jax.random.normal(key, (), x.dtype)) * (x - mean)


def _cutout(key: PRNGKey, x: Array) -> Array:
    """0 in a square of half the side, at a uniform place that may hang over the border."""
    height, width, _ = x.shape
    centre = jax.random.uniform(key, (2,)) * jnp.asarray([height, width])
    row, column = jnp.indices((height, width))
    inside = (jnp.abs(row + 0.5 - centre[0]) < height / 4) & (
        jnp.abs(column + 0.5 - centre[1]) < width / 4
    )
    return jnp.where(inside[:, :, None], 0, x)


AUGMENTATIONS: Mapping[str, AugmentFn] = {
    "translate": _translate,
    "turn": _turn,
    "flip": _flip,
    "brightness": _brightness,
    "contrast": _contrast,
    "cutout": _cutout,
}


def augment(
    key: PRNGKey,
    images: Float[Array, "batch height width channels"],
    *,
    p: Number,
    names: Sequence[str] = ("translate", "turn", "brightness", "contrast"),
) -> Float[Array, "batch height width channels"]:
    """Apply each of the named changes to each image with probability p, one after another.

    `AUGMENTATIONS` has them: whole-pixel translation, small turns with a scale, flips, brightness,
    contrast, cutout. The result is linear or smooth in the images, so that gradients reach the
    generator; image i's changes depend on (key, i) alone; p = 0 is the identity, and p may be
    traced. Real and generated images must both pass through it, before the critic. Images are on a
    scale where 0 is grey, as in [-1, 1]. Zhao et al. 2020 (arXiv:2006.10738); Karras et al. 2020
    (arXiv:2006.06676), section 2. Raises ValueError for an unknown name or p outside [0, 1].

    >>> augment(jax.random.key(0), jnp.zeros((4, 8, 8, 1)), p=0.5).shape
    (4, 8, 8, 1)
    """
    checks.rank("images", images, 4)
    checks.floating("images", images)
    checks.between("p", p, 0, 1)
    for name in names:
        checks.one_of("names", name, AUGMENTATIONS)

    def one(key: PRNGKey, x: Array) -> Array:
        for i, name in enumerate(names):
            key_whether, key_how = jax.random.split(jax.random.fold_in(key, i))
            changed = AUGMENTATIONS[name](key_how, x).astype(x.dtype)
            x = jnp.where(jax.random.bernoulli(key_whether, jnp.float32(p)), changed, x)
        return x

    return jax.vmap(one)(indexed_keys(key, len(images)), images)


def ada_update(
    p: Number,
    real_scores: Float[Array, " batch"] | None = None,
    *,
    images: Number,
    sure: Number | None = None,
    target: Number = 0.6,
    speed: Number = 500_000,
) -> Float[Array, ""]:
    """Next p: up where the critic is surer of the real examples than `target`, down elsewhere.

        p <- clip(p + sign(mean sign D(real) - target) images / speed, 0, 1)

    images: examples seen since the last update (the paper's four batches); `speed` of them take p
    from 0 to 1. Without gradient. Karras et al. 2020 (arXiv:2006.06676), section 3.1, whose r_t is
    mean sign D(real): `sure` gives it in the place of the scores, where it is known already.

    >>> scores = jnp.ones(64)  # the critic is sure of all real examples
    >>> round(float(ada_update(0.1, scores, images=5000)), 3)
    0.11
    """
    checks.positive("images", images)
    checks.positive("speed", speed)
    if real_scores is not None:
        checks.rank("real_scores", real_scores, 1)
        sure = jnp.mean(jnp.sign(at_least_float32(real_scores)))
    if sure is None:
        raise ValueError("real_scores or sure must be given, got neither")
    checks.between("sure", sure, -1, 1)
    moved = p + jnp.sign(sure - target) * (images / speed)
    return stop_gradient(jnp.clip(moved, 0.0, 1.0))
