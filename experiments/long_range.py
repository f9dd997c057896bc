"""What a model remembers over long sequences: selective copying, induction heads, digits by pixels.

copying: 8 tokens stand among 64 positions of blanks, and have to be repeated in order at the end.
induction: a marker appears once and again at the end; the token that followed it is asked for,
after training at one length also at others. digits: an image as a sequence of pixels, its class.

    python -m experiments.long_range
    python -m experiments.long_range --network s4d
    python -m experiments.long_range --task induction
    python -m experiments.long_range --task digits

Sequences of the first two are functions of their number, so that no two steps see the same. What is
left open has a default for each task, in DEFAULTS.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import _data, _run, _system
from experiments._data import Data
from experiments._system import System, parameter_count, prepare, weights
from genjax import checks
from genjax.data import DataSpec
from genjax.networks import RATES, StateSpace, state_space_groups
from genjax.training import export_npz

NUMBERS = 2**22  # sequences that can be drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a state space model on one task and measure it on fresh sequences."""

    evaluation: ClassVar = ("test_lengths", "examples")

    task: Literal["copying", "induction", "digits"] = "copying"
    """What is to be learnt, see above."""
    network: Literal["s4", "s4d", "mamba", "mamba2"] | None = None
    """The layer (default: mamba, s4d for digits)."""
    depth: int | None = None
    """Layers (default: 2, 4 for digits)."""
    width: int = 64
    """Features of a position."""
    states: int | None = None
    """States of a channel (default: the layer's own, 16 to 128; 16 for digits)."""
    first_steps: tuple[float, float] | None = None
    """Range of dt of s4 and s4d at first (default: 0.001 to 0.1, which looks back over 10 to 1,000
    positions; 0.01 to 1 for digits, which have 64)."""
    length: int = 64
    """Positions that hold the sequence in training."""
    test_lengths: tuple[int, ...] | None = None
    """Lengths at which it is measured, not digits (default: 64, and 1,024 for induction)."""
    copies: int = 8
    """Tokens to copy."""
    vocabulary: int = 16
    """Tokens, the blank and the marker among them."""
    examples: int = 1000
    """Fresh sequences in one measurement."""
    dropout: float | None = None
    """On what a layer adds (default: 0, 0.1 for digits)."""
    learning_rate: float = 3e-3
    slow_rate: float = 1e-3
    """The rate for A, the steps and D, at most."""
    weight_decay: float = 0.01
    """AdamW's decay, but for A, the steps and D."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.99
    batch_size: int | None = None  # type: ignore[assignment]
    """Examples in one update (default: 64, 32 for digits)."""
    steps: int | None = None  # type: ignore[assignment]
    """Updates in all (default: 3,000, 2,000 for digits)."""
    steps_per_call: int = 25


# What options that were left open are, for each task.
COPYING = {
    "network": "mamba",
    "depth": 2,
    "first_steps": (0.001, 0.1),
    "test_lengths": (64,),
    "dropout": 0.0,
    "batch_size": 64,
    "steps": 3000,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "copying": COPYING,
    "induction": COPYING | {"test_lengths": (64, 1024)},
    "digits": {
        "network": "s4d",
        "depth": 4,
        "states": 16,
        "first_steps": (0.01, 1.0),
        "test_lengths": (),
        "dropout": 0.1,
        "batch_size": 32,
        "steps": 2000,
    },
}


def settled(config: Config) -> Config:
    """Give the options that were left open their values for this task."""
    defaults = DEFAULTS[config.task].items()
    left = {name: value for name, value in defaults if getattr(config, name) is None}
    return dataclasses.replace(config, **left)


def main(config: Config) -> dict[str, Any]:
    """Train, measure; returns the summary."""
    config = settled(config)
    check(config)
    data = load_data(config)
    system = build(config, data)
    training = prepare(config, system, data)
    with _run.start_run(config) as run:
        params = weights(config, system, _run.fit(run, *training))
        export_npz(run.folder / "params.npz", params)
        facts = {"parameters": parameter_count(params), **measure(config, data, params)}
        return _run.finish(run, facts)


def check(config: Config) -> None:
    """Raise ValueError for options that make no task."""
    for name in ("depth", "width", "copies", "examples"):
        checks.integer(name, getattr(config, name), 1)
    checks.integer("vocabulary", config.vocabulary, 3)
    checks.between("dropout", config.dropout, 0, 0.99)
    low, high = config.first_steps or (0.0, 0.0)
    if not 0 < low < high:
        raise ValueError(f"first_steps must rise from above 0, got {config.first_steps}")
    least = config.copies if config.task == "copying" else 3
    for length in (config.length, *config.test_lengths):
        checks.integer("length", length, least)


def load_data(config: Config) -> Data:
    """The images, or the numbers of sequences."""
    if config.task == "digits":
        data = _data.load_data(config)
        data.require("images", labels=True)
        return data
    checks.one_of("dataset, which --task digits alone reads,", config.dataset, ["digits"])
    numbers = np.arange(NUMBERS, dtype=np.int32)
    spec = DataSpec(config.task, "tokens", (config.length,), config.vocabulary, None)
    return Data({"x": numbers}, {"x": numbers[: config.examples]}, spec)


def network(config: Config, data: Data) -> StateSpace:
    """The network: logits of every position."""
    config, digits = settled(config), config.task == "digits"
    return StateSpace(
        None if digits else config.vocabulary,
        outputs=data.spec.classes if digits else config.vocabulary,
        kind=config.network,
        depth=config.depth,
        width=config.width,
        shift=False,
        dropout=config.dropout,
        block_options=(("states", config.states), ("dt_range", config.first_steps)),
        remat=config.remat,
    )


def build(config: Config, data: Data) -> System:
    """The network with its loss; nothing is sampled."""
    config = settled(config)
    net = network(config, data)
    task = sequences(config, config.length)

    def init(key: jax.Array) -> Any:
        if config.task == "digits":
            return net.init(key, pixels(jnp.zeros((1, *data.spec.shape), jnp.uint8), data))
        return net.init(key, task(_system.keys(config.seed).run, jnp.arange(1))[0])

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_shift, key_drop = jax.random.split(key)
        if config.task == "digits":
            x, answers = pixels(shifted(key_shift, batch["x"], 1), data), batch["label"]
            logits = jnp.mean(net.apply(params, x, dropout_key=key_drop), axis=1)
        else:
            x, answers = task(_system.keys(config.seed).run, batch["x"])
            logits = net.apply(params, x, dropout_key=key_drop)[:, -answers.shape[1] :]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, answers)
        right = (jnp.argmax(logits, -1) == answers).astype(jnp.float32)
        if losses.ndim == 2:
            losses, right = jnp.mean(losses, axis=1), jnp.mean(right, axis=1)
        return losses, {"right": right}

    options = {"uncast": RATES}
    return System(init, loss, optimizer(config), evaluations=1, step_options=options, remat=True)


def optimizer(config: Any) -> optax.GradientTransformation:
    """AdamW with a warm-up and a cosine; A, the steps and D at `slow_rate` at most, no decay."""

    def rate(peak: float) -> Any:
        warmup = min(100, config.steps // 10)
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps)

    fast = optax.adamw(rate(config.learning_rate), b2=0.99, weight_decay=config.weight_decay)
    slow = optax.adam(rate(min(config.learning_rate, config.slow_rate)), b2=0.99)
    groups = optax.multi_transform({"rest": fast, "slow": slow}, state_space_groups)
    return optax.chain(optax.clip_by_global_norm(config.clip), groups)


def sequences(config: Config, length: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(key, numbers [n]) -> tokens [n, positions] and the answers at the last of them."""
    draw = {
        "copying": functools.partial(copying, copies=config.copies),
        "induction": induction,
        "digits": induction,
    }[config.task]
    one = functools.partial(draw, length=length, vocabulary=config.vocabulary)
    return lambda key, numbers: jax.vmap(lambda i: one(jax.random.fold_in(key, i)))(numbers)


