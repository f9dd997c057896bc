"""Masked diffusion of images or text: a bidirectional transformer learns to fill in what is hidden.

    -log p(x) <= E over n ~ U{1 .. T} of (T / n) sum over n hidden places of -log p(x_i | the rest)

    python -m experiments.masked_diffusion
    python -m experiments.masked_diffusion --loss time --schedule cosine --num-steps 16
    python -m experiments.masked_diffusion --dataset pydoc --num-samples 8 --width 128

Images are read row by row, one token a level; a text is cut into windows, as in
`experiments.language_model`. The test split is scored by the bound above, averaged over draws
(`order_bound`); samples reveal one token at a time, or several with fewer steps.
Sahoo et al. 2024 (arXiv:2406.07524).
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _run, _system
from experiments._data import Data
from experiments._data import load_data as load_image_data
from experiments._system import Row, System, adamw, train
from genjax import data as text_data
from genjax import diffusion as gd
from genjax.autoregressive import bits_per_byte
from genjax.data import DataSpec
from genjax.networks import GPT

ROWS = (Row("masked_diffusion", "Masked diffusion", images={}),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a network to fill in hidden tokens and sample it."""

    evaluation: ClassVar = ("num_samples", "by", "temperature", "test_draws")

    vocabulary: int = 256
    """Tokens of a text: 256 for bytes, more for BPE."""
    length: int = 128
    """Tokens of a text's windows."""
    loss: Literal["order", "time", "steps"] = "order"
    """The bound that is drawn: by the number of hidden places, by time, or of a chain of steps."""
    schedule: Literal["linear", "cosine", "quadratic"] = "linear"
    """How the hidden share grows with time (time, steps), and how fast samples are revealed."""
    width: int = 96
    """Features of a token."""
    depth: int = 3
    """Transformer blocks."""
    heads: int = 4
    """Heads of the attention."""
    dropout: float = 0.1
    """Share of what a block adds that is dropped in training."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    """AdamW's decay of the matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.995
    steps: int = 3200
    batch_size: int = 64
    accumulate: int = 8
    """Take each batch in so many parts one after another: eight images at a time stay in a
    processor's cache, and a step takes half the time."""
    num_steps: int = 32
    """Steps of the sampler, and of the chain (steps); 0: as many as there are tokens."""
    num_samples: int = 720
    """Samples that are drawn and judged."""
    by: Literal["random", "confidence", "independent"] = "random"
    """Which tokens a step of the sampler reveals."""
    temperature: float = 1.0
    """Divides the logits in sampling."""
    test_draws: int = 32
    """Draws of the bound for each example of the test split."""


def main(config: Config) -> dict[str, Any]:
    """Train, score, sample; returns the summary."""
    data = load_data(config)
    text = partial(report, config, data) if data.kind == "tokens" else None
    return train(config, build(config, data), data, text)


def load_data(config: Config) -> Data:
    """The image set, or the windows of a text, those of its test part side by side."""
    if config.dataset != "pydoc" and not Path(config.dataset).exists():
        return load_image_data(config)
    text = text_data.text(config.dataset)
    tokens = text_data.tokeniser(text.train, config.vocabulary)
    spec = DataSpec(text.name, "tokens", (config.length,), tokens.vocabulary, None)
    x, where = text_data.scored_windows(tokens.encode(text.test), config.length, config.length)
    train = {"x": text_data.windows(tokens.encode(text.train), config.length)}
    return Data(train, {"x": x, "where": where}, spec)


def report(
    config: Config, data: Data, run: _run.Run, params: Any, samples: np.ndarray
) -> dict[str, Any]:
    """Bits per byte of a text's test part, every token once; samples.txt."""
    _run.write_texts(run.folder / "samples.txt", texts(config, samples))
    network, key = make_network(config, data), _system.keys(config.seed).test

    @jax.jit
    def nats(draw: jax.Array, x: jax.Array, where: jax.Array) -> jax.Array:
        predict, now = partial(network.apply, params), jax.random.fold_in(key, draw)
        options = {"vocabulary": data.spec.levels, "where": where}
        return jnp.sum(gd.order_bound(predict, now, x, **options)[0])

    x, where = data.test["x"], data.test["where"]
    total, batches = 0.0, range(0, len(x), 64)
    for i in batches:
        fill = ((0, max(0, i + 64 - len(x))), (0, 0))  # one shape, so one program
        part = [np.pad(z[i : i + 64], fill) for z in (x, where)]
        total += sum(float(nats(n, *part)) for n in range(config.test_draws)) / config.test_draws
    test_bytes = len(text_data.text(config.dataset).test)
    return {"bits_per_byte": float(bits_per_byte(total, test_bytes))}


def texts(config: Config, samples: np.ndarray) -> list[str]:
    """What samples [n, length] of a text say."""
    text = text_data.text(config.dataset)
    tokens = text_data.tokeniser(text.train, config.vocabulary)
    return [tokens.decode(row).decode(errors="replace") for row in samples]


def make_network(config: Config, data: Data) -> GPT:
    """The transformer, which reads hidden tokens too."""
    return GPT(
        data.spec.levels or 0,
        config.depth,
        config.width,
        config.heads,
        max_length=math.prod(data.spec.shape),
        tied=False,
        causal=False,
        dropout=config.dropout,
        remat=config.remat,
    )


def build(config: Config, data: Data) -> System:
    """The network with its loss, its sampler and the bound."""
    if data.kind == "points" or data.spec.levels is None:
        raise ValueError(f"dataset must be of levels or tokens, got {data.spec.name!r}")
    shape, vocabulary = data.spec.shape, data.spec.levels
    length = math.prod(shape)
    network = make_network(config, data)
    num_steps = config.num_steps or length

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), length).astype(jnp.int32)

    def init(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, length), jnp.int32))

    bounds = {
        "order": gd.order_bound,
        "time": partial(gd.masked_bound, schedule=config.schedule),
        "steps": partial(gd.step_bound, schedule=config.schedule, num_steps=num_steps),
    }

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_loss, key_drop = jax.random.split(key)
        predict = partial(network.apply, params, dropout_key=key_drop)
        losses, aux = bounds[config.loss](
            predict, key_loss, flat(batch["x"]), vocabulary=vocabulary
        )
        return losses / length, {"cross_entropy": aux["cross_entropy"]}

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        tokens = gd.sample_masked(
            partial(network.apply, params), key, (n, length), vocabulary=vocabulary,
            num_steps=num_steps, schedule=config.schedule, by=config.by,
            temperature=config.temperature,
        )  # fmt: skip
        return tokens.reshape(n, *shape).astype(jnp.uint8 if vocabulary <= 256 else jnp.int32)

    def log_prob(params: Any, key: jax.Array, y: jax.Array) -> jax.Array:
        predict = partial(network.apply, params)
        return -gd.order_bound(predict, key, flat(y), vocabulary=vocabulary)[0]

    peak, warm = config.learning_rate, min(100, config.steps // 4)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warm, config.steps, 0.02 * peak)
    return System(
        init,
        loss,
        adamw(config, rate),
        sample,
        None if data.kind == "tokens" else log_prob,
        likelihood={"num_draws": config.test_draws, "batch_size": 360},
        evaluations=num_steps,
        count=config.num_samples,
        remat=True,
    )


if __name__ == "__main__":
    _run.launch(main, Config)
