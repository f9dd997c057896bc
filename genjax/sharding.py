"""Where arrays live on a mesh: hooks that a network calls, and that do nothing without a mesh.

Parameters sharded over the devices that also split the batch ("fsdp"; Rajbhandari et al. 2020,
arXiv:1910.02054, stage 3; Xu et al. 2021, arXiv:2105.04663) are to be gathered where a layer uses
them and nowhere else. Left to itself XLA may instead gather all layers of a stack at once, or split
activations along their features.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"
# Leaves of more bytes are stacks of layers, which are gathered layer by layer.
WHOLE_BYTES = 16 * 2**20

_mesh: ContextVar[Mesh | None] = ContextVar("genjax_mesh", default=None)


@contextlib.contextmanager
def over(mesh: Mesh | None) -> Iterator[None]:
    """Let the hooks below place arrays on the mesh, for what is traced inside."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def spec_of(shape: Sequence[int], devices: int) -> PartitionSpec:
    """Split the largest axis that the devices divide (of equal ones the last); P() for none."""
    fits = [(size, axis) for axis, size in enumerate(shape) if size and size % devices == 0]
    if not fits or devices == 1:
        return PartitionSpec()
    return PartitionSpec(*[None] * max(fits)[1], AXIS)


def split_batch(x: Any, axis: int = 0) -> Any:
    """Keep `axis` of x, which counts examples, split over the mesh; x itself without one."""
    mesh = _mesh.get()
    if mesh is None or jnp.ndim(x) <= axis or jnp.shape(x)[axis] % mesh.devices.size:
        return x
    split = NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))
    return jax.lax.with_sharding_constraint(x, split)


def gathered(tree: Any, *, most: int | None = None) -> Any:
    """Parameters whole on every device, their gradients summed into shards; without a mesh as is.

    Leaves of more than `most` bytes stay as they are.
    """
    mesh = _mesh.get()
    if mesh is None:
        return tree

    def leaf(x: Any) -> Any:
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        large = most is not None and x.size * x.dtype.itemsize > most
        if not floating or not jnp.ndim(x) or large:
            return x
        return _gather(mesh, x)

    return jax.tree.map(leaf, tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(mesh: Mesh, x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def _forward(mesh: Mesh, x: jax.Array) -> tuple[jax.Array, None]:
    return _gather(mesh, x), None


def _backward(mesh: Mesh, _: None, g: jax.Array) -> tuple[jax.Array]:
    # The sum over devices of the gradient's parts then is a reduce-scatter.
    shards = NamedSharding(mesh, spec_of(g.shape, mesh.devices.size))
    return (jax.lax.with_sharding_constraint(g, shards),)


_gather.defvjp(_forward, _backward)
