"""Conditioners, and the flows made of them: RealNVP, spline flow, Glow, planar flow.

Each flow is a module from data to base: `flow.apply(params, x)` gives (z, log_det [batch]), and
`flow.apply(params, z, inverse=True)` the way back. The maps themselves are those of genjax.flows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from genjax import flows
from genjax.flows import Bijection, Transformer
from genjax.networks.layers import drop, on_flat
from genjax.typing import PRNGKey

__all__ = [
    "ConvConditioner",
    "CouplingFlow",
    "Glow",
    "MLPConditioner",
    "PlanarFlow",
    "RealNVP",
    "SplineFlow",
]

Activation = Callable[[Array], Array]


class MLPConditioner(nn.Module):
    """Residual MLP on the last axis whose last layer starts at 0, so that a flow starts simple."""

    features: int
    hidden: Sequence[int] = (128, 128)
    activation: Activation = nn.silu
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch dim"], *, dropout_key: PRNGKey | None = None
    ) -> Float[Array, "batch features"]:
        for i, width in enumerate(self.hidden):
            h = drop(self.activation(nn.Dense(width)(x)), self.dropout, dropout_key, i)
            x = x + h if i and h.shape == x.shape else h
        return nn.Dense(self.features, kernel_init=nn.initializers.zeros_init())(x)


class ConvConditioner(nn.Module):
    """3x3, 1x1 and 3x3 convolutions, the last from 0 (Kingma and Dhariwal, 2018, section 3.3).

    Written as products over patches: small images, where that is faster than a convolution.
    """

    features: int
    width: int = 64
    activation: Activation = nn.silu
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, dropout_key: PRNGKey | None = None
    ) -> Float[Array, "batch height width features"]:
        h = self.activation(on_flat(nn.Dense(self.width), _patches(x)))
        h = drop(h, self.dropout, dropout_key, 0)
        h = h + drop(self.activation(nn.Dense(self.width)(h)), self.dropout, dropout_key, 1)
        zeros = nn.initializers.zeros_init()
        return on_flat(nn.Dense(self.features, kernel_init=zeros), _patches(h))


def _patches(x: Array) -> Array:
    """The 3x3 surroundings of each pixel as channels, zeros beyond the border."""
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=-1
    )


def _run(bijection: Bijection, params: Any, x: Any, inverse: bool) -> tuple[Any, Array]:
    return (bijection.inverse if inverse else bijection.forward)(params, x)


class CouplingFlow(nn.Module):
    """`layers` coupling maps of vectors [d], d even, each with a conditioner of its own.

    transformer: what a coupling does to one number. shuffle: reorder the dimensions before each
    coupling, in fixed orders drawn from `seed`; without, the two halves take turns (RealNVP).
    """

    layers: int = 8
    hidden: Sequence[int] = (128, 128)
    transformer: Transformer = flows.affine()
    shuffle: bool = False
    activation: Activation = nn.silu
    dropout: float = 0.0
    seed: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch dim"],
        *,
        inverse: bool = False,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[Float[Array, "batch dim"], Float[Array, " batch"]]:
        dim, rng = x.shape[-1], np.random.default_rng(self.seed)
        conditioners: list[Any] = []
        for i in range(self.layers):
            net = MLPConditioner(
                self.transformer.size * (dim // 2),
                self.hidden,
                self.activation,
                self.dropout,
                name=f"conditioner_{i}",
            )
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            conditioners.append(lambda _, h, net=net, key=key: net(h, dropout_key=key))
        if not self.shuffle:
            flow = flows.alternating_couplings(conditioners, self.transformer)
            return _run(flow, [None] * self.layers, x, inverse)
        parts: list[Bijection] = []
        for i, conditioner in enumerate(conditioners):
            # Every other order swaps the halves of the one before: all dimensions move.
            turn = np.roll(np.arange(dim), dim // 2)
            order = rng.permutation(dim) if i % 2 == 0 else turn
            parts += [flows.permutation(order), flows.coupling(conditioner, self.transformer)]
        return _run(flows.chain(parts), [None] * len(parts), x, inverse)


class RealNVP(CouplingFlow):
    """Affine couplings whose halves take turns (Dinh et al., 2017)."""


class SplineFlow(CouplingFlow):
    """Rational-quadratic couplings on the unit interval, shuffled (Durkan et al., 2019).

    For data in [0, 1]^d and a uniform base; other transformers for other ranges.
    """

    layers: int = 6
    transformer: Transformer = flows.rational_quadratic(16, 0.0, 1.0)
    shuffle: bool = True


class Glow(nn.Module):
    """Multi-scale flow of images: squeeze, then `num_steps` of actnorm, 1x1, coupling, per level.

    Kingma and Dhariwal (2018). z is a list, one array per level (see `shapes`). Actnorm is set
    from the batch that `init` is called with; 1x1 maps start as rotations drawn from `seed`.
    """

    levels: int = 2
    num_steps: int = 8
    width: int = 64
    transformer: Transformer = flows.affine()
    dropout: float = 0.0
    seed: int = 0

    @nn.compact
    def __call__(
        self, x: Any, *, inverse: bool = False, dropout_key: PRNGKey | None = None
    ) -> tuple[Any, Float[Array, " batch"]]:
        # The last level's array tells the shape of the image in either direction.
        image = self._image(x[-1].shape[1:]) if inverse else x.shape[1:]
        parts: list[Bijection] = []
        trees: list[Any] = []
        for level, shape in enumerate(self._level_shapes(image)):
            steps = range(level * self.num_steps, (level + 1) * self.num_steps)
            inner = [self._step(i, shape, dropout_key) for i in steps]
            parts.append(flows.chain([flows.squeeze(), *inner]))
            trees.append([None] * (1 + self.num_steps))
        return _run(flows.multi_scale(parts), trees, x, inverse)

    def shapes(self, image: Sequence[int]) -> list[tuple[int, ...]]:
        """The shapes of z for images of that shape: what the base must have."""
        inner = self._level_shapes(tuple(image))
        return [(*s[:2], s[2] // 2) for s in inner[:-1]] + [inner[-1]]

    def _level_shapes(self, image: Sequence[int]) -> list[tuple[int, ...]]:
        h, w, c = image
        if h % 2**self.levels or w % 2**self.levels:
            raise ValueError(
                f"Glow with {self.levels} levels needs sides that are multiples of "
                f"{2**self.levels}, got images of {tuple(image)}"
            )
        # A level squeezes to four times the channels, and all but the last keep half of them.
        return [(h // 2 ** (i + 1), w // 2 ** (i + 1), c * 4 * 2**i) for i in range(self.levels)]

    def _image(self, last: Sequence[int]) -> tuple[int, ...]:
        h, w, c = last
        return (h * 2**self.levels, w * 2**self.levels, c // (4 * 2 ** (self.levels - 1)))

    def _step(self, index: int, shape: tuple[int, ...], dropout_key: PRNGKey | None) -> Bijection:
        """One step of flow, its parameters closed over."""
        channels, half = shape[-1], shape[-1] // 2
        rotation = flows.random_rotation(self.seed + index, channels)
        order, start = flows.plu_init(rotation)
        plu = self.param(f"plu_{index}", lambda _: start)
        net = ConvConditioner(
            self.transformer.size * half,
            self.width,
            dropout=self.dropout,
            name=f"conditioner_{index}",
        )
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
        norm = flows.actnorm()

        def actnorm_params(x: Array) -> Any:
            return self.param(f"actnorm_{index}", lambda _: flows.actnorm_init(x))

        rest = flows.chain(
            [
                flows.plu(order),
                flows.coupling(lambda _, h: net(h, dropout_key=key), self.transformer),
            ]
        )

        def forward(_: Any, x: Array) -> tuple[Array, Array]:
            x, scaled = norm.forward(actnorm_params(x), x)
            y, log_det = rest.forward([plu, None], x)
            return y, scaled + log_det

        def inverse(_: Any, y: Array) -> tuple[Array, Array]:
            y, log_det = rest.inverse([plu, None], y)
            x, scaled = norm.inverse(actnorm_params(y), y)
            return x, log_det + scaled

        return Bijection(forward, inverse)


class PlanarFlow(nn.Module):
    """`depth` planar maps in one scan (Rezende and Mohamed, 2015), from data to base."""

    depth: int = 32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch dim"], *, inverse: bool = False
    ) -> tuple[Float[Array, "batch dim"], Float[Array, " batch"]]:
        def start(key: PRNGKey) -> Any:
            keys = jax.random.split(key, self.depth)
            return jax.vmap(lambda k: flows.planar_init(k, x.shape[-1]))(keys)

        return _run(flows.repeat(flows.planar()), self.param("planar", start), x, inverse)
