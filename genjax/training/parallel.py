"""Devices: a 1-D mesh, batches sharded over it, and several processes.

The default mode is one jit over a mesh with the axis "data": the state is on every device, the
batch is split along its first axis, and XLA inserts the sums over devices.
"""

import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genjax.training.state import is_key
from genjax.typing import Batch

__all__ = ["data_mesh", "initialize_distributed", "shard_batch"]

AXIS = "data"


def data_mesh(devices: int | None = None) -> Mesh:
    """Make a 1-D mesh with the axis "data" over the first `devices` devices (all by default)."""
    found = jax.devices()
    count = len(found) if devices is None else devices
    if not 1 <= count <= len(found):
        raise ValueError(f"devices must lie in [1, {len(found)}] (the devices found), got {count}")
    return Mesh(np.asarray(found[:count]), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Give the sharding of the state: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Give the sharding of a batch: axis `axis` split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def check_batch(batch: Batch, devices: int, axis: int = 0, accumulate: int = 1) -> int:
    """Return the size of the batch; raise unless all leaves agree and the parts are equal."""
    sizes = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        shape = np.shape(leaf)
        if len(shape) <= axis:
            name = jax.tree_util.keystr(path)
            raise ValueError(f"batch{name} must have rank at least {axis + 1}, got shape {shape}")
        sizes.add(shape[axis])
    if len(sizes) != 1:
        raise ValueError(f"batch must hold arrays of one batch size, got sizes {sorted(sizes)}")
    (size,) = sizes
    parts = devices * accumulate
    if size == 0 or size % parts:
        raise ValueError(
            f"batch size must be a positive multiple of {parts} "
            f"(devices {devices} x accumulate {accumulate}), got {size}"
        )
    return size


def shard_batch(mesh: Mesh, batch: Batch, *, axis: int = 0) -> Batch:
    """Put a batch on the mesh, split along `axis`.

    With several processes each passes its own share: the global batch is their shares in the
    order of the processes. Raises ValueError where the parts would be unequal.
    """
    local = mesh.devices.size // jax.process_count()
    check_batch(batch, local, axis)
    sharding = sharded(mesh, axis)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Put a tree whole on every device of the mesh; every process passes the same values."""

    def put(x: Any) -> Any:
        if is_key(x):
            data = put(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(replicated(mesh), np.asarray(x))

    if jax.process_count() == 1:
        return jax.device_put(tree, replicated(mesh))
    return jax.tree.map(put, tree)


def initialize_distributed(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Join the processes of one run: call once in each, before anything touches a device.

    coordinator: "host:port" of process 0; processes: how many; process: this one's index. What is
    not given is read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and on a
    cluster that jax knows (Slurm, Open MPI, Cloud TPU) it is found without any. Raises ValueError
    where only a part is given or the index is out of range. See jax.distributed.
    """
    given = {
        "coordinator (JAX_COORDINATOR_ADDRESS)": coordinator
        or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "processes (JAX_NUM_PROCESSES)": _number("JAX_NUM_PROCESSES", processes),
        "process (JAX_PROCESS_ID)": _number("JAX_PROCESS_ID", process),
    }
    missing = [name for name, value in given.items() if value is None]
    address, count, index = given.values()
    if len(missing) not in (0, 3):
        raise ValueError(f"give all three or none: {', '.join(missing)} missing")
    if not missing and not 0 <= index < count:
        raise ValueError(f"process must lie in [0, {count - 1}], got {index}")
    jax.distributed.initialize(address, count, index)


def _number(name: str, value: int | None) -> int | None:
    text = os.environ.get(name)
    if value is not None or text is None:
        return value
    if not text.strip().isdecimal():
        raise ValueError(f"{name} must be a whole number, got {text!r}")
    return int(text)
