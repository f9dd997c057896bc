"""The train step (state, batch) -> (state, metrics): pure, and compiled by make_train_step."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from genjax import checks
from genjax.training import parallel
from genjax.training.state import TrainState, ema_update
from genjax.training.update import Metrics, Player, Rule, all_finite, step_key, update
from genjax.typing import AbsorbFn, Batch, LossFn

__all__ = ["make_train_step", "train_step"]


def train_step(
    loss_fn: LossFn,
    optimizer: Any,
    state: TrainState,
    batch: Batch,
    *,
    absorb: AbsorbFn | None = None,
    axis_name: str | None = None,
    accumulate: int = 1,
    compute_dtype: Any = None,
    uncast: Sequence[str] = (),
) -> tuple[TrainState, Metrics]:
    """Do one update of the parameters along the gradient of the mean loss.

        g = grad of (1 / batch) sum_i loss_i(params, fold_in(key, step), batch)

    loss_fn(params, key, batch) -> (losses [batch], aux of named per-example terms). `optimizer` is
    an optax transformation; parameters that are not floating stay as they are, complex ones move
    along the conjugate of jax's gradient, which is steepest. axis_name: under pmap or vmap with
    that axis, gradients and metrics are averaged over it and each part draws its own randomness
    (not under shard_map, whose gradients are already sums). accumulate: the batch is taken in that
    many parts one after another, with the memory of one; part i draws from fold_in(key, i).
    compute_dtype: floating parameters and batch are cast to it for loss_fn; parameters, optimiser
    state, the mean of the losses, the averages and the carry keep their own type. uncast: names of
    parameters that are not cast either, as the rates of a recurrence (`networks.RATES`); a name
    that no parameter has is ignored. Raises ValueError for one string in place of the names.

    Where the state has a carry: loss_fn(params, key, batch, carry) -> (losses, aux, seen), and
    after the update absorb(carry, updated params, seen) is the next carry. `seen` is any pytree
    of floating arrays; it is averaged, in float32 at least, over the parts of `accumulate` and
    the devices of `axis_name`, which all see the carry of the step before. By default `seen`
    takes the carry's place, and None leaves it as it is. Raises ValueError, when it is traced, by
    name where the carry would change its structure, a shape or a type, and for integers in `seen`.

    Metrics are scalars: loss, the mean of each aux term, grad_norm (before the optimiser, so
    before its clipping) and finite (whether all of them are).

    >>> loss = lambda params, key, batch: ((params - batch) ** 2, {})
    >>> state = init_state(jnp.zeros(()), optax.sgd(0.5), jax.random.key(0))
    >>> state, metrics = train_step(loss, optax.sgd(0.5), state, jnp.array([1.0, 3.0]))
    >>> float(state.params)
    2.0
    """
    checks.integer("accumulate", accumulate, 1)
    if isinstance(uncast, str):
        raise ValueError(f"uncast must be a sequence of names, got the string {uncast!r}")
    parallel.check_batch(batch, 1, accumulate=accumulate)
    rule = Rule(
        "loss_fn",
        loss_fn,
        optimizer,
        absorb,
        axis_name=axis_name,
        accumulate=accumulate,
        compute_dtype=compute_dtype,
        uncast=uncast,
    )
    player, key = Player(state.params, state.opt_state), step_key(state, axis_name)
    player, carry, metrics = update(rule, player, state.carry, key, batch)
    metrics["finite"] = all_finite(metrics)
    return TrainState(
        step=state.step + 1,
        params=player.params,
        opt_state=player.opt_state,
        key=state.key,
        ema=ema_update(state.ema, player.params, state.step + 1),
        carry=carry,
    ), metrics


def make_train_step(
    loss_fn: LossFn,
    optimizer: Any,
    *,
    mesh: Mesh | None = None,
    pmap: bool = False,
    steps_per_call: int = 1,
    sharding: str = "replicated",
    **options: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile `train_step`: one jit over a 1-D mesh (default: all devices), or pmap.

    options: those of `train_step`: absorb, accumulate, compute_dtype, uncast. The state is donated:
    use the one that is returned. Under jit the loss sees the whole batch and one key, so that n
    devices compute what one does. steps_per_call > 1: the batch has a leading axis of (up to) that
    many batches, each gets its update in one scan, and the metrics have the same leading axis. The
    batch must divide by devices x accumulate (ValueError). Several processes pass their own shares
    of the batch. The compiled program is `.compiled`; `.place(batch)` puts a batch on the devices
    ahead of its step.

    sharding: "replicated", the whole state on every device, or "fsdp": every leaf of parameters,
    optimiser state, averages and carry is split along its largest axis that the devices divide
    (what none divides stays whole), a layer's parameters are gathered where it uses them, and
    gradients are summed into the parts. The numbers are the same; a device holds 1 / devices of the
    state. Put the first state there by `init_sharded`. On CPU keep steps_per_call and accumulate at
    1 for convolutional networks: XLA takes several times as long for the gradient of a convolution
    inside a loop.

    >>> loss = lambda params, key, batch: ((params - batch) ** 2, {})
    >>> optimizer = optax.sgd(0.5)
    >>> step = make_train_step(loss, optimizer, mesh=data_mesh(1))
    >>> state = init_state(jnp.zeros(()), optimizer, jax.random.key(0))
    >>> state, metrics = step(state, jnp.array([1.0, 3.0]))
    >>> float(metrics["loss"])
    5.0
    """
    return compile_step(
        train_step,
        loss_fn,
        optimizer,
        mesh=mesh,
        pmap=pmap,
        steps_per_call=steps_per_call,
        sharding=sharding,
        **options,
    )