def copying(
    key: jax.Array, *, length: int, vocabulary: int, copies: int
) -> tuple[jax.Array, jax.Array]:
    """Tokens 1, ..., vocabulary - 2 at random places among blanks (0), then a marker for each."""
    key_place, key_token = jax.random.split(key)
    places = jnp.sort(jax.random.permutation(key_place, length)[:copies])
    tokens = jax.random.randint(key_token, (copies,), 1, vocabulary - 1)
    blanks = jnp.zeros(length, jnp.int32).at[places].set(tokens)
    return jnp.concatenate([blanks, jnp.full(copies, vocabulary - 1)]), tokens


def induction(key: jax.Array, *, length: int, vocabulary: int) -> tuple[jax.Array, jax.Array]:
    """Random tokens; a marker at a random place and at the end: what followed the first one?"""
    key_place, key_token = jax.random.split(key)
    tokens = jax.random.randint(key_token, (length,), 0, vocabulary - 1)
    place = jax.random.randint(key_place, (), 0, length - 2)
    answer = tokens[place + 1]
    return tokens.at[place].set(vocabulary - 1).at[-1].set(vocabulary - 1), answer[None]


def pixels(x: Any, data: Data) -> jax.Array:
    """Images as sequences of pixels, row by row: [n, height * width, channels]."""
    return data.scaling().to_continuous(x).reshape(len(x), -1, data.spec.shape[-1])


def measure(config: Config, data: Data, params: Any) -> Mapping[str, float]:
    """Shares of right answers on the test split, or on fresh sequences of each length."""
    net = network(config, data)
    if config.task == "digits":

        @jax.jit
        def classes(x: jax.Array) -> jax.Array:
            return jnp.argmax(jnp.mean(net.apply(params, pixels(x, data)), axis=1), axis=-1)

        return {"test_accuracy": float(np.mean(classes(data.test["x"]) == data.test["label"]))}
    found: dict[str, float] = {}
    key = _system.keys(config.seed).test
    for length in config.test_lengths:
        task, size = sequences(config, length), min(config.examples, 100)

        @jax.jit
        def right(numbers: jax.Array, task: Any = task) -> jax.Array:
            x, answers = task(key, numbers)
            logits = net.apply(params, x)[:, -answers.shape[1] :]
            return jnp.argmax(logits, axis=-1) == answers

        parts = [right(jnp.arange(i, i + size)) for i in range(0, config.examples, size)]
        every = np.concatenate(parts)
        found[f"accuracy_{length}"] = float(np.mean(every))
        found[f"whole_sequences_{length}"] = float(np.mean(np.all(every, axis=1)))
    return found


def shifted(key: jax.Array, x: jax.Array, most: int) -> jax.Array:
    """Shift each image by up to `most` pixels up or down and to either side, level 0 moving in."""
    padded = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)))
    starts = jax.random.randint(key, (len(x), 2), 0, 2 * most + 1)

    def cut(image: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), x.shape[1:])

    return jax.vmap(cut)(padded, starts)


if __name__ == "__main__":
    _run.launch(main, Config)
