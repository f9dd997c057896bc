"""Training: one immutable state, one compiled step, and what surrounds them."""

from genjax.training.parallel import data_mesh, initialize_distributed, shard_batch
from genjax.training.state import TrainState, init_state
from genjax.training.step import make_train_step, train_step

__all__ = [
    "TrainState",
    "data_mesh",
    "init_state",
    "initialize_distributed",
    "make_train_step",
    "shard_batch",
    "train_step",
]
