"""Runs of the leaderboard: each in a process of its own, in folders that a later call reuses.

FOLDER/FAMILY/seed0/          the run's own folder
FOLDER/FAMILY/seed0.json      the options that it was made with, and how it ended
FOLDER/FAMILY/seed0.log       what it printed
FOLDER/FAMILY/calibration/    a short run, for the number of steps; steps.json says how many
"""

import contextlib
import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments._run import write_json
from experiments._system import Row

ROOT = Path(__file__).resolve().parents[1]
MANY = 10**7  # more steps than any budget allows


class Outcome(NamedTuple):
    """How a run ended. reason: why it failed, None where it did not."""

    seed: int
    folder: Path
    reason: str | None
    reused: bool


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other call works on the family, which may share its runs with this one."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def obtain(
    family: Row,
    folder: Path,
    options: Mapping[str, Any],
    *,
    seed: int,
    seconds: float,
    calibrate: float,
    timeout: float,
) -> Outcome:
    """Reuse the finished run with these very options, or make it; a failed one is tried again."""
    place, record = folder / f"seed{seed}", folder / f"seed{seed}.json"
    options = {**options, "seed": seed}
    if family.trained:
        options |= {"max_seconds": seconds, "devices": 1}
    # Without the number of steps, which is measured and belongs to the machine.
    wanted = json.loads(json.dumps({**options, "calibrate": calibrate}))
    known = _read(record)
    whole = (place / "summary.json").exists() and (place / "samples.npy").exists()
    if whole and known.get("options") == wanted and known.get("status") == "finished":
        return Outcome(seed, place, None, True)
    reason = None
    if family.trained and calibrate:
        steps, reason = steps_within(family, folder, options, seconds, calibrate, timeout)
        options |= {"steps": steps}
    if reason is None:
        reason = _run(family, place, options, folder / f"seed{seed}.log", timeout)
    if reason is None and not (place / "samples.npy").exists():
        reason = "left no samples.npy"
    status = "finished" if reason is None else "failed"
    write_json(
        record,
        {"options": wanted, "steps": options.get("steps"), "status": status, "reason": reason},
    )
    return Outcome(seed, place, reason, False)


def read(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """What a run left: its samples and its summary."""
    return np.load(folder / "samples.npy", allow_pickle=False), _read(folder / "summary.json")


def steps_within(
    family: Row,
    folder: Path,
    options: Mapping[str, Any],
    seconds: float,
    calibrate: float,
    timeout: float,
) -> tuple[int, str | None]:
    """How many steps the budget allows, from a short run; and why it failed, where it did.

    The short run trains for calibrate * seconds after its first call and is stopped as soon as its
    training has ended. The steps are whole calls, so that nothing is compiled twice. All seeds take
    the number that the first one found.
    """
    stored, place = folder / "calibration" / "steps.json", folder / "calibration" / "run"
    options = {**options, "seed": 0, "steps": MANY, "max_seconds": calibrate * seconds}
    known, wanted = _read(stored), json.loads(json.dumps(options))
    if known.get("options") == wanted:
        return known["steps"], None
    log = folder / "calibration" / "log"
    found: list[Path] = []

    def trained() -> bool:
        # The run's, or that of a run inside it; no deeper, where checkpoints come and go.
        found[:] = [*place.glob("training.json"), *place.glob("*/training.json")]
        return bool(found)

    reason = _run(family, place, options, log, timeout, until=trained)
    if not trained():
        return 0, reason or "the calibration left no training.json"
    training, config = _read(found[0]), _read(found[0].with_name("config.json"))
    per_call = config["steps_per_call"]
    counted = training["training_seconds"] - training["first_call_seconds"]
    rate = max(training["steps_done"] - per_call, 1) / counted
    steps = max(1, round(rate * seconds / per_call)) * per_call
    write_json(stored, {"options": wanted, "steps": steps, "steps_per_second": rate})
    return steps, None


def _run(
    family: Row,
    place: Path,
    options: Mapping[str, Any],
    log: Path,
    timeout: float,
    until: Callable[[], bool] = lambda: False,
) -> str | None:
    """Run the experiment anew in `place`, at most until `until`; the reason where it failed."""
    shutil.rmtree(place, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", family.module, *arguments(options)]
    end = time.monotonic() + timeout
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, "--run-dir", str(place)], cwd=ROOT, stdout=output, stderr=output
        )
        try:
            while process.poll() is None:
                if until():
                    return None
                if time.monotonic() > end:
                    return f"took more than {timeout:g} seconds"
                time.sleep(0.05)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        return last_line(log) or f"ended with status {process.returncode}"
    return None


def arguments(options: Mapping[str, Any]) -> list[str]:
    """The options as they are given on a command line."""
    words = []
    for name, value in options.items():
        if value is None:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{flag}", *map(str, values)]
    return words


def last_line(log: Path, longest: int = 200) -> str:
    """The last thing that a process said: the error, where it ended with one."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if any(c.isalnum() for c in line)]
    return said[-1][:longest].removeprefix("error: ") if said else ""


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or half of one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
