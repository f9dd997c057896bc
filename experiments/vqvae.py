"""VQ-VAE of images: discrete codes, and in the same run the autoregressive prior over them.

    log p(x) >= log sum_c p(x|c) P(c),   c over the codes of x and others near them

so that bits per dimension count everything. With few places (2x2) the sum is over all choices among
the nearest codes of each, which is closer to log p(x) than the codes of x alone; those are
bits_per_dim_of_one. The codes are nearest ones of a codebook (vq), those of
several codebooks one after another (residual), rounded features (fsq) or signs (lfq). With two
levels (VQ-VAE-2) the top codes have half the side of the bottom ones, whose encoder sees them, and
the prior is over the top ones, then the bottom ones given those; it takes the neighbours of a code
and the label at every place.

    python -m experiments.vqvae
    python -m experiments.vqvae --quantiser residual --stages 2 --codes 8
    python -m experiments.vqvae --quantiser fsq --fsq-levels 5 4 3
    python -m experiments.vqvae --quantiser lfq --codes 32
    python -m experiments.vqvae --dataset mnist_5k --levels 2 --codes 64 --likelihood mixture \\
        --conditional --dropout 0 --prior-dropout 0.1 --reset 0.1 --batch-size 32 --steps 4400 \\
        --autoencoder-share 0.25 --guidance 2

A codebook is no parameter: averages of its latents are in the state's carry, started by k-means,
and a code that is used less than a share of the mean becomes a random latent. The run folder gets
reconstructions.png.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run
from experiments._codes import nearest_tuples
from experiments._data import Data, load_data
from experiments._pixels import in_hundreds
from experiments._system import Row, System, adamw, train
from experiments._vq_model import make_model, tokens_of
from genjax import checks
from genjax.variational import perplexity

ROWS = (
    Row("vqvae", "VQ-VAE with its prior", images={}),
    Row("vqvae_2", "VQ-VAE-2", images={"levels": 2, "channels": (16, 32)},
        larger={"channels": (16, 32, 32), "codes": 64, "likelihood": "mixture", "dropout": 0.0,
                "prior_dropout": 0.1, "reset": 0.1, "batch_size": 32, "autoencoder_share": 0.25}),
)  # fmt: skip


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
    autoencoder_share: float = 0.0
    """Share of the steps that train the autoencoder alone, those before the prior's, in which the
    codes are fixed; 0: both are trained throughout."""
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
    guidance: float = 1.0
    """g of the logits l(c|none) + g (l(c|label) - l(c|none)) that codes of two levels are drawn by;
    1 are those of the label."""
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
        fixed = "fixed" in batch
        pixels, prior = not fixed, fixed or not config.autoencoder_share
        key_code, key_drop, key_label = jax.random.split(key, 3)
        coded = model.encode(params, carried, None if fixed else key_drop, batch["x"], key_code)
        terms = {}
        if pixels:
            raw = model.decode(params, [level.values for level in coded], key_drop)
            terms["reconstruction"] = model.log_likelihood(batch["x"], raw)
            terms["penalty"] = sum(level.penalty for level in coded)
        if prior:
            label = None
            if config.conditional:
                drop = jax.random.bernoulli(key_label, config.label_drop, batch["label"].shape)
                label = jnp.where(drop, data.spec.classes or 0, batch["label"])
            terms["codes"] = model.log_codes(params, tokens_of(coded), label, key_drop)
        losses = sum(x if name == "penalty" else -x for name, x in terms.items())
        seen = None if fixed else [level.seen for level in coded]
        return (losses, terms, seen) if carries else (losses, terms)

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
        if seen is None:
            return carried
        return [
            model.quantiser.absorb(old, new, config.batch_size)
            for old, new in zip(carried, seen, strict=True)
        ]

    def init_carry(key: jax.Array, params: Any) -> Any:
        return model.start(key, params, jnp.asarray(data.train["x"][:2000]))

    return System(
        model.init,
        loss,
        optimizer(config),
        sample,
        log_prob,
        likelihood={"num_draws": 1, "batch_size": 120},
        evaluations=model.quantiser.stages,
        labels=data.labels() if config.conditional else None,
        init_carry=init_carry if carries else None,
        absorb=absorb if carries else None,
        batches=in_parts(config) if config.autoencoder_share else lambda batches: batches,
        merge_carry=lambda params, carried: {**params, "carried": carried},
    )


def optimizer(config: Config) -> Any:
    """AdamW whose rate falls as a cosine; in two parts each part's falls in its own steps."""
    if not config.autoencoder_share:
        return adamw(config, optax.cosine_decay_schedule(config.learning_rate, config.steps))
    first = first_steps(config)
    rate, rest = config.learning_rate, max(config.steps - first, 1)
    prior = optax.warmup_cosine_decay_schedule(0, rate, min(100, rest // 10), rest)
    rates = {
        "prior": lambda step: jnp.where(step < first, 0, prior(step - first)),
        "rest": optax.cosine_decay_schedule(rate, first),
    }
    part = lambda params: {name: "prior" if name == "prior" else "rest" for name in params}  # noqa: E731
    return optax.multi_transform({n: adamw(config, r) for n, r in rates.items()}, part)


def first_steps(config: Config) -> int:
    """Steps of the autoencoder alone, a whole number of calls."""
    calls = round(config.autoencoder_share * config.steps / config.steps_per_call)
    return max(calls, 1) * config.steps_per_call


def in_parts(config: Config) -> Callable[..., Any]:
    """Batches in which "fixed" marks the steps of the prior, so that each part compiles alone."""

    def marked(batches: Callable[[int], Any]) -> Callable[[int], Any]:
        def at(step: int) -> Any:
            batch = batches(step)
            if step < first_steps(config):
                return batch
            return {**batch, "fixed": np.ones(len(batch["x"]), np.float32)}

        return at

    return marked


def check(config: Config) -> None:
    """Raise ValueError for options that make no model."""
    sizes = ("codes", "code_dim", "stages", "blocks", "prior_width", "prior_depth", "tuples",
             "components")  # fmt: skip
    for name in sizes:
        checks.integer(name, getattr(config, name), 1)
    checks.integers("channels", config.channels, 1)
    if config.quantiser == "fsq":
        checks.integers("fsq_levels", config.fsq_levels, 3)
    for name in ("dropout", "prior_dropout", "label_drop", "autoencoder_share"):
        checks.between(name, getattr(config, name), 0, 0.99)
    checks.at_least("commitment", config.commitment, 0)
    checks.one_of("levels", config.levels, (1, 2))
    if config.guidance != 1 and not config.conditional:
        raise ValueError(f"guidance must be 1 without --conditional, got {config.guidance}")
    if config.guidance != 1 and config.levels == 1:
        raise ValueError(f"guidance must be 1 with one level, got {config.guidance}")


if __name__ == "__main__":
    _run.launch(main, Config)
