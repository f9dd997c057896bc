"""Adversarial objectives as pure functions: f-divergence bounds, Wasserstein duals, penalties.

divergences (ground floor): the table of f-divergences. objectives: what critic and generator
minimise, and the bound between them. penalties: on the critic's gradient and weights.
"""

from genjax.adversarial.augment import *
from genjax.adversarial.objectives import *
from genjax.adversarial.penalties import *
from genjax.adversarial.relativistic import *
from genjax.adversarial.style import *
from genjax.divergences import *
