"""Training: one immutable state, one compiled step, and what surrounds them."""

from genjax.training.checkpoint import CheckpointError, Checkpoints
from genjax.training.export import export_npz, load_npz
from genjax.training.loop import NonFiniteError, Stopped, fit
from genjax.training.parallel import data_mesh, initialize_distributed, shard_batch
from genjax.training.saddle import (
    SaddleState,
    critic_batches,
    init_saddle_state,
    make_saddle_step,
    saddle_step,
    train_scan,
)
from genjax.training.state import TrainState, init_state
from genjax.training.step import make_train_step, train_step

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "NonFiniteError",
    "SaddleState",
    "Stopped",
    "TrainState",
    "critic_batches",
    "data_mesh",
    "export_npz",
    "fit",
    "init_saddle_state",
    "init_state",
    "initialize_distributed",
    "load_npz",
    "make_saddle_step",
    "make_train_step",
    "saddle_step",
    "shard_batch",
    "train_scan",
    "train_step",
]
