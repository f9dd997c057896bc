"""Alignment of a policy with rewards or preferences, as functions of token log-probabilities.

log_probs: of tokens and whole responses. rewards: reward models, the price of leaving the
reference, and the optimum that it has. advantages: of tokens and of groups. policy: clipped policy
gradients. preference: losses of a better and a worse response.
"""

from genjax.alignment.advantages import *
from genjax.alignment.log_probs import *
from genjax.alignment.policy import *
from genjax.alignment.preference import *
from genjax.alignment.rewards import *
