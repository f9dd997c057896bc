"""Run every benchmark beside the peers that are installed and write one table.

    python -m experiments.benchmarks
    python -m experiments.benchmarks --only vae wgan_gp --quick

Each workload has a process of its own, in which its sides are timed in turn. The table is written
after each of them, as benchmarks.md and benchmarks.json in the output folder; workloads that are
not run keep the rows that are there.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

import genjax
from experiments.__main__ import experiments
from experiments.benchmarks import _table
from experiments.benchmarks._ceilings import rates

PEERS = ("torch", "ott-jax", "POT", "geomloss", "flowjax", "distrax", "zuko", "nflows", "torchcfm",
         "torchdiffeq", "diffrax", "diffusers")  # fmt: skip


class Job(NamedTuple):
    """A benchmark module with its options, and what is less in a quick run."""

    module: str
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    quick: dict[str, Any] = {}  # noqa: RUF012


PATHS = {
    "continuous_flow": ("cnf_loglik", "cnf_grad", "cnf64_grad"),
    "flow_matching": ("fm", "fm_ot"),
}
SMALL = {"n": (256,), "eps": (0.1, 0.01), "repeats": 3}
PEERS_OF_OT = {"peers": ("ott", "ott-momentum", "ott-anderson", "pot", "geomloss"), "seconds": 8.0}
LARGE = {
    "n": (4096,),
    "peers": ("ott", "ott-momentum", "ott-anderson", "geomloss"),
    "repeats": 3,
    "seconds": 20.0,
}
TWO = {"n": (256, 1024), "eps": (0.01,), "peers": ("ott", "ott-momentum", "geomloss")}
JOBS: dict[str, Job] = {
    "ceilings": Job("_ceilings", {}, {"rounds": 5}),
    "sinkhorn_256": Job("sinkhorn", {"n": (256,), **PEERS_OF_OT}, SMALL),
    "sinkhorn_1024": Job("sinkhorn", {"n": (1024,), **PEERS_OF_OT}, SMALL | {"d": (2,)}),
    "sinkhorn_4096": Job("sinkhorn", LARGE, SMALL | {"n": (2048,), "d": (2,)}),
    "sinkhorn_divergence": Job("sinkhorn", {"problem": "divergence", **TWO}, SMALL),
    "vae": Job("vae", {}, {"rounds": 3, "steps": 20}),
    "wgan_gp": Job("wgan_gp", {}, {"rounds": 3, "width": 16}),
    "realnvp": Job("flows", {}, {"rounds": 3}),
    **{k: Job("flow_paths", {"workloads": v}, {"rounds": 3, "inner": 2}) for k, v in PATHS.items()},
    "unet": Job("unet", {}, {"rounds": 2, "sample_rounds": 2, "batch_size": 2}),
    "metrics": Job("metrics", {}, {"rounds": 2, "samples": 1000, "width": 128}),
    "step_overhead": Job("step_overhead", {}, {"rounds": 6}),
    "depth": Job("depth", {}, {"networks": ("mlp", "tarflow")}),
    "scaling": Job("scaling", {}, {"devices": (1, 2), "processes": ()}),
}


@dataclasses.dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()
    """Which to run (default: all): a name from the list that a wrong one prints, or "startup"."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where jax computes; on a gpu the peers of PyTorch, whose tensors are on the CPU, are left
    out."""
    quick: bool = False
    """Fewer rounds and smaller sizes: to see that everything runs, not for figures."""
    out: Path = Path("runs/benchmarks")
    """Folder of benchmarks.md and benchmarks.json."""
    timeout: float = 3600.0
    """Seconds after which a workload is given up."""


def jobs(config: Config) -> dict[str, Job]:
    """Choose what to run; raises ValueError for a name that is none."""
    names = [name.rsplit(".", 1)[1] for name in experiments() if name.count(".") == 1]
    startup = {f"startup_{name}": Job("_startup", {"experiment": name}) for name in names}
    all_jobs = JOBS | startup
    groups = {"startup": list(startup)}
    if config.quick:
        groups["startup"] = ["startup_vae"]
    chosen = config.only or (*JOBS, "startup")
    wanted = [name for given in chosen for name in groups.get(given, [given])]
    for name in wanted:
        if name not in all_jobs:
            raise ValueError(f"only must be among {[*JOBS, *groups, *startup]}, got {name!r}")
    # Shares of the ceilings need the ceilings of this run.
    return {name: all_jobs[name] for name in dict.fromkeys(["ceilings", *wanted])}


def run(name: str, job: Job, config: Config) -> list[_table.Row]:
    """Run one workload in a process of its own; what goes wrong there becomes a row."""
    options = {**job.options, **(job.quick if config.quick else {})}
    environment = {
        "PYTHONWARNINGS": "ignore",
        **os.environ,
        "JAX_PLATFORMS": "cpu" if config.device == "cpu" else "cuda,cpu",
    }
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "rows.json")
        worker = [sys.executable, "-m", "experiments.benchmarks._worker", job.module]
        command = [*worker, json.dumps(options), str(file)]
        try:
            done = subprocess.run(
                command, env=environment, timeout=config.timeout, stderr=subprocess.PIPE, text=True
            )
            lines = done.stderr.strip().splitlines() or ["no message"]
            why = next(
                (x for x in lines[::-1] if re.match(r"[\w.]+(Error|Exception)", x)), lines[-1]
            )
            if done.returncode == 0:
                return _table.read(file)
        except subprocess.TimeoutExpired:
            why = f"given up after {config.timeout:.0f} s"
    print(f"# {name} failed: {why}", flush=True)
    return [_table.Row(name, "", _table.OURS, note=f"failed: {why}"[:200])]


def machine(config: Config) -> dict[str, Any]:
    """Say where and with what the rows were measured."""
    versions: dict[str, str | None] = {"genjax": genjax.__version__}
    for peer in ("jax", *PEERS):
        try:
            versions[peer] = importlib.metadata.version(peer)
        except importlib.metadata.PackageNotFoundError:
            versions[peer] = None
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        processor = lines[0].split(":")[1].strip() if lines else processor
    return {
        "date": datetime.date.today().isoformat(),
        "device": config.device,
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "quick": config.quick,
        "versions": versions,
    }


def report(place: dict[str, Any], parts: dict[str, list[_table.Row]]) -> str:
    """Write the markdown: where, what the machine can do, what was missed, and the rows."""
    ceilings = rates(parts.get("ceilings", []))
    rows = [row for name, part in parts.items() if name != "ceilings" for row in part]
    held = [row for row in rows if row.met is not None]
    absent = [name for name, version in place["versions"].items() if version is None]
    present = [f"{name} {version}" for name, version in place["versions"].items() if version]
    units = {"flops": "GFLOP/s", "bytes": "GB/s", "exps": "Gexp/s"}
    able = [f"{rate / 1e9:,.1f} {units[what]}" for what, rate in ceilings.items()]
    head = [
        "# Benchmarks",
        "",
        f"{place['date']}, {place['processor']}, {place['cores']} cores, {place['device']}"
        + (", quick run: the figures mean little" if place["quick"] else "")
        + f". {', '.join(present)}. Not installed: {', '.join(absent) or 'none'}.",
        "",
        f"Ceilings, measured in the same run: {', '.join(able)}.",
        "",
        f"Targets met: {sum(bool(row.met) for row in held)} of {len(held)}. A ratio is the side's "
        "time over genjax's, the median over rounds in which the sides took turns; spread is the "
        "distance of the quartiles over the median; the share of the ceiling is the least time "
        "that the work takes at the machine's rates over the time that it took.",
        "",
    ]
    return "\n".join(head) + "\n" + _table.markdown(rows, ceilings)


def main(config: Config) -> dict[str, list[_table.Row]]:
    """Run what is asked and write the table; returns the rows by workload."""
    chosen, place = jobs(config), machine(config)
    for peer, version in place["versions"].items():
        if version is None:
            print(f"# {peer} is not installed: its rows are left out")
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "benchmarks.json"
    parts: dict[str, list[_table.Row]] = {}
    if path.exists():
        before = json.loads(path.read_text())
        parts = {k: [_table.Row(**row) for row in v] for k, v in before["workloads"].items()}
    for name, job in chosen.items():
        begun = time.monotonic()
        parts[name] = run(name, job, config)
        print(f"# {name}: {time.monotonic() - begun:.0f} s", flush=True)
        ordered = [k for k in [*JOBS, *parts] if k in parts]
        parts = {k: parts[k] for k in dict.fromkeys(ordered)}
        rows = {k: [dataclasses.asdict(row) for row in v] for k, v in parts.items()}
        path.write_text(json.dumps({**place, "workloads": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(report(place, parts))
    print(f"in {config.out}: benchmarks.md, benchmarks.json")
    return parts


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
