"""Pictures that the experiments draw. matplotlib is loaded when the first one is."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def caption(path: str | os.PathLike) -> str:
    """Of which run and step a picture is, by its place in the run's folder: "vae/3, step 2000"."""
    folder = Path(path).absolute().parent
    whole = folder.parent if (folder.parent / "config.json").exists() else folder
    name = "/".join([*whole.parts[-2:], *folder.relative_to(whole).parts])
    steps = []
    for file in (folder / "training.json", *folder.glob("*/training.json")):
        if file.exists():
            found = json.loads(file.read_text())
            steps.append(found.get("best_step") or found.get("steps_done") or 0)
    return f"{name}, step {max(steps)}" if steps else name


def save_grid(
    path: str | os.PathLike,
    images: Any,
    *,
    title: str,
    columns: int | None = None,
    low: float = 0.0,
    high: float = 1.0,
    pixel: int = 4,
) -> Path:
    """Write images [n, height, width, channels 1 or 3] side by side; low is black, high is white.

    Integers from load() have low=0, high=levels-1. Each pixel becomes `pixel` pixels square. Above
    them stands the title, with the run and its step.
    """
    from matplotlib import image as png

    sheet = tiled(images, columns=columns, low=low, high=high)
    sheet = np.kron(sheet, np.ones((pixel, pixel, 1)))
    strip = lettered(f"{title}\n{caption(path)}")
    width = max(sheet.shape[1], strip.shape[1])
    parts = [np.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0)), constant_values=1.0)
             for x in (strip, sheet)]  # fmt: skip
    png.imsave(Path(path), np.concatenate(parts))
    return Path(path)


def first(images: Any, count: int) -> Any:
    """The first `count` images; where there are fewer they come again."""
    return images[np.arange(count) % len(images)]


def save_reconstructions(folder: Path, images: Any, again: Any, *, high: float) -> Path:
    """Write reconstructions.png: four rows of ten images, each above what came back of them."""
    pairs = np.stack([first(np.asarray(x)[:40], 40) for x in (images, again)])
    rows = pairs.reshape(2, 4, 10, *pairs.shape[2:]).swapaxes(0, 1)
    title = "test images, each row above its reconstructions"
    sheet = rows.reshape(-1, *pairs.shape[2:])
    return save_grid(folder / "reconstructions.png", sheet, title=title, high=high, columns=10)


def lettered(text: str, size: float = 8.0) -> np.ndarray:
    """A text as pixels [height, width, 3] in [0, 1], black on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(20, 0.2 * (1 + text.count("\n")) + 0.05), dpi=100)
    canvas = FigureCanvasAgg(figure)
    figure.text(0.002, 0.5, text, size=size, va="center")
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    inked = np.flatnonzero(pixels.min(axis=(0, 2)) < 1)
    return pixels[:, : inked[-1] + 5] if len(inked) else pixels[:, :1]


def tiled(
    images: Any, *, columns: int | None = None, low: float = 0.0, high: float = 1.0
) -> np.ndarray:
    """Images [n, height, width, 1 or 3] as one picture [rows, columns, 3] in [0, 1], with a pixel
    of white between them; low becomes 0, high 1, what is not finite black."""
    images = np.asarray(images, dtype=np.float64)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be [n, height, width, 1 or 3], got shape {images.shape}")
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.ones((rows * (height + 1) - 1, columns * (width + 1) - 1, channels))
    for i, picture in enumerate(np.clip((images - low) / (high - low), 0, 1)):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = picture
    return np.nan_to_num(np.repeat(sheet, 3 // channels, axis=-1))


def save_figure(
    path: str | os.PathLike,
    plot: Any,
    *,
    title: str,
    panels: int = 1,
    size: float = 4.0,
    of: str | None = None,
) -> Path:
    """Write a figure of `panels` axes in a row: plot(axes) plots on the list of them.

    Above them stands the title, with the run and its step (`of`: what stands there instead).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size * panels, size + 0.4), layout="constrained")
    plot([figure.add_subplot(1, panels, i + 1) for i in range(panels)])
    figure.suptitle(f"{title}\n{caption(path) if of is None else of}", fontsize=9)
    figure.savefig(Path(path), dpi=120)
    return Path(path)


def save_points(
    path: str | os.PathLike, sets: Mapping[str, Any], *, title: str, limit: float = 0.0
) -> Path:
    """Write 2-D point sets {title: [n, 2]} beside each other on the same scale."""
    arrays = {name: np.asarray(points) for name, points in sets.items()}
    limit = limit or 1.05 * max(float(np.abs(points).max()) for points in arrays.values())

    def plot(axes: Sequence[Any]) -> None:
        for axis, (name, points) in zip(axes, arrays.items(), strict=True):
            axis.plot(points[:, 0], points[:, 1], ".", markersize=2, alpha=0.5)
            axis.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")

    return save_figure(path, plot, title=title, panels=len(arrays))


def save_samples(path: str | os.PathLike, data: Any, samples: Any, labels: Any = None) -> None:
    """Write points beside the data, or a hundred images, of ten classes one to a column."""
    title = f"samples, {data.spec.name}"
    if data.kind == "points":
        sets = {"data": data.test["x"][:2000], "samples": samples[:2000]}
        save_points(path, sets, title=title)
    elif data.kind == "images":
        shown, high = samples[hundred(samples, labels)], data.spec.levels - 1
        save_grid(path, shown, title=title, high=high, columns=10)


def hundred(samples: Any, labels: Any = None) -> np.ndarray:
    """Indices of the first hundred samples, or of ten of each of ten classes, one to a column."""
    first = np.arange(min(100, len(samples)))
    if labels is None:
        return first
    places = [np.flatnonzero(np.asarray(labels) == c)[:10] for c in range(10)]
    return np.stack(places, 1).ravel() if min(map(len, places)) == 10 else first


def density_report(system: Any, data: Any) -> Any:
    """A report for `train`: in the plane it writes density.png, with the density of a system, its
    samples and the data, and has nothing for the summary."""
    import jax

    log_prob = jax.jit(lambda params, grid: system.log_prob(params, None, grid))

    def report(run: Any, params: Any, samples: np.ndarray) -> dict[str, Any]:
        if data.kind != "points":
            return {}
        points = data.test["x"]
        limit = 1.15 * float(np.abs(points).max())
        axis = np.linspace(-limit, limit, 200, dtype=np.float32)
        grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
        density = np.exp(np.asarray(log_prob(params, grid))).reshape(200, 200)

        def plot(axes: Any) -> None:
            axes[0].imshow(density, origin="lower", extent=(-limit, limit) * 2)
            axes[0].set(title="density of the model")
            for axis, x, title in ((axes[1], samples[:5000], "samples"), (axes[2], points, "data")):
                axis.plot(*x.T, ".", markersize=1)
                axis.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")

        title = f"density, samples and data, {data.spec.name}"
        save_figure(run.folder / "density.png", plot, title=title, panels=3)
        return {}

    return report


def save_curves(
    path: str | os.PathLike,
    curves: Mapping[str, tuple[Any, Any]],
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "",
    log_y: bool = False,
) -> Path:
    """Write curves {name: (x, y)} on one pair of axes."""

    def plot(axes: Sequence[Any]) -> None:
        for name, (x, y) in curves.items():
            axes[0].plot(np.asarray(x), np.asarray(y), label=name)
        axes[0].set(xlabel=x_label, ylabel=y_label, yscale="log" if log_y else "linear")
        axes[0].legend()

    return save_figure(path, plot, title=title)
