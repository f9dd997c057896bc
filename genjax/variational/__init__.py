"""Variational inference: bounds, Gaussians, priors, discrete codes, hierarchies, exact PPCA."""

from genjax.likelihoods import *
from genjax.variational.aggregated import *
from genjax.variational.discrete import *
from genjax.variational.elbo import *
from genjax.variational.gaussian import *
from genjax.variational.hierarchical import *
from genjax.variational.ppca import *
from genjax.variational.priors import *
from genjax.variational.quantize import *
from genjax.variational.scalar_codes import *
