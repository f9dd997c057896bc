"""The smallest experiment that the leaderboard can run: a Gaussian whose mean is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from experiments import _run, _samples
from genjax.data import load
from genjax.training import init_state, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    steps: int = 10**6
    spread: float = 1.0
    """Standard deviation of the samples."""


def main(config):
    if config.spread <= 0:
        raise ValueError(f"spread must be positive, got {config.spread}")
    train, _ = load(config.dataset, "train")

    def loss(params, key, batch):
        return jnp.sum((batch["x"] - params["mean"][None]) ** 2, axis=1), {}

    adam = optax.adam(0.01)
    state = init_state({"mean": jnp.ones(2)}, adam, jax.random.key(config.seed))
    with _run.start_run(config) as run:
        step = make_train_step(loss, adam, mesh=_run.mesh(config))
        state = _run.fit(run, state, step, _run.batches(config, train))

        def sample():
            noise = jax.random.normal(jax.random.key(1), (2000, 2))
            return state.params["mean"][None] + config.spread * noise

        _, cost = _samples.save_samples(run, sample, evaluations=7)
        return _run.finish(run, {"parameters": 2, **cost})


if __name__ == "__main__":
    _run.launch(main, Config)
