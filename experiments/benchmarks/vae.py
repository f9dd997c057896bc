"""Time of a VAE training step (784-400-20, batch 128) beside plain jax, flax's example and torch.

One step draws the noise, takes the loss (Bernoulli pixels and the divergence) and its gradient,
updates by Adam at 1e-3 and reads the loss back. Every side has the same sizes and the same rows.
The sides are timed in turn, round by round, in one process; a ratio is the median over rounds of
(peer / genjax), so above 1 genjax is faster.

    genjax         make_train_step over elbo and two linen MLPs
    genjax_scan    the same with `scan` steps in one call, each with its own batch
    plain_jax      jax.jit of a hand-written loss, gradient and update, donated
    flax_example   as flax's own VAE example: linen module, flax TrainState, jit, not donated
    torch          as pytorch's VAE example, eager
    torch_compile  the same through torch.compile (with --torch-compile)
"""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.benchmarks._table import OURS, Row, build, make_rows, show
from experiments.benchmarks._timing import in_turn
from genjax.networks import MLP
from genjax.training import data_mesh, init_state, make_train_step
from genjax.variational import bernoulli_log_likelihood, elbo

PIXELS, HIDDEN, LATENT, BATCH, RATE = 784, 400, 20, 128, 1e-3
# What the same comparison has to give: ratios of the peer's time to ours.
TARGETS = {"flax_example": 1.15, "torch": 2.2, "torch_compile": 2.2}
Run = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Config:
    rounds: int = 15
    """How often all sides are timed in turn."""
    steps: int = 40
    """Steps in one timing (a multiple of scan)."""
    scan: int = 20
    """Steps in one call of genjax_scan."""
    torch: bool = True
    """Time torch too, where it is installed."""
    torch_compile: bool = False
    """Time torch.compile too; it needs a C++ compiler and a minute."""


def genjax_step(x: np.ndarray, scan: int = 1) -> Run:
    encoder, decoder = (
        MLP((HIDDEN, 2 * LATENT), activation=jax.nn.relu),
        MLP((HIDDEN, PIXELS), activation=jax.nn.relu),
    )

    def loss_fn(params: Any, key: Any, batch: jax.Array) -> Any:
        return elbo(
            lambda x: tuple(jnp.split(encoder.apply(params["encoder"], x), 2, axis=1)),
            lambda x, z: bernoulli_log_likelihood(x, decoder.apply(params["decoder"], z)),
            key,
            batch,
        )

    params = {
        "encoder": encoder.init(jax.random.key(0), x),
        "decoder": decoder.init(jax.random.key(1), x[:, :LATENT]),
    }
    optimizer = optax.adam(RATE)
    state = init_state(params, optimizer, jax.random.key(2))
    step = make_train_step(loss_fn, optimizer, mesh=data_mesh(1), steps_per_call=scan)
    batch = np.stack([x] * scan) if scan > 1 else x

    def run(steps: int) -> float:
        nonlocal state
        for _ in range(steps // scan):
            state, metrics = step(state, batch)
            loss = np.asarray(metrics["loss"])
        return float(loss.ravel()[-1])

    return run


def plain_jax(x: np.ndarray) -> Run:
    def dense(key: Any, rows: int, columns: int) -> dict[str, jax.Array]:
        return {"w": jax.random.normal(key, (rows, columns)) / rows**0.5, "b": jnp.zeros(columns)}

    keys = jax.random.split(jax.random.key(0), 5)
    params = [
        dense(keys[0], PIXELS, HIDDEN),
        dense(keys[1], HIDDEN, 2 * LATENT),
        dense(keys[2], LATENT, HIDDEN),
        dense(keys[3], HIDDEN, PIXELS),
    ]
    optimizer = optax.adam(RATE)

    def loss_fn(params: Any, key: Any, x: jax.Array) -> jax.Array:
        layer = lambda i, h: h @ params[i]["w"] + params[i]["b"]  # noqa: E731
        mean, log_var = jnp.split(layer(1, jax.nn.relu(layer(0, x))), 2, axis=1)
        z = mean + jnp.exp(log_var / 2) * jax.random.normal(key, mean.shape)
        logits = layer(3, jax.nn.relu(layer(2, z)))
        pixels = jnp.sum(jax.nn.softplus(logits) - x * logits, axis=1)
        kl = 0.5 * jnp.sum(jnp.exp(log_var) + mean**2 - 1 - log_var, axis=1)
        return jnp.mean(pixels + kl)

    def step(params: Any, opt_state: Any, key: Any, x: jax.Array) -> Any:
        key, now = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_fn)(params, now, x)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key, loss

    compiled = jax.jit(step, donate_argnums=(0, 1, 2))
    carry = (params, optimizer.init(params), keys[4])

    def run(steps: int) -> float:
        nonlocal carry
        for _ in range(steps):
            *carry, loss = compiled(*carry, x)
            value = float(loss)
        return value

    return run


def flax_example(x: np.ndarray) -> Run:
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

    key = jax.random.key(0)
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(key, x, key)["params"], tx=optax.adam(RATE)
    )

    def run(steps: int) -> float:
        nonlocal state, key
        for _ in range(steps):
            key, now = jax.random.split(key)
            state, loss = step(state, x, now)
            value = float(loss)
        return value

    return run


def torch_step(x: np.ndarray, compiled: bool = False) -> Run:
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(0)

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.up = nn.Linear(PIXELS, HIDDEN), nn.Linear(LATENT, HIDDEN)
            self.mean, self.log_var = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
            self.out = nn.Linear(HIDDEN, PIXELS)

        def forward(self, x: Any) -> Any:
            h = functional.relu(self.hidden(x))
            mean, log_var = self.mean(h), self.log_var(h)
            z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
            return torch.sigmoid(self.out(functional.relu(self.up(z)))), mean, log_var

    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    data = torch.from_numpy(x)

    def loss_fn(data: Any) -> Any:
        pixels, mean, log_var = model(data)
        cross_entropy = functional.binary_cross_entropy(pixels, data, reduction="sum")
        return cross_entropy - 0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())

    loss_fn = torch.compile(loss_fn) if compiled else loss_fn

    def run(steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(data)
            loss.backward()
            optimizer.step()
            value = loss.item() / BATCH
        return value

    return run


def main(config: Config) -> list[Row]:
    """Time every side in turn; the rows hold milliseconds of one step."""
    x = (np.random.default_rng(0).uniform(size=(BATCH, PIXELS)) < 0.2).astype(np.float32)
    makers: dict[str, Callable[[], Run]] = {
        OURS: partial(genjax_step, x),
        "genjax_scan": partial(genjax_step, x, config.scan),
        "plain_jax": partial(plain_jax, x),
        "flax_example": partial(flax_example, x),
    }
    if config.torch:
        makers["torch"] = partial(torch_step, x)
        if config.torch_compile:
            makers["torch_compile"] = partial(torch_step, x, compiled=True)
    losses: dict[str, float] = {}

    def side(name: str) -> Callable[[], None]:
        run = makers[name]()

        def call() -> None:
            losses[name] = run(config.steps)

        return call

    sides, notes = build({k: partial(side, k) for k in makers}, ("torch", "torch_compile"))
    # torch's threads spin for a while after their last work.
    times = in_turn(sides, rounds=config.rounds, units=config.steps, pause=0.05)
    checks = {name: {"last_loss": loss} for name, loss in losses.items()}
    weights = 2 * PIXELS * HIDDEN + 3 * HIDDEN * LATENT
    options = {"work": {"flops": 6.0 * BATCH * weights}, "notes": notes}
    return show(make_rows("vae", times, targets=TARGETS, checks=checks, **options))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
