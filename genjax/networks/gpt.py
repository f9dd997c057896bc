"""GPT: a transformer that reads tokens and predicts each from those before it.

Radford et al. 2019 (GPT-2) with learned positions, layer norm, GELU and tied embeddings; rotary
positions, RMS norm, SwiGLU and grouped heads make it a network of the Llama kind.
"""

from operator import itemgetter
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from genjax import checks
from genjax.networks.layers import Cache, Norm, drop, on_flat
from genjax.networks.transformer import Block, apply_stack, stacked
from genjax.typing import Params, PRNGKey

__all__ = ["GPT"]

Tokens = Int[Array, "batch length"] | UInt[Array, "batch length"]
Caches = tuple[Cache, ...]


class GPT(nn.Module):
    """Logits [batch, length, vocabulary] of tokens [batch, length].

    Causal: position t predicts token t and sees the tokens before it alone; the shift by one is
    inside, and before the first token stands the start token, whose number is `vocabulary`.
    causal=False: every position reads all tokens, and `vocabulary` is the mask token (the network
    of masked diffusion).

    depth: number of blocks, scanned, so that compilation does not grow with it. positions:
    "learned", a row for each of max_length places, or "rotary" in the layout `rotary_layout`, which
    has no longest length. tied: logits are products with the rows of the embedding. dropout: of the
    embedding and of each branch, where a key is given. Weights start as N(0, 0.02), those of a
    branch's last map divided by sqrt(2 depth). The other fields are `Block`'s.
    """

    vocabulary: int
    depth: int = 6
    width: int = 256
    heads: int = 8
    kv_heads: int | None = None
    hidden: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    positions: Literal["learned", "rotary"] = "learned"
    max_length: int = 1024
    rotary_layout: Literal["half", "interleaved"] = "half"
    rotary_base: float = 10_000.0
    qk_norm: bool = False
    use_bias: bool = True
    tied: bool = True
    causal: bool = True
    epsilon: float = 1e-5
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = None

    def setup(self) -> None:
        checks.one_of("positions", self.positions, ("learned", "rotary"))
        for name in ("vocabulary", "depth", "width", "heads"):
            checks.integer(name, getattr(self, name), 1)
        start, rows = nn.initializers.normal(0.02), self.vocabulary + 1
        self.embedding = self.param("embedding", start, (rows, self.width), jnp.float32)
        if self.positions == "learned":
            shape = (self.max_length, self.width)
            self.places = self.param("places", start, shape, jnp.float32)
        x = jnp.zeros((1, 1, self.width), self.dtype or self.embedding.dtype)
        self.blocks = stacked(self, "blocks", self.block(), self.depth, x)
        bias = self.use_bias and self.norm == "layer"
        self.last_norm = Norm(self.norm, use_bias=bias, epsilon=self.epsilon)
        if not self.tied:
            self.head = nn.Dense(self.vocabulary, False, self.dtype, kernel_init=start)

    def block(self) -> Block:
        """One block, whose parameters are stacked under "blocks"."""
        return Block(
            self.heads,
            self.kv_heads,
            self.hidden,
            self.norm,
            self.mlp,
            causal=self.causal,
            rotary=self.rotary_layout if self.positions == "rotary" else None,
            rotary_base=self.rotary_base,
            qk_norm=self.qk_norm,
            use_bias=self.use_bias,
            epsilon=self.epsilon,
            dropout=self.dropout,
            kernel_init=nn.initializers.normal(0.02),
            residual_init=nn.initializers.normal(0.02 / (2 * self.depth) ** 0.5),
            dtype=self.dtype,
            parent=None,
        )

    def __call__(
        self,
        tokens: Tokens,
        *,
        segments: Int[Array, "batch length"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch length vocabulary"]:
        """Logits of every position.

        segments: the number of the document that a token belongs to, -1 for padding; documents of
        one row do not see each other, and each has its own start token and positions. Raises
        ValueError for a token outside the vocabulary (where traced: NaN) and for more positions
        than there are.
        """
        tokens = self._checked(tokens, segments)
        length, mask = tokens.shape[1], None
        places = jnp.arange(length)[None]
        first = places == 0
        if segments is not None:
            tokens = jnp.where(segments >= 0, tokens, 0)
            mask = segments[:, :, None] == segments[:, None, :]
            changed = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-2)[:, :-1]
            first = changed | first
            places = places - jax.lax.cummax(jnp.where(changed, places, 0), axis=1)
        if self.causal:
            before = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
            tokens = jnp.where(first, self.vocabulary, before)
        h = self._embed(tokens, places)
        h = drop(h, self.dropout, dropout_key, self.depth)
        options = {"mask": mask, "positions": places, "dropout_key": dropout_key}
        h, _ = apply_stack(self.block(), self.blocks, h, remat=self.remat, **options)
        return self._logits(h)

    def empty_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> tuple[Cache, ...]:
        """Keys and values of no position yet, of each layer."""
        heads = self.kv_heads or self.heads
        zeros = jnp.zeros((batch, heads, length, self.width // self.heads), dtype)
        return (Cache(zeros, zeros),) * self.depth

    def unstacked(self, params: Params) -> Params:
        """The parameters with their layers apart, which `step` takes as well.

        Made outside of a loop over tokens they spare it a copy of every matrix for every token:

            step = partial(net.apply, net.unstacked(params), method="step")
        """
        layers = _layers(params["params"]["blocks"], self.depth)
        return {**params, "params": {**params["params"], "blocks": layers}}

    def step(
        self, cache: Caches, token: Int[Array, " batch"], position: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch vocabulary"], Caches]:
        """Logits of each row's `position`, where `token` is the one before it.

        At position 0 that is the start token. The layers are not scanned here. Raises ValueError
        for a known position beyond the cache or the learned positions; where it is traced the
        logits become NaN.
        """
        logits, cache = self._read(cache, token[:, None], position)
        return logits[:, 0], cache

    def prefill(
        self, cache: Caches, tokens: Tokens
    ) -> tuple[Float[Array, "batch length vocabulary"], Caches]:
        """Logits of the first positions, as of the full pass, and the cache that they leave.

        The step that follows gets the last of these tokens, and their number as position.
        """
        start = jnp.full((len(tokens), 1), self.vocabulary)
        tokens = self._checked(tokens, None)
        return self._read(cache, jnp.concatenate([start, tokens[:, :-1]], axis=1), 0)

    def _checked(self, tokens: Array, segments: Array | None) -> Array:
        checks.rank("tokens", tokens, 2)
        most = self.vocabulary - 1 if self.causal else self.vocabulary
        if checks.is_concrete(tokens) and segments is None:
            checks.between("tokens", tokens, 0, most)
        if segments is not None:
            checks.same_shape(tokens=tokens, segments=segments)
            if checks.is_concrete(tokens) and checks.is_concrete(segments):
                real = np.asarray(tokens)[np.asarray(segments) >= 0]
                checks.between("tokens", real, 0, most)
        if self.positions == "learned" and tokens.shape[1] > self.max_length:
            raise ValueError(
                f"tokens must be at most max_length = {self.max_length} long, got {tokens.shape}"
            )
        # The start token's row, `vocabulary`, is no other token's.
        tokens = tokens.astype(jnp.int32)
        return jnp.where(tokens > most, self.vocabulary + 1, tokens)

    def _embed(self, tokens: Array, places: Array) -> Array:
        # Out of range is NaN in jnp.take, unless negative.
        rows = jnp.where(tokens < 0, self.vocabulary + 1, tokens)
        h = jnp.take(self.embedding, rows, axis=0)
        if self.positions == "learned":
            h = h + jnp.take(self.places, places, axis=0)
        return h if self.dtype is None else h.astype(self.dtype)

    def _logits(self, h: Array) -> Array:
        h = self.last_norm(h)
        if not self.tied:
            return on_flat(self.head, h)
        return on_flat(lambda h: h @ self.embedding[: self.vocabulary].T.astype(h.dtype), h)

    def _read(self, cache: Caches, tokens: Array, start: Any) -> tuple[Array, Caches]:
        """Read tokens at the places start, start + 1, ... of all rows, or of each."""
        if not self.causal:
            raise ValueError("a cache needs causal=True: without it every position reads all")
        last = cache[0].keys.shape[2] - 1
        if self.positions == "learned":
            last = min(last, self.max_length - 1)
        end = start + tokens.shape[1] - 1
        checks.between("position", end, 0, last)
        places = jnp.reshape(start, (-1, 1)) + jnp.arange(tokens.shape[1])[None]
        h, written = self._embed(tokens, places), []
        for layer, mine in zip(_layers(self.blocks, self.depth), cache, strict=True):
            h, mine = self.block().apply({"params": layer}, h, cache=mine, start=start)
            written.append(mine)
        if not self.tied:
            return self._logits(h), tuple(written)
        # The start token's row too: without it the rows would be copied for every token.
        logits = jnp.einsum("bld,vd->blv", self.last_norm(h), self.embedding.astype(h.dtype))
        return logits[..., : self.vocabulary], tuple(written)


def _layers(blocks: Any, depth: int) -> tuple[Params, ...]:
    """The parameters of each block, of the stacked ones or of those that are apart already."""
    if isinstance(blocks, tuple):
        return blocks
    return tuple(jax.tree.map(itemgetter(i), blocks) for i in range(depth))
