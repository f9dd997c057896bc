"""f-GAN: any f-divergence by name, trained through its variational bound.

    max over critics V, min over the model Q:   E_P g(V) - E_Q f*(g(V)) <= D_f(P || Q)

    python -m experiments.f_gan
    python -m experiments.f_gan --divergence squared_hellinger --dataset 25gaussians

Nowozin, Cseke, Tomioka 2016 (arXiv:1606.00709). experiments.f_gan_study is the paper's univariate
study, where the best fit of each divergence is known.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

from experiments import _run
from experiments._data import Data, load_data
from experiments._system import Row, System, train
from experiments.gan import AdversarialConfig, networks, saddle
from genjax import checks
from genjax.adversarial import F_DIVERGENCES, f_gan

ROWS = (Row("f_gan", "f-GAN, Jensen-Shannon", images={}, plane={}),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(AdversarialConfig):
    """Train under an f-divergence."""

    divergence: Literal[tuple(F_DIVERGENCES)] = "jensen_shannon"  # type: ignore[valid-type]
    """The f-divergence."""
    saturating: bool = False
    """The generator minimises the bound itself."""


def main(config: Config) -> dict[str, Any]:
    """Train, sample, evaluate; returns the summary."""
    data = load_data(config)
    return train(config, build(config, data), data)


def build(config: Config, data: Data) -> System:
    """The two players under the divergence."""
    checks.one_of("divergence", config.divergence, F_DIVERGENCES)
    objective = partial(f_gan, config.divergence, saturating=config.saturating)
    return saddle(config, data, networks(config, data), objective)


if __name__ == "__main__":
    _run.launch(main, Config)
