"""VQ-VAE of images: discrete codes, and in the same run the autoregressive prior over them.

    log p(x) >= log sum_c p(x|c) P(c),   c over the codes of x and others near them

so that bits per dimension count everything. With few places (2x2) the sum is over all choices among
the nearest codes of each, which is closer to log p(x) than the codes of x alone; those are
bits_per_dim_of_one. The codes are nearest ones of a codebook (vq), those of
several codebooks one after another (residual), rounded features (fsq) or signs (lfq). With two
levels (VQ-VAE-2) the top codes have half the side of the bottom ones, whose encoder sees them, and
the prior is over the top ones, then the bottom ones given those.

    python -m experiments.vqvae
    python -m experiments.vqvae --quantiser residual --stages 2 --codes 8
    python -m experiments.vqvae --quantiser fsq --fsq-levels 5 4 3
    python -m experiments.vqvae --quantiser lfq --codes 32
    python -m experiments.vqvae --dataset mnist_5k --levels 2 --channels 16 32 --likelihood mixture

A codebook is no parameter: averages of its latents are in the state's carry, started by k-means,
and a code that is used less than a share of the mean becomes a random latent. The run folder gets
reconstructions.png.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run
from experiments._codes import Coded, Quantiser, code_prior, make_quantiser, nearest_tuples
from experiments._data import Data, load_data
from experiments._pixels import in_hundreds, pixel_law
from experiments._system import Row, System, adamw, train
from genjax import checks
from genjax.networks import GPT, GridDecoder, GridEncoder
from genjax.networks.layers import Norm
from genjax.variational import perplexity

ROWS = (
    Row("vqvae", "VQ-VAE with its prior", images={}),
    Row("vqvae_2", "VQ-VAE-2", images={"levels": 2, "channels": (16, 32)}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a VQ-VAE with its prior and measure both on the test split."""

    evaluation: ClassVar = ("tuples",)

    quantiser: Literal["vq", "residual", "fsq", "lfq"] = "vq"
    """How latents become codes, see above."""
    levels: Literal[1, 2] = 1
    """Levels of codes; with two the prior is over the top ones, then the bottom ones."""
    codes: int = 32
    """Size of each codebook; of lfq a power of two."""
    code_dim: int = 8
    """Features of a latent (vq and residual)."""
    stages: int = 2
    """Codebooks one after another (residual)."""
    fsq_levels: tuple[int, ...] = (5, 4, 3)
    """Values of each feature (fsq)."""
    channels: tuple[int, ...] = (16, 32, 32)
    """Channels of the image's resolution, then of each halving down to the (bottom) codes."""
    blocks: int = 1
    """Residual blocks of each resolution."""
    dropout: float = 0.4
    """Share of hidden units dropped in training."""
    commitment: float = 1.0
    """Weight of |z - sg e|^2, summed over the latents; of lfq, of its entropies."""
    decay: float = 0.99
    """Of the codebooks' averages."""
    reset: float = 0.3
    """Share of the mean use below which a code is dead (0: none is)."""
    prior_width: int = 64
    prior_depth: int = 2
    """Blocks of the prior's transformer."""
    prior_dropout: float = 0.2
    """Of the prior alone."""
    tuples: int = 81
    """Most choices of codes that the test split's bound sums over (vq of one level; 1: the chosen
    ones alone)."""
    conditional: bool = False
    """Give the prior the labels; the density is that without a label."""
    label_drop: float = 0.1
    """Share of labels dropped in conditional training."""
    likelihood: Literal["mixture", "categorical"] = "categorical"
    """p(x|z) of one pixel: a mixture of discretised logistics, or one probability per level."""
    components: int = 3
    """Logistics in the mixture."""
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    """AdamW's decay of the matrices."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    ema: float = 0.99
    steps: int = 1200
    steps_per_call: int = 1
    """Updates in one call; more do not help convolutions on a CPU."""


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


def main(config: Config) -> dict[str, Any]:
    """Train, evaluate, draw; returns the summary."""
    data = load_data(config)
    system, model = build(config, data), make_model(config, data)

    @jax.jit
    def look(params: Any, x: jax.Array) -> tuple[Any, Any, Any]:
        coded = model.encode(params, params["carried"], None, x)
        raw = model.decode(params, [level.values for level in coded], None)
        drawn = jax.random.key(0)
        of_codes = model.log_codes(params, tokens_of(coded), None, None)
        nats = -jnp.mean(of_codes), -jnp.mean(of_codes + model.log_likelihood(x, raw))
        return [level.codes for level in coded], nats, model.draw(drawn, raw)

    def report(run: _run.Run, params: Any, samples: np.ndarray) -> dict[str, Any]:
        x = jnp.asarray(data.test["x"])
        codes, nats, drawn = look(params, x)
        high = (data.spec.levels or 2) - 1
        _pictures.save_reconstructions(run.folder, x, drawn, high=high)
        used = [
            round(float(perplexity(level[..., i], model.quantiser.num_codes)), 2)
            for level in codes
            for i in range(model.quantiser.stages)
        ]
        bits = [float(v) / np.log(2) / np.prod(data.spec.shape) for v in nats]
        names = ("bits_per_dim_of_codes", "bits_per_dim_of_one")
        return {"perplexity": used, **dict(zip(names, bits, strict=True))}

    return train(config, system, data, report)


def build(config: Config, data: Data) -> System:
    """The model with its losses; the codebooks are its carry."""
    check(config)
    data.require("images", labels=config.conditional)
    model = make_model(config, data)
    carries = config.quantiser in ("vq", "residual")

    def loss(params: Any, key: jax.Array, batch: Any, carried: Any = None) -> Any:
        key_code, key_drop, key_label = jax.random.split(key, 3)
        coded = model.encode(params, carried, key_drop, batch["x"], key_code)
        raw = model.decode(params, [level.values for level in coded], key_drop)
        label = None
        if config.conditional:
            drop = jax.random.bernoulli(key_label, config.label_drop, batch["label"].shape)
            label = jnp.where(drop, data.spec.classes or 0, batch["label"])
        terms = {
            "reconstruction": model.log_likelihood(batch["x"], raw),
            "codes": model.log_codes(params, tokens_of(coded), label, key_drop),
            "penalty": sum(level.penalty for level in coded),
        }
        losses = terms["penalty"] - terms["reconstruction"] - terms["codes"]
        return (losses, terms, [level.seen for level in coded]) if carries else (losses, terms)

    def log_prob(params: Any, key: Any, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.int32)
        coded = model.encode(params, params["carried"], None, x)

        def nats(values: list[jax.Array], tokens: jax.Array) -> jax.Array:
            raw = model.decode(params, values, None)
            return model.log_likelihood(x, raw) + model.log_codes(params, tokens, None, None)

        if config.quantiser != "vq" or config.levels > 1:
            return nats([level.values for level in coded], tokens_of(coded))
        held, z = params["carried"][0], coded[0].latents

        def one(codes: jax.Array) -> jax.Array:
            return nats([model.quantiser.values(codes[..., None], held).reshape(z.shape)], codes)

        choices = nearest_tuples(z, held[0].codebook, config.tuples)
        return jax.nn.logsumexp(jax.lax.map(one, choices), axis=0)

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        def hundred(key: jax.Array, label: Any = None) -> jax.Array:
            return model.sample(params, params["carried"], key, label, 100)

        return in_hundreds(hundred, key, n, *([] if label is None else [label]))

    def absorb(carried: Any, params: Any, seen: Any) -> Any:
        return [
            model.quantiser.absorb(old, new, config.batch_size)
            for old, new in zip(carried, seen, strict=True)
        ]

    def init_carry(key: jax.Array, params: Any) -> Any:
        return model.start(key, params, jnp.asarray(data.train["x"][:2000]))

    return System(
        model.init,
        loss,
        adamw(config, optax.cosine_decay_schedule(config.learning_rate, config.steps)),
        sample,
        log_prob,
        likelihood={"num_draws": 1, "batch_size": 120},
        evaluations=model.quantiser.stages,
        labels=data.labels() if config.conditional else None,
        init_carry=init_carry if carries else None,
        absorb=absorb if carries else None,
        merge_carry=lambda params, carried: {**params, "carried": carried},
    )


def check(config: Config) -> None:
    """Raise ValueError for options that make no model."""
    sizes = ("codes", "code_dim", "stages", "blocks", "prior_width", "prior_depth", "tuples")
    for name in sizes:
        checks.integer(name, getattr(config, name), 1)
    for name in ("dropout", "prior_dropout", "label_drop"):
        checks.between(name, getattr(config, name), 0, 0.99)
    checks.at_least("commitment", config.commitment, 0)
    checks.one_of("levels", config.levels, (1, 2))


def tokens_of(coded: list[Coded]) -> jax.Array:
    """All codes of an image in one row: the top level's first, the stages of a place together."""
    return jnp.concatenate([c.codes.reshape(len(c.codes), -1) for c in coded], axis=1)


