"""Samples and curves on axes: the parts of pictures that put runs side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _pictures
from genjax.training.record import read_metrics

# Pictures that a run without samples.npy leaves, the most telling one first.
TELLING = ("samples", "images", "restored", "fits", "leaderboard", "preferences", "estimate")
DOTTED = "\u0530"  # characters up to Cyrillic are shown


def show_samples(axis: Any, samples: np.ndarray, labels: Any = None, *, high: float = 0.0) -> None:
    """Points [n, 2], the first hundred images [n, height, width, channels] or rows of tokens.

    high: the white of images (default: the largest number among integers, 1 for others).
    """
    if samples.ndim == 4:
        high = high or (float(samples.max()) or 1.0 if samples.dtype.kind in "iu" else 1.0)
        chosen = samples[_pictures.hundred(samples, labels)]
        axis.imshow(_pictures.tiled(chosen, high=high), interpolation="nearest")
        axis.axis("off")
    elif samples.ndim == 2 and samples.dtype.kind in "iu":
        show_text(axis, [" ".join(map(str, row)) for row in samples])
    elif samples.ndim == 2 and samples.shape[1] == 2:
        axis.plot(*samples[:10_000].T, ".", markersize=1)
        axis.set(aspect="equal")
    else:
        show_text(axis, [f"samples of shape {list(samples.shape)}"])


def show_text(axis: Any, texts: Sequence[str], *, lines: int = 24, width: int = 48) -> None:
    """The beginnings of texts, a line each; a dot for what the font may not have."""
    clean = [text[:width].replace("\n", " ") for text in texts[:lines]]
    clean = ["".join(c if c.isprintable() and c < DOTTED else "·" for c in text) for text in clean]
    shown = [text.replace("$", r"\$") for text in clean]  # no formulas
    options = {"family": "monospace", "size": 6, "va": "top", "transform": axis.transAxes}
    axis.text(0.0, 1.0, "\n".join(shown), **options)
    axis.axis("off")


def show_run(axis: Any, folder: Path) -> None:
    """What a run's folder shows: its samples, its texts, or a picture that it left."""
    pictures = {path.stem: path for path in sorted(folder.glob("*.png"), reverse=True)}
    pictures.pop("curves", None)
    found = next((name for name in TELLING if name in pictures), next(iter(pictures), None))
    if (folder / "samples.txt").exists():
        show_text(axis, (folder / "samples.txt").read_text().split(f"\n{'-' * 80}\n"))
    elif (folder / "samples.npy").exists():
        show_samples(axis, np.load(folder / "samples.npy", allow_pickle=False))
    elif found is not None:
        from matplotlib import image

        axis.imshow(image.imread(pictures[found]))
        axis.axis("off")
    else:
        show_text(axis, ["no samples yet"])


def show_term(
    axis: Any, term: str, lines: Mapping[str, tuple[Any, Any, Mapping[str, str]]]
) -> None:
    """A logged term by the step: {label: (steps, values, look)}."""
    for label, (steps, values, look) in lines.items():
        axis.plot(steps, values, label=label, linewidth=1, **look)
    axis.set_title(term, fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=7)
    if any(lines):
        axis.legend(fontsize=7)


def save_log(folder: Path) -> Path | None:
    """Write curves.png, a panel for each logged term of a run; None where nothing was logged."""
    from matplotlib.figure import Figure

    terms = curves(folder)
    if not terms:
        return None
    columns = min(4, len(terms))
    rows = -(-len(terms) // columns)
    # Laid out by hand, in inches: matplotlib's own layout would double the time.
    width, height = 4.0 * columns, 2.4 * rows + 0.8
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(0.6 / width, 0.5 / height, 1 - 0.15 / width, 1 - 0.8 / height, 0.2, 0.5)
    for i, (term, parts) in enumerate(terms.items()):
        lines = {part: (*curve, {}) for part, curve in parts.items()}
        show_term(figure.add_subplot(rows, columns, i + 1), term, lines)
    path = folder / "curves.png"
    figure.suptitle(f"what was logged by the step\n{_pictures.caption(path)}", fontsize=9)
    figure.savefig(path, dpi=80)
    return path


def curves(folder: Path) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Every logged term of a run: {term: {part: (steps, values)}}. part: the folder of a training
    inside the run's, "" for the run's own."""
    found: dict[str, dict[str, tuple[list[int], list[float]]]] = {}
    for path in [folder / "metrics.jsonl", *sorted(folder.glob("*/metrics.jsonl"))]:
        part = "" if path.parent == folder else path.parent.name
        for row in read_metrics(path):
            for term, value in row.items():  # null stands for what was not finite
                if term not in ("step", "seconds") and isinstance(value, int | float):
                    steps, values = found.setdefault(term, {}).setdefault(part, ([], []))
                    steps.append(row["step"])
                    values.append(value)
    return found


def summary(folder: Path) -> dict[str, Any]:
    """A run's summary.json, {} where it has not ended."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else {}


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested objects as one, the names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = flat(value, f"{above}{name}.") if isinstance(value, Mapping) else None
        found |= {above + name: value} if inner is None else inner
    return found
