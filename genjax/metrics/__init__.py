"""Metrics on arrays of features: distances, fidelity, modes, likelihood, provenance."""

from genjax.metrics.distances import (
    Moments,
    feature_moments,
    frechet_distance,
    sinkhorn_distance,
    sliced_wasserstein,
)
from genjax.metrics.extractors import Extractor, feature_extractor
from genjax.metrics.fidelity import (
    DensityCoverage,
    PrecisionRecall,
    TwoSampleTest,
    classifier_two_sample,
    density_coverage,
    inception_score,
    memorisation_share,
    precision_recall,
)
from genjax.metrics.kernels import (
    KERNELS,
    KID,
    gaussian_kernel,
    kid,
    laplacian_kernel,
    mmd,
    polynomial_kernel,
    rational_quadratic_kernel,
)
from genjax.metrics.likelihood import Likelihood, bits_per_dim, test_log_likelihood
from genjax.metrics.modes import high_quality_share, modes_covered, reverse_kl_modes
from genjax.metrics.provenance import Measured, hash_of, measure

__all__ = [
    "KERNELS",
    "KID",
    "DensityCoverage",
    "Extractor",
    "Likelihood",
    "Measured",
    "Moments",
    "PrecisionRecall",
    "TwoSampleTest",
    "bits_per_dim",
    "classifier_two_sample",
    "density_coverage",
    "feature_extractor",
    "feature_moments",
    "frechet_distance",
    "gaussian_kernel",
    "hash_of",
    "high_quality_share",
    "inception_score",
    "kid",
    "laplacian_kernel",
    "measure",
    "memorisation_share",
    "mmd",
    "modes_covered",
    "polynomial_kernel",
    "precision_recall",
    "rational_quadratic_kernel",
    "reverse_kl_modes",
    "sinkhorn_distance",
    "sliced_wasserstein",
    "test_log_likelihood",
]
