"""Normalizing flows and flow matching: bijections with laws, exact likelihood, straight paths.

bijections: pairs of pure functions with their log-determinant. density: log_prob and sample over
a base. continuous: dx/dt = v(x, t) as a bijection. matching: pairs, regression, reflow.
mean_flow: one step, or a few.
"""

from genjax.flows import bijections as bijections
from genjax.flows.bijections.base import *
from genjax.flows.bijections.couplings import *
from genjax.flows.bijections.image import *
from genjax.flows.bijections.residual import *
from genjax.flows.bijections.spline import *
from genjax.flows.bridges import *
from genjax.flows.continuous import *
from genjax.flows.density import *
from genjax.flows.matching import *
from genjax.flows.mean_flow import *
from genjax.ode import divergence as divergence
from genjax.randomness import rademacher as rademacher
