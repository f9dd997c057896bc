"""Hierarchical variational autoencoder of images: latents in levels, each given those above it.

The way up gives a feature for each level, the way down draws the top level from N(0, I) and every
further one from a prior that sees what is above; the posterior is in units of that prior.

    python -m experiments.hierarchical_vae
    python -m experiments.hierarchical_vae --latents 16 --sides 1              (one level: flat)
    python -m experiments.hierarchical_vae --latents 8 4 2 --sides 1 2 4 --width 64
    python -m experiments.hierarchical_vae --free-nats 1 --balance

The test split is scored by the importance weighted bound over all levels; scores.npy has it for
each test image, in nats, so that two runs can be compared image by image. levels.png: samples that
share their upper levels, one level more in each row.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run, _system
from experiments._data import Data, load_data
from experiments._pixels import in_hundreds, pixel_law
from experiments._system import Row, System, adamw, train
from genjax import checks
from genjax.metrics import test_log_likelihood
from genjax.networks import ImageHierarchy, init_power, spectral_penalty
from genjax.training import skip_above_median
from genjax.variational import (
    Level,
    hierarchical_elbo,
    hierarchical_iwae,
    hierarchical_latents,
    hierarchical_sample,
)

ROWS = (Row("hierarchical_vae", "Hierarchical VAE", images={}),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a hierarchical variational autoencoder and measure it on the test split."""

    evaluation: ClassVar = ("temperature", "test_samples")

    latents: tuple[int, ...] = (8, 8, 8)
    """Numbers of each level at each of its places, the top level first."""
    sides: tuple[int, ...] = (1, 1, 1)
    """Side of each level's square of places; 1 everywhere is fully connected."""
    width: int = 256
    """Channels of what is hidden."""
    depth: int = 1
    """Residual layers between two levels."""
    dropout: float = 0.2
    """Share of hidden units dropped in training."""
    beta: float = 1.0
    """Weight of the divergences."""
    warm_up: int = 500
    """Steps in which beta rises from 0: levels that start dear are given up for good."""
    free_nats: float = 0.0
    """Nats that each level may hold for nothing in training."""
    balance: bool = False
    """In the warm-up weigh the levels' divergences by size and by what they hold already."""
    likelihood: Literal["mixture", "categorical"] = "mixture"
    """p(x|z) of one pixel: a mixture of discretised logistics, or one probability per level."""
    components: int = 3
    """Logistics in the mixture."""
    temperature: float = 1.0
    """Standard deviation of the samples' latents, in units of the prior's."""
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    """AdamW's decay of the matrices."""
    clip: float = 5.0
    """Largest norm of the gradient."""
    skip_above: float = 0.0
    """Leave out updates whose gradient norm is over so many times its running median; 0: none."""
    spectral: float = 0.0
    """Weight of the sum of all layers' largest singular values, in nats."""
    ema: float = 0.99
    held_out: float = 0.0
    """Share of the training split kept from training, to choose settings by."""
    steps: int = 1000
    steps_per_call: int = 50
    test_samples: int = 512
    """K of the importance weighted bound on the test split, best a multiple of 32."""


class Model(NamedTuple):
    """The parts as functions of the parameters; key: of dropout, None without it."""

    init: Callable[[jax.Array], Any]
    bottom_up: Callable[..., Any]  # (params, key) -> bottom_up
    levels: Callable[..., list[Level]]  # (params, key) -> levels
    decode: Callable[..., jax.Array]  # (params, h) -> raw [batch, *event, numbers]
    log_likelihood: Callable[..., jax.Array]  # (x, raw) -> [batch], nats
    draw: Callable[..., jax.Array]  # (key, raw) -> x
    top: tuple[int, ...]  # shape of the top level's latents


def main(config: Config) -> dict[str, Any]:
    """Train, evaluate, draw; returns the summary."""
    data = load_data(config)
    system, model = build(config, data), make_model(config, data)
    key = _system.keys(config.seed).test

    @jax.jit
    def divergences(params: Any, x: jax.Array) -> jax.Array:
        parts = model.bottom_up(params, None), model.levels(params, None)
        flat = lambda x, h: jnp.zeros(len(x))  # noqa: E731
        return hierarchical_elbo(*parts, flat, key, x)[1]["kl"].mean(0)

    def report(run: _run.Run, params: Any, samples: np.ndarray) -> dict[str, Any]:
        log_prob = lambda key, x: system.log_prob(params, key, x)  # noqa: E731
        score = jax.jit(lambda x: test_log_likelihood(log_prob, key, x, **system.likelihood))
        x = jnp.asarray(data.test["x"], jnp.float32)
        np.save(run.folder / "scores.npy", np.asarray(score(x).per_example))
        plot_levels(run.folder, model, params, data, key)
        kl = [round(float(v), 3) for v in divergences(params, jnp.asarray(data.test["x"]))]
        return {"kl_of_levels": kl}

    return train(config, system, data, report)


