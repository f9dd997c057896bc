"""Networks: Flax linen modules, every size a field; the only room that imports flax."""

from genjax.networks.conv import ConvDecoder, ConvEncoder
from genjax.networks.coupling import (
    ConvConditioner,
    CouplingFlow,
    Glow,
    MLPConditioner,
    PlanarFlow,
    RealNVP,
    SplineFlow,
)
from genjax.networks.dcgan import DCGANCritic, DCGANGenerator
from genjax.networks.features import FeatureNetwork
from genjax.networks.hourglass import Hourglass
from genjax.networks.layers import fourier_features
from genjax.networks.lipschitz import (
    LipschitzMLP,
    OrthonormalDense,
    bjorck,
    group_sort,
    init_power,
    max_min,
    power_iteration,
    spectral_normalise,
)
from genjax.networks.mlp import MLP, ResidualMLP, TimeMLP
from genjax.networks.tarflow import TarFlow
from genjax.networks.transformer import Block
from genjax.networks.unet import UNet

__all__ = [
    "MLP",
    "Block",
    "ConvConditioner",
    "ConvDecoder",
    "ConvEncoder",
    "CouplingFlow",
    "DCGANCritic",
    "DCGANGenerator",
    "FeatureNetwork",
    "Glow",
    "Hourglass",
    "LipschitzMLP",
    "MLPConditioner",
    "OrthonormalDense",
    "PlanarFlow",
    "RealNVP",
    "ResidualMLP",
    "SplineFlow",
    "TarFlow",
    "TimeMLP",
    "UNet",
    "bjorck",
    "fourier_features",
    "group_sort",
    "init_power",
    "max_min",
    "power_iteration",
    "spectral_normalise",
]
