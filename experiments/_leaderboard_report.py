"""The leaderboard's table and picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# name: heading, digits after the point, factor. Memorised and KID are small numbers.
COLUMNS = {
    "precision": ("precision", 3, 1),
    "recall": ("recall", 3, 1),
    "density": ("density", 3, 1),
    "coverage": ("coverage", 3, 1),
    "frechet": ("Frechet", 2, 1),
    "kid": ("KID x 1000", 1, 1000),
    "memorised": ("memorised %", 1, 100),
    "bits_per_dim": ("bits/dim", 3, 1),
    "evaluations": ("evaluations", 0, 1),
    "sampling_seconds": ("ms per 1,000", 1, 1000),
    "training_seconds": ("training s", 1, 1),
    "steps": ("steps", 0, 1),
    "parameters": ("parameters", 0, 1),
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in markdown; of several seeds the mean and the standard deviation. A failed row says
    why in the place of its numbers."""
    headings = [heading for heading, _, _ in COLUMNS.values()]
    where = list(COLUMNS).index("bits_per_dim") + 1
    headings.insert(where, "which are")
    lines = ["| " + " | ".join(["model", *headings]) + " |", "|---" + "|---:" * len(headings) + "|"]
    for row in rows:
        if not row["mean"]:
            cells = [f"failed: {plain(row['reason'])}", *[""] * (len(headings) - 1)]
        else:
            cells = [cell(row, name) for name in COLUMNS]
            cells.insert(where, row.get("bits") or "")
        title = row["title"]
        if row["mean"] and row["reason"]:
            title += f" (a seed failed: {plain(row['reason'])})"
        lines.append("| " + " | ".join([title, *cells]) + " |")
    return "\n".join(lines) + "\n"


def cell(row: Mapping[str, Any], name: str) -> str:
    """One number, with its spread where there are several seeds."""
    _, digits, factor = COLUMNS[name]
    value, spread = row["mean"].get(name), row["spread"].get(name)
    if value is None or not math.isfinite(value):
        return ""
    text = f"{factor * value:,.{digits}f}"
    return text if not spread else f"{text} ± {factor * spread:,.{digits}f}"


def plain(reason: str) -> str:
    """A reason that breaks no table."""
    return " ".join(reason.replace("|", "/").split())


def page(board: Mapping[str, Any]) -> str:
    """leaderboard.md: what was measured and how, then the table."""
    net = board["extractor"]
    if net is not None:
        features = f"`{net['name']}` (SHA-256 `{net['sha256'][:16]}`)"
    else:
        points = board["kind"] == "points"
        features = "the points themselves" if points else "the pixels in [0, 1]"
    count, seeds, seconds = board["count"], board["seeds"], board["seconds_per_family"]
    spread = f", {seeds} seeds: mean ± standard deviation" if seeds > 1 else ""
    return (
        f"# Leaderboard: {board['dataset']}\n\n"
        f"{seconds:g} seconds of training each, compilation not counted{spread}. Features: "
        f"{features}. Each figure is a mean over blocks of {count} samples, against "
        f"{board['train_count']:,} training examples. Up: precision, recall (k = 3), density, "
        "coverage (k = 5). Down: Frechet distance, KID, bits/dim of the test split: exact, a "
        "bound, or an estimate by a solver. Memorised: samples nearer to a training example than "
        "99% of the test split are, 1% by chance. Evaluations: passes through the network, one "
        "after another, for a sample.\n\n" + table(board["rows"])
    )


def picture(path: Path, rows: Sequence[Mapping[str, Any]], shown: Mapping[str, Any]) -> Path:
    """Write samples of every row side by side, and precision against recall.

    shown: {title: images [n, h, w, c] in [0, 1], or points [n, 2]}.
    """
    from matplotlib.figure import Figure

    columns = math.ceil(math.sqrt(2 * len(shown)))
    grid = -(-len(shown) // columns)
    figure = Figure(figsize=(1.45 * columns + 4.6, max(1.65 * grid, 4.0)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.45 * columns, 4.6])
    axes = left.subplots(grid, columns, squeeze=False).ravel()
    points = [x for x in shown.values() if x.ndim == 2]
    limit = 1.15 * float(np.abs(points[0]).max()) if points else 1.0
    for axis in axes:
        axis.set_axis_off()
    numbers = {title: i + 1 for i, title in enumerate(shown)}
    for axis, (title, x) in zip(axes, shown.items(), strict=False):
        if x.ndim == 2:
            axis.plot(*x[:1000].T, ".", markersize=1)
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        else:
            axis.imshow(mosaic(x), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"{numbers[title]}. {title}", fontsize=7)
    axis = right.subplots()
    for row in rows:
        mean, spread = row["mean"], row["spread"]
        if not mean:
            continue
        place = (mean["recall"], mean["precision"])
        bars = {"xerr": spread.get("recall"), "yerr": spread.get("precision")}
        color = f"C{numbers[row['title']] % 10}"
        axis.errorbar(*place, **bars, fmt="o", markersize=5, color=color)
        text = str(numbers[row["title"]])
        axis.annotate(text, place, (4, 3), textcoords="offset points", fontsize=8, color=color)
    axis.set(xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    figure.suptitle(f"samples of every row, precision against recall: {path.parent.name}", size=8)
    figure.savefig(path, dpi=100)
    return path


def mosaic(images: np.ndarray, side: int = 5) -> np.ndarray:
    """The first side^2 images as one, a pixel apart."""
    _, height, width, _ = images.shape
    sheet = np.ones((side * (height + 1) - 1, side * (width + 1) - 1, images.shape[-1]))
    for i, image in enumerate(images[: side**2]):
        top, left = (i // side) * (height + 1), (i % side) * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet
