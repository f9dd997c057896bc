"""Timing of several sides in turn, A B B A, in one process; every benchmark uses it."""

import contextlib
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Side = Callable[[], Any]  # does its work and waits for it


class Times(NamedTuple):
    """Milliseconds of one side."""

    rounds: list[float]  # of one unit of work in each round
    first: float  # of the first call, which compiles
    peak_mb: float | None  # memory that it needed beyond what was there before (Linux; else None)
    result: Any = None  # what the last call returned

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        several = self.rounds if len(self.rounds) > 1 else 2 * self.rounds
        low, _, high = statistics.quantiles(several, n=4, method="inclusive")
        return low, high


def in_turn(
    sides: Mapping[str, Side],
    *,
    rounds: int,
    calls: int = 1,
    units: int = 1,
    warm: int = 1,
    pause: float = 0.01,
    seconds: float = float("inf"),
) -> dict[str, Times]:
    """Time every side in every round; every other round takes the sides in reverse order.

    A timing is of `calls` calls with `units` units of work in each; its milliseconds are of one
    unit. `warm`: untimed calls after the first. `pause`: seconds of sleep before each timing,
    while threads of another side still spin. No further round begins after `seconds`; two are
    always made.
    """
    first: dict[str, tuple[float, float | None]] = {}
    for name, run in sides.items():
        first[name] = watched(run)
        for _ in range(warm):
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    begun = time.perf_counter()
    for i in range(rounds):
        if i >= 2 and time.perf_counter() - begun > seconds:
            break
        for name in list(sides)[:: -1 if i % 2 else 1]:
            time.sleep(pause)
            # Threads that slept take a while to wake: one untimed call where timings are short.
            if pause and times[name] and times[name][-1] * calls * units < 20:
                sides[name]()
            start = time.perf_counter()
            for _ in range(calls):
                results[name] = sides[name]()
            times[name].append(1e3 * (time.perf_counter() - start) / (calls * units))
    return {name: Times(times[name], *first[name], results[name]) for name in sides}


def watched(run: Side) -> tuple[float, float | None]:
    """Milliseconds of one call, and the memory in MB that it needed at most."""
    before = _memory("VmRSS")
    with contextlib.suppress(OSError):  # let the peak begin anew, where the system can
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    run()
    spent = 1e3 * (time.perf_counter() - start)
    peak = _memory("VmHWM")
    return spent, None if peak is None or before is None else max(0.0, peak - before)


def ratio(theirs: Times, ours: Times) -> float:
    """Median over rounds of their time over ours: machine noise affects both sides of a round."""
    return statistics.median(a / b for a, b in zip(theirs.rounds, ours.rounds, strict=True))


def _memory(field: str) -> float | None:
    """This process' memory in MB, as Linux states it; None elsewhere."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else None
