"""Every family on the same data, with the same seconds of training, measured the same way.

    python -m experiments.leaderboard
    python -m experiments.leaderboard --dataset 25gaussians --seeds 3
    python -m experiments.leaderboard --families vae diffusion --seconds-per-family 10

Each run is a process of its own: one that fails leaves its reason in its row, and is tried again by
the next call; finished ones are reused. Rates of learning fall along schedules over a number of
steps, so a short run first measures how many steps the seconds allow; the budget itself ends what
turns out slower. Read from a run are its samples, its summary and nothing else.

On top stands the test split measured as if it were samples, the ceiling; then scikit-learn's
Gaussian mixture and kernel density, the floor. The folder gets leaderboard.md, leaderboard.json
(every metric with its extractor, counts, seed and dtype) and leaderboard.png.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import _judge, _run
from experiments import _leaderboard_report as report
from experiments import _leaderboard_runs as runs
from experiments import _leaderboard_scores as scores
from experiments._data import Data, load_data
from experiments._system import Row
from genjax import checks
from genjax.data import DataSpec

# In the order of the table; each has its rows as ROWS.
MODULES = ("ppca", "vae", "vqvae", "hierarchical_vae", "f_gan", "gan", "wgan", "stylegan",
           "sinkhorn_gan", "flow", "flow_matching", "few_step", "continuous_flow",
           "diffusion", "latent", "masked_diffusion", "pixelcnn")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare the families on a data set."""

    dataset: str = "digits"
    """digits, mnist_5k or another image set, or a 2-D density such as 8gaussians or 25gaussians."""
    seconds_per_family: float = 60.0
    """Seconds that each run trains, compilation not counted."""
    seeds: int = 1
    """Runs of each family; of several the table gives mean and standard deviation."""
    families: tuple[str, ...] = ()
    """Names of the rows (default: all that support the data set; above 16 pixels a side those that
    have options for such images)."""
    calibrate: float = 0.1
    """Share of the seconds that the short run takes which measures the number of steps (0: each
    experiment's own number, cut short by the budget)."""
    timeout: float = 1200.0
    """Seconds after which a process is ended and counts as failed."""
    data_dir: str | None = None
    """Folder of the prepared data sets (default: the usual one of tensorflow_datasets)."""
    run_dir: str | None = None
    """Folder of the runs and the results (default: runs/leaderboard/DATASET-SECONDSs)."""


def main(config: Config) -> dict[str, Any]:
    """Make or reuse the runs, measure, write; returns what leaderboard.json holds."""
    checks.integer("seeds", config.seeds, 1)
    checks.positive("seconds_per_family", config.seconds_per_family)
    checks.between("calibrate", config.calibrate, 0, 1)
    families = rows_of(MODULES)
    for name in config.families:
        checks.one_of("families", name, families)
    name = f"{config.dataset}-{config.seconds_per_family:g}s"
    folder = Path(config.run_dir or Path("runs", "leaderboard", name)).absolute()
    data = load_data(config)
    reference = _judge.reference(data)
    chosen = config.families or [n for n, f in families.items() if is_meant(f, data.spec)]
    folder.mkdir(parents=True, exist_ok=True)

    shown: dict[str, np.ndarray] = {}
    rows = [outside(reference, shown), *floors(config, reference, shown)]
    for i, name in enumerate(chosen):
        print(f"{i + 1} of {len(chosen)}: {families[name].title}", flush=True)
        rows.append(family_row(config, folder / name, families[name], reference, shown))
    net = reference.extractor
    board = {
        "dataset": config.dataset,
        "kind": data.kind,
        "seconds_per_family": config.seconds_per_family,
        "seeds": config.seeds,
        "extractor": None if net is None else {"name": net.name, "sha256": net.sha256},
        "count": reference.count,
        "train_count": len(reference.train["plain"]),
        "rows": rows,
    }
    _run.write_json(folder / "leaderboard.json", board)
    (folder / "leaderboard.md").write_text(report.page(board))
    report.picture(folder / "leaderboard.png", rows, shown)
    print(report.table(rows))
    print(f"in {folder}: leaderboard.md, leaderboard.json, leaderboard.png", flush=True)
    return board


def rows_of(modules: Sequence[str]) -> dict[str, Row]:
    """The rows of the experiments, by their names."""
    found = {}
    for name in modules:
        module = importlib.import_module(f"experiments.{name}")
        found |= {row.name: row._replace(module=module.__name__) for row in module.ROWS}
    return found


def options_of(family: Row, spec: DataSpec) -> dict[str, Any] | None:
    """The row's options of the command line on that data; None where it does not support them."""
    if spec.kind != "images":
        options = family.plane if spec.kind == "points" else None
        return None if options is None else dict(options)
    if family.images is None:
        return None
    return {**family.images, **((family.larger or {}) if is_large(spec) else {})}


