"""Time of the compiled train step beside jax.jit of a hand-written loss, gradient and update."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

from experiments.benchmarks._table import OURS, Row, make_rows, show
from experiments.benchmarks._timing import in_turn
from genjax.training import data_mesh, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    pixels: int = 784
    """Length of an example."""
    hidden: int = 500
    """Width of the hidden layers of encoder and decoder."""
    latent: int = 20
    """Length of the code."""
    batch_size: int = 128
    """Examples in a step."""
    rounds: int = 60
    """How many times the two are timed in turn (A B A B ...)."""
    steps: int = 5
    """Steps in one timing."""


def init_params(config: Config) -> dict[str, Any]:
    """Weights of a VAE with one hidden layer on each side."""
    sizes = {
        "in": (config.pixels, config.hidden),
        "code": (config.hidden, 2 * config.latent),
        "up": (config.latent, config.hidden),
        "out": (config.hidden, config.pixels),
    }
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {
        name: {"w": jax.random.normal(key, shape) / shape[0] ** 0.5, "b": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


def vae_loss(params: Any, key: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Minus the ELBO of each example, Bernoulli pixels."""

    def dense(name: str, h: jax.Array) -> jax.Array:
        return h @ params[name]["w"] + params[name]["b"]

    mean, log_var = jnp.split(dense("code", jnp.tanh(dense("in", x))), 2, axis=-1)
    z = mean + jnp.exp(log_var / 2) * jax.random.normal(key, mean.shape)
    logits = dense("out", jnp.tanh(dense("up", z)))
    reconstruction = jnp.sum(jax.nn.softplus(logits) - x * logits, axis=-1)
    kl = 0.5 * jnp.sum(jnp.exp(log_var) + mean**2 - 1 - log_var, axis=-1)
    return reconstruction + kl, {"reconstruction": reconstruction, "kl": kl}


def hand_written(optimizer: Any) -> Callable[..., Any]:
    """What one writes without a library: nothing but loss, gradient and update."""

    def step(params: Any, opt_state: Any, key: Any, x: jax.Array) -> Any:
        key, now = jax.random.split(key)
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(vae_loss(p, now, x)[0]))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key, loss

    return jax.jit(step, donate_argnums=(0, 1, 2))


def main(config: Config) -> list[Row]:
    optimizer = optax.adam(1e-3)
    x = jax.random.bernoulli(jax.random.key(1), 0.3, (config.batch_size, config.pixels))
    x = jax.device_get(x.astype(jnp.float32))

    state = init_state(init_params(config), optimizer, jax.random.key(2))
    ours_step = make_train_step(vae_loss, optimizer, mesh=data_mesh(1))
    params = init_params(config)
    by_hand = (params, optimizer.init(params), jax.random.key(2))
    hand_step = hand_written(optimizer)

    def ours() -> None:
        nonlocal state
        state, metrics = ours_step(state, x)
        metrics["loss"].block_until_ready()

    def hand() -> None:
        nonlocal by_hand
        *by_hand, loss = hand_step(*by_hand, x)
        loss.block_until_ready()

    # Beside the clock's time the processor's, which is deaf to neighbours.
    used: dict[str, list[float]] = {}

    def side(name: str, step: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            begun = time.process_time()
            for _ in range(config.steps):
                step()
            used.setdefault(name, []).append(1e3 * (time.process_time() - begun) / config.steps)

        return call

    sides = {OURS: side(OURS, ours), "by_hand": side("by_hand", hand)}
    times = in_turn(sides, rounds=config.rounds, units=config.steps)
    checks = {name: {"processor_ms": statistics.median(t[2:])} for name, t in used.items()}
    # At most 5% more than what one writes by hand.
    return show(make_rows("step_overhead", times, targets=1 / 1.05, checks=checks))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
