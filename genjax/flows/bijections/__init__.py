"""Bijections: pairs of pure functions with the log-determinant of their Jacobian.

base: what a bijection is; chain, repeat, invert; permutation, rescale, logit.
residual: planar and radial. spline: affine and rational-quadratic transformers.
couplings: elementwise, coupling, masked coupling, masked autoregressive.
image: actnorm, 1x1 by PLU, squeeze, split, multi-scale.
"""

from genjax.flows.bijections.base import (
    Bijection,
    bounded,
    chain,
    invert,
    logit,
    permutation,
    repeat,
    rescale,
)
from genjax.flows.bijections.couplings import (
    ConditionerFn,
    alternating_couplings,
    coupling,
    elementwise,
    masked_autoregressive,
    masked_coupling,
)
from genjax.flows.bijections.image import (
    actnorm,
    actnorm_init,
    multi_scale,
    plu,
    plu_init,
    random_rotation,
    split,
    squeeze,
)
from genjax.flows.bijections.residual import planar, planar_init, radial, radial_init
from genjax.flows.bijections.spline import Transformer, affine, rational_quadratic, standardise

__all__ = [
    "Bijection",
    "ConditionerFn",
    "Transformer",
    "actnorm",
    "actnorm_init",
    "affine",
    "alternating_couplings",
    "bounded",
    "chain",
    "coupling",
    "elementwise",
    "invert",
    "logit",
    "masked_autoregressive",
    "masked_coupling",
    "multi_scale",
    "permutation",
    "planar",
    "planar_init",
    "plu",
    "plu_init",
    "radial",
    "radial_init",
    "random_rotation",
    "rational_quadratic",
    "repeat",
    "rescale",
    "split",
    "squeeze",
    "standardise",
]
