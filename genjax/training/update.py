"""One update of one set of parameters: gradient of a mean loss, optimiser, carry.

`train_step` does one of these, `saddle_step` several: the options of both mean the same.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from genjax import sharding
from genjax.numerics import at_least_float32, safe_sqrt
from genjax.training.state import check_layout, is_float, is_key, layout, trainable, wide
from genjax.typing import AbsorbFn, Batch, Params

Metrics = dict[str, Any]
RESERVED = ("loss", "grad_norm", "finite")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Player:
    """Parameters and the state of their optimiser."""

    params: Any
    opt_state: Any


def new_player(params: Params, optimizer: Any) -> Player:
    """A player before its first update; the optimiser sees what has a gradient."""
    return Player(params, optimizer.init(trainable(params)))


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a player is updated; the options are those of `train_step` and `saddle_step`.

    name: what errors call the loss. per_example: whether the loss must be one number per example.
    project: applied to the parameters after the optimiser.
    """

    name: str
    loss_fn: Callable[..., Any]
    optimizer: Any
    absorb: AbsorbFn | None = None
    project: Callable[[Params], Params] | None = None
    per_example: bool = True
    axis_name: str | None = None
    accumulate: int = 1
    compute_dtype: Any = None
    uncast: Sequence[str] = ()


def update(
    rule: Rule, player: Player, carry: Any, key: Any, batch: Batch
) -> tuple[Player, Any, Metrics]:
    """Do one update: (player, carry, metrics), the metrics with grad_norm and without finite."""
    grads, metrics, seen = _gradient(rule, player.params, carry, key, batch)
    if rule.axis_name is not None:
        grads, metrics, seen = jax.lax.pmean((grads, metrics, seen), rule.axis_name)
    grads, metrics["grad_norm"] = with_norm(grads)
    params, opt_state = apply_update(rule.optimizer, grads, player.opt_state, player.params)
    params = params if rule.project is None else rule.project(params)
    return Player(params, opt_state), absorbed(rule.absorb, carry, params, seen), metrics


def absorbed(absorb: AbsorbFn | None, carry: Any, params: Params, seen: Any) -> Any:
    """The next carry, of the structure, shapes and types of this one; raises ValueError if not.

    Without `absorb` what was seen takes the carry's place, or the carry stays where that is None.
    """
    if absorb is not None:
        if carry is None:
            raise ValueError("absorb needs a state with a carry, got carry = None")
        new = absorb(carry, params, seen)
    else:
        new = carry if seen is None else seen
        if jax.tree.structure(new) == jax.tree.structure(carry):
            # Averages are float32 at least: as the new carry they return to its own types.
            new = jax.tree.map(
                lambda x, old: x.astype(old.dtype) if is_float(old) else x, new, carry
            )
    source = "seen" if absorb is None else "what absorb returns"
    try:
        check_layout(layout({"carry": new}), layout({"carry": carry}))
        if jax.tree.structure(new) != jax.tree.structure(carry):
            raise ValueError(f"{jax.tree.structure(new)}, not {jax.tree.structure(carry)}")
    except ValueError as error:
        raise ValueError(f"{source} must have the layout of the carry: {error}") from None
    # A weak type, as of a Python number, would compile the step again.
    return jax.tree.map(lambda x, old: x if is_key(x) else jnp.asarray(x, old.dtype), new, carry)


def _gradient(
    rule: Rule, params: Params, carry: Any, key: Any, batch: Batch
) -> tuple[Params, Metrics, Any]:
    """Gradient of the mean loss, metrics and what was seen, in one part or the mean of several."""

    def part(key: Any, batch: Batch) -> tuple[Params, Metrics, Any]:
        def mean(p: Params) -> tuple[Any, tuple[Metrics, Any]]:
            return _mean_loss(rule, _with_fixed(p, params), carry, key, batch)

        grads, (metrics, seen) = jax.grad(mean, has_aux=True)(trainable(params))
        # jax gives df/dx - i df/dy of complex parameters: steepest is its conjugate.
        return jax.tree.map(jnp.conj, grads), metrics, seen

    if rule.accumulate == 1:
        return part(key, batch)

    def add(total: Any, given: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, part(*given)), None

    # Part i takes every accumulate-th example, so that each device keeps the examples it holds.
    parts = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, rule.accumulate, *x.shape[1:]), 0, 1), batch
    )
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rule.accumulate))
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype),
        jax.eval_shape(part, keys[0], jax.tree.map(lambda x: x[0], parts)),
    )
    total, _ = jax.lax.scan(add, zeros, (keys, parts))
    return jax.tree.map(lambda x: x / rule.accumulate, total)


