"""Every public function that computes with floats, called on arrays: what the laws run over.

A new public function needs an entry here (or a case in tests/test_laws.py), or a reason against.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from tests import laws
from tests.tables import latents, processes, sequences, spaces
from tests.tables.entry import Entry, of
from tests.test_laws import CASES, OBJECTIVES

PACKAGES = (*laws.FAMILIES, "state_space", "metrics", *laws.GROUND)
KEY = jax.random.key(3)


def of_loss(case: laws.Case) -> Entry | None:
    """A per-example loss by its data; None where they are whole numbers."""
    if case.discrete:
        return None
    return of(lambda *x: laws.first(case.call(KEY, *x)), *case.data, rows=False)


# Those that are costly to make are made when they are asked for.
OWN: dict[str, Entry | Callable[[], Entry]] = {
    **spaces.TRANSPORT,
    **spaces.METRICS,
    **sequences.STATE_SPACE,
    **sequences.TOKENS,
    **latents.GROUND,
    **latents.VARIATIONAL,
    **latents.ADVERSARIAL,
    **processes.DIFFUSION,
    **processes.FLOWS,
}
ENTRIES: dict[str, Entry | Callable[[], Entry]] = {
    **{name: entry for name, case in CASES.items() if (entry := of_loss(case))},
    **{
        name: of(case.call, *case.samples, rows=False)
        for name, case in OBJECTIVES.items()
        if name not in OWN
    },
    **OWN,
}
DISCRETE = {name: "whole numbers in" for name, case in CASES.items() if case.discrete}
EXEMPT: dict[str, str] = {
    **DISCRETE,
    **spaces.EXEMPT,
    **sequences.EXEMPT,
    **latents.EXEMPT,
    **processes.NO_DIFFUSION,
    **processes.NO_FLOWS,
}


@functools.cache
def entry_of(name: str) -> Entry:
    """An entry by its name, made in float32."""
    entry = ENTRIES[name]
    with jax.enable_x64(False):
        return entry if isinstance(entry, Entry) else entry()


def public() -> dict[str, Any]:
    """Every public function that must have an entry: not the checks, which return nothing."""
    found = laws.public_functions(tuple(p for p in PACKAGES if p != "checks"))
    return {name: f for name, f in found.items() if f.__module__.startswith("genjax.")}
