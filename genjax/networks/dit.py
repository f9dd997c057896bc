"""Transformers of (x_t, t, label) over the patches of an image or of its latents."""

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.networks.layers import (
    Conditioning,
    Norm,
    on_flat,
    patchify,
    sinusoidal,
    unpatchify,
)
from genjax.networks.transformer import Block, apply_stack, stacked
from genjax.typing import PRNGKey

__all__ = ["DiT", "patch_positions"]

ZERO = nn.initializers.zeros


def patch_positions(height: int, width: int, features: int) -> Float[Array, "tokens features"]:
    """Fixed positions of height x width patches, row by row: sines and cosines of row and column.

    The first half of the features is `sinusoidal` of the row, the second of the column. Raises
    ValueError unless the features divide by four.

    >>> patch_positions(4, 4, 16).shape
    (16, 16)
    """
    checks.integer("features", features, 4)
    if features % 4:
        raise ValueError(f"features must be a multiple of 4 for rows and columns, got {features}")
    row, column = (x.reshape(-1) for x in jnp.indices((height, width)))
    return jnp.concatenate([sinusoidal(z, features // 2) for z in (row, column)], axis=1)


class DiT(nn.Module):
    """Diffusion transformer: patches, blocks conditioned by adaLN-zero, patches again.

    Peebles & Xie 2023 (arXiv:2212.09748), section 3.2; trained by flow matching it is SiT (Ma et
    al. 2024). width: of a token, a multiple of 4 and of heads. The published S, B, L and XL have
    width 384, 768, 1024 and 1152, depth 12, 12, 24 and 28, heads 6, 12, 16 and 16. end: a second
    time, for mean velocities u(x, t, end). classes: as in `Conditioning`. conditioning "tokens"
    puts time and label in front of the patches instead, as one token each, and long_skips joins
    the first half of the blocks to the second: both together are U-ViT (Bao et al. 2023,
    arXiv:2209.12152). positions=False leaves the tokens without an order. remat: recompute blocks
    in the backward pass.

    Every block starts as the identity under adaLN-zero, and the output at 0, of the shape of x.
    """

    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    classes: int | None = None
    conditioning: Literal["adaln", "tokens"] = "adaln"
    long_skips: bool = False
    positions: bool = True
    qk_norm: bool = True
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Float[Array, " batch"],
        label: Int[Array, " batch"] | None = None,
        *,
        end: Float[Array, " batch"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch height width channels"]:
        checks.one_of("conditioning", self.conditioning, ("adaln", "tokens"))
        if self.long_skips and self.depth % 2 == 0:
            raise ValueError(f"depth must be odd with long skips, got {self.depth}")
        patches, grid = (
            patchify(x, self.patch),
            (x.shape[1] // self.patch, x.shape[2] // self.patch),
        )
        h = on_flat(nn.Dense(self.width, dtype=self.dtype, name="embed"), patches)
        if self.positions:
            h = h + patch_positions(*grid, self.width).astype(h.dtype)[None]
        condition = Conditioning(self.width, self.classes, dtype=self.dtype, name="condition")
        c = condition(t, label)
        if end is not None:
            checks.shape("end", end, t.shape)
            c = c + Conditioning(self.width, dtype=self.dtype, name="step")(end - t)
        adaln = self.conditioning == "adaln"
        if not adaln:
            h = jnp.concatenate([c[:, None].astype(h.dtype), h], axis=1)
        h = self._blocks(h, {"condition": c} if adaln else {}, dropout_key)[:, 0 if adaln else 1 :]
        h = Norm(use_scale=not adaln, use_bias=not adaln, name="norm")(h)
        if adaln:
            last = nn.Dense(2 * self.width, dtype=self.dtype, kernel_init=ZERO, name="modulation")
            shift, scale = jnp.split(last(nn.silu(c))[:, None], 2, axis=-1)
            h = h * (1 + scale) + shift
        out = nn.Dense(patches.shape[-1], dtype=self.dtype, kernel_init=ZERO, name="out")
        return unpatchify(on_flat(out, h), self.patch, x.shape[1:])

    def _blocks(self, h: Array, options: dict[str, Any], dropout_key: Any) -> Array:
        block = Block(
            self.heads,
            conditioned=bool(options),
            qk_norm=self.qk_norm,
            dropout=self.dropout,
            dtype=self.dtype,
            parent=None,
        )
        if not self.long_skips:
            params = stacked(self, "blocks", block, self.depth, h, **options)
            more = {"dropout_key": dropout_key, "remat": self.remat, **options}
            return apply_stack(block, params, h, **more)[0]
        half = self.depth // 2
        first = stacked(self, "first", block, half, h, **options)
        middle = stacked(self, "middle", block, 1, h, **options)
        second = stacked(self, "second", block, half, h, **options)
        joint = nn.Dense(self.width, dtype=self.dtype, parent=None)
        joints = stacked(self, "joints", joint, half, jnp.concatenate([h, h], axis=-1))

        def run(h: Array, layer: Any, number: Any) -> Array:
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
            return block.apply({"params": layer}, h, dropout_key=key, **options)[0]

        def down(h: Array, scanned: Any) -> tuple[Array, Array]:
            h = run(h, *scanned)
            return h, h

        def up(h: Array, scanned: Any) -> tuple[Array, None]:
            layer, number, skip, weights = scanned
            joined = jnp.concatenate([h, skip], axis=-1)
            merge: Any = partial(joint.apply, {"params": weights})
            h = on_flat(merge, joined)
            return run(h, layer, number), None

        if self.remat:
            down, up = jax.checkpoint(down), jax.checkpoint(up)
        h, kept = jax.lax.scan(down, h, (first, jnp.arange(half)))
        h = run(h, jax.tree.map(lambda leaf: leaf[0], middle), half)
        scanned = (second, half + 1 + jnp.arange(half), kept[::-1], joints)
        return jax.lax.scan(up, h, scanned)[0]
