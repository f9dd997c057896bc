"""Two players: a critic and a generator, each with its own loss and optimiser, in one step."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from genjax import checks, sharding
from genjax.training import parallel
from genjax.training.state import (
    check_arrays,
    check_player,
    copy_leaves,
    ema_init,
    ema_read,
    ema_update,
)
from genjax.training.step import compile_step
from genjax.training.update import (
    Metrics,
    Player,
    Rule,
    all_finite,
    cast_floating,
    new_player,
    step_key,
    update,
)
from genjax.typing import AbsorbFn, Batch, Params

__all__ = [
    "SaddleState",
    "critic_batches",
    "init_saddle_state",
    "make_saddle_step",
    "saddle_step",
    "train_scan",
]

# (critic params, generator params, key, batch) -> (a loss [] or losses [batch], named terms), and
# with a carry (..., batch, carry) -> (loss, terms, seen)
SaddleLoss = Callable[..., tuple[Any, ...]]
# Folded into the key of a step, it gives the key of that step's data (`train_scan`).
DATA = 0x64617461


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SaddleState:
    """Two players, the updates of the generator so far, the run's key, averages of the generator.

    As in TrainState the key is never advanced, `ema` maps a decay to averages, and `carry` is what
    no gradient moves (one for both players), see `saddle_step`.
    """

    step: Any
    critic: Player
    generator: Player
    key: Any
    ema: Any = dataclasses.field(default_factory=dict)
    carry: Any = None

    @property
    def params(self) -> dict[str, Params]:
        """The parameters of both players."""
        return {"critic": self.critic.params, "generator": self.generator.params}

    def ema_params(self, decay: float) -> Params:
        """Read the average of the generator's parameters, see `ema_update`."""
        return ema_read(self.ema, decay)

    def replace(self, **changes: Any) -> "SaddleState":
        """Return the state with some fields changed."""
        return dataclasses.replace(self, **changes)


def init_saddle_state(
    critic_params: Params,
    generator_params: Params,
    critic_optimizer: Any,
    generator_optimizer: Any,
    key: Any,
    *,
    ema_decays: Sequence[float] = (),
    carry: Any = None,
) -> SaddleState:
    """Build the state at step 0; raises as `init_state` does. All arrays are copied.

    >>> key, optimizer = jax.random.key(0), optax.sgd(0.1)
    >>> state = init_saddle_state(jnp.ones(2), jnp.ones(3), optimizer, optimizer, key)
    >>> int(state.step)
    0
    """
    check_player("critic_optimizer", critic_optimizer, critic_params)
    check_player("generator_optimizer", generator_optimizer, generator_params)
    check_arrays("carry", carry)
    return copy_leaves(
        SaddleState(
            step=jnp.zeros((), jnp.int32),
            critic=new_player(critic_params, critic_optimizer),
            generator=new_player(generator_params, generator_optimizer),
            key=key,
            ema=ema_init(generator_params, ema_decays),
            carry=carry,
        )
    )


