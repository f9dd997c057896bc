"""Continuous flow (FFJORD): dx/dt = v(x, t) trained by exact likelihood through the solver.

    python -m experiments.continuous_flow
    python -m experiments.continuous_flow --dataset moons --gradient adjoint
    python -m experiments.continuous_flow --dataset digits --trace hutchinson --width 256

Two dimensions take the exact trace, images one Hutchinson probe for each solve in training; the
test likelihood always takes the exact trace. With fixed steps everything is one scan;
--method dopri5 controls the error instead (the training gradient then goes through diffrax).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments import _pictures, _run, _samples
from experiments.flow import Flow, draw, draw_density
from genjax import flows
from genjax.data import DENSITIES, DataSpec, Scaling, load
from genjax.metrics import test_log_likelihood
from genjax.networks import TimeMLP
from genjax.training import export_npz, init_state, make_train_step

# Evaluations of the field in one step; the others choose their steps as they go.
STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Train a continuous flow by maximum likelihood."""

    dataset: str = "pinwheel"
    """A two-dimensional density, or images."""
    method: str = "rk4"
    """Solver: euler, midpoint, heun, rk4, dopri5 or tsit5."""
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
    """Adam's largest rate, falling along a cosine."""
    ema: float = 0.99
    """Decay of the averaged weights, which are evaluated."""
    steps: int = 1500
    """Updates in all, those before a resume included."""
    batch_size: int = 256
    """Examples in one update."""
    steps_per_call: int = 25
    """Updates in one call of the compiled program."""
    log_every: int = 25
    """Steps between lines of metrics.jsonl."""


def main(config: Config) -> dict[str, Any]:
    """Train, evaluate, draw; returns the summary."""
    train, spec = load(config.dataset, "train", data_dir=config.data_dir)
    test, _ = load(config.dataset, "test", data_dir=config.data_dir)
    network = TimeMLP(config.width, config.depth)
    key_init, key_run, key_test, key_draw = jax.random.split(jax.random.key(config.seed), 4)
    rate = optax.cosine_decay_schedule(config.learning_rate, config.steps, 0.01)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    start = jax.jit(network.init)(key_init, jnp.zeros((1, *spec.shape)), jnp.zeros(1))
    state = init_state(start, optimizer, key_run, ema_decays=(config.ema,))
    flow = build(config, network, spec)

    with _run.start_run(config) as run:
        step_fn = make_train_step(
            make_loss(config, network, spec),
            optimizer,
            mesh=_run.mesh(config),
            steps_per_call=config.steps_per_call,
        )
        state = _run.fit(run, state, step_fn, _run.batches(config, train))
        params = state.ema_params(config.ema)
        export_npz(run.folder / "params.npz", params)
        x = test["x"] if spec.levels else jnp.asarray(test["x"])
        scored = jax.jit(
            lambda p, k: test_log_likelihood(
                lambda _, y: flow.log_prob(p, y), k, x, scaling=flow.scaling, batch_size=512
            )
        )(params, key_test)
        summary = {
            "parameters": _samples.parameter_count(params),
            **draw(run, flow, params, key_draw, _samples.sample_count(train, spec)),
            "test_log_likelihood": scored.log_likelihood,
            "standard_error": scored.standard_error,
        }
        if spec.levels is None:
            exact = jnp.mean(DENSITIES[spec.name].log_prob(x))
            summary |= {
                "exact_log_likelihood": exact,
                "kl_to_exact": exact - scored.log_likelihood,
            }
            draw_density(run.folder, flow, params, spec, test["x"], key_draw)
        else:
            summary["bits_per_dim"] = scored.bits_per_dim
            y = jax.jit(lambda p, k: flow.sample(p, k, 100))(params, key_draw)
            levels = Scaling(spec.levels).to_levels(y)
            _pictures.save_grid(run.folder / "samples.png", levels, high=spec.levels - 1)
        return _run.finish(run, summary)


def build(config: Config, network: TimeMLP, spec: DataSpec) -> Flow:
    """The flow with exact trace, as densities and samples need it."""
    bijection = flows.continuous_flow(
        network.apply, num_steps=2 * config.solver_steps, method=config.method
    )
    base = flows.normal(spec.shape)

    def log_prob(params: Any, y: jax.Array) -> jax.Array:
        return flows.log_prob(bijection, base, params, y)

    def sample(params: Any, key: jax.Array, n: int) -> jax.Array:
        return flows.sample(bijection, base, params, key, n)

    stages = STAGES.get(config.method)
    scaling = None if spec.levels is None else Scaling(spec.levels)
    passes = None if stages is None else 2 * config.solver_steps * stages
    return Flow(network.init, log_prob, sample, scaling, passes)


def make_loss(config: Config, network: TimeMLP, spec: DataSpec) -> Callable[..., Any]:
    """Negative log-likelihood as loss(params, key, batch) -> (losses, aux)."""
    base = flows.normal(spec.shape)

    def loss_fn(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        key_data, key_probe = jax.random.split(key)
        x = batch["x"]
        if spec.levels is not None:
            x = Scaling(spec.levels).dequantise(key_data, x)
        probe = flows.rademacher(key_probe, x) if config.trace == "hutchinson" else None
        z, log_det = flows.solve_with_log_det(
            network.apply,
            params,
            x,
            probe=probe,
            times=(1.0, 0.0),
            num_steps=config.solver_steps,
            method=config.method,
            gradient=config.gradient,
        )
        return -(base.log_prob(z) + log_det), {}

    return loss_fn


if __name__ == "__main__":
    _run.launch(main, Config)
