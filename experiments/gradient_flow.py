"""Particles that flow along the gradient of the Sinkhorn divergence to the data; no network.

n particles x with weights 1/n follow dx_i/dt = -n dS(x, y)/dx_i. For the squared distance that is
twice the debiased barycentric displacement, so that a step of 1/2 would jump onto the data's
barycentres; small steps draw the whole path.

    python -m experiments.gradient_flow
    python -m experiments.gradient_flow --dataset digits --num-particles 1000
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import _judge, _pictures, _run
from experiments._data import Data, load_data
from genjax import checks
from genjax.metrics import sliced_wasserstein
from genjax.training import NonFiniteError
from genjax.training.record import MetricsLog
from genjax.transport import sinkhorn_divergence, squared_euclidean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    """Move particles to a data set."""

    dataset: str = "moons"
    """A 2-D density such as moons, or an image set such as digits."""
    steps: int = 100
    """Steps of the flow."""
    num_particles: int = 500
    """Particles, and points of the data that they flow to."""
    step_size: float = 0.05
    """Time of one step; 0.5 jumps onto the barycentres."""
    epsilon: float = 0.005
    """Entropy, in parts of the data's mean squared distance."""
    tolerance: float = 1e-2
    """L1 marginal error that ends the Sinkhorn iterations of a step."""
    max_iterations: int = 200
    """Most Sinkhorn iterations in one problem of a step."""
    spread: float = 1.0
    """Standard deviation of the Gaussian where the particles start, in the data's unit."""
    frames: int = 6
    """Pictures in the strip, the start and the end among them."""


def main(config: Config) -> dict[str, Any]:
    """Run the flow, draw it, measure where it ends; returns the summary."""
    checks.positive("epsilon", config.epsilon)
    checks.integer("num_particles", config.num_particles, 2)
    data = load_data(config)
    scaling = data.scaling()
    key_start, key_data, key_score = jax.random.split(jax.random.key(config.seed), 3)
    chosen = jax.random.permutation(key_data, len(data.train["x"]))[: config.num_particles]
    target = data.train["x"][np.asarray(chosen)]
    y = jnp.asarray(scaling.to_continuous(target)).reshape(len(target), -1)
    x = config.spread * jax.random.normal(key_start, y.shape)

    with _run.start_run(config) as run:
        scale = jnp.mean(squared_euclidean(y, y))
        found = jax.jit(flow, static_argnums=2)(x, y, config, scale)
        path, trace, end = jax.device_get(found)
        run.training_seconds = time.monotonic() - run.begun
        log = MetricsLog(run.folder)
        for step in range(config.steps):
            log.write(step, {name: values[step] for name, values in trace.items()})
        log.close()
        if not np.isfinite(path).all():
            step = np.argmin(np.isfinite(path).all(axis=(1, 2)))
            raise NonFiniteError(f"the particles are not finite after step {step}")

        samples = np.asarray(scaling.to_levels(path[-1].reshape(-1, *data.spec.shape)))
        np.save(run.folder / "samples.npy", samples)
        plot(run.folder, path, target, data, config)
        pair = [z.reshape(len(z), -1).astype(np.float32) for z in (samples, data.test["x"])]
        summary = {
            "divergence_start": trace["divergence"][0],
            "divergence_end": end,
            "largest_marginal_error": trace["marginal_error"].max(),
            "sliced_wasserstein": sliced_wasserstein(key_score, *pair),
            **_judge.judge(_judge.reference(data), samples),
        }
        return _run.finish(run, summary)


def flow(
    x: jax.Array, y: jax.Array, config: Config, scale: Any
) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
    """Follow the gradient from x [n, d]: the path [steps + 1, n, d], each step's numbers, and the
    divergence at the end.

    epsilon is in parts of `scale`. The target stays, so the potentials of one step start the next.
    """

    def divergence(x: jax.Array, init: Any) -> tuple[jax.Array, Any]:
        result = sinkhorn_divergence(
            x,
            y,
            epsilon=config.epsilon * scale,
            tolerance=config.tolerance,
            max_iterations=config.max_iterations,
            init=init,
        )
        return result.value, result

    def step(carry: tuple[jax.Array, Any], _: None) -> tuple[Any, Any]:
        x, init = carry
        (value, result), gradient = jax.value_and_grad(divergence, has_aux=True)(x, init)
        x = x - config.step_size * len(x) * gradient
        numbers = {"divergence": value, "marginal_error": result.marginal_error}
        return (x, result.init), (x, numbers)

    zeros = jnp.zeros((len(x),)), jnp.zeros((len(y),))
    start = (zeros, (zeros[0], zeros[0]), (zeros[1], zeros[1]))
    (last, init), (path, numbers) = jax.lax.scan(step, (x, start), length=config.steps)
    return jnp.concatenate([x[None], path]), numbers, divergence(last, init)[0]


def plot(folder: Any, path: np.ndarray, target: np.ndarray, data: Data, config: Config) -> None:
    """Write the strip of pictures."""
    # Most of the way is covered early: times 0, 1, ... in equal ratios.
    shown = np.geomspace(1, config.steps, config.frames - 1).round().astype(int)
    shown = np.concatenate([[0], shown])
    title = f"particles at steps {', '.join(map(str, shown))}"
    if data.kind == "images":
        columns = min(12, len(target))
        rows = path[shown, :columns].reshape(-1, *data.spec.shape)
        _pictures.save_grid(folder / "flow.png", rows, title=title, columns=columns, low=-1, high=1)
        return
    titles = {f"step {n}": path[n] for n in shown}
    _pictures.save_points(folder / "flow.png", {**titles, "data": target}, title=title)


if __name__ == "__main__":
    _run.launch(main, Config)