def saddle_step(
    critic_loss: SaddleLoss,
    generator_loss: SaddleLoss,
    critic_optimizer: Any,
    generator_optimizer: Any,
    state: SaddleState,
    batch: Batch,
    *,
    n_critic: int = 1,
    project: Callable[[Params], Params] | None = None,
    critic_absorb: AbsorbFn | None = None,
    generator_absorb: AbsorbFn | None = None,
    simultaneous: bool = False,
    unroll: bool = True,
    axis_name: str | None = None,
    accumulate: int = 1,
    compute_dtype: Any = None,
) -> tuple[SaddleState, Metrics]:
    """Do n_critic updates of the critic in one scan, then one of the generator.

    Both losses are (critic_params, generator_params, key, batch) -> (loss, terms), to be made
    small: a scalar, or one per example (the mean is taken). Every leaf of `batch` is
    [n_critic, batch, ...]: critic update i sees part i and fold_in(key, i), the generator the
    last part and fold_in(key, n_critic), where key = fold_in(state.key, state.step). project: a
    pure function of the critic's parameters after each of its updates (weight clipping).
    simultaneous: the generator answers the critic as it was before the step (f-GAN's Algorithm 1).
    unroll: write the critic's updates out one after another, which compiles longer; in a loop XLA
    on CPU takes 4 times as long for the gradient of a convolution. axis_name, accumulate,
    compute_dtype: as in `train_step`, for both; a loss that is a scalar is averaged over devices
    and parts, which is right for means over examples only.

    Where the state has a carry, both losses get it as their last argument and return a third
    value, `seen`. One carry goes through all updates in their order: each loss sees it as the
    update before left it. After every update of the critic it becomes
    critic_absorb(carry, critic's new params after `project`, seen), after the generator's
    generator_absorb(carry, generator's new params, seen); averages, defaults and errors are those
    of `train_step`, so that a player whose loss returns None for `seen` leaves the carry alone.

    Metrics are scalars: "critic/..." (means over its updates) and "generator/...", each with loss,
    its terms and grad_norm; and finite. Raises ValueError for a bad n_critic or batch.

    >>> loss = lambda critic, generator, key, batch: (critic * generator * batch, {})
    >>> opposite = lambda *given: (-loss(*given)[0], {})
    >>> sgd, one = optax.sgd(0.1), jnp.ones(())
    >>> state = init_saddle_state(one, one, sgd, sgd, jax.random.key(0))
    >>> state, metrics = saddle_step(opposite, loss, sgd, sgd, state, jnp.ones((1, 4)))
    >>> round(float(state.critic.params), 3)
    1.1
    """
    checks.integer("n_critic", n_critic, 1)
    checks.integer("accumulate", accumulate, 1)
    _check_parts(batch, n_critic, accumulate)
    key = step_key(state, axis_name)
    options = {"axis_name": axis_name, "accumulate": accumulate, "compute_dtype": compute_dtype}
    rule = functools.partial(Rule, per_example=False, **options)
    generator = _opponent(state.generator, compute_dtype)
    critic_rule = rule(
        "critic_loss",
        lambda params, *given: critic_loss(params, generator, *given),
        critic_optimizer,
        critic_absorb,
        project,
    )
    critic, carry, terms = _update_critic(critic_rule, state, key, batch, n_critic, unroll)

    opponent = _opponent(state.critic if simultaneous else critic, compute_dtype)
    generator_rule = rule(
        "generator_loss",
        lambda params, *given: generator_loss(opponent, params, *given),
        generator_optimizer,
        generator_absorb,
    )
    at = jax.random.fold_in(key, n_critic)
    player, carry, answer = update(generator_rule, state.generator, carry, at, _part(batch, -1))

    players = {"critic": terms, "generator": answer}
    metrics = {f"{name}/{term}": x for name in players for term, x in players[name].items()}
    metrics["finite"] = all_finite(metrics)
    ema = ema_update(state.ema, player.params, state.step + 1)
    return SaddleState(state.step + 1, critic, player, state.key, ema, carry), metrics


def _opponent(player: Player, compute_dtype: Any) -> Params:
    """The parameters that the other player's loss reads."""
    params = cast_floating(player.params, compute_dtype)
    return sharding.gathered(params, most=sharding.WHOLE_BYTES)


def _update_critic(
    rule: Rule, state: SaddleState, key: Any, batch: Batch, n_critic: int, unroll: bool
) -> tuple[Player, Any, Metrics]:
    """Do the critic's updates, one for each part of the batch; the means of their metrics."""

    def once(before: tuple[Player, Any], given: Any) -> tuple[tuple[Player, Any], Metrics]:
        i, part = given
        critic, carry, terms = update(rule, *before, jax.random.fold_in(key, i), part)
        return (critic, carry), terms

    start, indices = (state.critic, state.carry), jnp.arange(n_critic)
    if n_critic == 1:
        end, terms = once(start, (indices[0], _part(batch, 0)))
        return *end, terms
    end, terms = jax.lax.scan(once, start, (indices, batch), unroll=n_critic if unroll else 1)
    return *end, jax.tree.map(lambda x: jnp.mean(x, axis=0), terms)


