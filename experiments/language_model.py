"""A language model of a text: trained, measured in bits per byte, and sampled with a cache.

    python -m experiments.language_model
    python -m experiments.language_model --dataset book.txt --vocabulary 2048
    python -m experiments.language_model --sample-from runs/language_model/1 --prompt "The for"

The text is split into a part to train on and one to test on; tokens are bytes, or a byte-level BPE
trained on the first. The test part is scored every token once, with at least half a window before
it, beside what gzip, xz and Kneser-Ney need after the same training part. The run folder gets
samples.txt and loss.png.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _pictures, _run, _system
from experiments._data import Data
from experiments._system import System, adamw, train
from experiments._text_baselines import baselines
from genjax import checks
from genjax import data as text_data
from genjax.autoregressive import bits_per_byte, dynamic_evaluation, generate, next_token, select
from genjax.data import DataSpec
from genjax.networks import GPT, RATES, StateSpace, state_space_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a language model and measure it on the part held out."""

    evaluation: ClassVar = ("samples", "temperature", "top_k", "top_p", "min_p", "adapt")

    dataset: str = "pydoc"
    """pydoc (the running Python's own documentation), or the path of a text or a folder of .txt."""
    text_sha256: str | None = None
    """What the text's SHA-256 must be (default: what it is; a run's config.json keeps it)."""
    vocabulary: int = 1024
    """Tokens: 256 for bytes, more for BPE."""
    length: int = 128
    """Tokens of a window, and of the cache when sampling."""
    network: Literal["gpt", "s4", "s4d", "mamba", "mamba2"] = "gpt"
    """Transformer, or state space layers in place of attention."""
    depth: int = 3
    """Blocks."""
    width: int = 128
    """Features of a position."""
    heads: int = 4
    """Heads of the attention (gpt)."""
    states: int | None = None
    """States of a channel (default: 16 with mamba2, else the block's own)."""
    kv_heads: int | None = None
    """Heads of keys and values (default: as many)."""
    norm: Literal["layer", "rms"] = "rms"
    """Norm (gpt)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """MLP of a block (gpt)."""
    positions: Literal["learned", "rotary"] = "rotary"
    """Positions (gpt)."""
    tied: bool = True
    """Logits by the rows of the embedding (gpt)."""
    dropout: float = 0.15
    """Dropout of embedding and branches."""
    label_smoothing: float = 0.0
    """Share of the uniform law in the targets."""
    z_loss: float = 0.0
    """Weight of (log Z)^2."""
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    """AdamW's decay of the matrices."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.99
    steps: int = 1800
    batch_size: int = 16
    held_out: float = 0.0
    """Share of the training part that is scored instead of trained on, to choose options by."""
    adapt: float = 0.1
    """Rate of the gradient step on each scored window, in bits_per_byte_adapted."""
    samples: int = 8
    """Texts that are drawn."""
    temperature: float = 1.0
    """Of the samples (0: the most probable token each time)."""
    top_k: int = 0
    """Draw from so many most probable tokens (0: all)."""
    top_p: float = 1.0
    """Draw from the most probable tokens with that much together."""
    min_p: float = 0.0
    """Draw from tokens at least so probable, beside the most probable one."""
    sample_from: str | None = None
    """Train nothing: continue `prompt` by the model of that run's folder, and print."""
    prompt: str = ""
    """What the texts begin with, with sample_from."""


def gpt(config: Config, vocabulary: int) -> nn.Module:
    """The transformer."""
    return GPT(
        vocabulary,
        config.depth,
        config.width,
        config.heads,
        config.kv_heads,
        norm=config.norm,
        mlp=config.mlp,
        positions=config.positions,
        max_length=config.length,
        tied=config.tied,
        use_bias=False,
        dropout=config.dropout,
        remat=config.remat,
    )


def state_space(config: Config, vocabulary: int, kind: Any) -> nn.Module:
    """State space layers in place of attention; width is that of a position, 2 width inside."""
    sizes = {"depth": config.depth, "width": config.width, "dropout": config.dropout}
    block = {"states": config.states}
    if kind == "mamba2":  # two heads, few states and short chunks: small products, fast on a core
        block = {"states": config.states or 16, "head": config.width, "chunk": 32}
    options = tuple(block.items())
    return StateSpace(vocabulary, kind=kind, remat=config.remat, block_options=options, **sizes)


