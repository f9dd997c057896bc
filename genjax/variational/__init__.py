"""Variational inference: bounds on the log-likelihood, Gaussians, likelihoods, exact PPCA."""

from genjax.likelihoods import (
    bernoulli_log_likelihood,
    categorical_log_likelihood,
    gaussian_log_likelihood,
    gaussian_log_prob,
    logistic_log_likelihood,
    logistic_mixture_log_likelihood,
    standard_normal_log_prob,
)
from genjax.variational.elbo import elbo, iwae
from genjax.variational.gaussian import gaussian_kl, gaussian_kl_between, gaussian_sample
from genjax.variational.ppca import PPCA, ppca_fit, ppca_log_likelihood, ppca_posterior

__all__ = [
    "PPCA",
    "bernoulli_log_likelihood",
    "categorical_log_likelihood",
    "elbo",
    "gaussian_kl",
    "gaussian_kl_between",
    "gaussian_log_likelihood",
    "gaussian_log_prob",
    "gaussian_sample",
    "iwae",
    "logistic_log_likelihood",
    "logistic_mixture_log_likelihood",
    "ppca_fit",
    "ppca_log_likelihood",
    "ppca_posterior",
    "standard_normal_log_prob",
]