def make_saddle_step(
    critic_loss: SaddleLoss,
    generator_loss: SaddleLoss,
    critic_optimizer: Any,
    generator_optimizer: Any,
    *,
    mesh: Mesh | None = None,
    pmap: bool = False,
    steps_per_call: int = 1,
    sharding: str = "replicated",
    **options: Any,
) -> Callable[[SaddleState, Batch], tuple[SaddleState, Metrics]]:
    """Compile `saddle_step` as `make_train_step` does; the batch is split along its axis 1.

    options: those of `saddle_step`, but for axis_name. sharding: as there. With steps_per_call > 1
    the leaves of the batch are [steps, n_critic, batch, ...].

    >>> loss = lambda critic, generator, key, batch: (critic * generator * batch, {})
    >>> opposite = lambda *given: (-loss(*given)[0], {})
    >>> key, sgd, one = jax.random.key(0), optax.sgd(0.1), jnp.ones(())
    >>> step = make_saddle_step(opposite, loss, sgd, sgd, mesh=data_mesh(1))
    >>> state = init_saddle_state(one, one, sgd, sgd, key)
    >>> int(step(state, jnp.ones((1, 4)))[0].step)
    1
    """
    checks.integer("n_critic", options.get("n_critic", 1), 1)
    players = (critic_loss, generator_loss, critic_optimizer, generator_optimizer)
    common = {"mesh": mesh, "pmap": pmap, "steps_per_call": steps_per_call, "batch_axis": 1}
    return compile_step(saddle_step, *players, **common, sharding=sharding, **options)


def critic_batches(batches: Callable[[int], Batch], n_critic: int) -> Callable[[int], Batch]:
    """Make of the batch of a step n_critic batches, stacked: those of n_critic steps of data.

    >>> critic_batches(lambda n: jnp.full(2, n), 3)(1)
    array([[3, 3],
           [4, 4],
           [5, 5]], dtype=int32)
    """
    checks.integer("n_critic", n_critic, 1)

    def stacked(step: int) -> Batch:
        parts = [batches(step * n_critic + i) for i in range(n_critic)]
        return jax.tree.map(lambda *x: np.stack(x), *parts)

    return stacked


def train_scan(
    step: Callable[[Any, Batch], tuple[Any, Metrics]],
    state: Any,
    sample: Callable[[Any], Batch],
    *,
    num_steps: int,
) -> tuple[Any, Metrics]:
    """Train for `num_steps` updates in one scan: pure, so that vmap over keys trains many runs.

    step(state, batch) is a pure train step (a `functools.partial` of `train_step` or
    `saddle_step`), sample(key) -> batch draws the data of one step; for `saddle_step` its leaves
    begin with n_critic. Returns the last state and the metrics stacked [num_steps].

    >>> loss = lambda params, key, batch: ((params - batch) ** 2, {})
    >>> step = lambda state, batch: train_step(loss, optax.sgd(0.5), state, batch)
    >>> state = init_state(jnp.zeros(()), optax.sgd(0.5), jax.random.key(0))
    >>> state, metrics = train_scan(step, state, lambda key: jnp.full(4, 2.0), num_steps=3)
    >>> float(state.params)
    2.0
    """
    checks.integer("num_steps", num_steps, 1)

    def body(state: Any, _: None) -> tuple[Any, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        return step(state, sample(jax.random.fold_in(key, DATA)))

    return jax.lax.scan(body, state, None, length=num_steps)


def _part(batch: Batch, i: int) -> Batch:
    return jax.tree.map(lambda x: x[i], batch)


def _check_parts(batch: Batch, n_critic: int, accumulate: int) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.ndim(x) < 2 or jnp.shape(x)[0] != n_critic:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"batch{name} must be [n_critic, batch, ...] with n_critic = {n_critic}, "
                f"got shape {jnp.shape(x)}"
            )
    parallel.check_batch(batch, 1, axis=1, accumulate=accumulate)
