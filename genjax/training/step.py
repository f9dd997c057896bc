"""The train step (state, batch) -> (state, metrics): pure, and compiled by make_train_step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from genjax import checks
from genjax.numerics import at_least_float32
from genjax.training import parallel
from genjax.training.state import TrainState, ema_update
from genjax.typing import Batch, LossFn, Params

Metrics = dict[str, Any]
RESERVED = ("loss", "grad_norm", "finite")


def train_step(
    loss_fn: LossFn,
    optimizer: Any,
    state: TrainState,
    batch: Batch,
    *,
    axis_name: str | None = None,
    accumulate: int = 1,
    compute_dtype: Any = None,
) -> tuple[TrainState, Metrics]:
    """Do one update of the parameters along the gradient of the mean loss.

        g = grad of (1 / batch) sum_i loss_i(params, fold_in(key, step), batch)

    loss_fn(params, key, batch) -> (losses [batch], aux of named per-example terms). `optimizer` is
    an optax transformation. axis_name: under pmap or vmap with that axis, gradients and metrics
    are averaged over it and each part draws its own randomness (not under shard_map, whose
    gradients are already sums). accumulate: the batch is taken in that many parts one after
    another, with the memory of one; part i draws from fold_in(key, i). compute_dtype: floating
    parameters and batch are cast to it for loss_fn; parameters, optimiser state, the mean of the
    losses and the averages keep their own type.

    Metrics are scalars: loss, the mean of each aux term, grad_norm (before the optimiser, so
    before its clipping) and finite (whether all of them are).
    """
    checks.integer("accumulate", accumulate, 1)
    parallel.check_batch(batch, 1, accumulate=accumulate)
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    grads, metrics = _gradient(loss_fn, state.params, key, batch, accumulate, compute_dtype)
    if axis_name is not None:
        grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
    grads, metrics["grad_norm"] = with_norm(grads)
    metrics["finite"] = all_finite(metrics)
    params, opt_state = apply_update(optimizer, grads, state.opt_state, state.params)
    state = state.replace(
        step=state.step + 1, params=params, opt_state=opt_state, ema=ema_update(state.ema, params)
    )
    return state, metrics


def make_train_step(
    loss_fn: LossFn,
    optimizer: Any,
    *,
    mesh: Mesh | None = None,
    pmap: bool = False,
    steps_per_call: int = 1,
    accumulate: int = 1,
    compute_dtype: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Compile `train_step`: one jit over a 1-D mesh (default: all devices), or pmap.

    The state is donated: use the one that is returned. Under jit the loss sees the whole batch and
    one key, so that n devices compute what one does. steps_per_call > 1: the batch has a leading
    axis of (up to) that many batches, each gets its update in one scan, and the metrics have the
    same leading axis. The batch must divide by devices x accumulate (ValueError). Several
    processes pass their own shares of the batch. The compiled program is `.compiled`. On CPU keep
    steps_per_call and accumulate at 1 for convolutional networks: XLA takes several times as long
    for the gradient of a convolution inside a loop.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return train_step(
            loss_fn,
            optimizer,
            state,
            batch,
            axis_name=parallel.AXIS if pmap else None,
            accumulate=accumulate,
            compute_dtype=compute_dtype,
        )

    return compile_step(
        step, mesh=mesh, pmap=pmap, steps_per_call=steps_per_call, accumulate=accumulate
    )


def compile_step(
    step: Callable[[Any, Batch], tuple[Any, Metrics]],
    *,
    mesh: Mesh | None = None,
    pmap: bool = False,
    steps_per_call: int = 1,
    accumulate: int = 1,
    batch_axis: int = 0,
) -> Callable[[Any, Batch], tuple[Any, Metrics]]:
    """Compile any pure (state, batch) -> (state, metrics) for a mesh, see `make_train_step`.

    batch_axis: the axis of the batch that counts examples, where it is not the first.
    """
    checks.integer("steps_per_call", steps_per_call, 1)
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
    else:
        compiled = jax.jit(
            program, in_shardings=(whole, split), out_shardings=whole, donate_argnums=0
        )

    def call(state: Any, batch: Batch) -> tuple[Any, Metrics]:
        processes = jax.process_count()
        parallel.check_batch(batch, devices // processes, axis, accumulate)
        if getattr(jax.tree.leaves(state)[0], "sharding", None) != whole:
            # The first call: as every later state will be, or the second call would trace again.
            state = parallel.replicate(mesh, state)
        if pmap:
            batch = jax.tree.map(lambda x: _split(x, devices, axis), batch)
        elif processes > 1 and not _is_global(batch):
            batch = parallel.shard_batch(mesh, batch, axis=axis)
        return compiled(state, batch)

    call.compiled = compiled  # type: ignore[attr-defined]
    return call


def first_bad_term(metrics: Metrics) -> str | None:
    """Name the first metric that is not finite: the aux terms, then the loss, then the gradient."""
    terms = [name for name in metrics if name not in RESERVED]
    for name in [*terms, "loss", "grad_norm"]:
        if name in metrics and not bool(jnp.all(jnp.isfinite(metrics[name]))):
            return name
    return None


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Cast the floating leaves of a tree, leave the others (integers, keys)."""
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x, tree
    )


