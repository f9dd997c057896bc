"""Rows of the benchmark table: what every benchmark returns, and how they are written."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks._timing import Side, Times, ratio

OURS = "genjax"


@dataclasses.dataclass(frozen=True)
class Row:
    """One side of one case of one workload. What does not apply, or was not measured, is None."""

    workload: str
    """What is computed."""
    case: str
    """Sizes and options of it."""
    side: str
    """genjax, or the peer."""
    ms: float | None = None
    """Median milliseconds."""
    low: float | None = None
    """First quartile of the milliseconds."""
    high: float | None = None
    """Third quartile of the milliseconds."""
    first_ms: float | None = None
    """Milliseconds of the first call, which compiles."""
    peak_mb: float | None = None
    """Memory that the first call needed beyond what was there."""
    ratio: float | None = None
    """Its time over genjax's, median of the rounds: above 1 genjax is faster."""
    target: float | None = None
    """What that ratio has to be at least."""
    checks: dict[str, float] = dataclasses.field(default_factory=dict)
    """Figures that make the comparison fair: errors, differences of values."""
    work: dict[str, float] = dataclasses.field(default_factory=dict)
    """What one unit needs at least: flops, bytes read, exps."""
    note: str = ""
    """Why there is no time, or no ratio."""

    @property
    def met(self) -> bool | None:
        if self.target is None or self.ratio is None:
            return None
        return self.ratio >= self.target


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
        own = side == OURS
        found = dict((checks or {}).get(side, {}))
        failed = not all(math.isfinite(x) for x in found.values())
        if own and failed:
            raise FloatingPointError(f"{workload} {case}: genjax found no answer, {found}")
        target = targets.get(side) if isinstance(targets, Mapping) else targets
        rows.append(
            Row(
                workload,
                case,
                side,
                ms=t.median,
                low=t.quartiles[0],
                high=t.quartiles[1],
                first_ms=t.first,
                peak_mb=t.peak_mb,
                ratio=None if own or failed else ratio(t, times[OURS]),
                target=None if own or failed else target,
                checks=found,
                work=dict(work or {}) if own else {},
                note="diverged" if failed else "",
            )
        )
    return rows + [Row(workload, case, side, note=why) for side, why in (notes or {}).items()]


def build(
    makers: Mapping[str, Callable[[], Side]], torch: Sequence[str] = ()
) -> tuple[dict[str, Side], dict[str, str]]:
    """Make every side that can be made here: (sides, why the others cannot).

    A peer that is not installed is left out, and those of `torch`, whose tensors are on the CPU,
    where jax computes on an accelerator.
    """
    import jax

    sides, notes = {}, {}
    for name, make in makers.items():
        if name in torch and jax.default_backend() != "cpu":
            notes[name] = "not on this device"
            continue
        try:
            sides[name] = make()
        except ImportError as error:
            notes[name] = f"{error.name or error} is not installed"
    for name, why in notes.items():
        print(f"# {name} skipped: {why}", flush=True)
    return sides, notes


def show(rows: Sequence[Row]) -> list[Row]:
    """Print rows a line each, and return them."""
    for row in rows:
        text = f"{row.workload} {row.case}".strip()
        time = f"{number(row.ms):>9} ms  " if row.ms is not None else ""
        line = f"{text:<34} {row.side:<15} {time}{row.note}".rstrip()
        if row.ratio is not None:
            line += f"  ratio {number(row.ratio)}"
        if row.target is not None:
            line += f" (target {number(row.target)}, {'met' if row.met else 'missed'})"
        line += "".join(f"  {name} {number(x)}" for name, x in row.checks.items())
        print(line, flush=True)
    return list(rows)


def least_ms(work: Mapping[str, float], ceilings: Mapping[str, float]) -> float | None:
    """Milliseconds that the work takes at the machine's ceilings, the slowest resource alone."""
    parts = [1e3 * n / ceilings[what] for what, n in work.items() if what in ceilings]
    return max(parts, default=None)


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON, numbers that are not finite as null."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return None if isinstance(x, float) and not math.isfinite(x) else x

    path.write_text(json.dumps([plain(dataclasses.asdict(row)) for row in rows], indent=1) + "\n")


def read(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())]


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
        name = f"{row.workload} {row.case}".strip()
        if row.ms is None:
            checks = ", ".join(f"{what} {number(x)}" for what, x in row.checks.items())
            empty = " |" * (len(HEAD) - 4)
            lines.append(f"| {name} | {row.side} | {row.note} |{empty} {checks} |")
            continue
        spread = (row.high - row.low) / row.ms if row.high is not None and row.ms else None
        least = least_ms(row.work, ceilings)
        cells = [
            name,
            row.side,
            number(row.ms),
            "" if spread is None else f"{100 * spread:.0f}%",
            number(row.first_ms),
            "" if row.peak_mb is None else f"{row.peak_mb:,.0f}",
            number(row.ratio) if row.ratio is not None else row.note,
            number(row.target),
            {True: "yes", False: "**no**", None: ""}[row.met],
            "" if least is None else f"{100 * least / row.ms:.0f}%",
            ", ".join(f"{name} {number(x)}" for name, x in row.checks.items()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
