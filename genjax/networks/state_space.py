"""Networks of state space layers: S4, S4D, Mamba and Mamba-2 blocks, stacked and scanned.

The mathematics is in `genjax.state_space`, which has arrays and no parameters; here are the maps
around it, what the parameters begin with, and which of them an optimiser treats apart.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from genjax import checks, state_space
from genjax.networks.layers import Norm, drop, on_flat
from genjax.networks.transformer import apply_stack, stacked
from genjax.numerics import at_least_float32
from genjax.typing import Params, PRNGKey

__all__ = ["RATES", "StateSpace", "StateSpaceBlock", "state_space_groups"]

Kind = Literal["s4", "s4d", "mamba", "mamba2"]
Tokens = Int[Array, "batch length"] | UInt[Array, "batch length"]
KINDS = ("s4", "s4d", "mamba", "mamba2")
STATES = {"s4": 64, "s4d": 64, "mamba": 16, "mamba2": 128}
# A, the step and the skip, by the names of their parameters. They are trained slowly, and stay
# float32 where `uncast=RATES` is given to the train step: a recurrence compounds their rounding.
RATES = ("log_rate", "frequency", "low_rank", "drive", "log_dt", "dt_bias", "log_a", "skip")


def state_space_groups(params: Params) -> Params:
    """ "slow" for A, the steps and D of every layer, "rest" for all else, in the shape of params.

    For `optax.multi_transform`: the slow ones are trained at 1e-3 at most and without weight decay,
    which would pull rates and steps to 1.

    >>> rates = {"slow": optax.adam(1e-3), "rest": optax.adamw(3e-3)}
    >>> optimizer = optax.multi_transform(rates, state_space_groups)
    """

    def group(path: Any, _: Any) -> str:
        return "slow" if getattr(path[-1], "key", None) in RATES else "rest"

    return jax.tree_util.tree_map_with_path(group, params)


def log_uniform(low: float, high: float) -> Callable[..., Array]:
    """An initialiser: the logarithm of a number uniform in the logarithm between low and high."""

    def init(key: PRNGKey, shape: Any, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, jnp.log(low), jnp.log(high))

    return init


def log_dt_bias(key: PRNGKey, shape: Any, dtype: Any = jnp.float32) -> Array:
    """softplus of it is log-uniform in [1e-3, 0.1], at least 1e-4."""
    dt = jnp.maximum(jnp.exp(log_uniform(1e-3, 0.1)(key, shape, dtype)), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))


class StateSpaceBlock(nn.Module):
    """Pre-norm block of one state space layer, x <- x + layer(norm(x)); the sum is in float32.

    kind: "s4" and "s4d" apply their model to every feature, then GELU and a gated linear map
    (Gu, Goel, Re 2022; Gu et al. 2022); "mamba" is Gu & Dao 2023, "mamba2" Dao & Gu 2024, with one
    projection to z, x, B, C and dt and an RMS norm of y silu(z). states: N, by default 64, 16 for
    mamba and 128 for mamba2. expand, taps: width of the inner features over that of x, and length
    of the short convolution (mamba). head, groups: features of a head, by default 64 or all where
    they are fewer, and sets of B and C (mamba2). chunk: positions scanned together, by default that
    of `selective_scan` or `ssd`. dt_range: of the first steps, log-uniform (s4, s4d; with mamba it
    is [1e-3, 0.1]).

    Returns (x, cache). cache: (tail, state) of the positions before, as `empty` gives it; None
    begins at 0 and gives None. where: positions that exist, the others change nothing.
    """

    kind: Kind = "mamba"
    states: int | None = None
    expand: int = 2
    taps: int = 4
    head: int | None = None
    groups: int = 1
    chunk: int | None = None
    dt_range: tuple[float, float] = (1e-3, 0.1)
    norm: Literal["layer", "rms"] = "rms"
    dropout: float = 0.0
    residual_init: Callable[..., Array] = nn.initializers.lecun_normal()
    dtype: Any = None

    @property
    def size(self) -> int:
        """States of a channel."""
        return self.states or STATES[self.kind]

    def empty(self, batch: int, width: int, dtype: Any = jnp.float32) -> tuple[Array, Array]:
        """The cache before the first position: the tail of the convolution, and the state."""
        inner, before = self.expand * width, self.taps - 1
        if self.kind in ("s4", "s4d"):
            kind = jnp.promote_types(dtype, jnp.complex64)
            state = jnp.zeros((batch, width, self.size // 2), kind)
            return jnp.zeros((batch, 0, width), dtype), state
        if self.kind == "mamba":
            state = jnp.zeros((batch, inner, self.size), dtype)
            return jnp.zeros((batch, before, inner), dtype), state
        mixed = inner + 2 * self.groups * self.size
        head = self.head or min(inner, 64)
        state = jnp.zeros((batch, inner // head, head, self.size), dtype)
        return jnp.zeros((batch, before, mixed), dtype), state

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        *,
        cache: Any = None,
        where: Bool[Array, "batch length"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> tuple[Float[Array, "batch length width"], Any]:
        checks.one_of("kind", self.kind, KINDS)
        if where is not None:
            x = jnp.where(where[..., None], x, 0)
        h = Norm(self.norm, name="norm")(x)
        h = h if self.dtype is None else h.astype(self.dtype)
        layer = {"mamba": self._mamba, "mamba2": self._mamba2}.get(self.kind, self._s4)
        h, written = layer(h, cache or (None, None), where, dropout_key)
        h = drop(h, self.dropout, dropout_key, 0)
        if where is not None:
            h = jnp.where(where[..., None], h, 0)
        if cache is not None:  # in the types that it came in, whatever the layer computes in
            cache = jax.tree.map(lambda new, old: new.astype(old.dtype), written, cache)
        return x + h.astype(x.dtype), cache

    def _dense(self, x: Array, features: int, name: str, last: bool = False) -> Array:
        init = self.residual_init if last else nn.initializers.lecun_normal()
        return on_flat(nn.Dense(features, False, self.dtype, kernel_init=init, name=name), x)

    def _s4(self, u: Array, cache: Any, where: Any, dropout_key: Any) -> tuple[Array, Any]:
        width, pairs = u.shape[-1], self.size // 2
        start = state_space.dplr(self.size) if self.kind == "s4" else None
        rates = state_space.s4d_lin(self.size) if start is None else start.eigenvalues
        shape = (width, pairs)

        # Float32 at least: what a train step casts to bfloat16 has no complex numbers.
        def own(name: str, *made: Any) -> Array:
            return at_least_float32(self.param(name, *made))

        def begin(name: str, value: Array) -> Array:
            return own(name, lambda key: jnp.broadcast_to(value, (width, *value.shape)))

        def pair(name: str, value: Array) -> Array:
            z = begin(name, jnp.stack([jnp.real(value), jnp.imag(value)]))
            return jax.lax.complex(z[:, 0], z[:, 1])

        log_rate, frequency = (
            begin("log_rate", jnp.log(-rates.real)),
            begin("frequency", rates.imag),
        )
        eigenvalues = jax.lax.complex(-jnp.exp(log_rate), frequency)
        c = own("read", nn.initializers.normal(0.5**0.5), (2, *shape), jnp.float32)
        c = jax.lax.complex(c[0], c[1])
        dt = jnp.exp(own("log_dt", log_uniform(*self.dt_range), (width,)))
        options = {
            "d": own("skip", nn.initializers.normal(1.0), (width,)),
            "h0": cache[1],
            "where": where,
        }
        if start is None:
            drive = jnp.ones(shape)
            y, state = state_space.s4d_convolution(u, eigenvalues, drive, c, dt, **options)
        else:
            p, b = pair("low_rank", start.p), pair("drive", start.b)
            y, state = state_space.dplr_convolution(u, eigenvalues, p, b, c, dt, **options)
        y = drop(nn.gelu(y), self.dropout, dropout_key, 1)
        a, gate = jnp.split(self._dense(y, 2 * width, "out", last=True), 2, axis=-1)
        return a * nn.sigmoid(gate), (cache[0], state)

    def _convolve(self, x: Array, tail: Any, where: Any) -> tuple[Array, Array]:
        """silu of the short convolution."""
        bound = self.taps**-0.5
        init = nn.initializers.uniform(2 * bound)
        weight = self.param("conv", lambda *a: init(*a) - bound, (self.taps, x.shape[-1]))
        bias = self.param("conv_bias", nn.initializers.zeros, (x.shape[-1],))
        y, tail = state_space.short_convolution(x, weight, bias, tail=tail, where=where)
        return nn.silu(y), tail

    def _mamba(self, x: Array, cache: Any, where: Any, _: Any) -> tuple[Array, Any]:
        width, inner, n = x.shape[-1], self.expand * x.shape[-1], self.size
        rank = -(-width // 16)
        u, z = jnp.split(self._dense(x, 2 * inner, "in"), 2, axis=-1)
        u, tail = self._convolve(u, cache[0], where)
        low, B, C = jnp.split(self._dense(u, rank + 2 * n, "select"), [rank, rank + n], axis=-1)
        bound = rank**-0.5
        scale = nn.initializers.uniform(2 * bound)
        layer = nn.Dense(
            inner, False, self.dtype, kernel_init=lambda *a: scale(*a) - bound, name="step"
        )
        bias = self.param("dt_bias", log_dt_bias, (inner,))
        dt = nn.softplus(on_flat(layer, low) + bias[None, None])
        rows = jnp.log(jnp.arange(1, n + 1, dtype=jnp.float32))
        log_a = self.param("log_a", lambda key: jnp.broadcast_to(rows, (inner, n)))
        skip = self.param("skip", nn.initializers.ones, (inner,))
        y, state = state_space.selective_scan(
            u, dt, -jnp.exp(log_a), B, C, skip, z, h0=cache[1], where=where, chunk=self.chunk
        )
        return self._dense(y, width, "out", last=True), (tail, state)

    def _mamba2(self, x: Array, cache: Any, where: Any, _: Any) -> tuple[Array, Any]:
        batch, length, width = x.shape
        inner, shared = self.expand * width, self.groups * self.size
        head = self.head or min(inner, 64)
        if inner % head:
            raise ValueError(f"head must divide expand * width = {inner}, got {head}")
        heads = inner // head
        z, mixed, dt = jnp.split(
            self._dense(x, 2 * inner + 2 * shared + heads, "in"),
            [inner, 2 * inner + 2 * shared],
            axis=-1,
        )
        mixed, tail = self._convolve(mixed, cache[0], where)
        u, B, C = jnp.split(mixed, [inner, inner + shared], axis=-1)
        B, C = (v.reshape(batch, length, self.groups, self.size) for v in (B, C))
        dt = nn.softplus(dt + self.param("dt_bias", log_dt_bias, (heads,))[None, None])

        def rates(key: PRNGKey) -> Array:
            return jnp.log(jax.random.uniform(key, (heads,), minval=1.0, maxval=16.0))

        y, state = state_space.ssd(
            u.reshape(batch, length, heads, head),
            dt,
            -jnp.exp(self.param("log_a", rates)),
            B,
            C,
            D=self.param("skip", nn.initializers.ones, (heads,)),
            chunk=self.chunk or 64,
            h0=cache[1],
            where=where,
        )
        y = Norm("rms", name="gated_norm")(y.reshape(batch, length, inner) * nn.silu(z))
        return self._dense(y, width, "out", last=True), (tail, state)


class StateSpace(nn.Module):
    """Blocks between an embedding and a linear map: outputs [batch, length, outputs].

    vocabulary: tokens [batch, length] come in; None: features [batch, length, any]. outputs: by
    default the vocabulary, with logits by the rows of the embedding. shift: position t sees the
    tokens before it alone, as a language model, with the start token `vocabulary` before the first;
    without it, position t sees token t. depth blocks are scanned, so that compilation does not grow
    with it. block: their fields, as `StateSpaceBlock` names them.
    """

    vocabulary: int | None
    outputs: int | None = None
    kind: Kind = "mamba2"
    depth: int = 4
    width: int = 128
    shift: bool = True
    dropout: float = 0.0
    block_options: tuple[tuple[str, Any], ...] = ()
    remat: bool = False
    dtype: Any = None

    def setup(self) -> None:
        for name in ("depth", "width"):
            checks.integer(name, getattr(self, name), 1)
        checks.one_of("kind", self.kind, KINDS)
        if self.vocabulary is None:
            if self.outputs is None or self.shift:
                raise ValueError("features (vocabulary=None) need outputs, and shift=False")
            self.enter = nn.Dense(self.width, dtype=self.dtype)
        else:
            rows, init = self.vocabulary + 1, nn.initializers.normal(0.02)
            self.embedding = self.param("embedding", init, (rows, self.width), jnp.float32)
        x = jnp.zeros((1, 1, self.width))
        self.blocks = stacked(self, "blocks", self.block(), self.depth, x)
        self.last_norm = Norm("rms")
        if self.outputs is not None:
            self.head = nn.Dense(self.outputs, dtype=self.dtype)

    def block(self) -> StateSpaceBlock:
        """One block; what it adds begins smaller the more there are."""
        init = nn.initializers.variance_scaling(1 / self.depth, "fan_in", "normal")
        return StateSpaceBlock(
            self.kind,
            dropout=self.dropout,
            residual_init=init,
            dtype=self.dtype,
            parent=None,
            **dict(self.block_options),
        )

    def __call__(
        self,
        x: Int[Array, "batch length"]
        | UInt[Array, "batch length"]
        | Float[Array, "batch length n"],
        *,
        where: Bool[Array, "batch length"] | None = None,
        dropout_key: PRNGKey | None = None,
    ) -> Float[Array, "batch length outputs"]:
        """Outputs of every position; those at masked positions mean nothing."""
        if where is not None:
            x = jnp.where(where.reshape(where.shape + (1,) * (x.ndim - 2)), x, 0)
        h = self._enter(self._before(x, where) if self.shift else x)
        h = drop(h, self.dropout, dropout_key, self.depth)
        h, _ = self._run(h, None, where=where, dropout_key=dropout_key)
        return self._leave(h)

    def empty_cache(self, batch: int, length: int | None = None, dtype: Any = jnp.float32) -> Any:
        """States before the first position, [batch, depth, ...]: of one size for any length."""
        del length
        one = self.block().empty(batch, self.width, dtype)
        return jax.tree.map(lambda x: jnp.repeat(x[:, None], self.depth, axis=1), one)

    def step(
        self,
        cache: Any,
        token: Int[Array, " batch"] | UInt[Array, " batch"],
        position: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch outputs"], Any]:
        """Logits of each row's `position`, where `token` is the one before it; at 0 any token."""
        token = jnp.where(position == 0, self._start(), token.astype(jnp.int32))
        h, cache = self._run(self._enter(token[:, None]), cache)
        return self._leave(h)[:, 0], cache

    def prefill(
        self, cache: Any, tokens: Tokens
    ) -> tuple[Float[Array, "batch length outputs"], Any]:
        """Logits of the first positions, as of the full pass, and the cache that they leave.

        The step that follows gets the last of these tokens, and their number as position.
        """
        h, cache = self._run(self._enter(self._before(tokens)), cache)
        return self._leave(h), cache

    def _start(self) -> int:
        """The start token of a model of a language."""
        if not self.shift or self.vocabulary is None:
            raise ValueError("a cache needs shift=True: the model of a language")
        return self.vocabulary

    def _before(self, tokens: Array, where: Array | None = None) -> Array:
        """The kept token before each kept position, the start token before the first."""
        checks.rank("tokens", tokens, 2)
        start = jnp.full((len(tokens), 1), self._start(), jnp.int32)
        tokens = tokens.astype(jnp.int32)
        if where is None:
            return jnp.concatenate([start, tokens[:, :-1]], axis=1)
        # Kept positions side by side, then each at its place again.
        packed = jnp.take_along_axis(tokens, jnp.argsort(~where, axis=1, stable=True), axis=1)
        rank = jnp.maximum(jnp.cumsum(where, axis=1) - 1, 0)
        return jnp.take_along_axis(jnp.concatenate([start, packed], axis=1), rank, axis=1)

    def _enter(self, x: Array) -> Array:
        if self.vocabulary is None:
            checks.rank("features", x, 3)
            return self.enter(x)
        checks.rank("tokens", x, 2)
        # Out of range is NaN in jnp.take, unless negative.
        rows = jnp.where(x < 0, self.vocabulary + 1, x.astype(jnp.int32))
        return jnp.take(self.embedding, rows, axis=0)

    def _run(self, h: Array, cache: Any, **options: Any) -> tuple[Array, Any]:
        swap = lambda tree: jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tree)  # noqa: E731
        remat = self.remat and cache is None
        block = self.block()
        how = {"remat": remat, "own_memory": True}
        h, cache = apply_stack(block, self.blocks, h, cache=swap(cache), **how, **options)
        return h, swap(cache)

    def _leave(self, h: Array) -> Array:
        h = self.last_norm(h)
        if self.outputs is not None:
            return on_flat(self.head, h)
        rows = self.embedding[: self.vocabulary]
        return on_flat(lambda h: h @ rows.T.astype(h.dtype), h)
