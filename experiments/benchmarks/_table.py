"""Rows of the benchmark table: what every benchmark returns, and how they are written."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks._timing import Times, ratio

OURS = "genjax"


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one case of one workload. What does not apply, or was not measured, is None."""

    workload: str  # what is computed
    case: str  # sizes and options of it
    side: str  # genjax, or the peer
    ms: float | None = None  # median milliseconds
    low: float | None = None  # first quartile of the milliseconds
    high: float | None = None  # third quartile of the milliseconds
    first_ms: float | None = None  # milliseconds of the first call, which compiles
    peak_mb: float | None = None  # memory that the first call needed beyond what was there
    ratio: float | None = None
    """Its time over genjax's, median of the rounds: above 1 genjax is faster."""
    target: float | None = None  # what that ratio has to be at least
    checks: dict[str, float] = dataclasses.field(default_factory=dict)
    """Figures that make the comparison fair: errors, differences of values."""
    work: dict[str, float] = dataclasses.field(default_factory=dict)
    """What one unit needs at least: flops, bytes read, exps."""
    note: str = ""  # why there is no time, or no ratio

    @property
    def met(self) -> bool | None:
        """Whether the ratio reaches its target; None where either is missing."""
        return None if self.target is None or self.ratio is None else self.ratio >= self.target

    @property
    def name(self) -> str:
        return f"{self.workload} {self.case}".strip()


def make_rows(
    workload: str,
    times: Mapping[str, Times],
    *,
    case: str = "",
    targets: Mapping[str, float] | float | None = None,
    checks: Mapping[str, Mapping[str, float]] | None = None,
    work: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """Make the rows of one case; `targets` for each peer or one for all, `notes` of the absent.

    A peer with a check that is not finite has found no answer: its time is not compared. Raises
    FloatingPointError where genjax has.
    """
    rows = []
    for side, t in times.items():
        row = Row(workload, case, side, t.median, *t.quartiles, t.first, t.peak_mb)
        found = dict((checks or {}).get(side, {}))
        failed = not all(math.isfinite(x) for x in found.values())
        if side == OURS and failed:
            raise FloatingPointError(f"{workload} {case}: genjax found no answer, {found}")
        more: dict[str, Any] = {"note": "diverged" if failed else ""}
        if side == OURS:
            more["work"] = dict(work or {})
        elif not failed and OURS in times:
            target = targets.get(side) if isinstance(targets, Mapping) else targets
            more |= {"ratio": ratio(t, times[OURS]), "target": target}
        rows.append(dataclasses.replace(row, checks=found, **more))
    return rows + [Row(workload, case, side, note=why) for side, why in (notes or {}).items()]


def show(rows: Sequence[Row]) -> list[Row]:
    """Print rows a line each, and return them."""
    for row in rows:
        time = f"{number(row.ms):>9} ms  " if row.ms is not None else ""
        line = f"{row.name:<34} {row.side:<15} {time}{row.note}".rstrip()
        if row.ratio is not None:
            line += f"  ratio {number(row.ratio)}"
        if row.target is not None:
            line += f" (target {number(row.target)}, {'met' if row.met else 'missed'})"
        print(line + "".join(f"  {k} {number(x)}" for k, x in row.checks.items()), flush=True)
    return list(rows)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON has them; numbers that are not finite become None."""
    text = json.dumps([dataclasses.asdict(row) for row in rows])
    return json.loads(text, parse_constant=lambda name: None)


def number(x: float | None) -> str:
    """Three figures, an exponent only where a table would be too wide without."""
    if x is None or not math.isfinite(x):
        return "" if x is None else str(x)
    if x and not 1e-3 <= abs(x) < 1e12:
        return f"{x:.1e}"
    digits = max(0, 2 - math.floor(math.log10(abs(x)))) if x else 0
    return f"{x:,.{min(digits, 4)}f}"


HEAD = ("workload", "side", "ms", "spread", "first call, ms", "peak, MB", "ratio", "target", "met",
        "share of ceiling", "checks")  # fmt: skip


def markdown(rows: Sequence[Row], ceilings: Mapping[str, float]) -> str:
    """The table: a line for each row, targets that are missed in bold."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for row in rows:
        cells = [row.name, row.side, row.note] + [""] * (len(HEAD) - 4)
        if row.ms is not None:
            spread = (row.high - row.low) / row.ms if row.high is not None and row.ms else None
            # The least time of the work at the machine's ceilings, by the slowest resource alone.
            least = max([1e3 * n / ceilings.get(k, math.inf) for k, n in row.work.items()] or [0])
            cells[2:] = [
                number(row.ms),
                "" if spread is None else f"{100 * spread:.0f}%",
                number(row.first_ms),
                "" if row.peak_mb is None else f"{row.peak_mb:,.0f}",
                number(row.ratio) if row.ratio is not None else row.note,
                number(row.target),
                {True: "yes", False: "**no**", None: ""}[row.met],
                f"{100 * least / row.ms:.0f}%" if least else "",
            ]
        checks = ", ".join(f"{name} {number(x)}" for name, x in row.checks.items())
        lines.append("| " + " | ".join([*cells, checks]) + " |")
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """In short: a line for each case, with our time and the peers' over it; missed targets bold."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.name, []).append(row)
    lines = ["| workload | genjax, ms | time of the peers over it (target) |", "|---|---:|---|"]
    for name, sides in cases.items():
        own = next((row for row in sides if row.side == OURS and row.ms is not None), None)
        if own is not None and any(row.ratio is not None for row in sides):
            peers = ", ".join(filter(None, map(_peer, sides)))
            lines.append(f"| {name} | {number(own.ms)} | {peers} |")
    return "\n".join(lines) + "\n"


def _peer(row: Row) -> str:
    if row.ratio is None:
        return f"{row.side} {row.note}" if row.ms is not None and row.note else ""
    text = f"{row.side} {number(row.ratio)}"
    text += f" ({row.target:.3g})" if row.target is not None else ""
    return f"**{text}**" if row.met is False else text