def make_model(config: Config, data: Data) -> Model:
    """Encoders, quantiser, decoder, likelihood and prior for images of the data set."""
    event, scaling = tuple(data.spec.shape), data.scaling()
    law = pixel_law(config.likelihood, config.components, data.spec)
    quantiser = _quantiser(config)
    grids = _grids(config, event)
    nets = _networks(config, event[2] * law.numbers, quantiser, grids, data.spec.classes)
    prior, sizes = nets["prior"], [a * b * quantiser.stages for a, b in grids]
    cuts = np.cumsum(sizes)[:-1]

    def of(name: str, key: Any) -> Any:
        """The network's own key of dropout."""
        return None if key is None else jax.random.fold_in(key, list(nets).index(name))

    def apply(params: Any, name: str, x: jax.Array, key: Any) -> jax.Array:
        return nets[name].apply(params[name], x, dropout_key=of(name, key))

    def normed(z: jax.Array) -> jax.Array:
        # Of one size, so that the commitment's weight means the same throughout.
        codebook = config.quantiser in ("vq", "residual")
        return Norm("rms", use_scale=False).apply({}, z) if codebook else z

    def levels(params: Any, key: Any, x: jax.Array, quantise: Callable[..., Any]) -> list[Any]:
        """quantise(level, z) in turn; the bottom encoder sees the quantised top."""
        features = apply(params, "encoder", scaling.to_continuous(x.astype(jnp.int32)), key)
        found = []
        if len(grids) == 2:
            found.append(quantise(0, normed(apply(params, "top", features, key))))
            above = apply(params, "up", found[0].values, key)
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
            x = jnp.concatenate([x, apply(params, "up", values[0], key)], axis=-1)
        raw = apply(params, "decoder", x, key)
        return raw.reshape(len(x), *event, law.numbers)

    null = (data.spec.classes or 0) if config.conditional else None
    nats_of, draw_codes = code_prior(prior, quantiser.num_codes, sum(sizes), null)

    def log_codes(params: Any, tokens: jax.Array, label: Any, key: Any) -> jax.Array:
        return nats_of(params["prior"], tokens, label, of("prior", key))

    def sample(params: Any, carried: Any, key: jax.Array, label: Any, n: int) -> jax.Array:
        tokens = draw_codes(params["prior"], key, label, n)
        parts = zip(jnp.split(tokens, cuts, axis=1), grids, strict=True)
        values = []
        for i, (part, grid) in enumerate(parts):
            codes = part.reshape(n, -1, quantiser.stages)
            held = None if carried is None else carried[i]
            values.append(quantiser.values(codes, held).reshape(n, *grid, quantiser.dim))
        drawn = jax.random.fold_in(key, config.conditional + sum(sizes))
        return law.sample(drawn, decode(params, values, None))

    begin = partial(_init, config, event, nets, grids, quantiser)
    return Model(
        begin, start, encode, decode, law.log_likelihood, log_codes, sample, law.sample, quantiser
    )


