"""The table from each system of the lecture notes to its function, oracle, experiment and notebook.

`table()` renders it for the documentation; tests/test_docs.py checks that every cell resolves.
"""

import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Row(NamedTuple):
    """One system of the notes and where each part of it lives."""

    system: str
    functions: list[str]  # dotted names of public functions
    test: str  # path of the oracle test
    experiment: str  # module under experiments/
    notebook: str  # file under notebooks/, without the suffix


def rows() -> list[Row]:
    """Read docs/coverage.toml."""
    parsed = tomllib.loads((ROOT / "docs" / "coverage.toml").read_text())
    return [Row(**row) for row in parsed["row"]]


def table() -> str:
    """The rows as a markdown table."""
    lines = [
        "| in the notes | function | oracle test | experiment | notebook |",
        "|---|---|---|---|---|",
    ]
    for row in rows():
        functions = ", ".join(f"{{py:obj}}`~{name}`" for name in row.functions)
        test = f"{{download}}`{Path(row.test).stem} <../{row.test}>`"
        experiment = f"{{download}}`{row.experiment} <../experiments/{row.experiment}.py>`"
        lines.append(
            f"| {row.system} | {functions} | {test} | {experiment} "
            f"| [{row.notebook}](tutorials/{row.notebook}.ipynb) |"
        )
    return "\n".join(lines) + "\n"
