"""Entries of state spaces, tokens, responses and pixels."""

import jax
import jax.numpy as jnp
import numpy as np

from genjax import alignment as A
from genjax import autoregressive as R
from genjax import state_space as S
from tests.tables.entry import X, Y, normals, of

KEY = jax.random.key(0)
U = normals(1, 2, 5, 3)  # [batch, length, channels]
DT = 0.1 + np.abs(normals(2, 2, 5, 3))
EIGEN = (-0.5 + 1j * np.arange(1, 3)).astype(np.complex64)
P, STATES = np.ones(2, np.complex64), np.ones((2, 3, 2), np.complex64)
ONES = np.ones((2, 3, 4), np.float32)
SELECT = (-np.exp(normals(3, 3, 4)), normals(4, 2, 5, 4), normals(5, 2, 5, 4))
HEADS = (normals(6, 2, 5, 2, 3), 0.1 + np.abs(normals(7, 2, 5, 2)))
GROUPS = (normals(8, 2, 5, 1, 4), normals(9, 2, 5, 1, 4))


def decays(u):
    return -1 - jnp.abs(u[0, 0, :2])


def adapted(params):
    """Losses of windows by an adapted law of tokens."""
    windows, where = jnp.arange(6).reshape(2, 3) % 3, jnp.ones((2, 3), bool)
    logits = lambda p, x: jnp.broadcast_to(p[:3], (*x.shape, 3))  # noqa: E731
    return R.dynamic_evaluation(logits, params, windows, where, rate=0.1)[0]


STATE_SPACE = {
    "bilinear": of(lambda dt: S.bilinear(EIGEN, P, dt), np.float32(0.1), rows=False),
    "zoh": of(lambda dt: S.zoh(EIGEN, P, dt), np.float32(0.1), rows=False),
    "causal_convolution": of(S.causal_convolution, U, normals(2, 3, 2), rows=False),
    "conv_step": of(S.conv_step, U[:, :2], U[:, 2], normals(3, 3, 3), rows=False),
    "short_convolution": of(S.short_convolution, U, normals(3, 3, 3), rows=False),
    "dplr_convolution": of(lambda u: S.dplr_convolution(u, EIGEN, P, P, P, 0.1), U, rows=False),
    "dplr_kernel": of(lambda dt: S.dplr_kernel(EIGEN, P, P, P, dt, 5), np.float32(0.1), rows=False),
    "dplr_step": of(
        lambda u: S.dplr_step(STATES[:, 0], u[:, 0], EIGEN, P, P, P, 0.1), U[:, 0], rows=False
    ),
    "s4d_convolution": of(lambda u: S.s4d_convolution(u, EIGEN, P, P, 0.1), U, rows=False),
    "s4d_kernel": of(lambda dt: S.s4d_kernel(EIGEN, P, P, dt, 5), np.float32(0.1), rows=False),
    "s4d_step": of(
        lambda u: S.s4d_step(STATES[:, 0], u[:, 0], EIGEN, P, P, 0.1), U[:, 0], rows=False
    ),
    "linear_scan": of(lambda a, b: S.linear_scan(jnp.tanh(a), b), U, U, rows=False),
    "recur": of(lambda x: S.recur(lambda h, u: (h * 0.5 + u, h), x[:, 0], x), U, rows=False),
    "selective_scan": of(
        lambda u, dt: S.selective_scan(u, dt, *SELECT, chunk=2), U, DT, rows=False
    ),
    "selective_step": of(
        lambda u, dt: S.selective_step(ONES, u, dt, SELECT[0], *(z[:, 0] for z in SELECT[1:])),
        U[:, 0],
        DT[:, 0],
        rows=False,
    ),
    "ssd": of(
        lambda x, dt: S.ssd(x, dt, -np.ones(2, np.float32), *GROUPS, chunk=2), *HEADS, rows=False
    ),
    "ssd_step": of(
        lambda x, dt: S.ssd_step(
            np.stack([ONES] * 2, 1), x, dt, -np.ones(2, np.float32), *(z[:, 0] for z in GROUPS)
        ),
        HEADS[0][:, 0],
        HEADS[1][:, 0],
        rows=False,
    ),
}
TABLE = normals(1, 5, 5)
LOG_P, LOG_Q = -np.abs(X), -np.abs(Y)
DONE = np.zeros((4, 3), bool)
MASKED = np.zeros((4, 3), bool)
PROMPT = np.ones((4, 2), np.int32)


