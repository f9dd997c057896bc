"""The transformer block, and stacks of it that compile in a time that does not grow with depth."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from genjax import checks, sharding
from genjax.networks.layers import Cache, Norm, attention, drop, on_flat, rotary, write_cache
from genjax.numerics import expand_to
from genjax.typing import Params, PRNGKey

__all__ = ["Block"]

ATTENDED = "attended"
# What a block keeps for its backward pass: products and what attention gave. Norms and activations
# are cheaper to compute again than to write to memory and read.
KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENDED),
)


class Block(nn.Module):
    """Pre-norm transformer block: x <- x + attention(norm(x)), then x <- x + mlp(norm(x)).

    heads: divides the width of x. kv_heads: heads of keys and values, each read by
    heads / kv_heads query heads; `heads` by default. hidden: width of the MLP, by default 4 times
    that of x. mlp: "gelu" (its tanh form) or "swiglu", silu(W x) * (V x). rotary: layout of rotary
    positions. qk_norm: RMS norm of each query and key. dropout: on what either branch adds, where
    a key is given. residual_init: of the two maps whose results are added to x.

    conditioned (adaLN-zero; Peebles & Xie 2023, arXiv:2212.09748, section 3.2): norms have no
    parameters; shift, scale and gate of the attention, then of the MLP, are linear in
    silu(condition) and start at 0: x <- x + gate * attention(norm(x) (1 + scale) + shift).
    """

    heads: int
    kv_heads: int | None = None
    hidden: int | None = None
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    causal: bool = False
    conditioned: bool = False
    rotary: Literal["half", "interleaved"] | None = None
    rotary_base: float = 10_000.0
    qk_norm: bool = False
    use_bias: bool = True
    epsilon: float = 1e-6
    dropout: float = 0.0
    kernel_init: Callable[..., Array] = nn.initializers.lecun_normal()
    residual_init: Callable[..., Array] = nn.initializers.lecun_normal()
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        condition: Float[Array, "batch features"] | None = None,
        mask: Bool[Array, "length keys"] | Bool[Array, "rows length keys"] | None = None,
        cache: Cache | None = None,
        start: int | Int[Array, ""] | Int[Array, " batch"] = 0,
        positions: Int[Array, " length"] | Int[Array, "rows length"] | None = None,
        temperature: Float[Array, " batch"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[Float[Array, "batch length width"], Cache | None]:
        """Return the block's output, and the cache with the keys and values of x (or None).

        mask: True where a position of x may read a key: one of x, or one of all the cache's places.
        cache: x continues a sequence at the places start, start + 1, ... (`start` of all rows, or
        of each) and reads the places up to its own. positions: for rotary positions, where they
        are not these places. temperature: divides the logits of the attention.
        """
        checks.one_of("mlp", self.mlp, ("gelu", "swiglu"))
        if (condition is not None) != self.conditioned:
            given = "no condition" if condition is None else "a condition"
            raise ValueError(f"{given} is given, but the block has conditioned={self.conditioned}")
        zero, six = nn.initializers.zeros, None
        if condition is not None:
            layer = nn.Dense(6 * x.shape[-1], True, self.dtype, kernel_init=zero, name="modulation")
            six = jnp.split(layer(nn.silu(condition))[:, None], 6, axis=-1)

        def branch(i: int, name: str, inner: Callable[[Array], Array], x: Array) -> Array:
            affine = not self.conditioned
            bias = affine and self.use_bias and self.norm == "layer"
            h = Norm(self.norm, affine, bias, self.epsilon, name=f"norm_{name}")(x)
            shift, scale, gate = (0, 0, 1) if six is None else six[3 * i : 3 * i + 3]
            h = inner(h if six is None else h * (1 + scale) + shift)
            h = drop(h, self.dropout, dropout_key, i)
            return (x + (h if six is None else gate * h)).astype(x.dtype)

        written = cache

        def attend(h: Array) -> Array:
            nonlocal written
            h, written = self._attend(h, mask, cache, start, positions, temperature)
            return h

        x = branch(0, "attention", attend, x)
        return branch(1, "mlp", self._mlp, x), written

    def _dense(self, x: Array, features: int, name: str, residual: bool = False) -> Array:
        init = self.residual_init if residual else self.kernel_init
        return on_flat(
            nn.Dense(features, self.use_bias, self.dtype, kernel_init=init, name=name), x
        )

    def _attend(
        self, h: Array, mask: Any, cache: Cache | None, start: Any, positions: Any, temperature: Any
    ) -> tuple[Array, Cache | None]:
        batch, length, width = h.shape
        heads, kv_heads = self.heads, self.kv_heads or self.heads
        if width % heads:
            raise ValueError(f"width must be a multiple of heads = {heads}, got {width}")
        qkv = self._dense(h, (heads + 2 * kv_heads) * (width // heads), "qkv")
        qkv = qkv.reshape(batch, length, heads + 2 * kv_heads, width // heads)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        if self.qk_norm:
            q = Norm("rms", epsilon=self.epsilon, name="norm_query")(q)
            k = Norm("rms", epsilon=self.epsilon, name="norm_key")(k)
        places = jnp.reshape(start, (-1, 1)) + jnp.arange(length)[None]
        if self.rotary is not None:
            turns = places if positions is None else positions
            q, k = (rotary(z, turns, base=self.rotary_base, layout=self.rotary) for z in (q, k))
        if temperature is not None:
            q = (q / expand_to(temperature, q)).astype(q.dtype)
        if cache is not None:
            cache = write_cache(cache, k, v, start)
            k, v = (jnp.swapaxes(z, 1, 2).astype(q.dtype) for z in cache)
            before = jnp.arange(k.shape[1])[None, None] <= places[:, :, None]
            mask = before if mask is None else before & mask.reshape(-1, *mask.shape[-2:])
        out = attention(q, k, v, mask=mask, causal=self.causal and cache is None)
        out = checkpoint_name(out, ATTENDED)
        return self._dense(out.reshape(h.shape), width, "out", residual=True), cache

    def _mlp(self, h: Array) -> Array:
        hidden = self.hidden or 4 * h.shape[-1]
        up = self._dense(h, hidden, "up")
        gated = self.mlp == "swiglu"
        up = nn.silu(self._dense(h, hidden, "gate")) * up if gated else nn.gelu(up)
        return self._dense(up, h.shape[-1], "down", residual=True)


def stacked(
    owner: nn.Module, name: str, module: nn.Module, num: int, *inputs: Any, **options: Any
) -> Params:
    """Parameters of `num` copies of a module on a leading axis, as parameter `name` of `owner`.

    module: unbound (`parent=None`). Each copy is initialised with a key of its own.
    """
    # `param` would trace `init` again at every call, to compare shapes.
    if owner.has_variable("params", name):
        return owner.get_variable("params", name)
    init = jax.vmap(lambda key: module.init(key, *inputs, **options)["params"])
    return owner.param(name, lambda key: init(jax.random.split(key, num)))


def apply_stack(
    block: nn.Module,
    params: Params,
    x: Float[Array, "batch length width"],
    *,
    cache: Any = None,
    dropout_key: PRNGKey | None = None,
    remat: bool = False,
    own_memory: bool = False,
    **options: Any,
) -> tuple[Float[Array, "batch length width"], Any]:
    """Apply the blocks whose parameters are `stacked` one after another, in one scan.

    cache: of `empty_cache`, or another pytree that the block takes, stacked. remat: recompute each
    block in the backward pass, not only its norms and activations. own_memory: copy a layer's
    parameters before they are used. options: what every block is called with.
    """

    def step(x: Array, scanned: tuple) -> Any:
        layer, kept, i = scanned
        layer, x = sharding.gathered(layer), sharding.split_batch(x)
        layer = _own_memory(layer, i) if own_memory else layer
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
        return block.apply({"params": layer}, x, cache=kept, dropout_key=key, **options)

    num = len(jax.tree.leaves(params)[0])
    # In a loop nothing is computed twice by accident: CSE need not be prevented.
    step = jax.checkpoint(step, policy=None if remat else KEPT, prevent_cse=False)
    return jax.lax.scan(step, x, (params, cache, jnp.arange(num)))


def _own_memory(layer: Params, i: Array) -> Params:
    """The layer's parameters as arrays of their own, by a quotient that the compiler cannot drop.

    Read where they lie among all layers', a loop over several of them is no vector loop on CPU.
    """
    one = jnp.where(i >= 0, 1.0, 2.0)
    return jax.tree.map(lambda p: (p / one).astype(p.dtype), layer)


def empty_cache(
    block: Block, num: int, batch: int, length: int, width: int, dtype: Any = jnp.float32
) -> Cache:
    """The cache of a stack of `num` blocks, for sequences of that length."""
    shape = (num, batch, block.kv_heads or block.heads, length, width // block.heads)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
