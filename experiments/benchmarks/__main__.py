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

import genjax
from experiments.__main__ import experiments
from experiments.benchmarks import _table
from experiments.benchmarks._workload import launch
from genjax import checks

PEERS = ("jax", "torch", "ott-jax", "POT", "geomloss", "flowjax", "distrax", "zuko", "nflows",
         "torchcfm", "torchdiffeq", "diffrax", "diffusers", "transformers",
         "vector-quantize-pytorch")  # fmt: skip
UNITS = {"flops": "GFLOP/s", "bytes": "GB/s", "exps": "Gexp/s"}


class Job(NamedTuple):
    """A benchmark module with its options, and what is less in a quick run."""

    module: str
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    quick: dict[str, Any] = {}  # noqa: RUF012


COMPILE = {"problem": "compile", "n": (1024,), "d": (2,), "eps": (0.01,), "peers": ("ott",)}
OVERHEAD = {"workloads": ("step_overhead",), "rounds": 60}
CNF = {"workloads": ("cnf_loglik", "cnf_grad", "cnf64_grad")}
SMALL = {"n": (256,), "eps": (0.1, 0.01), "rounds": 3}
OTT = ("ott", "ott-momentum", "ott-anderson")
PEERS_OF_OT = {"peers": (*OTT, "pot", "geomloss"), "seconds": 8.0}
LARGE = {"n": (4096,), "peers": (*OTT, "geomloss"), "rounds": 3, "seconds": 20.0}
TWO = {"n": (256, 1024), "eps": (0.01,), "peers": ("ott", "ott-momentum", "geomloss")}
JOBS: dict[str, Job] = {
    "ceilings": Job("_ceilings", {}, {"rounds": 5}),
    "sinkhorn_256": Job("sinkhorn", {"n": (256,), **PEERS_OF_OT}, SMALL),
    "sinkhorn_1024": Job("sinkhorn", {"n": (1024,), **PEERS_OF_OT}, SMALL | {"d": (2,)}),
    "sinkhorn_4096": Job("sinkhorn", LARGE, SMALL | {"n": (2048,), "d": (2,)}),
    "sinkhorn_divergence": Job("sinkhorn", {"problem": "divergence", **TWO}, SMALL),
    "unbalanced": Job("unbalanced", {}, {"n": (256,), "rounds": 2}),
    "sinkhorn_compile": Job("sinkhorn", COMPILE, {"n": (256,), "rounds": 2}),
    "vae": Job("vae", {"workloads": ("vae",)}, {"rounds": 3, "steps": 20}),
    "wgan_gp": Job("wgan_gp", {}, {"rounds": 3, "width": 16}),
    "stylegan": Job("stylegan", {}, {"rounds": 2, "width": 16, "batch_size": 4}),
    "realnvp": Job("flows", {}, {"rounds": 3}),
    "continuous_flow": Job("flow_paths", CNF, {"rounds": 3}),
    "flow_matching": Job("flow_paths", {"workloads": ("fm", "fm_ot")}, {"rounds": 3}),
    "unet": Job("unet", {}, {"rounds": 2, "sample_rounds": 2, "batch_size": 2}),
    "state_space": Job("state_space", {}, {"rounds": 2, "lengths": (256,)}),
    "metrics": Job("metrics", {}, {"rounds": 2, "samples": 1000, "width": 128}),
    "vector_quantisation": Job("vector_quantisation", {}, {"rounds": 2, "steps": 3}),
    "language": Job("language", {}, {"rounds": 2, "batch_size": 2, "tokens": 8}),
    "pixelcnn": Job("pixelcnn", {}, {"rounds": 2}),
    "alignment": Job("alignment", {}, {"rounds": 2, "vocabulary": 1000, "steps": 64}),
    "step_overhead": Job("vae", OVERHEAD, {"rounds": 6}),
    "depth": Job("depth", {}, {"networks": ("mlp", "tarflow")}),
    "scaling": Job("scaling", {}, {"devices": (1, 2), "processes": ()}),
}


@dataclasses.dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()
    """Which to run (default: all): a name from the list that a wrong one prints, or "startup"."""
    device: Literal["cpu", "gpu"] = "cpu"
    """Where jax computes; on a gpu PyTorch's peers, whose tensors are on the CPU, are left out."""
    quick: bool = False
    """Fewer rounds and smaller sizes: to see that everything runs, not for figures."""
    out: Path = Path("runs/benchmarks")  # folder of benchmarks.md and benchmarks.json
    timeout: float = 3600.0  # seconds after which a workload is given up


