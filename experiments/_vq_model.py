"""The networks of a VQ-VAE as one model: encoders, quantiser, decoder, pixels and prior."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._code_prior import CodePrior, neighbours
from experiments._codes import Coded, Quantiser, code_prior, grid_prior, make_quantiser
from experiments._data import Data
from experiments._pixels import pixel_law
from genjax.networks import GPT, GridDecoder, GridEncoder
from genjax.networks.layers import Norm


class Model(NamedTuple):
    """The parts as functions of the parameters and what the quantiser carries, one for each level;
    key: of dropout, None without it."""

    init: Callable[[jax.Array], Any]
    start: Callable[..., Any]  # (key, params, x) -> carried
    encode: Callable[..., list[Coded]]  # (params, carried, key, x), the top level first
    decode: Callable[..., jax.Array]  # (params, values of each level, key) -> raw
    log_likelihood: Callable[..., jax.Array]  # (x, raw) -> [batch], nats
    log_codes: Callable[..., jax.Array]  # (params, tokens, label, key) -> [batch], nats
    sample: Callable[..., jax.Array]  # (params, carried, key, label, n) -> x
    draw: Callable[..., jax.Array]  # (key, raw) -> x
    quantiser: Quantiser


def tokens_of(coded: list[Coded]) -> jax.Array:
    """All codes of an image in one row: the top level's first, the stages of a place together."""
    return jnp.concatenate([c.codes.reshape(len(c.codes), -1) for c in coded], axis=1)


def make_model(config: Any, data: Data) -> Model:
    """Encoders, quantiser, decoder, likelihood and prior for images of the data set."""
    event, scaling = tuple(data.spec.shape), data.scaling()
    law = pixel_law(config.likelihood, config.components, data.spec)
    quantiser = _quantiser(config)
    grids = _grids(config, event)
    nets = _networks(config, event[2] * law.numbers, quantiser, grids, data.spec.classes)
    prior, total = nets["prior"], sum(a * b * quantiser.stages for a, b in grids)

    def of(name: str, key: Any) -> Any:
        """The network's own key of dropout."""
        return None if key is None else jax.random.fold_in(key, list(nets).index(name))

    def apply(params: Any, name: str, x: jax.Array, key: Any) -> jax.Array:
        return nets[name].apply(params[name], x, dropout_key=of(name, key))

    normed = partial(_normed, config.quantiser)

    def raised(params: Any, top: jax.Array, key: Any) -> jax.Array:
        """Features of the top codes at the bottom's resolution, which may be odd."""
        rows, columns = grids[1]
        return apply(params, "up", top, key)[:, :rows, :columns]

    def levels(params: Any, key: Any, x: jax.Array, quantise: Callable[..., Any]) -> list[Any]:
        """quantise(level, z) in turn; the bottom encoder sees the quantised top."""
        features = apply(params, "encoder", scaling.to_continuous(x.astype(jnp.int32)), key)
        found = []
        if len(grids) == 2:
            odd = [(0, -side % 2) for side in grids[1]]
            even = jnp.pad(features, ((0, 0), *odd, (0, 0)))
            found.append(quantise(0, normed(apply(params, "top", even, key))))
            above = raised(params, found[0].values, key)
            features = jnp.concatenate([features, above], axis=-1)
        return [*found, quantise(len(found), normed(apply(params, "bottom", features, key)))]

    def encode(params: Any, carried: Any, key: Any, x: jax.Array, spare: Any = None) -> list[Coded]:
        spare = jax.random.key(0) if spare is None else spare

        def quantise(i: int, z: jax.Array) -> Coded:
            given = None if carried is None else carried[i]
            return quantiser.apply(jax.random.fold_in(spare, i), z, given)._replace(latents=z)

        return levels(params, key, x, quantise)

    def start(key: jax.Array, params: Any, x: jax.Array) -> Any:
        states = []

        def quantise(i: int, z: jax.Array) -> Coded:
            states.append(quantiser.start(jax.random.fold_in(key, i), z))
            return quantiser.apply(jax.random.fold_in(key, len(grids) + i), z, states[-1])

        levels(params, None, x, quantise)
        return states

    def decode(params: Any, values: list[jax.Array], key: Any) -> jax.Array:
        x = values[-1]
        if len(grids) == 2:
            x = jnp.concatenate([x, raised(params, values[0], key)], axis=-1)
        raw = apply(params, "decoder", x, key)
        return raw.reshape(len(x), *event, law.numbers)

    null = (data.spec.classes or 0) if config.conditional else None
    if isinstance(prior, CodePrior):
        nats_of, draw_codes = grid_prior(prior, null, config.guidance)
    else:
        nats_of, draw_codes = code_prior(prior, quantiser.num_codes, total, null)

    def log_codes(params: Any, tokens: jax.Array, label: Any, key: Any) -> jax.Array:
        return nats_of(params["prior"], tokens, label, of("prior", key))

    def sample(params: Any, carried: Any, key: jax.Array, label: Any, n: int) -> jax.Array:
        tokens = draw_codes(params["prior"], key, label, n)
        values = _values_of(quantiser, grids, tokens, carried)
        drawn = jax.random.fold_in(key, config.conditional + total)
        return law.sample(drawn, decode(params, values, None))

    begin = partial(_init, config, event, nets, grids, quantiser)
    return Model(
        begin, start, encode, decode, law.log_likelihood, log_codes, sample, law.sample, quantiser
    )


