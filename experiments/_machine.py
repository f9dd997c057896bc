"""Where a run is made and with what: devices, versions, commit; and how a start says so."""

import functools
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import genjax

ROOT = Path(__file__).parents[1]


def machine(num_devices: int | None = None) -> dict[str, Any]:
    """What machine.json and summary.json hold. num_devices: how many are used (default: all)."""
    devices = jax.devices()
    return {
        "devices": len(devices) if num_devices is None else num_devices,
        "of_devices": len(devices),
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "genjax": genjax.__version__,
        "commit": commit(),
    }


@functools.cache
def commit(root: Path = ROOT) -> str | None:
    """The commit of the checkout, with "-dirty" where its files differ from it; None where it is
    no git repository."""
    if not (root / ".git").exists():
        return None
    line = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(line, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def start_line(found: Mapping[str, Any]) -> str:
    """The facts of `machine` as a start says them."""
    used, there = found["devices"], found["of_devices"]
    count = f"{used}" if used == there else f"{used} of {there}"
    kind = "" if found["device"] == found["platform"] else f" ({found['device']})"
    parts = [f"on {count} {found['platform']} device{'s' if there > 1 else ''}{kind}"]
    parts += [f"{found['processes']} processes"] if found["processes"] > 1 else []
    parts += [f"jax {found['jax']}", f"genjax {found['genjax']}"]
    return ", ".join([*parts, *([f"commit {found['commit']}"] if found["commit"] else [])])