def global_norm(tree: Any) -> Any:
    """Euclidean norm over all leaves, accumulated in float32 at least."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(at_least_float32(x))) for x in jax.tree.leaves(tree)))


def with_norm(grads: Params) -> tuple[Params, Any]:
    """Return the gradients and their norm, taken before anything else reads them.

    Left to itself, XLA on CPU mixes the sums into the update, which then costs 5% of a step of a
    small network.
    """
    return jax.lax.optimization_barrier((grads, global_norm(grads)))


def all_finite(tree: Any) -> Any:
    """Whether every number in the tree is finite, bool []."""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]).all()


def apply_update(
    optimizer: Any, grads: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
    """Do what optax's update and apply_updates do; parameters keep their types."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates), opt_state


def mean_loss(
    loss_fn: LossFn, params: Params, key: Any, batch: Batch, compute_dtype: Any = None
) -> tuple[Any, Metrics]:
    """Reduce a loss to the mean over its examples, and its terms to theirs."""
    if compute_dtype is not None:
        params, batch = cast_floating(params, compute_dtype), cast_floating(batch, compute_dtype)
    losses, aux = loss_fn(params, key, batch)
    if jnp.ndim(losses) != 1:
        raise ValueError(
            f"loss_fn must return one loss per example, [batch], got shape {jnp.shape(losses)}"
        )
    return reduce_terms(losses, aux)


def reduce_terms(losses: Any, aux: Metrics) -> tuple[Any, Metrics]:
    """Take the means of the losses and of each term, in float32 at least."""
    for name in RESERVED:
        if name in aux:
            raise ValueError(f"aux of a loss must not use the name {name!r}: the step reports it")
    loss = jnp.mean(at_least_float32(losses))
    terms = {name: jnp.mean(at_least_float32(term)) for name, term in aux.items()}
    return loss, {"loss": loss, **terms}


def _gradient(
    loss_fn: LossFn, params: Params, key: Any, batch: Batch, accumulate: int, compute_dtype: Any
) -> tuple[Params, Metrics]:
    """Gradient of the mean loss and the metrics, in one part or as the mean of several."""

    def part(key: Any, batch: Batch) -> tuple[Params, Metrics]:
        def mean(p: Params) -> tuple[Any, Metrics]:
            return mean_loss(loss_fn, p, key, batch, compute_dtype)

        return jax.grad(mean, has_aux=True)(params)

    if accumulate == 1:
        return part(key, batch)

    def add(total: Any, given: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, part(*given)), None

    # Part i takes every accumulate-th example, so that each device keeps the examples it holds.
    parts = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch
    )
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(accumulate))
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(part, keys[0], jax.tree.map(lambda x: x[0], parts)),
    )
    total, _ = jax.lax.scan(add, zeros, (keys, parts))
    return jax.tree.map(lambda x: x / accumulate, total)


def _split(x: Any, devices: int, axis: int) -> Any:
    shape = jnp.shape(x)
    return x.reshape(*shape[:axis], devices, shape[axis] // devices, *shape[axis + 1 :])


def _is_global(batch: Batch) -> bool:
    return not all(getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(batch))
