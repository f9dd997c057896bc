"""Networks: Flax linen modules, every size a field; the only room that imports flax."""

from genjax.networks.conv import ConvDecoder, ConvEncoder
from genjax.networks.dcgan import DCGANCritic, DCGANGenerator
from genjax.networks.denoiser import MLPDenoiser, fourier_features
from genjax.networks.hourglass import Hourglass
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
from genjax.networks.mlp import MLP, ResidualMLP
from genjax.networks.unet import UNet

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "DCGANCritic",
    "DCGANGenerator",
    "Hourglass",
    "LipschitzMLP",
    "MLPDenoiser",
    "OrthonormalDense",
    "ResidualMLP",
    "UNet",
    "bjorck",
    "fourier_features",
    "group_sort",
    "init_power",
    "max_min",
    "power_iteration",
    "spectral_normalise",
]