# A network maps tokens [n, length] to logits [n, length, vocabulary], dropout_key by keyword; with
# the methods `empty_cache(n, length)` and `step(cache, token, position)` it is sampled.
NETWORKS: Mapping[str, Callable[[Config, int], nn.Module]] = {
    "gpt": gpt,
    **{
        name: functools.partial(state_space, kind=name) for name in ("s4", "s4d", "mamba", "mamba2")
    },
}


def main(config: Config) -> dict[str, Any]:
    """Train, score, sample; returns the summary. With sample_from: the texts."""
    checks.one_of("network", config.network, NETWORKS)
    if config.sample_from is not None:
        return continue_prompt(config)
    config = dataclasses.replace(config, text_sha256=_load(config)[0].sha256)
    data = load_data(config)
    text, tokens = _load(config)

    def report(run: _run.Run, params: Any, samples: np.ndarray) -> dict[str, Any]:
        _run.write_texts(run.folder / "samples.txt", texts(config, samples))
        plot_losses(run.folder, tokens.lengths(tokens.encode(text.train)).mean())
        split = {"": data.test} | ({} if data.held_out is None else {"_held_out": data.held_out})
        found: dict[str, float] = {}
        for name, part in split.items():
            found[name] = score(config, params, part, tokens)
            found[f"{name}_adapted"] = score_adapted(config, params, part, tokens)
        return {
            **{f"bits_per_byte{name}": bits for name, bits in found.items()},
            **baselines(text.train, text.test),
            "train_bytes": len(text.train),
            "test_bytes": len(text.test),
            "text_sha256": text.sha256,
        }

    return train(config, build(config, data), data, report)


def load_data(config: Config) -> Data:
    """All windows of the training part; of the others those of `scored_windows`."""
    text, tokens = _load(config)
    if config.text_sha256 not in (None, text.sha256):
        raise _run.RunError(
            f"text_sha256 must be that of the run, {config.text_sha256}, whose tokens were trained "
            f"on another text than {config.dataset!r} is now: {text.sha256}"
        )
    ids, test = tokens.encode(text.train), tokens.encode(text.test)
    checks.between("held_out", config.held_out, 0, 0.5)
    kept = int(len(ids) * (1 - config.held_out))
    parts = [test, ids[kept:]] if config.held_out else [test]
    scored = [
        dict(zip(("x", "where"), text_data.scored_windows(part, config.length), strict=True))
        for part in parts
    ]
    spec = DataSpec(text.name, "tokens", (config.length,), tokens.vocabulary, None)
    windows = {"x": text_data.windows(ids[:kept], config.length)}
    return Data(windows, scored[0], spec, scored[1] if config.held_out else None)


def texts(config: Config, samples: np.ndarray) -> list[str]:
    """What samples [n, length] say."""
    tokens = _load(config)[1]
    return [tokens.decode(row).decode(errors="replace") for row in samples]


def build(config: Config, data: Data) -> System:
    """The network with its loss."""
    checks.one_of("network", config.network, NETWORKS)
    checks.between("dropout", config.dropout, 0, 0.99)
    chosen(config)(jnp.zeros(2))  # refuses its options before anything is trained
    data.require("tokens")
    network = NETWORKS[config.network](config, data.spec.levels or 0)
    terms = {"z_loss": config.z_loss, "label_smoothing": config.label_smoothing}

    def init(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, config.length), jnp.int32))

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits = functools.partial(network.apply, params, dropout_key=key)
        losses, aux = next_token(logits, batch["x"], divisor=config.length, **terms)
        return losses, {"correct": aux["correct"] / config.length, "log_z": aux["log_z"]}

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        prompt = jnp.zeros((n, 0), jnp.int32)
        return draw(config, network, params, key, prompt, config.length)

    def log_prob(params: Any, key: jax.Array, x: jax.Array) -> jax.Array:
        return -next_token(functools.partial(network.apply, params), x.astype(jnp.int32))[0]

    warmup = min(100, config.steps // 10)

    def rate(peak: float) -> Any:
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps)

    # Rates, steps and skips of state spaces move slowly; a transformer has none.
    slow = optax.adam(rate(min(config.learning_rate, 1e-3)), b2=0.99)
    parts = {"rest": adamw(config, rate(config.learning_rate)), "slow": slow}
    return System(
        init,
        loss,
        optax.multi_transform(parts, state_space_groups),
        sample,
        log_prob,
        likelihood={"batch_size": 16, "bits": False},
        evaluations=config.length,
        count=config.samples,
        step_options={"uncast": RATES},
        remat=True,
    )


