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
            f"| [{row.notebook.replace('_', ' ')}](tutorials/{row.notebook}.ipynb) |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    """The table with what its columns mean."""
    return f"""# From the notes to the code

The notes are those of a lecture on deep generative models, from the linear latent model to
alignment. A line for each of its systems: the functions that compute it, the test that holds them
against a closed form, the experiment that trains it and the tutorial that explains it. Where the
notes or their slides print another formula than the papers, the page of the family says which one
is computed and why.

{table()}"""