def is_meant(family: Row, spec: DataSpec) -> bool:
    """Whether a call without names has the row: above 16 pixels a side by its options for them."""
    return options_of(family, spec) is not None and (
        not is_large(spec) or family.larger is not None
    )


def is_large(spec: DataSpec) -> bool:
    """Whether these are images of more than 16 pixels a side."""
    return spec.kind == "images" and max(spec.shape[:2]) > 16


def outside(reference: _judge.Reference, shown: dict[str, np.ndarray]) -> dict[str, Any]:
    """The row of the test split."""
    title = "Test split, the ceiling"
    found = entry(title, 0, reference, shown, *scores.ceiling(reference.data))
    return row(title, [found], bits="exact")


def floors(
    config: Config, reference: _judge.Reference, shown: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The rows of scikit-learn's density models."""
    found: dict[str, list] = {}
    for seed in range(config.seeds):
        for title, make in scores.floors(reference.data, seed).items():
            found.setdefault(title, []).append(entry(title, seed, reference, shown, *make()))
    bits = Row("", "").of_bits(reference.data.kind)
    return [row(title, entries, bits=bits) for title, entries in found.items()]


def family_row(
    config: Config,
    folder: Path,
    family: Row,
    reference: _judge.Reference,
    shown: dict[str, np.ndarray],
) -> dict[str, Any]:
    """The row of a family: its runs, made or reused, and their measurements."""
    options = options_of(family, reference.data.spec)
    if options is None:
        reason = f"{family.module} does not support {config.dataset}"
        return row(family.title, [], reason, family.name)
    options = {**options, "dataset": config.dataset, "data_dir": config.data_dir}
    entries, reasons = [], []
    for seed in range(config.seeds):
        with runs.alone(folder):
            outcome = runs.obtain(
                family,
                folder,
                options,
                seed=seed,
                seconds=config.seconds_per_family,
                calibrate=config.calibrate,
                timeout=config.timeout,
            )
        state = "reused" if outcome.reused else outcome.reason or "finished"
        print(f"  seed {seed}: {state}", flush=True)
        if outcome.reason is not None:
            reasons.append(outcome.reason)
            continue
        try:
            samples, summary = runs.read(outcome.folder)
            costs = scores.costs(summary, reference.data.spec)
            found = entry(family.title, seed, reference, shown, samples, costs)
        except (ValueError, OSError) as error:
            reasons.append(f"its samples cannot be measured: {error}")
            continue
        entries.append({**found, "folder": str(outcome.folder), "reused": outcome.reused})
    reason, bits = reasons[0] if reasons else None, family.of_bits(reference.data.kind)
    return row(family.title, entries, reason, family.name, options, bits)


def entry(
    title: str,
    seed: int,
    reference: _judge.Reference,
    shown: dict[str, np.ndarray],
    samples: np.ndarray,
    costs: Mapping[str, float],
) -> dict[str, Any]:
    """One run as leaderboard.json keeps it; the title's first samples are shown."""
    records = _judge.score(reference, samples, seed)
    shown.setdefault(title, visible(reference.data, samples))
    measured = []
    for record in records:
        value = record.value
        value = value._asdict() if hasattr(value, "_asdict") else value
        measured.append({**record._asdict(), "value": value, "counts": list(record.counts)})
    return {"seed": seed, "values": {**_judge.numbers(records), **costs}, "measured": measured}


def row(
    title: str,
    entries: list[dict[str, Any]],
    reason: str | None = None,
    family: str | None = None,
    options: Mapping[str, Any] | None = None,
    bits: str | None = None,
) -> dict[str, Any]:
    """A row: mean and standard deviation over the seeds that finished. bits: what bits/dim are."""
    names = {name for e in entries for name in e["values"]}
    values = {n: [e["values"][n] for e in entries if n in e["values"]] for n in sorted(names)}
    return {
        "title": title,
        "family": family,
        "options": options,
        "reason": reason,
        "bits": bits if "bits_per_dim" in values else None,
        "mean": {name: float(np.mean(x)) for name, x in values.items()},
        "spread": {name: float(np.std(x, ddof=1)) for name, x in values.items() if len(x) > 1},
        "runs": entries,
    }


def visible(data: Data, samples: np.ndarray) -> np.ndarray:
    """The samples that the picture shows: images in [0, 1], or points."""
    if data.kind == "points":
        return samples[:1000]
    return samples[:25] / ((data.spec.levels or 2) - 1)


if __name__ == "__main__":
    _run.launch(main, Config)
