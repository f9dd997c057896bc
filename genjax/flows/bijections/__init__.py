"""Bijections: pairs of pure functions with the log-determinant of their Jacobian.

base: what a bijection is; chain, repeat, invert; permutation, rescale, logit.
residual: planar and radial. spline: affine and rational-quadratic transformers.
couplings: elementwise, coupling, masked coupling, masked autoregressive.
image: actnorm, 1x1 by PLU, squeeze, split, multi-scale.
"""

from genjax.flows.bijections.base import *
from genjax.flows.bijections.base import bounded as bounded
from genjax.flows.bijections.couplings import *
from genjax.flows.bijections.image import *
from genjax.flows.bijections.residual import *
from genjax.flows.bijections.spline import *
