"""What StyleGAN2 adds to the training of a GAN: path lengths, style mixing, lazy terms, truncation.

A generator maps styles w [batch, layers, dim] to images. What training remembers without a gradient
(the mean path length, the mean style, the number of steps) is the caller's carry.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.numerics import at_least_float32, safe_sqrt
from genjax.typing import PRNGKey

__all__ = [
    "PathLengths",
    "every_nth",
    "mean_style",
    "mix_styles",
    "path_length_penalty",
    "truncate",
]

# beartype takes no int where a float is asked for
Number: TypeAlias = float | int | Float[Array, ""]


class PathLengths(NamedTuple):
    """The penalty of each example, and the running mean of the lengths for the next call."""

    penalties: Float[Array, " batch"]
    mean: Float[Array, ""]


def path_length_penalty(
    generator: Callable[[Array], Array],
    w: Float[Array, "batch *layers dim"],
    noise: Float[Array, "batch height width channels"],
    *,
    mean: Number,
    decay: Number = 0.01,
) -> PathLengths:
    """(|J_w^T y| - a)^2 per example: a step in w changes the image by about the same length a.

    y is the standard normal `noise` of the image's shape over sqrt(height width); J_w^T y is one
    reverse derivative of <G(w), y>. Of w [batch, layers, dim] the length is sqrt(mean over layers
    of |.|^2 over dim), as in the released code. a moves towards the batch's mean length first,
    a <- a + decay (mean |J^T y| - a), and gets no gradient; it is returned for the next call.
    StyleGAN2 starts at 0, and lengths are pulled down while a rises; in short runs decay =
    max(0.01, 1 / calls) makes a the mean of all lengths so far. The penalty's weight is 2, every 4
    or 8 steps times that number (`every_nth`). The generator must map each example by itself.

    Karras et al. 2020 (arXiv:1912.04958), eq. 4. Raises ValueError where w is no [batch, dim] or
    [batch, layers, dim], or the noise has not the images' shape.

    >>> generator = lambda w: jnp.broadcast_to(w[:, None, None, :1], (len(w), 4, 4, 1))
    >>> noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    >>> path_length_penalty(generator, jnp.ones((2, 3)), noise, mean=1.0).penalties.shape
    (2,)
    """
    checks.rank("w", w, (2, 3))
    checks.between("decay", decay, 0, 1)
    images = jax.eval_shape(generator, w)
    checks.shape("noise", noise, images.shape)
    checks.rank("images", images, 4)
    y = noise / (noise.shape[1] * noise.shape[2]) ** 0.5

    def along(w: Array) -> Array:
        return jnp.sum(at_least_float32(generator(w)) * y)

    slope = at_least_float32(jax.grad(along)(w)).reshape(len(w), -1, w.shape[-1])
    lengths = safe_sqrt(jnp.mean(jnp.sum(jnp.square(slope), axis=-1), axis=-1))
    target = stop_gradient(mean + decay * (jnp.mean(lengths) - mean))
    return PathLengths(jnp.square(lengths - target), target)


def mix_styles(
    key: PRNGKey,
    first: Float[Array, "batch dim"],
    second: Float[Array, "batch dim"],
    *,
    layers: int,
    probability: Number = 0.9,
) -> Float[Array, "batch layers dim"]:
    """Styles of every layer: `first` up to a random layer, `second` from there on.

    With probability `probability` an example is mixed, at a layer uniform in 1, ..., layers - 1;
    else all its layers are `first` (Karras et al. 2019, arXiv:1812.04948, section 3.1).

    >>> first, second = jnp.zeros((4, 2)), jnp.ones((4, 2))
    >>> mix_styles(jax.random.key(0), first, second, layers=6).shape
    (4, 6, 2)
    """
    checks.same_shape(first=first, second=second)
    checks.rank("first", first, 2)
    checks.integer("layers", layers, 2)
    checks.between("probability", probability, 0, 1)
    key_mixed, key_layer = jax.random.split(key)
    n = len(first)
    crossing = jax.random.randint(key_layer, (n,), 1, layers)
    crossing = jnp.where(
        jax.random.bernoulli(key_mixed, jnp.float32(probability), (n,)), crossing, layers
    )
    before = jnp.arange(layers)[None, :] < crossing[:, None]
    return jnp.where(before[:, :, None], first[:, None], second[:, None])


def mean_style(
    mean: Float[Array, " dim"], w: Float[Array, "batch dim"], *, decay: Number = 0.995
) -> Float[Array, " dim"]:
    """Running mean of the styles: m <- m + (1 - decay) (mean w - m), without gradient.

    Karras et al. 2019 (arXiv:1812.04948), appendix B; what `truncate` draws styles to.

    >>> mean_style(jnp.zeros(2), jnp.ones((4, 2)), decay=0.5)
    Array([0.5, 0.5], dtype=float32)
    """
    checks.between("decay", decay, 0, 1)
    checks.rank("w", w, 2)
    checks.shape("mean", mean, w.shape[1:])
    return stop_gradient(mean + (1 - decay) * (jnp.mean(at_least_float32(w), axis=0) - mean))


def truncate(
    w: Float[Array, "batch *layers dim"], mean: Float[Array, " dim"], psi: Number
) -> Float[Array, "batch *layers dim"]:
    """m + psi (w - m): psi = 1 leaves the styles, smaller trades variety for quality.

    Scores are taken at psi = 1 (Karras et al. 2019, appendix B).

    >>> truncate(jnp.array([[2.0, 0.0]]), mean=jnp.zeros(2), psi=0.5)
    Array([[1., 0.]], dtype=float32)
    """
    checks.shape("mean", mean, w.shape[-1:])
    centre = mean.reshape((1,) * (w.ndim - 1) + mean.shape)
    return centre + psi * (w - centre)


def every_nth(
    step: int | Int[Array, ""], every: int, term: Callable[[], Float[Array, "*shape"]]
) -> Float[Array, "*shape"]:
    """`every` times the term in each step that `every` divides, 0 and no work in the others.

    Its mean over steps is the term (lazy regularisation; Karras et al. 2020, appendix B, who also
    slow Adam down by c = every / (every + 1): rate lr c, decays b^c).

    >>> every_nth(16, 16, lambda: jnp.ones(2)), every_nth(17, 16, lambda: jnp.ones(2))
    (Array([16., 16.], dtype=float32), Array([0., 0.], dtype=float32))
    """
    checks.integer("every", every, 1)
    if every == 1:
        return term()
    like = jax.eval_shape(term)
    zeros = lambda: jnp.zeros(like.shape, like.dtype)  # noqa: E731
    return jax.lax.cond(step % every == 0, lambda: every * term(), zeros)
