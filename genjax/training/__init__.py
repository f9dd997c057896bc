"""Training: one immutable state, one compiled step, and what surrounds them."""

from genjax.training.checkpoint import *
from genjax.training.export import *
from genjax.training.loop import *
from genjax.training.parallel import *
from genjax.training.saddle import *
from genjax.training.skipping import *
from genjax.training.state import *
from genjax.training.step import *
