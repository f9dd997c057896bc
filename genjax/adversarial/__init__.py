"""Adversarial objectives as pure functions: f-divergence bounds, Wasserstein duals, penalties."""

from genjax.adversarial.objectives import (
    AdversarialLosses as AdversarialLosses,  # critic, generator, bound
)
from genjax.adversarial.objectives import (
    DonskerVaradhan as DonskerVaradhan,  # the same with the running log average
)
from genjax.adversarial.objectives import (
    donsker_varadhan as donsker_varadhan,  # KL bound, MINE's gradient by option
)
from genjax.adversarial.objectives import f_gan as f_gan  # any f-divergence by name
from genjax.adversarial.objectives import gan as gan  # binary cross-entropy, softplus form
from genjax.adversarial.objectives import hinge as hinge  # a bound on total variation
from genjax.adversarial.objectives import least_squares as least_squares  # LSGAN
from genjax.adversarial.objectives import nwj as nwj  # KL bound with an unbiased gradient
from genjax.adversarial.objectives import wasserstein as wasserstein  # Kantorovich-Rubinstein
from genjax.adversarial.penalties import clip_weights as clip_weights  # WGAN
from genjax.adversarial.penalties import gradient_penalty as gradient_penalty  # WGAN-GP, WGAN-LP
from genjax.adversarial.penalties import r1_penalty as r1_penalty  # |grad|^2 at real examples
from genjax.adversarial.penalties import r2_penalty as r2_penalty  # |grad|^2 at generated ones
from genjax.divergences import (
    F_DIVERGENCES as F_DIVERGENCES,  # name -> generator, conjugate, domain, activation, optimum
)
from genjax.divergences import (
    FDivergence as FDivergence,  # one entry of the table
)
from genjax.divergences import (
    f_divergence as f_divergence,  # D_f(P || Q) from samples, where both densities are known
)
