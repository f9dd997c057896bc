"""State space models: x' = A x + B u, y = C x + D u as recurrence, as convolution and as scan.

hippo: the matrices a layer begins with. kernels: discretisation, convolution kernels, causal
convolutions. scans: models whose coefficients change with time. steps: one position of each model.
"""

from genjax.state_space.discretisation import bilinear as bilinear
from genjax.state_space.discretisation import zoh as zoh
from genjax.state_space.hippo import *
from genjax.state_space.kernels import *
from genjax.state_space.scans import *
from genjax.state_space.steps import *
