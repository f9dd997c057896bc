"""The table in short, for a README: a line for each case, its peers with their ratios.

python -m experiments.benchmarks._summary runs/benchmarks/benchmarks.json
"""

import json
from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments.benchmarks._table import OURS, Row, number


def summary(rows: Sequence[Row]) -> str:
    """Every case with a ratio: our time and the peers' over it; what misses its target is bold."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(f"{row.workload} {row.case}".strip(), []).append(row)
    lines = ["| workload | genjax, ms | time of the peers over it (target) |", "|---|---:|---|"]
    for name, sides in cases.items():
        own = next((row for row in sides if row.side == OURS and row.ms is not None), None)
        if own is None or not any(row.ratio is not None for row in sides):
            continue
        lines.append(
            f"| {name} | {number(own.ms)} | {', '.join(filter(None, map(_peer, sides)))} |"
        )
    return "\n".join(lines) + "\n"


def _peer(row: Row) -> str:
    if row.ratio is None:
        return f"{row.side} {row.note}" if row.ms is not None and row.note else ""
    text = f"{row.side} {number(row.ratio)}"
    if row.target is not None:
        text += f" ({row.target:.3g})"
    return f"**{text}**" if row.met is False else text


def main(path: Path, /) -> None:
    """Print the summary of a benchmarks.json."""
    found = json.loads(path.read_text())
    parts = {name: [Row(**row) for row in rows] for name, rows in found["workloads"].items()}
    rows = [row for part in parts.values() for row in part]
    held = [row for row in rows if row.met is not None]
    met = sum(bool(row.met) for row in held)
    print(
        f"{found['date']}, {found['processor']}, {found['cores']} cores, {found['device']}: ",
        end="",
    )
    print(f"{met} of {len(held)} targets met.\n\n{summary(rows)}")


if __name__ == "__main__":
    tyro.cli(main)
