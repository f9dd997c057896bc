"""Metrics: likelihood, distances between samples, fidelity, modes."""

from genjax.metrics.likelihood import Likelihood, bits_per_dim, test_log_likelihood

__all__ = [
    "Likelihood",
    "bits_per_dim",
    "test_log_likelihood",
]
