"""The rows of the leaderboard: which experiment with which options, on which kind of data."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """One row. module: of the experiment. options: of its command line, those of images or those of
    the plane (None: it does not support them). trained: takes --steps and --max-seconds."""

    title: str
    module: str
    images: Mapping[str, Any] | None
    plane: Mapping[str, Any] | None
    trained: bool = True

    def options(self, plane: bool) -> Mapping[str, Any] | None:
        return self.plane if plane else self.images


PLANE_SINKHORN = {"width": 128, "batch_size": 256, "learning_rate": 3e-3}
F_GAN = {"divergence": "jensen_shannon", "batch_size": 64}

# The options are those that the experiments' own docstrings recommend, else the defaults.
FAMILIES: dict[str, Family] = {
    "ppca": Family("PPCA", "experiments.ppca", {}, None, trained=False),
    "vae": Family("VAE", "experiments.vae", {}, None),
    "f_gan": Family("f-GAN, Jensen-Shannon", "experiments.f_gan", F_GAN, F_GAN),
    "gan": Family("GAN", "experiments.gan", {}, {}),
    "wgan_gp": Family("WGAN, gradient penalty", "experiments.wgan", {}, {}),
    "sinkhorn_fixed": Family(
        "Sinkhorn, fixed cost",
        "experiments.sinkhorn_gan",
        {"variant": "fixed"},
        {"variant": "fixed", **PLANE_SINKHORN},
    ),
    "sinkhorn_learned": Family(
        "Sinkhorn, learned cost",
        "experiments.sinkhorn_gan",
        {"variant": "learned"},
        {"variant": "learned", **PLANE_SINKHORN},
    ),
    "otgan": Family(
        "OT-GAN",
        "experiments.sinkhorn_gan",
        {"variant": "otgan", "generator_updates": 3},
        {"variant": "otgan", "generator_updates": 3, **PLANE_SINKHORN},
    ),
    "planar": Family("Flow, planar", "experiments.flow", None, {"model": "planar"}),
    "realnvp": Family(
        "Flow, RealNVP", "experiments.flow", {"model": "realnvp"}, {"model": "realnvp"}
    ),
    "spline": Family("Flow, spline", "experiments.flow", {"model": "spline"}, {"model": "spline"}),
    "glow": Family("Flow, Glow", "experiments.flow", {"model": "glow"}, None),
    "tarflow": Family("Flow, TarFlow", "experiments.flow", {"model": "tarflow"}, None),
    "flow_matching": Family(
        "Flow matching",
        "experiments.flow_matching",
        {"methods": ("flow",), "width": 256, "dropout": 0.1},
        {"methods": ("flow",)},
    ),
    "continuous_flow": Family(
        "Continuous flow",
        "experiments.continuous_flow",
        # Eight solver steps, as by default; with four and a rate of 3e-3 it ended at 5.5 bits/dim.
        {
            "trace": "hutchinson",
            "width": 128,
            "batch_size": 128,
            "learning_rate": 1e-3,
            "steps_per_call": 5,
        },
        {"steps_per_call": 5},
    ),
    "diffusion": Family(
        "Diffusion, with labels", "experiments.diffusion", {}, {"width": 128, "num_samples": 10_000}
    ),
}
