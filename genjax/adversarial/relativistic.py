"""Relativistic pairs: the critic says which of two is real, and the generator wants the other."""

import math

import jax
from jaxtyping import Array, Float

from genjax import checks
from genjax.adversarial.objectives import AdversarialLosses, Mask, _prepare
from genjax.numerics import masked_mean

__all__ = ["relativistic"]


def relativistic(
    real_scores: Float[Array, " batch"],
    fake_scores: Float[Array, " batch"],
    *,
    where: Mask | tuple[Mask | None, Mask | None] | None = None,
) -> AdversarialLosses:
    """Losses of a critic that compares, pair by pair, a real with a generated example.

        critic    = mean softplus(-(D(x_i) - D(y_i)))
        generator = mean softplus(-(D(y_i) - D(x_i)))
        bound     = log 2 - critic <= log 2                                        (nats)

    x_i real, y_i generated, row by row. The generator's loss has the real scores in it: they come
    from the same critic as the fake ones, and no gradient flows to the generator through them. A
    critic that is the same on both has bound 0; at D = log p/q the critic is the best one, since
    the pair (x, y) beside (y, x) has log-odds D(x) - D(y). `where` keeps the pairs of which both
    sides are kept. R3GAN adds gamma / 2 (R1 + R2) to the critic's loss in every step, by
    `r1_penalty` and `r2_penalty`.

    Raises ValueError unless both are [batch] of one length. Jolicoeur-Martineau 2019
    (arXiv:1807.00734), section 4; R3GAN: Huang et al. 2024 (arXiv:2501.05441), eqs. 2 and 3.

    >>> round(float(relativistic(jnp.array([2.0, 1.0]), jnp.array([2.0, 1.0])).critic), 3)
    0.693
    """
    real, keep_real, fake, keep_fake = _prepare(real_scores, fake_scores, where)
    checks.same_shape(real_scores=real, fake_scores=fake)
    keep, gap = keep_real & keep_fake, real - fake
    critic = masked_mean(jax.nn.softplus(-gap), keep)
    generator = masked_mean(jax.nn.softplus(gap), keep)
    return AdversarialLosses(critic, generator, math.log(2) - critic)
