"""Optimal transport: entropic, debiased, between samples and between Gaussians."""

from genjax.transport.barycentre import Barycentre, barycentre
from genjax.transport.costs import cosine, euclidean, squared_euclidean
from genjax.transport.divergence import (
    MinibatchEnergy,
    SinkhornDivergence,
    SinkhornLoss,
    minibatch_energy_distance,
    sinkhorn_divergence,
    sinkhorn_loss,
)
from genjax.transport.extension import barycentric_map, potential_functions
from genjax.transport.gaussian import gaussian_entropic_ot, gaussian_wasserstein
from genjax.transport.line import LineTransport, transport_1d
from genjax.transport.ott_adapter import sinkhorn_from_ott
from genjax.transport.sinkhorn import SinkhornResult, sinkhorn, sinkhorn_from_cost
from genjax.transport.unbalanced import (
    UnbalancedDivergence,
    UnbalancedResult,
    unbalanced_divergence,
    unbalanced_sinkhorn,
)

__all__ = [
    "Barycentre",
    "LineTransport",
    "MinibatchEnergy",
    "SinkhornDivergence",
    "SinkhornLoss",
    "SinkhornResult",
    "UnbalancedDivergence",
    "UnbalancedResult",
    "barycentre",
    "barycentric_map",
    "cosine",
    "euclidean",
    "gaussian_entropic_ot",
    "gaussian_wasserstein",
    "minibatch_energy_distance",
    "potential_functions",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_from_cost",
    "sinkhorn_from_ott",
    "sinkhorn_loss",
    "squared_euclidean",
    "transport_1d",
    "unbalanced_divergence",
    "unbalanced_sinkhorn",
]
