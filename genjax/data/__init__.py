"""Data: images by name, 2-D densities, batches as a function of (seed, step), scaling."""

from genjax.data.loading import DataSpec, load
from genjax.data.pipeline import Records, batch_at, check_arrays, num_examples, stream
from genjax.data.scaling import Scaling
from genjax.data.synthetic import DENSITIES, Checkerboard, Density, GaussianMixture, Pinwheel

__all__ = [
    "DENSITIES",
    "Checkerboard",
    "DataSpec",
    "Density",
    "GaussianMixture",
    "Pinwheel",
    "Records",
    "Scaling",
    "batch_at",
    "check_arrays",
    "load",
    "num_examples",
    "stream",
]