def _quantiser(config: Config) -> Quantiser:
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


def _init(config: Config, event: Any, nets: Any, grids: Any, quantiser: Quantiser, key: Any) -> Any:
    """The networks' parameters by their names."""
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(nets)}
    (rows, columns), dim = grids[-1], quantiser.dim
    shapes = {
        "encoder": (1, *event),
        "top": (1, rows, columns, config.channels[-1]),
        "up": (1, *grids[0], dim),
        "bottom": (1, rows, columns, len(grids) * config.channels[-1]),
        "decoder": (1, rows, columns, dim + (len(grids) - 1) * config.channels[-1]),
    }
    found = {n: nets[n].init(keys[n], jnp.zeros(s)) for n, s in shapes.items() if n in nets}
    total = sum(a * b for a, b in grids) * quantiser.stages
    return {**found, "prior": nets["prior"].init(keys["prior"], jnp.zeros((1, total), int))}


def _grids(config: Config, event: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rows and columns of each level's codes, the top first."""
    factor = 2 ** (len(config.channels) - 1)
    below = config.levels - 1
    if event[0] % (factor << below) or event[1] % (factor << below):
        raise ValueError(
            f"channels {tuple(config.channels)} and levels {config.levels} halve the image "
            f"{len(config.channels) - 1 + below} times, which {event[0]}x{event[1]} does not allow"
        )
    bottom = (event[0] // factor, event[1] // factor)
    return [bottom] if not below else [(bottom[0] // 2, bottom[1] // 2), bottom]


def _networks(
    config: Config, numbers: int, quantiser: Quantiser, grids: Any, classes: int | None
) -> dict[str, Any]:
    wide = config.channels[-1]
    options = {"num_blocks": config.blocks, "dropout": config.dropout}
    nets: dict[str, Any] = {
        "encoder": GridEncoder(wide, tuple(config.channels), **options),
        "bottom": GridEncoder(quantiser.dim, (wide,), **options),
        "decoder": GridDecoder(numbers, tuple(config.channels[::-1]), **options),
        "prior": GPT(
            quantiser.num_codes + ((classes or 0) + 1 if config.conditional else 0),
            config.prior_depth,
            config.prior_width,
            heads=4,
            max_length=sum(a * b for a, b in grids) * quantiser.stages + config.conditional,
            dropout=config.prior_dropout,
        ),
    }
    if len(grids) == 2:
        nets["top"] = GridEncoder(quantiser.dim, (wide, wide), **options)
        nets["up"] = GridDecoder(wide, (wide, wide), **options)
    return nets


if __name__ == "__main__":
    _run.launch(main, Config)
