"""Variational inference: bounds on the log-likelihood, Gaussians, likelihoods, exact PPCA."""

from genjax.likelihoods import *
from genjax.variational.elbo import *
from genjax.variational.gaussian import *
from genjax.variational.ppca import *
