"""genjax: the mathematics of deep generative models as pure JAX functions.

`import genjax` loads nothing; `genjax.transport`, or any other room, is imported when it is named.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker reads, which runs no `__getattr__`
    # isort: off
    from genjax import (
        adversarial as adversarial, alignment as alignment, autoregressive as autoregressive,
        checks as checks, data as data, diffusion as diffusion, divergences as divergences,
        flows as flows, likelihoods as likelihoods, metrics as metrics, networks as networks,
        numerics as numerics, ode as ode, randomness as randomness, sharding as sharding,
        state_space as state_space, training as training, transport as transport,
        typing as typing, variational as variational,
    )  # fmt: skip
    # isort: on

__version__ = "0.2.0"


def _rooms() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def __getattr__(name: str) -> Any:
    if name in _rooms():
        return importlib.import_module(f"genjax.{name}")
    raise AttributeError(f"module 'genjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_rooms()})