def jobs(config: Config) -> dict[str, Job]:
    """Choose what to run; raises ValueError for a name that is none."""
    names = [name.rsplit(".", 1)[1] for name in experiments() if name.count(".") == 1]
    startup = {f"startup_{name}": Job("_startup", {"experiment": name}) for name in names}
    all_jobs = JOBS | startup
    groups = {"startup": ["startup_vae"] if config.quick else list(startup)}
    chosen = config.only or (*JOBS, "startup")
    wanted = [name for given in chosen for name in groups.get(given, [given])]
    for name in wanted:
        checks.one_of("only", name, [*JOBS, *groups, *startup])
    # Shares of the ceilings need the ceilings of this run.
    return {name: all_jobs[name] for name in dict.fromkeys(["ceilings", *wanted])}


def run(name: str, job: Job, config: Config) -> list[_table.Row]:
    """Run one workload in a process of its own; what goes wrong there becomes a row."""
    options = json.dumps({**job.options, **(job.quick if config.quick else {})})
    platforms = "cpu" if config.device == "cpu" else "cuda,cpu"
    environment = {"PYTHONWARNINGS": "ignore", **os.environ, "JAX_PLATFORMS": platforms}
    worker = [sys.executable, "-m", "experiments.benchmarks._worker", job.module, options]
    watch: Any = {"timeout": config.timeout, "stderr": subprocess.PIPE, "text": True, "check": True}
    with tempfile.NamedTemporaryFile() as file:
        try:
            subprocess.run([*worker, file.name], env=environment, **watch)
            return [_table.Row(**row) for row in json.load(file)]
        except subprocess.TimeoutExpired:
            why = f"given up after {config.timeout:.0f} s"
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines()[::-1] or ["no message"]
            why = next((x for x in lines if re.match(r"[\w.]+(Error|Exception)", x)), lines[0])
    print(f"# {name} failed: {why}", flush=True)
    return [_table.Row(name, "", _table.OURS, note=f"failed: {why}"[:200])]


def machine(config: Config) -> dict[str, Any]:
    """Say where and with what the rows were measured."""
    found = {
        x.name.lower().replace("_", "-"): x.version for x in importlib.metadata.distributions()
    }
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search("model name.*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "date": datetime.date.today().isoformat(),
        "device": config.device,
        "processor": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "quick": config.quick,
        "versions": {"genjax": genjax.__version__, **{x: found.get(x.lower()) for x in PEERS}},
    }


def report(place: dict[str, Any], parts: dict[str, list[_table.Row]]) -> str:
    """Write the markdown: where, what the machine can do, what was missed, and the rows."""
    measured = parts.get("ceilings", [])
    ceilings = {row.side: row.checks["per_second"] for row in measured if row.checks}
    rows = [row for name, part in parts.items() if name != "ceilings" for row in part]
    held = [row.met for row in rows if row.met is not None]
    absent = [name for name, version in place["versions"].items() if version is None]
    present = [f"{name} {version}" for name, version in place["versions"].items() if version]
    able = [f"{rate / 1e9:,.1f} {UNITS[what]}" for what, rate in ceilings.items()]
    quick = ", quick run: the figures mean little" if place["quick"] else ""
    return f"""# Benchmarks

{place["date"]}, {place["processor"]}, {place["cores"]} cores, {place["device"]}{quick}. \
{", ".join(present)}. Not installed: {", ".join(absent) or "none"}.

Ceilings, measured in the same run: {", ".join(able)}.

Targets met: {sum(held)} of {len(held)}. In short, those that are missed in bold:

{_table.summary(rows)}
All columns. A ratio is the side's time over genjax's, the median over rounds in which the sides \
took turns; spread is the distance of the quartiles over the median; the share of the ceiling is \
the least time that the work takes at the machine's rates over the time that it took.

{_table.markdown(rows, ceilings)}"""


def main(config: Config) -> dict[str, list[_table.Row]]:
    """Run what is asked and write the table; returns the rows by workload."""
    chosen, place = jobs(config), machine(config)
    for peer in (peer for peer, version in place["versions"].items() if version is None):
        print(f"# {peer} is not installed: its rows are left out")
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "benchmarks.json"
    kept = json.loads(path.read_text())["workloads"] if path.exists() else {}
    parts = {name: [_table.Row(**row) for row in rows] for name, rows in kept.items()}
    for name, job in chosen.items():
        begun = time.monotonic()
        parts[name] = run(name, job, config)
        print(f"# {name}: {time.monotonic() - begun:.0f} s", flush=True)
        parts = {k: parts[k] for k in dict.fromkeys([*JOBS, *parts]) if k in parts}
        rows = {k: _table.to_json(v) for k, v in parts.items()}
        path.write_text(json.dumps({**place, "workloads": rows}, indent=1) + "\n")
        path.with_suffix(".md").write_text(report(place, parts))
    print(f"in {config.out}: benchmarks.md, benchmarks.json")
    return parts


if __name__ == "__main__":
    launch(main, Config)
