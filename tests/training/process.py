"""One of several processes of a run: trains on its share of the batches, reports the end."""

import sys

import jax
import numpy as np
import optax

from genjax.training import Checkpoints, fit, init_state, initialize_distributed, make_train_step
from genjax.training.checkpoint import to_host
from tests.training.problem import make_batch, make_params, noisy_loss


def main(folder, steps, layout):
    initialize_distributed()
    index, count = jax.process_index(), jax.process_count()

    def share(step):
        batch = make_batch(step)
        return jax.tree.map(lambda x: np.split(x, count)[index], batch)

    sgd = optax.sgd(0.1)
    state = init_state(make_params(), sgd, jax.random.key(0), ema_decays=[0.9])
    checkpoints = Checkpoints(f"{folder}/checkpoints")
    found = checkpoints.restore(state)
    state = found[1] if found else state
    step = make_train_step(noisy_loss, sgd, sharding=layout)
    state = fit(
        state, step, share, num_steps=steps, folder=folder, checkpoints=checkpoints, save_every=2
    )
    checkpoints.close()
    leaves = to_host((state.params, state.ema))
    np.savez(f"{folder}/end-{index}.npz", *leaves, devices=jax.device_count(), processes=count)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