def markov(scale):
    return lambda cache, token, position: (scale * jnp.asarray(TABLE)[token], cache)


def drawn(scale):
    step = R.recomputing_step(lambda tokens: scale * jnp.asarray(TABLE)[tokens])
    return R.generate(step, jnp.zeros((4, 4), jnp.int32), KEY, PROMPT, num_tokens=2).log_probs


def painted(scale):
    params = lambda x: scale * jnp.ones((*x.shape[:3], 6))  # noqa: E731
    return R.sample_pixels(
        R.recomputing_pixel_step(params), jnp.zeros((2, 2, 2, 1), jnp.int32), KEY, (2, 2, 2, 1),
        draw=lambda k, p: R.draw_colours(k, p, colours=1, levels=4),
    )  # fmt: skip


ONE = np.float32(0.5)
TOKENS = {
    "gae": of(
        lambda r, v: A.gae(r, v, DONE), X, Y, masked=lambda r, v: A.gae(r, v, DONE, where=MASKED)
    ),
    "group_advantages": of(A.group_advantages, X),
    "leave_one_out": of(A.leave_one_out, X),
    "whiten": of(A.whiten, X, masked=lambda x: A.whiten(x, where=MASKED)),
    "kl_estimate": of(A.kl_estimate, LOG_P, LOG_Q),
    "kl_rewards": of(
        lambda p, q: A.kl_rewards(p, q, p[:, 0], beta=0.1),
        LOG_P,
        LOG_Q,
        order=0,
        masked=lambda p, q: A.kl_rewards(p, q, p[:, 0], beta=0.1, where=MASKED),
    ),
    "optimal_policy": of(lambda p, r: A.optimal_policy(-(p**2), r, beta=0.3), X[:, 0], Y[:, 0]),
    "token_entropy": of(A.token_entropy, normals(3, 4, 3, 5)),
    "adapt_beta": of(lambda b: A.adapt_beta(b, 2 * b, target=0.1), ONE, rows=False, order=0),
    "kto_reference_point": of(
        A.kto_reference_point,
        X[:, 0],
        masked=lambda x: A.kto_reference_point(x, where=MASKED[:, 0]),
    ),
    "dynamic_evaluation": of(adapted, X[0], rows=False),
    "bits_per_byte": of(lambda x: R.bits_per_byte(x, 7), X[:, 0]),
    "select": of(lambda z: R.select(z, temperature=0.7, top_k=3, top_p=0.9, min_p=0.01), X),
    "generate": of(drawn, ONE, order=0, rows=False),
    "recomputing_step": of(drawn, ONE, order=0, rows=False),
    "beam_search": of(
        lambda s: R.beam_search(markov(s), jnp.zeros(4), PROMPT, num_tokens=2, width=2),
        ONE,
        order=0,
        rows=False,
    ),
    "sample_pixels": of(painted, ONE, order=0, rows=False),
    "recomputing_pixel_step": of(painted, ONE, order=0, rows=False),
    "draw_colours": of(
        lambda p: R.draw_colours(KEY, p, colours=1, levels=4), normals(3, 6), order=0, rows=False
    ),
}
EXEMPT = {
    "dplr": "constants of a start",
    "hippo_legs": "constants of a start",
    "s4d_inv": "constants of a start",
    "s4d_lin": "constants of a start",
    "s4d_real": "constants of a start",
    "num_colour_params": "of two integers",
    "pixel_mask": "a mask made by numpy",
}
