"""From the sides of a workload to its rows: what every benchmark goes through."""

import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from experiments._command import mistake, read
from experiments.benchmarks._table import OURS, Row, make_rows, show
from experiments.benchmarks._timing import Side, in_turn
from genjax.checks import one_of

__all__ = ["OURS", "Options", "Row", "Side", "compare", "every", "launch"]

Checks = dict[str, dict[str, float]]  # of each side, figures by name
# How the names of the peers begin whose tensors are PyTorch's, on the CPU.
TORCH = ("torch", "diffusers", "zuko", "nflows")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every benchmark with peers; each adds its own."""

    rounds: int = 15  # how often all sides are timed in turn
    torch: bool = True  # time the peers of PyTorch too, where they are installed
    workloads: tuple[str, ...] = ()  # which of the module's to time (default: all)


def launch(main: Callable[[Any], list[Row]], config_type: type = Options) -> None:
    """Read the command line into the Config and run main, without the peers' warnings.

    A mistake, and so every ValueError, ends in one line with status 2.
    """
    warnings.filterwarnings("ignore")
    config = read(config_type, sys.modules["__main__"].__doc__)
    try:
        main(config)
    except ValueError as error:
        mistake(str(error))


def every(one: Callable[[str, Any], list[Row]], names: Iterable[str]) -> Callable[..., list[Row]]:
    """Make the main of a module whose one(name, config) times one of its workloads."""

    def main(config: Any) -> list[Row]:
        for name in config.workloads:
            one_of("workloads", name, names)
        return [row for name in config.workloads or names for row in one(name, config)]

    return main


def build(makers: Mapping[str, Callable[[], Side]], torch: bool = True) -> tuple[Any, Any]:
    """Make every side that can be made here: (sides, why the others cannot).

    Left out are peers that are not installed, and those of PyTorch where jax computes on an
    accelerator or `torch` is False.
    """
    sides, notes = {}, {}
    for name, make in makers.items():
        if name.startswith(TORCH) and not (torch and jax.default_backend() == "cpu"):
            notes[name] = "not on this device" if torch else "not asked for"
            continue
        try:
            sides[name] = make()
        except ImportError as error:
            notes[name] = f"{error.name or error} is not installed"
    for name, why in notes.items():
        print(f"# {name} skipped: {why}", flush=True)
    return sides, notes


def compare(
    name: str,
    makers: Mapping[str, Callable[[], Side]],
    options: Options,
    *,
    case: str = "",
    targets: Mapping[str, float] | float | None = None,
    checks: Callable[[dict[str, Any]], Checks] = lambda results: {},
    work: Callable[[], Mapping[str, float]] = dict,
    **timing: Any,
) -> list[Row]:
    """Make the sides, time them in turn, print a line for each and return their rows.

    checks: from what each side returned last to figures for each. work: of one unit of genjax's
    side, asked for after the timing, so that it traces nothing beforehand. timing: as in `in_turn`.
    """
    sides, notes = build(makers, options.torch)
    times = in_turn(sides, **{"rounds": options.rounds, **timing})
    found = checks({side: t.result for side, t in times.items()})
    common = {"case": case, "targets": targets, "work": work(), "notes": notes}
    return show(make_rows(name, times, checks=found, **common))
