"""Two-sample objectives: what the critic and the generator minimise, and the bound between them.

Each takes the critic's raw scores of real and of generated examples, larger meaning "real", and
returns `AdversarialLosses`: three scalars with names, so that nobody negates one.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from genjax import checks
from genjax.divergences import ALIASES, F_DIVERGENCES, FDivergence
from genjax.numerics import at_least_float32, masked_mean

__all__ = [
    "AdversarialLosses",
    "DonskerVaradhan",
    "donsker_varadhan",
    "f_gan",
    "gan",
    "hinge",
    "least_squares",
    "nwj",
    "wasserstein",
]

Mask: TypeAlias = Bool[Array, " batch"]
Where: TypeAlias = Mask | tuple[Bool[Array, " real"] | None, Bool[Array, " fake"] | None] | None


class AdversarialLosses(NamedTuple):
    """What each player minimises, and the lower bound on a distance that the critic maximises."""

    critic: Float[Array, ""]
    generator: Float[Array, ""]
    bound: Float[Array, ""]


class DonskerVaradhan(NamedTuple):
    """`AdversarialLosses` with the running log of E_Q exp(T), to be passed to the next call."""

    critic: Float[Array, ""]
    generator: Float[Array, ""]
    bound: Float[Array, ""]
    log_average: Float[Array, ""]


def _prepare(real: Array, fake: Array, where: Where) -> tuple[Array, Array, Array, Array]:
    """Check both score vectors and split `where` into a mask for each.

    Masked scores become 0 before any function sees them: a `where` after it would let their NaN
    through to the gradient.
    """
    masks = where if isinstance(where, tuple) else (where, where)
    prepared = []
    for name, scores, mask in (("real", real, masks[0]), ("fake", fake, masks[1])):
        checks.floating(f"{name}_scores", scores)
        if scores.ndim != 1:
            raise ValueError(
                f"{name}_scores must be one score per example, shape [batch], got {scores.shape}"
            )
        checks.not_empty(f"{name}_scores", scores)
        if mask is None:
            mask = jnp.ones(scores.shape, bool)
        checks.shape(f"where for {name}_scores", mask, scores.shape)
        prepared += [jnp.where(mask, at_least_float32(scores), 0), mask]
    return prepared[0], prepared[1], prepared[2], prepared[3]


def f_gan(
    divergence: str | FDivergence,
    real_scores: Float[Array, " real"],
    fake_scores: Float[Array, " fake"],
    *,
    saturating: bool = False,
    where: Where = None,
) -> AdversarialLosses:
    """Variational bound on an f-divergence, and the losses of f-GAN.

        bound     = mean g(V_real) - mean f*(g(V_fake)) <= D_f(P || Q)           (nats)
        critic    = -bound
        generator = -mean g(V_fake), or -mean f*(g(V_fake)) with `saturating=True`

    `divergence` is a key of `F_DIVERGENCES` or an entry of one's own. The saturating generator loss
    minimises the bound itself; its gradient vanishes where the critic is sure of the fakes.

    `where` masks examples: one mask for both vectors, or (mask of real, mask of fake). A side that
    is masked out entirely contributes 0.

    Scores of +-1e4 give finite losses and gradients for `gan`, `jensen_shannon`, `total_variation`
    and `pearson`. The others grow exponentially on one side, like exp(v) or exp(-v), and do so to
    +-80 in float32; beyond 88 the loss is infinite and its gradient infinite or NaN, which is the
    objective, not rounding: keep such critics bounded (penalty, clipping, lower learning rate).

    Raises ValueError for an unknown divergence, scores that are not [batch], or none at all.
    Nowozin et al. 2016 (arXiv:1606.00709), eq. 6 and section 3.2.

    >>> real_scores, fake_scores = jnp.array([2.0, 1.0]), jnp.array([-1.0, 0.0])
    >>> round(float(f_gan("pearson", real_scores, fake_scores).bound), 3)
    1.875
    """
    if isinstance(divergence, str):
        checks.one_of("divergence", divergence, F_DIVERGENCES, ALIASES)
        divergence = F_DIVERGENCES[divergence]
    real, keep_real, fake, keep_fake = _prepare(real_scores, fake_scores, where)
    conjugate = masked_mean(divergence.conjugate_activation(fake), keep_fake)
    bound = masked_mean(divergence.activation(real), keep_real) - conjugate
    generator = conjugate if saturating else masked_mean(divergence.activation(fake), keep_fake)
    return AdversarialLosses(-bound, -generator, bound)


def gan(
    real_scores: Float[Array, " real"],
    fake_scores: Float[Array, " fake"],
    *,
    saturating: bool = False,
    where: Where = None,
) -> AdversarialLosses:
    """GAN: binary cross-entropy of the logits, in the softplus form.

        critic    = mean softplus(-V_real) + mean softplus(V_fake)
        generator = mean softplus(-V_fake), or -mean softplus(V_fake) with `saturating=True`
        bound     = -critic <= 2 JS(P, Q) - log 4                                (nats)

    It is `f_gan("gan", ...)`. Goodfellow et al. 2014, eq. 1, theorem 1 and section 3.

    >>> real_scores, fake_scores = jnp.array([2.0, 1.0]), jnp.array([-1.0, 0.0])
    >>> losses = gan(real_scores, fake_scores)
    >>> losses.critic.round(3), losses.generator.round(3)
    (Array(0.723, dtype=float32), Array(1.003, dtype=float32))
    """
    return f_gan("gan", real_scores, fake_scores, saturating=saturating, where=where)


def donsker_varadhan(
    real_scores: Float[Array, " real"],
    fake_scores: Float[Array, " fake"],
    *,
    log_average: Float[Array, ""] | None = None,
    decay: float | Float[Array, ""] = 0.99,
    where: Where = None,
) -> DonskerVaradhan:
    """Donsker-Varadhan bound on KL(P || Q); with joint and shuffled pairs, on mutual information.

        bound = mean T_real - log mean exp(T_fake) <= KL(P || Q)                 (nats)

    The bound is tight iff T = log p/q + const, over T with E_Q exp(T) finite. `generator` is the
    part that Q moves, -log mean exp(T_fake).

    The gradient of the log of a minibatch mean is biased. With `log_average`, the running log of
    E_Q exp(T), the critic's gradient divides by that average instead (MINE); the value is
    unchanged. Start with `jnp.array(-jnp.inf)`, which takes the first batch's own mean, and pass
    the returned `log_average` to the next call. Under a mask, a side with nothing left gives 0,
    and without fakes the average stays. Finite for scores of any finite size. Raises ValueError
    unless 0 <= decay < 1. Belghazi et al. 2018 (arXiv:1801.04062), eqs. 10-12.

    >>> joint, shuffled = jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0])
    >>> float(donsker_varadhan(joint, shuffled).bound)
    1.5
    """
    real, keep_real, fake, keep_fake = _prepare(real_scores, fake_scores, where)
    checks.between("decay", decay, 0, 1)
    # In float32, the numbers next to 1 among them.
    if checks.is_concrete(decay) and np.float32(decay) == 1:
        raise ValueError(f"decay must be below 1, where the average would never move, got {decay}")
    count = jnp.sum(keep_fake)
    kept = jnp.where(keep_fake, fake, -jnp.inf)
    safe = jnp.where(count > 0, kept, 0)  # all masked: a defined 0, and no NaN in the gradient
    log_mean = jax.nn.logsumexp(safe) - jnp.log(jnp.where(count > 0, count, fake.size))
    log_mean = log_mean.astype(fake.dtype)
    if log_average is None:
        average, partition = stop_gradient(log_mean), log_mean
    else:
        checks.rank("log_average", log_average, 0)
        now = stop_gradient(log_mean)
        mixed = jnp.logaddexp(log_average + jnp.log(decay), now + jnp.log1p(-jnp.asarray(decay)))
        average = jnp.where(log_average == -jnp.inf, now, mixed)
        average = stop_gradient(jnp.where(count > 0, average, log_average)).astype(fake.dtype)
        # Value log_mean; gradient E[exp(T) dT] / exp(average).
        scaled = jnp.exp(jnp.where(count > 0, log_mean - average, 0))
        partition = now + scaled - stop_gradient(scaled)
    mean_real = masked_mean(real, keep_real)
    return DonskerVaradhan(
        critic=partition - mean_real,
        generator=-log_mean,
        bound=mean_real - log_mean,
        log_average=average,
    )


def nwj(
    real_scores: Float[Array, " real"],
    fake_scores: Float[Array, " fake"],
    *,
    saturating: bool = False,
    where: Where = None,
) -> AdversarialLosses:
    """Nguyen-Wainwright-Jordan bound: mean T_real - mean exp(T_fake - 1) <= KL(P || Q), in nats.

    Tight only at T = 1 + log p/q, and never above Donsker-Varadhan's bound for the same T; its
    minibatch gradient is unbiased. It is `f_gan("kl", ...)`. Nguyen et al. 2010.

    >>> joint, shuffled = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
    >>> float(nwj(joint, shuffled).bound)
    0.5
    """
    return f_gan("kl", real_scores, fake_scores, saturating=saturating, where=where)


def wasserstein(
    real_scores: Float[Array, " real"],
    fake_scores: Float[Array, " fake"],
    *,
    where: Where = None,
) -> AdversarialLosses:
    """Kantorovich-Rubinstein dual of the Wasserstein-1 distance.

        bound = mean f(real) - mean f(fake) <= W1(P, Q) for a 1-Lipschitz critic f
        critic = -bound,  generator = -mean f(fake)

    The bound is in units of the data's distance, and holds only as far as the critic is
    1-Lipschitz. Arjovsky, Chintala, Bottou 2017 (arXiv:1701.07875), eq. 2 and Algorithm 1.

    >>> losses = wasserstein(jnp.array([2.0, 1.0]), jnp.array([0.0, 1.0]))
    >>> float(losses.bound)
    1.0
    """
    real, keep_real, fake, keep_fake = _prepare(real_scores, fake_scores, where)
    mean_fake = masked_mean(fake, keep_fake)
    bound = masked_mean(real, keep_real) - mean_fake
    return AdversarialLosses(-bound, -mean_fake, bound)


def hinge(
    real_scores: Float[Array, " real"],
    fake_scores: Float[Array, " fake"],
    *,
    where: Where = None,
) -> AdversarialLosses:
    """Hinge loss: a bound on total variation.

        critic    = mean max(0, 1 - V_real) + mean max(0, 1 + V_fake)
        generator = -mean V_fake
        bound     = 1 - critic / 2 <= TV(P, Q), with equality at V = sign(p - q)

    Lim & Ye 2017 (arXiv:1705.02894).

    >>> float(hinge(jnp.array([2.0, 0.5]), jnp.array([-1.0, 0.0])).critic)
    0.75
    """
    real, keep_real, fake, keep_fake = _prepare(real_scores, fake_scores, where)
    critic = masked_mean(jax.nn.relu(1 - real), keep_real)
    critic = critic + masked_mean(jax.nn.relu(1 + fake), keep_fake)
    return AdversarialLosses(critic, -masked_mean(fake, keep_fake), 1 - critic / 2)


def least_squares(
    real_scores: Float[Array, " real"],
    fake_scores: Float[Array, " fake"],
    *,
    where: Where = None,
) -> AdversarialLosses:
    """Least-squares GAN: targets 1 for real and 0 for fake examples.

        critic    = mean (V_real - 1)^2 / 2 + mean V_fake^2 / 2
        generator = mean (V_fake - 1)^2 / 2
        bound     = 1 - 4 critic <= (1/2) integral of (p - q)^2 / (p + q), equal at V = p / (p + q)

    Mao et al. 2017 (arXiv:1611.04076), eq. 2.

    >>> float(least_squares(jnp.array([1.0, 1.0]), jnp.array([0.0, 0.0])).critic)
    0.0
    """
    real, keep_real, fake, keep_fake = _prepare(real_scores, fake_scores, where)
    critic = masked_mean(jnp.square(real - 1), keep_real) / 2
    critic = critic + masked_mean(jnp.square(fake), keep_fake) / 2
    generator = masked_mean(jnp.square(fake - 1), keep_fake) / 2
    return AdversarialLosses(critic, generator, 1 - 4 * critic)
