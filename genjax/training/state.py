"""The state of training: one immutable pytree, with exponential moving averages of the weights."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from genjax import checks
from genjax.typing import Params

__all__ = ["TrainState", "init_state"]

# The fields are `Any` because a pytree is also filled with shapes, shardings and tracers.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a training run carries from step to step.

    step: int32 [], updates done. params, opt_state: pytrees. key: the run's PRNG key, never
    advanced: step n draws from fold_in(key, n). ema: decay (as text) -> averages of params.
    carry: what no gradient moves and the next step needs (running averages, power vectors, a frozen
    reference), a pytree of arrays, or None; see `train_step`.
    """

    step: Any
    params: Any
    opt_state: Any
    key: Any
    ema: Any = dataclasses.field(default_factory=dict)
    carry: Any = None

    def ema_params(self, decay: float) -> Params:
        """Read the average of the parameters, without a bias to its start, see `ema_update`."""
        return ema_read(self.ema, decay)

    def replace(self, **changes: Any) -> "TrainState":
        """Return the state with some fields changed."""
        return dataclasses.replace(self, **changes)


def init_state(
    params: Params,
    optimizer: Any,
    key: Any,
    *,
    ema_decays: Sequence[float] = (),
    carry: Any = None,
) -> TrainState:
    """Build the state at step 0: optimiser state, one average for each decay, the carry.

    `optimizer` is an optax transformation (`init` and `update`); parameters that are not floating
    (integers, keys) stay as they are and are None to it. All arrays are copied, so that
    the caller's own parameters outlive a compiled step that donates its state. Raises ValueError
    for a decay outside [0, 1), parameters without an array, and TypeError for an optimiser
    without `init` and `update`, and for leaves that are not arrays.

    >>> state = init_state({"w": jnp.ones(2)}, optax.sgd(0.1), jax.random.key(0))
    >>> int(state.step)
    0
    """
    check_player("optimizer", optimizer, params)
    check_arrays("carry", carry)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(trainable(params)),
        key=key,
        ema=ema_init(params, ema_decays),
        carry=carry,
    )
    return copy_leaves(state)


def check_player(name: str, optimizer: Any, params: Params) -> None:
    """Raise unless the optimiser can update and there is something to update."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            f"{name} must be an optax transformation (with init and update), "
            f"got {type(optimizer).__name__}"
        )
    check_arrays("params", params)
    if not jax.tree.leaves(trainable(params)):
        kinds = [str(jnp.result_type(x)) for x in jax.tree.leaves(params)]
        raise ValueError(f"params must hold at least one array of floats, got {kinds}")


def check_arrays(name: str, tree: Any) -> None:
    """Raise TypeError unless every leaf is an array or a number."""
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, int | float | complex) and not hasattr(leaf, "dtype"):
            raise TypeError(f"{name} must be a tree of arrays, got a {type(leaf).__name__} in it")


def copy_leaves(tree: Any) -> Any:
    """Copy every leaf into an array of its own, of a fixed (not weak) type.

    A buffer that is shared (parameters kept by the caller or inside the optimiser's state) cannot
    be donated, and a weak type would change after the first step and compile it again.
    """

    return jax.tree.map(
        lambda x: jnp.copy(x) if is_key(x) else jnp.array(x, dtype=jnp.result_type(x), copy=True),
        tree,
    )


def is_float(x: Any) -> bool:
    """Whether an array (or number) is floating or complex."""
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def wide(x: Any) -> Any:
    """Cast floating and complex arrays to float32 or complex64 at least; leave the others."""
    dtype = jnp.result_type(x)
    return jnp.asarray(x, jnp.promote_types(dtype, jnp.float32)) if is_float(x) else x


def trainable(params: Params) -> Params:
    """The parameters that have a gradient; None in the place of others (integers, keys)."""
    return jax.tree.map(lambda x: x if is_float(x) else None, params)


def is_key(x: Any) -> bool:
    """Whether an array is one of typed PRNG keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def leaf_name(path: Any) -> str:
    """Name a leaf by its place: 'params/Dense_0/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def layout(tree: Any) -> dict[str, list]:
    """The type and the shape of every leaf, by its name."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {leaf_name(path): [str(jnp.result_type(x)), list(jnp.shape(x))] for path, x in leaves}


def check_layout(found: Mapping[str, list], expected: Mapping[str, list]) -> None:
    """Raise ValueError naming the first leaf that is missing, unknown or of another type or shape.

    Further columns of `found` are not compared.
    """
    for what, names in {
        "has no": expected.keys() - found.keys(),
        "has an unknown": found.keys() - expected.keys(),
    }.items():
        if names:
            raise ValueError(f"it {what} {sorted(names)[0]} ({len(names)} such)")
    for name, (dtype, shape) in expected.items():
        if found[name][:2] != [dtype, shape]:
            raise ValueError(f"{name} is {found[name][0]} {found[name][1]}, not {dtype} {shape}")


def ema_init(params: Params, decays: Sequence[float]) -> dict[str, Params]:
    """Start one average for each decay at the parameters, in float32 at least (integers: as is)."""
    for decay in decays:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decays must lie in [0, 1), got {decay}")
    start = jax.tree.map(wide, params)
    return {str(float(decay)): start for decay in decays}


def ema_update(ema: dict[str, Params], params: Params, updates: Any) -> dict[str, Params]:
    """Move every average by the update that is the `updates`-th, in float32 at least.

        m <- m + w_n (params - m),  w_n = (1 - d) / (1 - d^n)

    is the mean of the parameters after updates 1..n with weights d^(n - i): w_1 = 1 forgets the
    start, and a constant stays what it is. The form d m + (1 - d) params shrinks it in float32,
    whose rounded d and 1 - d do not sum to 1.
    """
    n = jnp.maximum(jnp.asarray(updates).astype(float), 1)

    def weight(decay: float) -> Any:
        # 1 - d^n = -expm1(n log d): exact to float32 where d^n is near 1.
        log_decay = math.log(decay) if decay > 0 else -math.inf
        return jnp.where(n > 1, (1 - decay) / -jnp.expm1(n * log_decay), 1)

    def move(w: Any, mean: Any, new: Any) -> Any:
        if not is_float(new):
            return new
        new = new.astype(mean.dtype)
        # The first mean is its only member, without the rounding of m + (new - m).
        return jnp.where(n > 1, mean + w.astype(mean.dtype) * (new - mean), new)

    return {
        name: jax.tree.map(functools.partial(move, weight(float(name))), mean, params)
        for name, mean in ema.items()
    }


def ema_read(ema: dict[str, Params], decay: float) -> Params:
    """Read one average; before the first update it is the parameters. See `ema_update`.

    Raises ValueError for a decay that is not kept.
    """
    name = str(float(decay))
    checks.one_of("decay", name, ema)
    return ema[name]