def compile_step(
    step: Callable[..., tuple[Any, Metrics]],
    *given: Any,
    mesh: Mesh | None = None,
    pmap: bool = False,
    steps_per_call: int = 1,
    sharding: str = "replicated",
    batch_axis: int = 0,
    **options: Any,
) -> Callable[[Any, Batch], tuple[Any, Metrics]]:
    """Compile the pure step(*given, state, batch, **options) for a mesh, see `make_train_step`.

    batch_axis: the axis of the batch that counts examples, where it is not the first. A misspelt
    option raises TypeError here, not at the first call.
    """
    checks.integer("steps_per_call", steps_per_call, 1)
    checks.one_of("sharding", sharding, parallel.LAYOUTS)
    if pmap and sharding != "replicated":
        raise ValueError(f"sharding must be 'replicated' with pmap, got {sharding!r}")
    inspect.signature(step).bind_partial(*given, **options)
    step = functools.partial(step, *given, axis_name=parallel.AXIS if pmap else None, **options)
    accumulate = options.get("accumulate", 1)
    mesh = parallel.data_mesh() if mesh is None else mesh
    devices = mesh.devices.size
    several = steps_per_call > 1
    axis = batch_axis + several
    program = (lambda state, batches: jax.lax.scan(step, state, batches)) if several else step

    whole, split = parallel.replicated(mesh), parallel.sharded(mesh, axis)
    if pmap:
        # Exactly (state, batch), so that in_axes are matched to the arguments, and only averages
        # come out, so that any device's copy is the result.
        compiled = jax.pmap(
            program,
            axis_name=parallel.AXIS,
            in_axes=(None, axis),
            out_axes=None,
            donate_argnums=0,
            devices=list(mesh.devices.flat),
        )
    elif sharding == "fsdp":
        shards = parallel.Shards(mesh)
        compiled = jax.jit(parallel.in_shards(mesh, program), donate_argnums=0)
    else:
        shardings = {"in_shardings": (whole, split), "out_shardings": whole}
        compiled = jax.jit(program, donate_argnums=0, **shardings)

    def call(state: Any, batch: Batch) -> tuple[Any, Metrics]:
        processes = jax.process_count()
        parallel.check_batch(batch, devices // processes, axis, accumulate)
        # The first call: as every later state will be, or the second call would trace again.
        if sharding == "fsdp":
            state = shards(state)
        elif getattr(jax.tree.leaves(state)[0], "sharding", None) != whole:
            state = parallel.replicate(mesh, state)
        if pmap:
            batch = jax.tree.map(lambda x: _split(x, devices, axis), batch)
        elif (processes > 1 or sharding == "fsdp") and not _is_global(batch):
            batch = parallel.shard_batch(mesh, batch, axis=axis)
        return compiled(state, batch)

    def place(batch: Batch) -> Batch:
        """Begin to copy a batch to where its step takes it; one of a bad size is left to `call`."""
        try:
            parallel.check_batch(batch, devices // jax.process_count(), axis, accumulate)
        except ValueError:
            return batch
        return batch if pmap else parallel.shard_batch(mesh, batch, axis=axis)

    call.compiled = compiled  # type: ignore[attr-defined]
    call.place = place  # type: ignore[attr-defined]
    return call


def _split(x: Any, devices: int, axis: int) -> Any:
    shape = jnp.shape(x)
    return x.reshape(*shape[:axis], devices, shape[axis] // devices, *shape[axis + 1 :])


def _is_global(batch: Batch) -> bool:
    return not all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(batch))
