"""Entries of transport and metrics: clouds of points."""

import jax
import jax.numpy as jnp
import numpy as np

from genjax import metrics as M
from genjax import transport as T
from tests.tables.entry import ALL, SCALES, UNIT, X, Y, normals, of

KEY = jax.random.key(0)
A, B = X[:, :2], np.concatenate([Y, Y[::-1] + 0.3])[:, :2] + 0.5
FEW = {"epsilon": 0.5, "num_iterations": 30}


def mean_cost(x, y):
    return jax.lax.stop_gradient(jnp.mean(T.squared_euclidean(x, y)))


def far(share):
    return lambda x, y: share * mean_cost(x, y) + 1e-30


def solved(function, share=0.1, **options):
    """An entropic solve whose epsilon is a share of the mean cost."""
    return lambda x, y: function(x, y, epsilon=far(share)(x, y), **options)


def covariance(x):
    return x.T @ x / 2 + 0.1 * jnp.mean(x * x) * jnp.eye(2, dtype=x.dtype)


def plans(x, y):
    return T.sinkhorn(x, y, epsilon=far(0.5)(x, y))


mean = normals(7, 2)
MEASURES = np.random.default_rng(8).uniform(0.2, 1, (2, 4))
TRANSPORT = {
    "squared_euclidean": of(T.squared_euclidean, A, B, changes=ALL),
    "euclidean": of(T.euclidean, A, B, changes=ALL),
    "cosine": of(T.cosine, A, B, changes=ALL),
    "gaussian_wasserstein": of(
        lambda m, x, n, y: T.gaussian_wasserstein(m, covariance(x), n, covariance(y)),
        mean,
        A,
        -mean,
        B,
        changes=SCALES,
        rows=False,
    ),
    "gaussian_entropic_ot": of(
        lambda m, x, n, y: T.gaussian_entropic_ot(m, covariance(x), n, covariance(y), epsilon=0.3),
        mean,
        A,
        -mean,
        B,
        changes=SCALES,
        rows=False,
    ),
    "sinkhorn": of(lambda x, y: solved(T.sinkhorn)(x, y).value, A, B, changes=ALL),
    "sinkhorn, small epsilon": of(
        lambda x, y: solved(T.sinkhorn, 1e-2)(x, y).value, A, B, changes=ALL
    ),
    "sinkhorn, smallest epsilon": of(
        lambda x, y: solved(T.sinkhorn, 1e-4)(x, y).value, A, B, order=1, changes=SCALES
    ),
    "sinkhorn, large epsilon": of(
        lambda x, y: solved(T.sinkhorn, 1e4)(x, y).value, A, B, changes=ALL
    ),
    "sinkhorn, plan": of(lambda x, y: solved(T.sinkhorn, 0.5)(x, y).plan(), A, B),
    "sinkhorn, unrolled": of(
        lambda x, y: T.sinkhorn(x, y, epsilon=0.5, num_iterations=5, gradient="unroll").value, A, B
    ),
    "sinkhorn_from_cost": of(
        lambda c: T.sinkhorn_from_cost(c**2, epsilon=0.5).value, normals(9, 4, 5), rows=False
    ),
    "sinkhorn_divergence": of(
        lambda x, y: solved(T.sinkhorn_divergence)(x, y).value, A, B, changes=ALL
    ),
    "sinkhorn_loss": of(lambda x, y: T.sinkhorn_loss(x, y, **FEW), A, B),
    "minibatch_energy_distance": of(
        lambda x, y: T.minibatch_energy_distance(x, x + 1, y, y[::-1] * 2, **FEW).value, A, B
    ),
    "unbalanced_sinkhorn": of(
        lambda x, y: solved(T.unbalanced_sinkhorn, marginal_penalty=2.0)(x, y).value, A, B
    ),
    "unbalanced_divergence": of(
        lambda x, y: solved(T.unbalanced_divergence, marginal_penalty=2.0)(x, y).value, A, B
    ),
    "potential_functions": of(
        lambda x, y: [f(x + 0.1) for f in T.potential_functions(plans(x, y), x, y)], A, B
    ),
    "barycentric_map": of(lambda x, y: T.barycentric_map(plans(x, y), y)(x + 0.1), A, B),
    "barycentre": of(
        lambda c, m: T.barycentre(c**2, m, epsilon=0.5)[0],
        normals(9, 4, 5),
        MEASURES,
        rows=False,
    ),
    "transport_1d": of(lambda x, y: T.transport_1d(x, y).value, A[:, 0], B[:, 0], changes=ALL),
}
PROBABILITIES = UNIT / UNIT.sum(1, keepdims=True)


