"""Networks: Flax linen modules, every size a field; the only room that imports flax."""

from genjax.networks.conv import ConvDecoder, ConvEncoder
from genjax.networks.mlp import MLP, ResidualMLP

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "ResidualMLP",
]
