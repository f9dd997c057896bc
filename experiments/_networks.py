"""Networks of (x_t, t, label) that several experiments choose by name, with their options."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from experiments._config import TrainConfig
from experiments._data import Data
from genjax import checks
from genjax.networks import DiT, TimeMLP, UNet


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig(TrainConfig):
    """Options of the networks of a time."""

    network: Literal["mlp", "dit"] = "mlp"
    """Residual MLP on the flattened event, or a transformer over patches (images only)."""
    width: int = 256
    """Hidden units, or the width of a token."""
    depth: int = 3
    """Residual layers, or blocks of the transformer."""
    heads: int = 4
    """Attention heads (dit)."""
    patch: int = 2
    """Side of a patch (dit)."""
    dropout: float = 0.0
    """Share of hidden units dropped in training."""


def make_network(
    config: Any,
    shape: tuple[int, ...],
    classes: int | None,
    *,
    norm: Literal["none", "layer"] = "none",
    channels: Sequence[int] = (),
    attention: Sequence[int] = (),
) -> TimeMLP | DiT | UNet:
    """The network that the config names for x [batch, *shape]; only the MLP takes any shape.

    norm: of the MLP. channels, attention: of the U-Net; by default `channels_of` the height.
    """
    checks.one_of("network", config.network, ("mlp", "dit", "unet"))
    if config.network == "mlp":
        return TimeMLP(config.width, config.depth, norm, classes, dropout=config.dropout)
    if len(shape) != 3:
        raise ValueError(f"network {config.network} needs images or grids, got shape {shape}")
    options = {"dropout": config.dropout, "remat": config.remat}
    if config.network == "dit":
        sizes = (config.patch, config.width, config.depth, config.heads, classes)
        return DiT(*sizes, **options)
    channels = tuple(channels) or channels_of(shape[0])
    return UNet(channels, attention=tuple(attention), classes=classes, **options)


def network_of(config: Any, data: Data, **options: Any) -> Any:
    """The network that the config names for examples of the data, with labels where the config is
    `conditional`; options as `make_network` has them."""
    if config.conditional and not data.spec.classes:
        raise ValueError(f"conditional needs a data set with classes, got {data.spec.name!r}")
    if config.network != "mlp":
        data.require("images")
    classes = data.spec.classes if config.conditional else None
    return make_network(config, data.spec.shape, classes, **options)


def channels_of(side: int) -> tuple[int, ...]:
    """The U-Net's channels for images of that side: 32, then 64 for each halving, at least one
    where it can be halved, down to at most 8 pixels."""
    channels = [32]
    while side % 2 == 0 and (side > 8 or len(channels) == 1):
        channels, side = [*channels, 64], side // 2
    return tuple(channels)