def build(config: Config, data: Data) -> System:
    """The model with its objective, scored by the importance weighted bound."""
    check(config)
    data.require("images")
    model = make_model(config, data)
    # So many samples at once, and the rest one after another, to bound the memory.
    chunk = math.gcd(config.test_samples, 32) if config.test_samples >= 32 else config.test_samples

    def parts(params: Any, key: Any = None) -> tuple[Any, Any, Any]:
        likelihood = lambda x, h: model.log_likelihood(x, model.decode(params, h))  # noqa: E731
        return model.bottom_up(params, key), model.levels(params, key), likelihood

    def loss(params: Any, key: jax.Array, batch: Any, carry: Any) -> Any:
        step, power = carry if config.spectral else (carry, {})
        key_z, key_drop = jax.random.split(key)
        balance = config.balance and step < config.warm_up
        options = {"free_nats": config.free_nats, "balance": balance}
        options["beta"] = config.beta * jnp.minimum(1.0, (step + 1) / max(config.warm_up, 1))
        losses, aux = hierarchical_elbo(*parts(params, key_drop), key_z, batch["x"], **options)
        by_level = {f"kl_{i}": aux["kl"][:, i] for i in range(len(config.latents))}
        terms = {"reconstruction": aux["reconstruction"], **by_level}
        if config.spectral:
            terms["spectral"] = spectral_penalty(params, power)[0]
            losses = losses + config.spectral * terms["spectral"]
        return losses, terms, None

    # The carry: steps so far, for the warm-up, and the power vectors, which no gradient moves.
    def init_carry(key: jax.Array, params: Any) -> Any:
        step = jnp.zeros(())
        return (step, init_power(params, key)) if config.spectral else step

    def absorb(carry: Any, params: Any, seen: Any) -> Any:
        if not config.spectral:
            return carry + 1
        return carry[0] + 1, spectral_penalty(params, carry[1])[1]

    def log_prob(params: Any, key: jax.Array, x: jax.Array) -> jax.Array:
        return -hierarchical_iwae(*parts(params), key, x, num_samples=chunk)[0]

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        def hundred(key: jax.Array) -> jax.Array:
            key_z, key_x = jax.random.split(key)
            h, _ = hierarchical_sample(
                key_z,
                model.levels(params, None),
                (100, *model.top),
                temperature=config.temperature,
            )
            return model.draw(key_x, model.decode(params, h))

        return in_hundreds(hundred, key, n)

    optimizer = adamw(config, optax.cosine_decay_schedule(config.learning_rate, config.steps))
    if config.skip_above:
        optimizer = skip_above_median(optimizer, config.skip_above)
    return System(
        model.init,
        loss,
        optimizer,
        sample,
        log_prob,
        likelihood={
            "batch_size": 120,
            "num_draws": config.test_samples // chunk,
            "estimator": "importance",
        },
        evaluations=len(config.latents),
        init_carry=init_carry,
        absorb=absorb,
    )


def check(config: Config) -> None:
    """Raise ValueError for options that make no model."""
    for name in ("width", "depth", "components", "test_samples"):
        checks.integer(name, getattr(config, name), 1)
    for name in ("latents", "sides"):
        for number in getattr(config, name):
            checks.integer(name, number, 1)
    checks.integer("warm_up", config.warm_up, 0)
    checks.at_least("beta", config.beta, 0)
    checks.at_least("free_nats", config.free_nats, 0)
    checks.at_least("spectral", config.spectral, 0)
    if config.skip_above and not config.skip_above > 1:
        raise ValueError(f"skip_above must be 0 or over 1, got {config.skip_above}")
    checks.positive("temperature", config.temperature)
    checks.between("dropout", config.dropout, 0, 0.99)


def make_model(config: Config, data: Data) -> Model:
    """The networks and the likelihood for images of the data set."""
    event, scaling = tuple(data.spec.shape), data.scaling()
    law = pixel_law(config.likelihood, config.components, data.spec)
    net = ImageHierarchy(
        (*event[:2], event[2] * law.numbers),
        config.latents,
        config.sides,
        config.width,
        config.depth,
        config.dropout,
    )

    def init(key: jax.Array) -> Any:
        return net.init(key, jnp.zeros((1, *event)))

    def bottom_up(params: Any, key: Any) -> Callable[[jax.Array], Any]:
        def features(x: jax.Array) -> Any:
            y = scaling.to_continuous(x.astype(jnp.int32))
            return net.apply(params, y, dropout_key=key, method="features")

        return features

    def levels(params: Any, key: Any) -> list[Level]:
        def part(name: str, i: int) -> Callable[..., Any]:
            return lambda *given: net.apply(params, i, *given, dropout_key=key, method=name)

        return [
            Level(part("prior", i) if i else None, part("posterior", i), part("merge", i))
            for i in range(len(config.latents))
        ]

    def decode(params: Any, h: jax.Array) -> jax.Array:
        raw = net.apply(params, h, method="decode")
        return raw.reshape(len(h), *event, law.numbers)

    top = (config.sides[0], config.sides[0], config.latents[0]) if config.sides else ()
    return Model(init, bottom_up, levels, decode, law.log_likelihood, law.sample, top)


def plot_levels(folder: Any, model: Model, params: Any, data: Data, key: jax.Array) -> None:
    """Write levels.png: ten test images, then below them samples that have none, one, two, ... of
    the image's own upper levels, as the most likely level of every pixel."""
    x = jnp.asarray(_pictures.first(data.test["x"], 10))
    levels = model.levels(params, None)
    key_latents, key_levels, key_pixels = jax.random.split(key, 3)
    latents = hierarchical_latents(model.bottom_up(params, None), levels, key_latents, x)
    rows = [x]
    for count in range(len(levels) + 1):
        # The same noise in every row: they differ by what is given alone.
        h, _ = hierarchical_sample(key_levels, levels, (10, *model.top), latents=latents[:count])
        raw = model.decode(params, h)
        rows.append(model.draw(key_pixels, raw))
    sheet = np.concatenate([np.asarray(row) for row in rows])
    high = (data.spec.levels or 2) - 1
    title = "test images; samples given 0, 1, ... of their levels"
    _pictures.save_grid(folder / "levels.png", sheet, title=title, high=high, columns=10)


if __name__ == "__main__":
    _run.launch(main, Config)