def draw(
    config: Config, network: nn.Module, params: Any, key: Any, prompt: jax.Array, num: int
) -> jax.Array:
    """Tokens [n, num] after the prompts, drawn as the config says."""
    n, given = prompt.shape
    if given >= config.length:
        raise ValueError(f"prompt must be shorter than {config.length} tokens, got {given}")
    cache = network.apply(params, n, config.length, method="empty_cache")
    apart = network.unstacked(params) if isinstance(network, GPT) else params
    step = functools.partial(network.apply, apart, method="step")
    return generate(step, cache, key, prompt, num_tokens=num, select=chosen(config)).tokens


def chosen(config: Config) -> Callable[[jax.Array], jax.Array]:
    """What of the logits may be drawn."""
    names = ("temperature", "top_k", "top_p", "min_p")
    return functools.partial(select, **{name: getattr(config, name) for name in names})


def score(config: Config, params: Any, part: Mapping[str, np.ndarray], tokens: Any) -> float:
    """Bits per byte of a part's windows, every token once."""
    network = NETWORKS[config.network](config, tokens.vocabulary)

    @jax.jit
    def nats(params: Any, x: jax.Array, where: jax.Array) -> jax.Array:
        logits = functools.partial(network.apply, params)
        return jnp.sum(next_token(logits, x, where=where)[0])

    x, where = part["x"], part["where"]
    total = 0.0
    for i in range(0, len(x), 32):
        fill = ((0, max(0, i + 32 - len(x))), (0, 0))  # one shape, so one program
        total += float(nats(params, np.pad(x[i : i + 32], fill), np.pad(where[i : i + 32], fill)))
    return float(bits_per_byte(total, int(tokens.lengths(x[where]).sum())))


def score_adapted(
    config: Config, params: Any, part: Mapping[str, np.ndarray], tokens: Any
) -> float:
    """Bits per byte by weights that take a step on each window after its score."""
    network = NETWORKS[config.network](config, tokens.vocabulary)
    losses, _ = jax.jit(functools.partial(dynamic_evaluation, network.apply, rate=config.adapt))(
        params, part["x"], part["where"]
    )
    length = int(tokens.lengths(part["x"][part["where"]]).sum())
    return float(bits_per_byte(jnp.sum(losses), length))


def continue_prompt(config: Config) -> dict[str, Any]:
    """Print texts that begin with the prompt, by the averaged weights of an earlier run."""
    _, params, run = _system.reopen(config.sample_from or "")
    tokens = _load(run)[1]
    prompt = np.tile(tokens.encode(config.prompt)[None], (config.samples, 1))
    options = ("temperature", "top_k", "top_p", "min_p")
    run = dataclasses.replace(run, **{name: getattr(config, name) for name in options})
    network = NETWORKS[run.network](run, tokens.vocabulary)
    key, num = _system.keys(config.seed).sample, run.length - prompt.shape[1]
    drawn = jax.jit(lambda params: draw(run, network, params, key, jnp.asarray(prompt), num))(
        params
    )
    found = [config.prompt + text for text in texts(run, np.asarray(drawn))]
    print(f"\n{'-' * 80}\n".join(found))
    return {"texts": found}


def plot_losses(folder: Any, bytes_per_token: float) -> None:
    """Write loss.png: the training loss, in bits per byte of the text, by the step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps, nats = zip(*[(r["step"], r["loss"]) for r in rows if "loss" in r], strict=True)
    bits = np.asarray(nats) / (bytes_per_token * math.log(2))
    curve = {"training, with dropout": (steps, bits)}
    _pictures.save_curves(
        folder / "loss.png", curve, title="training loss", y_label="bits per byte", log_y=True
    )


def _load(config: Config) -> tuple[text_data.Text, text_data.Tokeniser]:
    text = text_data.text(config.dataset)
    return text, _tokeniser(text.train, config.vocabulary)


_tokeniser = functools.lru_cache(maxsize=2)(text_data.tokeniser)


if __name__ == "__main__":
    _run.launch(main, Config)
