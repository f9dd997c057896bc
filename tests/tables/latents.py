"""Entries of the ground floor, of latent variables and of adversarial training."""

import jax
import jax.numpy as jnp
import numpy as np

from genjax import adversarial as A
from genjax import likelihoods, numerics, ode, randomness
from genjax import variational as V
from tests.tables.entry import ALL, SCALES, W, X, Y, normals, of

KEY = jax.random.key(0)
CODES = normals(3, 5, 3)
INDEX = np.array([0, 1, 1, 4])
POSITIVE = np.abs(X) + 0.1
LEVELS = [
    V.Level(None, lambda h, q: q, lambda h, z: z),
    V.Level(lambda h: (h @ W, 0.1 * h), lambda h, q: q, lambda h, z: h + z),
]
IMAGES = normals(4, 2, 4, 4, 1)
TOKENS = np.array([[0, 1, 2], [3, 4, 0]])


def codebook(x):
    return V.codebook_state(x)


def field(x):
    return jnp.tanh(x @ W)


GROUND = {
    "at_least_float32": of(numerics.at_least_float32, X, changes=ALL),
    "centred": of(numerics.centred, X, Y, changes=ALL),
    "event_norm": of(numerics.event_norm, X, changes=ALL),
    "exp_excess": of(numerics.exp_excess, X, changes=ALL[:2]),
    "expand_to": of(lambda x: numerics.expand_to(x, jnp.ones((4, 2, 2))), X[:, 0], rows=False),
    "linearize": of(lambda x: numerics.linearize(field, x)[1](x), X),
    "log_mean_exp": of(numerics.log_mean_exp, X, changes=ALL),
    "masked_mean": of(
        numerics.masked_mean,
        X,
        changes=ALL,
        masked=lambda x: numerics.masked_mean(x, jnp.zeros(x.shape, bool)),
    ),
    "safe_norm": of(numerics.safe_norm, X, changes=ALL),
    "safe_sqrt": of(lambda x: numerics.safe_sqrt(x * x), X, changes=ALL),
    "squared_distances": of(numerics.squared_distances, X, Y, changes=ALL),
    "squared_distances, many axes": of(
        numerics.squared_distances, normals(1, 4, 12), normals(2, 5, 12), changes=ALL
    ),
    "sum_event": of(numerics.sum_event, X, changes=ALL),
    "divergence": of(lambda x: ode.divergence(field, x), X),
    "divergence, probe": of(lambda x: ode.divergence(field, x, jnp.ones_like(x)), X),
    "ode.solve": of(
        lambda x: ode.solve(lambda a, x, t: field(x), None, x, (0.0, 1.0), num_steps=2), X
    ),
    "ode.solve, adaptive": of(
        lambda x: ode.solve(lambda a, x, t: field(x), None, x, (0.0, 1.0), method="dopri5"),
        X,
        order=1,
        rows=False,
    ),
    "ode.solve, adjoint": of(
        lambda x: ode.solve(
            lambda a, x, t: field(x), None, x, (0.0, 1.0), num_steps=2, gradient="adjoint"
        ),
        X,
        order=1,
    ),
    "indexed_normal": of(
        lambda s: s * randomness.indexed_normal(KEY, (4, 3)), X, rows=False, wide=True
    ),
    "indexed_rademacher": of(
        lambda s: s * randomness.indexed_rademacher(KEY, (4, 3)), X, rows=False, wide=True
    ),
    "rademacher": of(lambda x: randomness.rademacher(KEY, x), X, order=0),
    "low_discrepancy": of(
        lambda x: x * randomness.low_discrepancy(KEY, 4), X[:, 0], rows=False, wide=True
    ),
    "log_bins": of(
        lambda m, s: likelihoods.log_bins(np.ones((4, 3), int), m, s, levels=4), X, Y, rows=False
    ),
    "token_log_probs": of(
        lambda z: likelihoods.token_log_probs(z, TOKENS), normals(5, 2, 3, 5), rows=False
    ),
}
VARIATIONAL = {
    "active_units": of(V.active_units, X, order=0),
    "code_totals": of(lambda z: V.code_totals(z, INDEX, 5), X, rows=False),
    "codebook_state": of(codebook, CODES),
    "ema_absorb": of(
        lambda c, z: V.ema_absorb(codebook(c), *V.code_totals(z, INDEX, 5)), CODES, X, rows=False
    ),
    "ema_update": of(lambda c, z: V.ema_update(codebook(c), z, INDEX), CODES, X, rows=False),
    "reset_dead_codes": of(
        lambda c, z: V.reset_dead_codes(KEY, codebook(c), z, threshold=2.0),
        CODES,
        X,
        order=0,
        rows=False,
    ),
    "finite_scalar_quantise": of(lambda z: V.finite_scalar_quantise(z, (3, 4, 5)).values, X),
    "free_nats_kl": of(lambda k: V.free_nats_kl(k, 0.5), POSITIVE),
    "kl_balance": of(lambda k: V.kl_balance(k, (2, 3, 4)), POSITIVE),
    "kl_decomposition": of(V.kl_decomposition, X, Y, 0.1 * X),
    "gaussian_sample": of(lambda m, s: V.gaussian_sample(KEY, m, s), X, Y),
    "gumbel_softmax": of(lambda z: V.gumbel_softmax(KEY, z, temperature=0.5), X),
    "hierarchical_latents": of(
        lambda x: V.hierarchical_latents(lambda x: [(x, 0.1 * x)] * 2, LEVELS, KEY, x), X
    ),
    "hierarchical_sample": of(
        lambda t: V.hierarchical_sample(KEY, LEVELS, (4, 3), temperature=t),
        np.float32(0.7),
        rows=False,
        wide=True,
    ),
    "kmeans": of(lambda z: V.kmeans(KEY, z, 2, num_iterations=2), X, order=0),
    "lookup_free_quantise": of(V.lookup_free_quantise, X),
    "mixture_sample": of(lambda m, s: V.mixture_sample(KEY, m, s, 4), X, Y, rows=False),
    "ppca_fit": of(lambda x: V.ppca_fit(x, 1).noise_variance, normals(6, 9, 3), changes=SCALES),
    "ppca_posterior": of(
        lambda m, y: V.ppca_posterior(V.PPCA(m, W[:, :1], jnp.float32(0.5)), y),
        X[0],
        Y,
        rows=False,
    ),
    "residual_quantise": of(lambda z, c: V.residual_quantise(z, [c, 0.3 * c]), X, CODES),
    "vector_quantise": of(V.vector_quantise, X, CODES),
    "vector_quantise, cosine": of(lambda z, c: V.vector_quantise(z, c, cosine=True), X, CODES),
}
SCORES = (X[:, 0], Y[:, 0])
ADVERSARIAL = {
    "ada_update": of(
        lambda p, s: A.ada_update(p, s, images=64), np.float32(0.5), X[:, 0], order=0, rows=False
    ),
    "augment": of(lambda x: A.augment(KEY, x, p=0.8), IMAGES),
    "clip_weights": of(lambda w: A.clip_weights({"w": w}, 0.5), W, rows=False),
    "every_nth": of(lambda x: A.every_nth(4, 2, lambda: x), X),
    "mean_style": of(lambda m, w: A.mean_style(m, w), X[0], Y, order=0, rows=False),
    "mix_styles": of(lambda x, y: A.mix_styles(KEY, x, y, layers=3), X, Y),
    "truncate": of(lambda w, m: A.truncate(w, m, 0.7), X, Y[0], rows=False),
    "path_length_penalty": of(
        lambda w: A.path_length_penalty(
            lambda w: jnp.tanh(w @ W)[:, :, None, None] * jnp.ones((1, 1, 2, 1)),
            w,
            normals(8, 4, 3, 2, 1),
            mean=0.1,
        ),
        X,
    ),
    "f_divergence": of(
        lambda x: A.f_divergence(
            "kl", lambda x: -0.5 * jnp.sum((x - 0.1) ** 2, 1), lambda x: -0.5 * jnp.sum(x**2, 1), x
        ),
        X,
    ),
}
EXEMPT = {
    "has_forward_mode": "a question about a function",
    "hoisted": "a function and what it closes over",
    "check_solver": "a check",
    "indexed_keys": "keys",
    "finite_scalar_codes": "of indices",
    "lookup_free_codes": "of indices",
    "perplexity": "of indices",
}
