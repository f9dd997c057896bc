"""Devices: a 1-D mesh, batches sharded over it, and several processes.

The default mode is one jit over a mesh with the axis "data": the state is on every device, the
batch is split along its first axis, and XLA inserts the sums over devices.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from genjax.sharding import AXIS, over, spec_of
from genjax.training.state import is_key, leaf_name
from genjax.typing import Batch

__all__ = ["data_mesh", "init_sharded", "initialize_distributed", "shard_batch"]

LAYOUTS = ("replicated", "fsdp")

log = logging.getLogger("genjax")


def data_mesh(devices: int | None = None) -> Mesh:
    """Make a 1-D mesh with the axis "data" over the first `devices` devices (all by default).

    >>> data_mesh(1).axis_names
    ('data',)
    """
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

    >>> shard_batch(data_mesh(1), {"x": jnp.ones((4, 2))})["x"].shape
    (4, 2)
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


def shards_of(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf in the layout "fsdp", see `make_train_step`."""
    devices = mesh.devices.size
    spec = lambda x: PartitionSpec() if is_key(x) else spec_of(np.shape(x), devices)  # noqa: E731
    return jax.tree.map(lambda x: NamedSharding(mesh, spec(x)), tree)


def in_shards(mesh: Mesh, program: Callable[[Any, Batch], Any]) -> Callable[[Any, Batch], Any]:
    """The program with networks' hooks on the mesh, and the state that it returns in shards."""

    def sharded_program(state: Any, batch: Batch) -> Any:
        with over(mesh):
            state, metrics = program(state, batch)
        whole = jax.tree.map(lambda _: replicated(mesh), metrics)
        places = (shards_of(mesh, state), whole)
        return jax.lax.with_sharding_constraint((state, metrics), places)

    return sharded_program


def init_sharded(mesh: Mesh, make: Callable[..., Any], *given: Any) -> Any:
    """make(*given), a state, made in the layout "fsdp": no leaf is ever whole on one device.

        state = init_sharded(mesh, lambda key: init_state(net.init(key, x), optimizer, key), key)

    What no axis divides is whole on every device, and said once in the log.

    >>> make = lambda key: init_state({"w": jnp.ones(8)}, optax.sgd(0.1), key)
    >>> int(init_sharded(data_mesh(1), make, jax.random.key(0)).step)
    0
    """
    shapes = jax.eval_shape(make, *given)
    places = shards_of(mesh, shapes)
    _say_whole(mesh, shapes)
    return jax.jit(make, out_shardings=places)(*given)


class Shards:
    """Puts states of one structure in the layout "fsdp"; what lies there is not touched."""

    def __init__(self, mesh: Mesh):
        self.mesh, self.places = mesh, []

    def __call__(self, state: Any) -> Any:
        leaves, structure = jax.tree.flatten(state)
        if len(self.places) != len(leaves):
            self.places = jax.tree.leaves(shards_of(self.mesh, state))
        found = [getattr(leaf, "sharding", None) for leaf in leaves]
        if found == self.places:
            return state
        return structure.unflatten(map(self._put, leaves, self.places))

    def _put(self, x: Any, place: NamedSharding) -> Any:
        if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
            return jax.device_put(x, place)
        if is_key(x):
            return replicate(self.mesh, x)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])


def _say_whole(mesh: Mesh, shapes: Any) -> None:
    if mesh.devices.size == 1:
        return
    whole = {
        leaf_name(path): int(np.prod(x.shape))
        for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        if not is_key(x) and x.shape and spec_of(x.shape, mesh.devices.size) == PartitionSpec()
    }
    if whole:
        largest = max(whole, key=lambda name: whole[name])
        log.warning(
            "no axis of %d leaves (%d numbers in all, the largest %s) is divided by %d devices: "
            "they are whole on each",
            len(whole),
            sum(whole.values()),
            largest,
            mesh.devices.size,
        )


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
