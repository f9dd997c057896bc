"""How the laws call the losses of tokens: bounds of masked diffusion, losses of responses."""

import jax.numpy as jnp
import numpy as np

from genjax import alignment as A
from genjax import diffusion as D
from tests.laws import Case

RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, 3, (4, 3)))
RESPONSES = -jnp.abs(jnp.asarray(RNG.normal(size=(3, 4, 3)), jnp.float32))


def of_tokens(loss, **options):
    """A bound of masked diffusion, on whole numbers; the network sees the hidden ones too."""
    table = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    predict = lambda z: table[z] + jnp.sum(table[z], axis=1, keepdims=True)  # noqa: E731
    return Case(lambda k, x: loss(predict, k, x, vocabulary=3, **options), (TOKENS,), discrete=True)


def log_score(z, t):
    return (z[..., None] * jnp.arange(1.0, 4.0)[None, None] - 3) * t[:, None, None]


# The first argument of a loss of responses is data, the others stay as they are.
p, q, r = RESPONSES
f_dpo = lambda k, x: A.f_dpo("jeffreys", x, p, q, r)  # noqa: E731
kept = jnp.asarray([True, False, True, False])
ranks = jnp.asarray([[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]])
tilt = jnp.arange(1.0, 4.0)[None]
x, vector = (RESPONSES[0] - 0.1,), (RESPONSES[0, :, 0],)
CASES = {
    "masked_bound": of_tokens(D.masked_bound, times=jnp.full(4, 0.9)),
    "order_bound": of_tokens(D.order_bound),
    "step_bound": of_tokens(D.step_bound, num_steps=1),
    "score_entropy": Case(
        lambda k, x: D.score_entropy(log_score, k, x, vocabulary=3, times=jnp.full(4, 0.9)),
        (TOKENS,),
        discrete=True,
    ),
    "masked_cross_entropy": of_tokens(
        lambda predict, k, x, **o: D.masked_cross_entropy(
            predict, x, jnp.asarray([[False, True, True]] * 4), **o
        )
    ),
    "sequence_log_prob": Case(lambda k, x: A.sequence_log_prob(x), x),
    "dpo": Case(lambda k, x: A.dpo(x, p, q, r, label_smoothing=0.1), x),
    "ipo": Case(lambda k, x: A.ipo(x, p, q, r), x),
    "alignment.hinge": Case(lambda k, x: A.hinge(x, p, q, r), x),
    "simpo": Case(lambda k, x: A.simpo(x, p), x),
    "orpo": Case(lambda k, x: A.orpo(x, p), x),
    "f_dpo": Case(f_dpo, x, extremes=(0.0, 40.0, -40.0)),
    "kto": Case(lambda k, x: A.kto(x, kept, 0.1), vector),
    "policy_loss": Case(lambda k, x: A.policy_loss(x, p, q[:, 0], ref=r, beta=0.1), x),
    "value_loss": Case(lambda k, x: A.value_loss(x, p, old=q, clip=0.2), x),
    "bradley_terry": Case(lambda k, x: A.bradley_terry(x, p[:, 0]), vector),
    "plackett_luce": Case(lambda k, x: A.plackett_luce(x * tilt, ranks), x),
    "ranked_bradley_terry": Case(lambda k, x: A.ranked_bradley_terry(x * tilt, ranks), x),
}
