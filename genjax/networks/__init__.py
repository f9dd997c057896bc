"""Networks: Flax linen modules, every size a field; the only room that imports flax."""

from genjax import checks

with checks.extra("networks", "genjax.networks"):
    import flax.linen as _  # noqa: F401

from genjax.networks.autoencoder import *
from genjax.networks.conv import *
from genjax.networks.coupling import *
from genjax.networks.dcgan import *
from genjax.networks.dit import *
from genjax.networks.features import *
from genjax.networks.gpt import *
from genjax.networks.hierarchy import *
from genjax.networks.hourglass import *
from genjax.networks.latents import *
from genjax.networks.layers import fourier_features as fourier_features
from genjax.networks.lipschitz import *
from genjax.networks.mlp import *
from genjax.networks.pixelcnn import *
from genjax.networks.pixelcnn_plus import *
from genjax.networks.precision import *
from genjax.networks.r3gan import *
from genjax.networks.state_space import *
from genjax.networks.stylegan import *
from genjax.networks.tarflow import *
from genjax.networks.transformer import *
from genjax.networks.unet import *