def _normed(kind: str, z: jax.Array) -> jax.Array:
    """For codebooks of one size, so that the commitment's weight means the same throughout."""
    return Norm("rms", use_scale=False).apply({}, z) if kind in ("vq", "residual") else z


def _values_of(quantiser: Quantiser, grids: Any, tokens: jax.Array, carried: Any) -> list[Any]:
    """What the codes of a row stand for, [n, rows, columns, dim] of each level."""
    cuts = np.cumsum([a * b * quantiser.stages for a, b in grids])[:-1]
    values = []
    for i, part in enumerate(jnp.split(tokens, cuts, axis=1)):
        codes = part.reshape(len(tokens), -1, quantiser.stages)
        found = quantiser.values(codes, None if carried is None else carried[i])
        values.append(found.reshape(len(tokens), *grids[i], quantiser.dim))
    return values


def _quantiser(config: Any) -> Quantiser:
    return make_quantiser(
        config.quantiser,
        num_codes=config.codes,
        dim=config.code_dim,
        stages=config.stages,
        levels=config.fsq_levels,
        decay=config.decay,
        commitment=config.commitment,
        reset=config.reset,
    )


def _init(config: Any, event: Any, nets: Any, grids: Any, quantiser: Quantiser, key: Any) -> Any:
    """The networks' parameters by their names."""
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(nets)}
    (rows, columns), dim = grids[-1], quantiser.dim
    shapes = {
        "encoder": (1, *event),
        "top": (1, rows + rows % 2, columns + columns % 2, config.channels[-1]),
        "up": (1, *grids[0], dim),
        "bottom": (1, rows, columns, len(grids) * config.channels[-1]),
        "decoder": (1, rows, columns, dim + (len(grids) - 1) * config.channels[-1]),
    }
    found = {n: nets[n].init(keys[n], jnp.zeros(s)) for n, s in shapes.items() if n in nets}
    total = sum(a * b for a, b in grids) * quantiser.stages
    return {**found, "prior": nets["prior"].init(keys["prior"], jnp.zeros((1, total), int))}


def _grids(config: Any, event: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rows and columns of each level's codes, the top first; half of an odd side is rounded up."""
    factor = 2 ** (len(config.channels) - 1)
    bottom = (event[0] // factor, event[1] // factor)
    below = config.levels - 1
    if event[0] % factor or event[1] % factor or min(bottom) <= below:
        raise ValueError(
            f"channels {tuple(config.channels)} and levels {config.levels} halve the image "
            f"{len(config.channels) - 1 + below} times, which {event[0]}x{event[1]} does not allow"
        )
    return [bottom] if not below else [(-(-bottom[0] // 2), -(-bottom[1] // 2)), bottom]


def _networks(
    config: Any, numbers: int, quantiser: Quantiser, grids: Any, classes: int | None
) -> dict[str, Any]:
    wide = config.channels[-1]
    options = {"num_blocks": config.blocks, "dropout": config.dropout}
    nets: dict[str, Any] = {
        "encoder": GridEncoder(wide, tuple(config.channels), **options),
        "bottom": GridEncoder(quantiser.dim, (wide,), **options),
        "decoder": GridDecoder(numbers, tuple(config.channels[::-1]), **options),
        "prior": _prior(config, quantiser, grids, classes),
    }
    if len(grids) == 2:
        nets["top"] = GridEncoder(quantiser.dim, (wide, wide), **options)
        nets["up"] = GridDecoder(wide, (wide, wide), **options)
    return nets


def _prior(config: Any, quantiser: Quantiser, grids: Any, classes: int | None) -> GPT | CodePrior:
    """Of one level a GPT, to which the label is one code more; of two the one of neighbours."""
    if len(grids) == 2:
        return CodePrior(
            quantiser.num_codes,
            neighbours(grids, quantiser.stages),
            (classes or 0) if config.conditional else None,
            config.prior_depth,
            config.prior_width,
            dropout=config.prior_dropout,
        )
    return GPT(
        quantiser.num_codes + ((classes or 0) + 1 if config.conditional else 0),
        config.prior_depth,
        config.prior_width,
        heads=4,
        max_length=sum(a * b for a, b in grids) * quantiser.stages + config.conditional,
        dropout=config.prior_dropout,
    )
