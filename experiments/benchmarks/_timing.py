"""Timing of several sides in turn, A B A B, in one process; every benchmark uses it."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Side = Callable[[], Any]  # does its work, waits for it, returns what it likes


class Times(NamedTuple):
    """Milliseconds of one side: of each round, and of the first call, which compiles.

    peak_mb: memory that the first call needed beyond what was there before it (Linux; else None).
    """

    rounds: list[float]
    first: float
    peak_mb: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.rounds) < 3:
            return min(self.rounds), max(self.rounds)
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
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
    """Time every side in every round, backwards in every other one.

    A timing is of `calls` calls with `units` units of work in each, and counts one unit. `warm`
    further calls come after the first. `pause`: seconds of sleep before a timing, for threads of
    another side that spin on. No further round begins after `seconds` (two are always made).
    """
    first: dict[str, tuple[float, float | None]] = {}
    for name, run in sides.items():
        first[name] = watched(run)
        for _ in range(warm):
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    begun = time.perf_counter()
    for i in range(rounds):
        if i >= 2 and time.perf_counter() - begun > seconds:
            break
        for name in list(sides)[:: -1 if i % 2 else 1]:
            time.sleep(pause)
            # A short call that follows a sleep would be timed with the waking of its threads.
            if pause and times[name] and times[name][-1] * calls * units < 20:
                sides[name]()
            start = time.perf_counter()
            for _ in range(calls):
                sides[name]()
            times[name].append(1e3 * (time.perf_counter() - start) / (calls * units))
    return {name: Times(times[name], *first[name]) for name in sides}


def watched(run: Side) -> tuple[float, float | None]:
    """Milliseconds of one call, and the memory in MB that it needed at most."""
    before = _memory("VmRSS")
    _forget_peak()
    start = time.perf_counter()
    run()
    spent = 1e3 * (time.perf_counter() - start)
    peak = _memory("VmHWM")
    return spent, None if peak is None or before is None else max(0.0, peak - before)


def ratio(theirs: Times, ours: Times) -> float:
    """Median over rounds of their time over ours: a mood of the machine hits both of a pair."""
    return statistics.median(a / b for a, b in zip(theirs.rounds, ours.rounds, strict=True))


def _memory(field: str) -> float | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next(line for line in text.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def _forget_peak() -> None:
    """Let the peak of this process' memory begin anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
