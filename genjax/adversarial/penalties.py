"""Penalties on the critic's gradient, and weight clipping.

Each penalty is a function phi of g_i, the gradient of the score of example i with respect to that
example, over its whole event. The derivative of phi(g) with respect to the critic's parameters is
the derivative of <g, c> with c = phi'(g) held fixed, and <g, c> is one directional derivative of
the critic: so it is taken forward over reverse, which compiles to a several times faster program
than a second reverse pass and is the same number. A critic that contains a `jax.custom_vjp`
function refuses forward mode: there the second pass is a reverse one too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from genjax import checks
from genjax.numerics import event_norm, expand_to, has_forward_mode, hoisted, sum_event
from genjax.randomness import indexed_keys
from genjax.typing import CriticFn, PRNGKey

__all__ = ["clip_weights", "gradient_penalty", "r1_penalty", "r2_penalty"]

# (gradient [batch, *event], target []) -> penalty [batch]
PenaltyFn = Callable[[Array, Array], Array]


def gradient_penalty(
    critic: CriticFn,
    key: PRNGKey,
    real: Float[Array, "batch *event"],
    fake: Float[Array, "batch *event"],
    *,
    target: float | int | Float[Array, ""] = 1.0,
    one_sided: bool = False,
    weights: Float[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """Penalty on the norm of the critic's gradient between real and generated examples.

        x_i = e_i real_i + (1 - e_i) fake_i,   e_i ~ U[0, 1], one number per example
        penalty_i = (|grad critic(x_i)| - target)^2,   or max(0, |grad| - target)^2 if `one_sided`

    The norm is over the whole event; its gradient at 0 is 0. Nothing is averaged or scaled: the
    paper adds 10 times the mean to the critic's loss. The critic must score each example by itself
    (no normalisation over the batch).

    e_i is drawn from fold_in(key, i): a pair's penalty depends on the key, on its place i and on
    the pair, not on the others nor on the batch's size, and changes continuously with the pair.
    `weights` gives e_i instead; the key is then unused.

    Exact derivatives of any order with respect to whatever the critic closes over, and to `real`
    and `fake`, also through `jax.custom_vjp` functions in the critic (see the module).
    Raises ValueError where the shapes differ or the critic does not return [batch].
    Gulrajani et al. 2017 (arXiv:1704.00028), eq. 3; one-sided: Petzka et al. 2018.

    >>> critic = lambda x: 3 * x[:, 0]
    >>> real, fake = jax.random.normal(jax.random.key(0), (2, 4, 2))
    >>> gradient_penalty(critic, jax.random.key(1), real, fake)
    Array([4., 4., 4., 4.], dtype=float32)
    """
    for name, x in (("real", real), ("fake", fake)):
        checks.floating(name, x)
        checks.min_rank(name, x, 1)
    checks.same_event(real=real, fake=fake)
    checks.same_batch(real=real, fake=fake)
    checks.not_empty("real", real)
    checks.at_least("target", target, 0)
    if weights is None:
        uniform = partial(jax.random.uniform, dtype=jnp.float32)
        weights = jax.vmap(uniform)(indexed_keys(key, real.shape[0]))
    checks.shape("weights", weights, real.shape[:1])
    weight = expand_to(weights.astype(jnp.result_type(real, fake)), real)
    mixed = weight * real + (1 - weight) * fake

    def phi(gradient: Array, target: Array) -> Array:
        excess = event_norm(gradient) - target
        return jnp.square(jax.nn.relu(excess) if one_sided else excess)

    return _penalise(phi, critic, mixed, target)


def r1_penalty(critic: CriticFn, real: Float[Array, "batch *event"]) -> Float[Array, " batch"]:
    """Squared norm of the critic's gradient at the real examples, |grad critic(x_i)|^2, [batch].

    The paper adds gamma / 2 times the mean to the critic's loss. Mescheder, Geiger, Nowozin 2018
    (arXiv:1801.04406), eq. 9.

    >>> r1_penalty(lambda x: 3 * x[:, 0], jnp.ones((2, 4)))
    Array([9., 9.], dtype=float32)
    """
    return _squared_norm("real", critic, real)


def r2_penalty(critic: CriticFn, fake: Float[Array, "batch *event"]) -> Float[Array, " batch"]:
    """Squared norm of the critic's gradient at generated examples, |grad critic(x_i)|^2, [batch].

    The paper adds gamma / 2 times the mean. Mescheder et al. 2018 (arXiv:1801.04406), eq. 10.

    >>> r2_penalty(lambda x: 3 * x[:, 0], jnp.ones((2, 4)))
    Array([9., 9.], dtype=float32)
    """
    return _squared_norm("fake", critic, fake)


def clip_weights(params: PyTree, limit: float | int | Float[Array, ""]) -> PyTree:
    """Clip every floating parameter to [-limit, limit]; 0.01 in the paper.

    Arjovsky, Chintala, Bottou 2017 (arXiv:1701.07875), Algorithm 1, line 7.

    >>> clip_weights({"kernel": jnp.array([-2.0, 0.005])}, 0.01)
    {'kernel': Array([-0.01 ,  0.005], dtype=float32)}
    """
    checks.positive("limit", limit)

    def clip(w: Array) -> Array:
        w = jnp.asarray(w)
        return jnp.clip(w, -limit, limit).astype(w.dtype) if w.dtype.kind in "fV" else w

    return jax.tree.map(clip, params)


def _squared_norm(name: str, critic: CriticFn, x: Array) -> Array:
    checks.floating(name, x)
    checks.min_rank(name, x, 1)
    checks.not_empty(name, x)
    return _penalise(lambda g, target: sum_event(jnp.square(g)), critic, x, 0.0)


def _penalise(phi: PenaltyFn, critic: CriticFn, x: Array, target: Any) -> Array:
    """phi of the critic's gradient at x, [batch], with the derivative rule of the module."""
    scores = jax.eval_shape(critic, x)
    if scores.shape != x.shape[:1]:
        raise ValueError(
            f"critic must return one score per example, shape {x.shape[:1]}, got {scores.shape}"
        )
    # What the critic closes over becomes an argument, so that it can be differentiated.
    pure, consts = hoisted(critic, x)
    return _phi_of_gradient(phi, pure, consts, x, jnp.asarray(target, jnp.float32))


def _input_gradient(critic: Callable[..., Array], consts: list[Array], x: Array) -> Array:
    return jax.grad(lambda x: jnp.sum(critic(x, *consts)))(x)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _phi_of_gradient(phi: PenaltyFn, critic: Any, consts: list[Array], x: Array, target: Array):
    return phi(_input_gradient(critic, consts, x), target)


@_phi_of_gradient.defjvp
def _phi_of_gradient_jvp(phi: PenaltyFn, critic: Any, primals: tuple, tangents: tuple):
    consts, x, target = primals
    forward = has_forward_mode(lambda x: critic(x, *consts), x)
    gradient = _input_gradient(critic, consts, x)
    value, pullback = jax.vjp(lambda g: phi(g, target), gradient)
    (direction,) = pullback(jnp.ones_like(value))

    def along(consts: list[Array], x: Array) -> Array:
        if forward:
            return jax.jvp(lambda x: critic(x, *consts), (x,), (direction,))[1]
        return sum_event(_input_gradient(critic, consts, x) * direction)

    by_critic = jax.jvp(along, (consts, x), tangents[:2])[1].astype(value.dtype)
    by_target = jax.jvp(lambda t: phi(gradient, t), (target,), tangents[2:])[1]
    return value, by_critic + by_target
