"""Sides that several benchmarks share: training steps of genjax, plain jax, PyTorch; the VAE."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks._ceilings import work_of
from experiments.benchmarks._timing import Side
from genjax.networks import MLP
from genjax.training import data_mesh, init_state, make_train_step
from genjax.variational import bernoulli_log_likelihood, elbo

PIXELS, LATENT = 784, 20


class Trainer:
    """genjax's compiled step with its state: a call makes `updates` updates and reads the loss."""

    def __init__(self, loss_fn: Any, params: Any, x: Any, *, rate=1e-3, updates=1, mesh=None):
        optimizer = optax.adam(rate)
        options = {"mesh": mesh or data_mesh(1), "steps_per_call": updates}
        self.step: Any = make_train_step(loss_fn, optimizer, **options)
        self.state = init_state(params, optimizer, jax.random.key(2))
        self.batch = np.stack([x] * updates) if updates > 1 else x

    def __call__(self) -> float:
        self.state, metrics = self.step(self.state, self.batch)
        return float(np.ravel(metrics["loss"])[-1])

    def work(self) -> dict[str, float]:
        """Flops and exponentials of one call."""
        return work_of(self.step.compiled, self.state, self.batch)


def plain_trainer(loss_fn: Any, params: Any, x: Any) -> Side:
    """What one writes without a library, with a loss of train_step: compiled, donated, Adam."""
    optimizer = optax.adam(1e-3)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, opt_state: Any, key: Any, x: Any) -> Any:
        key, now = jax.random.split(key)
        loss, grads = jax.value_and_grad(lambda p: jnp.mean(loss_fn(p, now, x)[0]))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key, loss

    carried = [jax.tree.map(jnp.array, params), optimizer.init(params), jax.random.key(0)]

    def run() -> float:
        nonlocal carried
        *carried, loss = step(*carried, x)
        return float(loss)

    return run


def timed_steps(steps: dict[str, Any], start: Any, key: Any) -> dict[str, Callable[..., Any]]:
    """Each step (state, key) -> state compiled, donated and waited for; "work": that of a step."""

    def timed(step: Any) -> Side:
        compiled = jax.jit(step, donate_argnums=0)
        state = [jax.tree.map(jnp.copy, start)]

        def run() -> None:
            state[0] = jax.block_until_ready(compiled(state[0], key))

        return run

    work = lambda part: work_of(jax.jit(steps[part]), start, key)  # noqa: E731
    return {"work": work, **{part: timed(step) for part, step in steps.items()}}


def torch_trainer(parameters: Any, loss_fn: Callable[[], Any], **adam: Any) -> Side:
    """A step of Adam, at 1e-3 unless `adam` says so, in eager PyTorch, the loss read back."""
    import torch

    optimizer = torch.optim.Adam(parameters, **{"lr": 1e-3, **adam})

    def run() -> float:
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def waiting(f: Callable[..., Any], *args: Any) -> Side:
    """Make the side that calls f and waits for its arrays."""
    return lambda: jax.block_until_ready(f(*args))


def repeat(side: Side, times: int) -> Side:
    """Make the side that calls another so many times; it returns what the last call did."""
    return lambda: [side() for _ in range(times)][-1]


def vae(hidden: int = 400) -> tuple[Any, Any]:
    """Make genjax's VAE of two linen MLPs, Bernoulli pixels: (params, loss_fn of train_step)."""
    encoder = MLP((hidden, 2 * LATENT), activation=jax.nn.relu)
    decoder = MLP((hidden, PIXELS), activation=jax.nn.relu)

    def loss_fn(params: Any, key: Any, x: jax.Array) -> Any:
        encode = lambda x: tuple(jnp.split(encoder.apply(params[0], x), 2, axis=1))  # noqa: E731
        score = lambda x, z: bernoulli_log_likelihood(x, decoder.apply(params[1], z))  # noqa: E731
        return elbo(encode, score, key, x)

    key = jax.random.key(0)
    params = encoder.init(key, jnp.ones((1, PIXELS))), decoder.init(key, jnp.ones((1, LATENT)))
    return params, loss_fn


def plain_vae(hidden: int, activation: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Make the same VAE without a library: (params, loss_fn of train_step)."""
    sizes = (PIXELS, hidden), (hidden, 2 * LATENT), (LATENT, hidden), (hidden, PIXELS)
    keys = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        {"w": jax.random.normal(key, size) / size[0] ** 0.5, "b": jnp.zeros(size[1])}
        for key, size in zip(keys, sizes, strict=True)
    ]

    def loss_fn(params: Any, key: Any, x: jax.Array) -> Any:
        layer = lambda i, h: h @ params[i]["w"] + params[i]["b"]  # noqa: E731
        mean, log_var = jnp.split(layer(1, activation(layer(0, x))), 2, axis=1)
        z = mean + jnp.exp(log_var / 2) * jax.random.normal(key, mean.shape)
        logits = layer(3, activation(layer(2, z)))
        reconstruction = jnp.sum(jax.nn.softplus(logits) - x * logits, axis=1)
        kl = 0.5 * jnp.sum(jnp.exp(log_var) + mean**2 - 1 - log_var, axis=1)
        return reconstruction + kl, {"reconstruction": reconstruction, "kl": kl}

    return params, loss_fn