def running(x):
    """Moments of two batches, merged."""
    empty = M.init_moments(2)
    return M.merge_moments(M.update_moments(empty, x[:3]), M.update_moments(empty, x[3:] + 1))


METRICS = {
    "bits_per_dim": of(lambda x: M.bits_per_dim(x, 3), X[:, 0], changes=ALL),
    "compute_moments": of(
        lambda x: M.compute_moments(running(x)), B, changes=ALL, rows=False, wide=True
    ),
    "merge_moments": of(running, B, changes=ALL, rows=False, wide=True),
    "update_moments": of(
        lambda x: M.update_moments(running(x), x), B, changes=ALL, rows=False, wide=True
    ),
    "feature_moments": of(M.feature_moments, B, changes=ALL, wide=True),
    "frechet_distance": of(M.frechet_distance, A, B, changes=ALL, wide=True),
    "kid": of(
        lambda x, y: M.kid(KEY, x, y, num_subsets=2, subset_size=4), A, B, changes=SCALES, wide=True
    ),
    "mmd": of(M.mmd, A, B, changes=ALL, wide=True),
    "mmd, biased": of(lambda x, y: M.mmd(x, y, unbiased=False, bandwidth=1.0), A, B, wide=True),
    "gaussian_kernel": of(lambda x, y: M.gaussian_kernel(1.0)(x, y), A, B, changes=SCALES),
    "laplacian_kernel": of(lambda x, y: M.laplacian_kernel(1.0)(x, y), A, B, changes=SCALES),
    "polynomial_kernel": of(lambda x, y: M.polynomial_kernel()(x, y), A, B, changes=SCALES),
    "rational_quadratic_kernel": of(
        lambda x, y: M.rational_quadratic_kernel(1.0)(x, y), A, B, changes=SCALES
    ),
    "sliced_wasserstein": of(
        lambda x, y: M.sliced_wasserstein(KEY, x, y, num_projections=8), A, B, changes=ALL
    ),
    "sinkhorn_distance": of(
        lambda x, y: M.sinkhorn_distance(x, y, divergence=T.sinkhorn_divergence), A, B
    ),
    "inception_score": of(M.inception_score, PROBABILITIES),
    "inception_score_splits": of(
        lambda p: M.inception_score_splits(p, num_splits=2), PROBABILITIES
    ),
    "reverse_kl_modes": of(lambda x, y: M.reverse_kl_modes(x, y), A, B, order=0),
    "modes_covered": of(lambda x, y: M.modes_covered(x, y, 0.5), A, B, order=0),
    "high_quality_share": of(lambda x, y: M.high_quality_share(x, y, 0.5), A, B, order=0),
    "precision_recall": of(lambda x, y: M.precision_recall(x, y, k=2), A, B, order=0),
    "density_coverage": of(lambda x, y: M.density_coverage(x, y, k=2), A, B, order=0),
    "memorisation_share": of(lambda x, y: M.memorisation_share(x, y, x + 0.1), A, B, order=0),
    "classifier_two_sample": of(
        lambda x, y: M.classifier_two_sample(KEY, x, y),
        np.tile(A, (3, 1)),
        np.tile(B, (2, 1)),
        order=0,
    ),
}
EXEMPT = {
    "sinkhorn_from_ott": "needs a geometry of another library",
    "init_moments": "no data",
    "merge_processes": "talks to other processes",
    "feature_extractor": "reads a file",
    "hash_of": "bytes of parameters",
    "measure": "a record of how a metric was taken",
    "test_log_likelihood": "a loop over batches on the host",
}
