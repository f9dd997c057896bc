"""A tiny experiment for the drills: something may happen to it before any of its steps."""

import dataclasses
import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

from experiments import _run
from genjax.training import data_mesh, export_npz, init_state, make_train_step
from tests.training.problem import make_batch, make_params, noisy_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(_run.TrainConfig):
    steps: int = 40
    batch_size: int = 16
    save_every: int = 10
    log_every: int = 1
    devices: int | None = 1
    curves: bool = False  # matplotlib takes a second to load
    prefetch: int = 0  # what a drill does to a batch happens at its step


ADAM = optax.adam(0.01)


@functools.cache  # compiled once for all runs of a process
def make_step(devices, steps_per_call):
    return make_train_step(noisy_loss, ADAM, mesh=data_mesh(devices), steps_per_call=steps_per_call)


def main(config, fault: Callable[[int, dict], None] = lambda step, batch: None):
    """Train; `fault(step, batch)` is called with every batch and may do what it likes."""

    def batches(step):
        batch = make_batch(step, config.seed, config.batch_size)
        fault(step, batch)
        return batch

    def evaluate(state):
        return {"size": optax.tree.norm(state.ema_params(0.9))}

    with _run.start_run(config) as run:
        step = make_step(config.devices, config.steps_per_call)
        state = init_state(make_params(), ADAM, jax.random.key(config.seed), ema_decays=[0.9])
        state = _run.fit(run, state, step, batches, evaluate=evaluate, best="size")
        everything = (state.params, state.opt_state, state.ema, state.step)
        export_npz(run.folder / "final.npz", everything)
        return _run.finish(run, {"size": evaluate(state)["size"]})


def main_with_fault(config):
    """Train with the fault that TINY_FAULT names: "NAN 7", "SIGTERM 7", "SIGKILL 7 0.02",
    "READONLY 7" (the folder of the checkpoints)."""
    # Not options, or a resumed run would have to be given them again.
    name, at, *delay = os.environ.get("TINY_FAULT", "none -1").split()

    def fault(step, batch):
        if step != int(at):
            return
        if name == "NAN":
            batch["x"][0, 0] = np.nan
        elif name == "READONLY":
            folder = Path(config.run_dir) / "checkpoints"
            while [*folder.glob("*tmp*")]:  # what was begun before
                time.sleep(0.01)
            folder.chmod(0o555)
            os.seteuid(os.geteuid() or 65534)  # no permission stops root
        elif delay:
            send = threading.Timer(float(delay[0]), os.kill, (os.getpid(), signal.Signals[name]))
            send.daemon = True
            send.start()
        else:
            os.kill(os.getpid(), signal.Signals[name])

    return main(config, fault)


if __name__ == "__main__":
    _run.launch(main, Config)
