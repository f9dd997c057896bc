"""Continuous flow (FFJORD): dx/dt = v(x, t) trained by exact likelihood through the solver.

    python -m experiments.continuous_flow
    python -m experiments.continuous_flow --dataset moons --gradient adjoint
    python -m experiments.continuous_flow --dataset digits --trace hutchinson --width 256

Two dimensions take the exact trace, images one Hutchinson probe for each solve in training; the
test likelihood always takes the exact trace. With fixed steps everything is one scan;
--method dopri5 controls the error instead (the training gradient then goes through diffrax).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments import _pictures, _run
from experiments._data import Data, load_data
from experiments._system import Row, System, train
from genjax import flows
from genjax.networks import TimeMLP

# Eight solver steps, as by default; with four and a rate of 3e-3 it ended at 5.5 bits/dim.
OF_IMAGES = {"trace": "hutchinson", "width": 128, "batch_size": 128, "learning_rate": 1e-3}
FEW = {"steps_per_call": 5}
ROWS = (Row("continuous_flow", "Continuous flow", {**OF_IMAGES, **FEW}, FEW, bits="estimate"),)
# Evaluations of the field in one step; the others choose their steps as they go.
STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    """Train a continuous flow by maximum likelihood."""

    dataset: str = "pinwheel"
    """A two-dimensional density, or images."""
    method: Literal["euler", "midpoint", "heun", "rk4", "dopri5", "tsit5"] = "rk4"
    """Solver."""
    solver_steps: int = 8
    """Steps of a fixed-step solver."""
    trace: Literal["exact", "hutchinson"] = "exact"
    """The divergence in training."""
    gradient: Literal["backprop", "adjoint"] = "backprop"
    """Through the solver's steps, or by the adjoint equation."""
    width: int = 64
    """Hidden units."""
    depth: int = 2
    """Residual layers."""
    learning_rate: float = 3e-3
    ema: float = 0.99
    steps: int = 1500
    batch_size: int = 256
    steps_per_call: int = 25
    log_every: int = 25


def main(config: Config) -> dict[str, Any]:
    """Train, evaluate, draw; returns the summary."""
    data = load_data(config)
    system = build(config, data)
    return train(config, system, data, _pictures.density_report(system, data))


def build(config: Config, data: Data) -> System:
    """The flow: exact trace for densities and samples, a probe for the loss where asked."""
    network, base = TimeMLP(config.width, config.depth), flows.normal(data.spec.shape)
    scaling = data.scaling()
    exact = flows.continuous_flow(
        network.apply, num_steps=2 * config.solver_steps, method=config.method
    )

    def init(key: jax.Array) -> Any:
        return network.init(key, jnp.zeros((1, *data.spec.shape)), jnp.zeros(1))

    def loss(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_data, key_probe = jax.random.split(key)
        x = scaling.dequantise(key_data, batch["x"])
        z, log_det = flows.solve_with_log_det(
            network.apply,
            params,
            x,
            probe=flows.rademacher(key_probe, x) if config.trace == "hutchinson" else None,
            times=(1.0, 0.0),
            num_steps=config.solver_steps,
            method=config.method,
            gradient=config.gradient,
        )
        return -(base.log_prob(z) + log_det), {}

    def sample(params: Any, key: jax.Array, n: int, label: Any = None) -> jax.Array:
        return scaling.to_levels(flows.sample(exact, base, params, key, n))

    def log_prob(params: Any, key: Any, y: jax.Array) -> jax.Array:
        return flows.log_prob(exact, base, params, y)

    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps, 0.01)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    stages = STAGES.get(config.method)
    passes = None if stages is None else 2 * config.solver_steps * stages
    return System(
        init,
        loss,
        optimizer,
        sample,
        log_prob,
        scaling,
        likelihood={"batch_size": 512},
        evaluations=passes,
    )


if __name__ == "__main__":
    _run.launch(main, Config)