def _mean_loss(
    rule: Rule, params: Params, carry: Any, key: Any, batch: Batch
) -> tuple[Any, tuple[Metrics, Any]]:
    """Call the loss and reduce it to (mean over the examples, (metrics, seen))."""
    params = cast_floating(params, rule.compute_dtype, rule.uncast)
    batch = cast_floating(batch, rule.compute_dtype)
    # On a mesh with sharded parameters; what is larger is gathered by the network, layer by layer.
    params = sharding.gathered(params, most=sharding.WHOLE_BYTES)
    batch = jax.tree.map(sharding.split_batch, batch)
    result = rule.loss_fn(params, key, batch, *(() if carry is None else (carry,)))
    expected = ("losses", "aux") if carry is None else ("losses", "aux", "seen")
    count = len(result) if isinstance(result, tuple | list) else 1
    if count != len(expected):
        raise ValueError(
            f"{rule.name} must return ({', '.join(expected)}) where state.carry is "
            f"{'None' if carry is None else 'given'}, got {count} values"
        )
    losses, aux, *rest = result
    if rule.per_example and jnp.ndim(losses) != 1:
        raise ValueError(
            f"{rule.name} must return one loss per example, [batch], got shape {jnp.shape(losses)}"
        )
    seen = jax.tree_util.tree_map_with_path(_seen_leaf, rest[0] if rest else None)
    loss, metrics = reduce_terms(losses, aux)
    return loss, (metrics, seen)


def _seen_leaf(path: Any, x: Any) -> Any:
    if not is_float(x):
        raise ValueError(
            f"seen{jax.tree_util.keystr(path)} must be floating, because it is averaged over "
            f"devices and parts, got {jnp.result_type(x)}: keep counts and keys in absorb"
        )
    return at_least_float32(x)


def reduce_terms(losses: Any, aux: Metrics) -> tuple[Any, Metrics]:
    """Take the means of the losses and of each term, in float32 at least."""
    for name in RESERVED:
        if name in aux:
            raise ValueError(f"aux of a loss must not use the name {name!r}: the step reports it")
    loss = jnp.mean(at_least_float32(losses))
    terms = {name: jnp.mean(at_least_float32(term)) for name, term in aux.items()}
    return loss, {"loss": loss, **terms}


def cast_floating(tree: Any, dtype: Any, uncast: Sequence[str] = ()) -> Any:
    """Cast the floating leaves of a tree, leave the others (integers, keys) and those whose last
    name is in `uncast`; None casts nothing."""
    if dtype is None:
        return tree

    def cast(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        return x.astype(dtype) if floating and name not in uncast else x

    return jax.tree_util.tree_map_with_path(cast, tree)


def apply_update(
    optimizer: Any, grads: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
    """Do what optax's update and apply_updates do; parameters keep their types."""
    moved = trainable(params)
    updates, opt_state = optimizer.update(grads, opt_state, moved)
    moved = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), moved, updates)
    return _with_fixed(moved, params), opt_state


def _with_fixed(moved: Params, params: Params) -> Params:
    """The trainable parameters, and the others from `params` in their places."""
    fill = lambda new, old: old if new is None else new  # noqa: E731
    return jax.tree.map(fill, moved, params, is_leaf=lambda x: x is None)


def with_norm(grads: Params) -> tuple[Params, Any]:
    """Return the gradients and their norm, taken before anything else reads them.

    The norm is real, and finite where float32 holds it: squares overflow from 1e19 on and vanish
    below 1e-19, so that they are taken again at another scale. Left to itself, XLA on CPU mixes
    the sums into the update, which then costs 5% of a step of a small network.
    """
    leaves = [wide(x) for x in jax.tree.leaves(grads)]

    def norm(scale: Any) -> Any:
        squares = [jnp.sum(jnp.square(jnp.abs(x) / scale)) for x in leaves]
        return scale * safe_sqrt(sum(squares, start=jnp.zeros((), squares[0].dtype)))

    plain = norm(1)
    within = (plain > 1e-15) & (plain < jnp.inf)
    result = jax.lax.cond(within, lambda: plain, lambda: norm(jnp.where(plain > 1, 1e22, 1e-22)))
    return jax.lax.optimization_barrier((grads, result))


def all_finite(tree: Any) -> Any:
    """Whether every number in the tree is finite, bool []."""
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]).all()


def first_bad_term(metrics: Metrics) -> str | None:
    """Name the first metric that is not finite: the aux terms, then the loss, then the gradient."""
    terms = [name for name in metrics if name not in RESERVED]
    for name in [*terms, "loss", "grad_norm"]:
        if name in metrics and not bool(jnp.all(jnp.isfinite(metrics[name]))):
            return name
    return None


def step_key(state: Any, axis_name: str | None) -> Any:
    """The key of this step, and of this device where an axis is named."""
    key = jax.random.fold_in(state.key, state.step)
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
