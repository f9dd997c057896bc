"""A tiny experiment for the drills: it breaks, or sends itself a signal, at a given step."""

import dataclasses
import os
import signal

import jax
import numpy as np
import optax

from experiments import _run
from genjax.training import export_npz, init_state, make_train_step
from tests.training.problem import make_batch, make_params, noisy_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.RunConfig):
    steps: int = 40
    batch_size: int = 16
    save_every: int = 10
    log_every: int = 1
    devices: int | None = 1
    nan_at: int = -1
    """Step whose batch holds a NaN."""
    break_at: int = -1
    """Step whose batch cannot be loaded."""


def main(config):
    # Not options, or a resumed run would have to be given them again.
    name, at = os.environ.get("TINY_SIGNAL", "SIGUSR1 -1").split()

    def batches(step):
        if step == int(at):
            os.kill(os.getpid(), signal.Signals[name])
        batch = make_batch(step, config.seed, config.batch_size)
        if step == config.break_at:
            raise FileNotFoundError("the data folder is gone")
        if step == config.nan_at:
            batch["x"][0, 0] = np.nan
        return batch

    def evaluate(state):
        return {"size": optax.tree.norm(state.ema_params(0.9))}

    adam = optax.adam(0.01)
    with _run.start_run(config) as run:
        step = make_train_step(
            noisy_loss, adam, mesh=_run.mesh(config), steps_per_call=config.steps_per_call
        )
        state = init_state(make_params(), adam, jax.random.key(config.seed), ema_decays=[0.9])
        state = _run.fit(run, state, step, batches, evaluate=evaluate, best="size")
        everything = (state.params, state.opt_state, state.ema, state.step)
        export_npz(run.folder / "final.npz", everything)
        return _run.finish(run, {"size": evaluate(state)["size"]})


if __name__ == "__main__":
    _run.launch(main, Config)
