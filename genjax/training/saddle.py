"""Two players: a critic and a generator, each with its own loss and optimiser, in one step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from genjax import checks
from genjax.training import parallel
from genjax.training.state import check_player, ema_init, ema_read, ema_update, own
from genjax.training.step import (
    Metrics,
    all_finite,
    apply_update,
    compile_step,
    reduce_terms,
    with_norm,
)
from genjax.typing import Batch, Params

# (critic params, generator params, key, batch) -> (a loss [] or losses [batch], named terms)
SaddleLoss = Callable[[Params, Params, Any, Batch], tuple[Any, dict[str, Any]]]
# Folded into the key of a step, it gives the key of that step's data (`train_scan`).
DATA = 0x64617461


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Player:
    """What one player carries."""

    params: Any
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SaddleState:
    """Two players, the updates of the generator so far, the run's key, averages of the generator.

    As in TrainState the key is never advanced, and `ema` maps a decay to uncorrected averages.
    """

    step: Any
    critic: Player
    generator: Player
    key: Any
    ema: Any = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> dict[str, Params]:
        """The parameters of both players."""
        return {"critic": self.critic.params, "generator": self.generator.params}

    def ema_params(self, decay: float) -> Params:
        """Read the bias-corrected average of the generator's parameters, see `ema_read`."""
        return ema_read(self.ema, decay, self.step, self.generator.params)

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
) -> SaddleState:
    """Build the state at step 0; raises as `init_state` does. All arrays are copied."""
    check_player("critic_optimizer", critic_optimizer, critic_params)
    check_player("generator_optimizer", generator_optimizer, generator_params)
    return own(
        SaddleState(
            step=jnp.zeros((), jnp.int32),
            critic=Player(critic_params, critic_optimizer.init(critic_params)),
            generator=Player(generator_params, generator_optimizer.init(generator_params)),
            key=key,
            ema=ema_init(generator_params, ema_decays),
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
    simultaneous: bool = False,
    unroll: bool = True,
    axis_name: str | None = None,
) -> tuple[SaddleState, Metrics]:
    """Do n_critic updates of the critic in one scan, then one of the generator.

    Both losses are (critic_params, generator_params, key, batch) -> (loss, terms), to be made
    small: a scalar, or one per example (the mean is taken). Every leaf of `batch` is
    [n_critic, batch, ...]: critic update i sees part i and fold_in(key, i), the generator the
    last part and fold_in(key, n_critic), where key = fold_in(state.key, state.step). project: a
    pure function of the critic's parameters after each of its updates (weight clipping, a power
    iteration). simultaneous: the generator answers the critic as it was before the step (f-GAN's
    Algorithm 1) and not the updated one. unroll: write the critic's updates out one after another,
    which compiles longer; inside a loop XLA on CPU takes 4 times as long for the gradient of a
    convolution. axis_name: as in `train_step`; the average over devices
    is right for losses that are means over examples.

    Metrics are scalars: "critic/..." (means over its updates) and "generator/...", each with
    loss, its terms and grad_norm; and finite. Raises ValueError by name for a bad n_critic or
    batch.
    """
    checks.integer("n_critic", n_critic, 1)
    _check_parts(batch, n_critic)
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def update_critic(critic: Player, given: Any) -> tuple[Player, Metrics]:
        i, part = given

        def loss(params: Params) -> Any:
            at = jax.random.fold_in(key, i)
            return reduce_terms(*critic_loss(params, state.generator.params, at, part))

        critic, terms = _update(loss, critic_optimizer, critic, axis_name)
        if project is not None:
            critic = Player(project(critic.params), critic.opt_state)
        return critic, terms

    indices = jnp.arange(n_critic)
    if n_critic == 1:
        critic, terms = update_critic(state.critic, (indices[0], _part(batch, 0)))
    else:
        critic, terms = jax.lax.scan(
            update_critic, state.critic, (indices, batch), unroll=n_critic if unroll else 1
        )
        terms = jax.tree.map(lambda x: jnp.mean(x, axis=0), terms)
    opponent = state.critic if simultaneous else critic

    def loss(params: Params) -> Any:
        at = jax.random.fold_in(key, n_critic)
        return reduce_terms(*generator_loss(opponent.params, params, at, _part(batch, -1)))

    generator, own_terms = _update(loss, generator_optimizer, state.generator, axis_name)
    metrics = {f"critic/{name}": x for name, x in terms.items()}
    metrics |= {f"generator/{name}": x for name, x in own_terms.items()}
    metrics["finite"] = all_finite(metrics)
    state = state.replace(
        step=state.step + 1,
        critic=critic,
        generator=generator,
        ema=ema_update(state.ema, generator.params),
    )
    return state, metrics


def make_saddle_step(
    critic_loss: SaddleLoss,
    generator_loss: SaddleLoss,
    critic_optimizer: Any,
    generator_optimizer: Any,
    *,
    n_critic: int = 1,
    project: Callable[[Params], Params] | None = None,
    simultaneous: bool = False,
    unroll: bool = True,
    mesh: Mesh | None = None,
    pmap: bool = False,
    steps_per_call: int = 1,
) -> Callable[[SaddleState, Batch], tuple[SaddleState, Metrics]]:
    """Compile `saddle_step` as `make_train_step` does; the batch is split along its axis 1.

    With steps_per_call > 1 the leaves of the batch are [steps, n_critic, batch, ...].
    """
    checks.integer("n_critic", n_critic, 1)

    def step(state: SaddleState, batch: Batch) -> tuple[SaddleState, Metrics]:
        return saddle_step(
            critic_loss,
            generator_loss,
            critic_optimizer,
            generator_optimizer,
            state,
            batch,
            n_critic=n_critic,
            project=project,
            simultaneous=simultaneous,
            unroll=unroll,
            axis_name=parallel.AXIS if pmap else None,
        )

    return compile_step(step, mesh=mesh, pmap=pmap, steps_per_call=steps_per_call, batch_axis=1)


def critic_batches(batches: Callable[[int], Batch], n_critic: int) -> Callable[[int], Batch]:
    """Make of the batch of a step n_critic batches, stacked: those of n_critic steps of data."""
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
    steps: int,
) -> tuple[Any, Metrics]:
    """Train for `steps` updates in one scan: a pure function, so that vmap over keys trains many.

    step(state, batch) is a pure train step (a `functools.partial` of `train_step` or
    `saddle_step`), sample(key) -> batch draws the data of one step; for `saddle_step` its leaves
    begin with n_critic. Returns the last state and the metrics stacked [steps].
    """
    checks.integer("steps", steps, 1)

    def body(state: Any, _: None) -> tuple[Any, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        return step(state, sample(jax.random.fold_in(key, DATA)))

    return jax.lax.scan(body, state, None, length=steps)


def _update(
    loss: Callable[[Params], Any], optimizer: Any, player: Player, axis_name: str | None
) -> tuple[Player, Metrics]:
    grads, terms = jax.grad(loss, has_aux=True)(player.params)
    if axis_name is not None:
        grads, terms = jax.lax.pmean((grads, terms), axis_name)
    grads, terms["grad_norm"] = with_norm(grads)
    return Player(*apply_update(optimizer, grads, player.opt_state, player.params)), terms


def _part(batch: Batch, i: int) -> Batch:
    return jax.tree.map(lambda x: x[i], batch)


def _check_parts(batch: Batch, n_critic: int) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        if jnp.ndim(x) < 2 or jnp.shape(x)[0] != n_critic:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"batch{name} must be [n_critic, batch, ...] with n_critic = {n_critic}, "
                f"got shape {jnp.shape(x)}"
            )
    parallel.check_batch(batch, 1, axis=1)
