"""Put runs side by side: a table of their figures and options, a picture of samples and curves.

    python -m experiments.compare runs/diffusion/1 runs/diffusion/2
    python -m experiments.compare runs/vae/1 runs/flow/3 runs/gan/2 --out families.png

The runs may be of different experiments and need not have ended. The table has the options that at
least two of them have and in which they differ.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from experiments import _panels, _run
from genjax import checks

# Options that say where a run lies and not what it is.
PLACES = ("run_dir", "data_dir", "resume", "coordinator", "processes", "process", "progress")
STYLES = ("-", "--", ":", "-.")  # of the trainings inside one run, which has one colour


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Which runs are compared."""

    runs: Positional[tuple[str, ...]]
    """Folders of the runs."""
    out: str = "compare.png"
    """File of the picture."""
    terms: tuple[str, ...] = ()
    """Logged terms whose curves are plotted (default: all)."""


def main(config: Config) -> dict[str, Any]:
    """Print the table, write the picture; returns both parts of the table."""
    folders = [Path(run).absolute() for run in config.runs]
    if not folders:
        raise _run.RunError("give the folders of the runs to compare")
    options = [
        _run.read_config(folder / "config.json", "give a run's folder") for folder in folders
    ]
    summaries = [_panels.summary(folder) for folder in folders]
    labels = named(folders)
    differing = {
        name: row
        for name, row in rows(options).items()
        if name not in PLACES and len(set(row)) > 1 and sum(name in run for run in options) > 1
    }
    figures = rows([_panels.flat(summary) for summary in summaries])
    ended = ["" if summary else "not ended" for summary in summaries]
    parts = {"options that differ": differing, "figures": figures}
    print(table(labels, {"": {"": ended} if any(ended) else {}, **parts}))
    path = Path(config.out).absolute()
    picture(path, folders, labels, config.terms)
    print(f"in {path}")
    return {"runs": labels, **parts}


def named(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the folders apart, two parts at least."""
    most = max(len(folder.parts) for folder in folders)
    for parts in range(2, most + 1):
        labels = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(labels)) == len(set(folders)):
            break
    return labels


def rows(values: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The values of each name in all of the objects, as text; "" where one has none."""
    names = dict.fromkeys(name for found in values for name in found)
    return {name: [text(found[name]) if name in found else "" for found in values]
            for name in names}  # fmt: skip


def text(value: Any) -> str:
    """A cell of the table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    whole = " ".join(map(text, value)) if isinstance(value, list) else str(value)
    return whole if len(whole) <= 24 else f"{whole[:21]}..."


def table(labels: Sequence[str], parts: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """The parts below each other, each under its title, in common columns."""
    lines = [["", *labels]]
    for title, part in parts.items():
        lines += [[title]] if part and title else []
        lines += [[f"  {name}", *row] for name, row in part.items()]
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(len(labels) + 1)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
              for line in lines]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in padded)


def picture(
    path: Path, folders: Sequence[Path], labels: Sequence[str], terms: Sequence[str] = ()
) -> None:
    """Samples of every run in the first rows, below them a panel for each logged term."""
    from matplotlib.figure import Figure

    found = [_panels.curves(folder) for folder in folders]
    logged = tuple(dict.fromkeys(term for run in found for term in run))
    for term in terms:
        checks.one_of("terms", term, logged)
    shown = terms or logged
    columns = min(4, max(len(folders), len(shown)))
    above, below = (math.ceil(len(x) / columns) for x in (folders, shown))
    figure = Figure(figsize=(4 * columns, 4 * above + 2.5 * below), layout="constrained")
    grid = figure.add_gridspec(above + below, columns, height_ratios=[4] * above + [2.5] * below)
    for i, (folder, label) in enumerate(zip(folders, labels, strict=True)):
        axis = figure.add_subplot(grid[i // columns, i % columns])
        _panels.show_run(axis, folder)
        axis.set_title(f"{label}, {reached(folder)}", fontsize=9)
    for i, term in enumerate(shown):
        axis = figure.add_subplot(grid[above + i // columns, i % columns])
        lines = {}
        for number, (run, label) in enumerate(zip(found, labels, strict=True)):
            for style, (part, curve) in enumerate(run.get(term, {}).items()):
                look = {"color": f"C{number}", "linestyle": STYLES[style % len(STYLES)]}
                lines[f"{label} {part}".strip()] = (*curve, look)
        _panels.show_term(axis, term, lines)
    figure.suptitle(f"samples and logged terms of {', '.join(labels)}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def reached(folder: Path) -> str:
    """How far a run is: "step 6000", or up to where an unfinished one is logged."""
    done = _panels.summary(folder).get("steps_done")
    if done:
        return f"step {done}"
    found = _panels.curves(folder).values()
    last = max((steps[-1] for parts in found for steps, _ in parts.values()), default=None)
    return "nothing logged" if last is None else f"logged to step {last}"


if __name__ == "__main__":
    _run.launch(main, Config)
