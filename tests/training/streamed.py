"""A run from images that the memory limit does not hold; KILL_AT=n kills it at batch n."""

import os
import signal
import time

from experiments import _run, _system, flow_matching
from genjax.data import loading
from genjax.training import Checkpoints, export_npz

LIMIT = 4096


def main(config):
    loading.IN_MEMORY_LIMIT = LIMIT if config.in_memory is None else loading.IN_MEMORY_LIMIT
    data = flow_matching.load_data(config)
    assert (data.source is None) == bool(config.in_memory)
    system = flow_matching.build(config, data)
    state, step_fn, batches = _system.prepare(config, system, data)
    kill_at = int(os.environ.get("KILL_AT", -1))

    def watched(step):
        if step == kill_at:
            # Batches are made ahead: the last checkpoint before this one is on its way.
            saved = Checkpoints(f"{config.run_dir}/checkpoints")
            before = (step - config.prefetch) // config.save_every * config.save_every
            while before not in saved.steps():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return batches(step)

    with _run.start_run(config) as run:
        state = _run.fit(run, state, step_fn, watched)
        export_npz(run.folder / "end.npz", (state.params, state.opt_state, state.ema))


if __name__ == "__main__":
    _run.launch(main, flow_matching.Config)
