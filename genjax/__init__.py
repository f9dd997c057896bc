"""genjax: the mathematics of deep generative models as pure JAX functions.

`import genjax` loads nothing; `genjax.transport`, or any other room, is imported when it is named.
"""

import importlib
import pkgutil
from typing import Any

__version__ = "0.2.0"


def _rooms() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def __getattr__(name: str) -> Any:
    if name in _rooms():
        return importlib.import_module(f"genjax.{name}")
    raise AttributeError(f"module 'genjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_rooms()})
