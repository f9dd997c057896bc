"""Time of a VAE training step beside plain jax, flax's example and torch, and of what a step adds.

vae: 784-400-20, batch 128. One step draws the noise, takes the loss (Bernoulli pixels) and its
gradient, updates by Adam at 1e-3 and reads the loss back.

    genjax         make_train_step over elbo and two linen MLPs
    genjax_scan    the same with `scan` steps in one call, each with its own batch
    plain_jax      jax.jit of a hand-written loss, gradient and update, donated
    flax_example   as flax's own VAE example: linen module, flax TrainState, jit, not donated
    torch          as pytorch's VAE example, eager
    torch_compile  the same through torch.compile (with --torch-compile)

step_overhead: make_train_step beside jax.jit of loss, gradient and update, both of the same plain
loss, 784-500-20; the processor's time too, to which other processes do not add.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import _models
from experiments.benchmarks._models import LATENT, PIXELS, repeat
from experiments.benchmarks._workload import OURS, Options, Row, Side, compare, every, launch

HIDDEN, BATCH = 400, 128
TARGETS = {"flax_example": 1.15, "torch": 2.2, "torch_compile": 2.2}


@dataclasses.dataclass(frozen=True)
class Config(Options):
    steps: int = 40  # steps in one timing (a multiple of scan)
    scan: int = 20  # steps in one call of genjax_scan
    torch_compile: bool = False  # time torch.compile too; it needs a C++ compiler and a minute


def data() -> np.ndarray:
    return (np.random.default_rng(0).uniform(size=(BATCH, PIXELS)) < 0.2).astype(np.float32)


def genjax_step(updates: int = 1) -> Side:
    params, loss_fn = _models.vae(HIDDEN)
    return _models.Trainer(loss_fn, params, data(), updates=updates)


def plain_jax() -> Side:
    params, loss_fn = _models.plain_vae(HIDDEN, jax.nn.relu)
    return _models.plain_trainer(loss_fn, params, data())


def flax_example() -> Side:
    import flax.linen as nn
    from flax.training.train_state import TrainState

    class VAE(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, key: Any) -> Any:
            h = nn.relu(nn.Dense(HIDDEN)(x))
            mean, log_var = nn.Dense(LATENT)(h), nn.Dense(LATENT)(h)
            z = mean + jnp.exp(0.5 * log_var) * jax.random.normal(key, log_var.shape)
            return nn.Dense(PIXELS)(nn.relu(nn.Dense(HIDDEN)(z))), mean, log_var

    model = VAE()

    def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
        # The example's own formula.
        logits = nn.log_sigmoid(logits)
        return -jnp.sum(labels * logits + (1.0 - labels) * jnp.log(-jnp.expm1(logits)), axis=-1)

    @jax.jit
    def step(state: Any, x: jax.Array, key: Any) -> Any:
        def loss_fn(params: Any) -> jax.Array:
            logits, mean, log_var = model.apply({"params": params}, x, key)
            kl = -0.5 * jnp.sum(1 + log_var - jnp.square(mean) - jnp.exp(log_var), axis=-1)
            return cross_entropy(logits, x).mean() + kl.mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    x, key = data(), jax.random.key(0)
    params = model.init(key, x, key)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-3))

    def run() -> float:
        nonlocal state, key
        key, now = jax.random.split(key)
        state, loss = step(state, x, now)
        return float(loss)

    return run


def torch_step(compiled: bool = False) -> Side:
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)
    encoder = [(PIXELS, HIDDEN), (HIDDEN, LATENT), (HIDDEN, LATENT)]  # the last two: mean, log_var
    sizes = [*encoder, (LATENT, HIDDEN), (HIDDEN, PIXELS)]
    layers, x = nn.ModuleList(nn.Linear(*size) for size in sizes), torch.from_numpy(data())

    def loss_fn() -> Any:
        h = functional.relu(layers[0](x))
        mean, log_var = layers[1](h), layers[2](h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        pixels = torch.sigmoid(layers[4](functional.relu(layers[3](z))))
        cross_entropy = functional.binary_cross_entropy(pixels, x, reduction="sum")
        return cross_entropy - 0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())

    loss_fn = torch.compile(loss_fn) if compiled else loss_fn
    step = _models.torch_trainer(layers.parameters(), loss_fn)
    return lambda: step() / BATCH  # the example's loss is a sum


def step(config: Config) -> list[Row]:
    """Time a step of the library's VAE and of its peers'."""
    steps: dict[str, Callable[[], Side]] = {
        OURS: genjax_step,
        "genjax_scan": lambda: genjax_step(config.scan),
        "plain_jax": plain_jax,
        "flax_example": flax_example,
        "torch": torch_step,
    }
    if config.torch_compile:
        steps["torch_compile"] = lambda: torch_step(compiled=True)
    times = {name: 1 if name == "genjax_scan" else config.scan for name in steps}
    makers = {name: lambda n=name: repeat(steps[n](), times[n]) for name in steps}
    flops = 6.0 * BATCH * (2 * PIXELS * HIDDEN + 3 * HIDDEN * LATENT)
    last_loss = lambda results: {k: {"last_loss": loss} for k, loss in results.items()}  # noqa: E731
    figures = {"checks": last_loss, "work": lambda: {"flops": flops}}
    timing = {"calls": config.steps // config.scan, "units": config.scan}
    # The threads of torch spin for a while after their last work: hence the longer pause.
    return compare("vae", makers, config, targets=TARGETS, **figures, **timing, pause=0.05)


def overhead(config: Config) -> list[Row]:
    """Time the library's step beside the same by hand."""
    params, loss_fn = _models.plain_vae(500, jnp.tanh)
    used: dict[str, list[float]] = {}

    def side(name: str, make: Callable[..., Side]) -> Side:
        step, spent = make(loss_fn, params, data()), used.setdefault(name, [])

        def call() -> None:
            begun = time.process_time()
            step()
            spent.append(1e3 * (time.process_time() - begun))

        return call

    def checks(_: Any) -> dict[str, dict[str, float]]:
        return {name: {"processor_ms": statistics.median(t[2:])} for name, t in used.items()}

    peers = {OURS: _models.Trainer, "by_hand": _models.plain_trainer}
    makers = {name: partial(side, name, make) for name, make in peers.items()}
    # At most 5% more than what one writes by hand.
    options = {"targets": 1 / 1.05, "checks": checks, "calls": 5}
    return compare("step_overhead", makers, config, **options)


WORKLOADS = {"vae": step, "step_overhead": overhead}
main = every(lambda name, config: WORKLOADS[name](config), WORKLOADS)
if __name__ == "__main__":
    launch(main, Config)
