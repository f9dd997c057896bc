"""A run's folder: its place, its lock, config.json, and how files are written into it."""

import dataclasses
import difflib
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._command import experiment_of, runs_of
from experiments._config import MAY_DIFFER, RunConfig


class RunError(RuntimeError):
    """A run cannot begin or go on; the message says what to do."""


def choose_folder(config: RunConfig) -> Path:
    if config.run_dir is not None:
        if "://" in config.run_dir:
            raise RunError(f"--run-dir must be a local folder, got {config.run_dir!r}")
        return Path(config.run_dir).absolute()
    above, numbers = runs_of(experiment_of(config))
    if not getattr(config, "resume", False):
        return above / str(numbers[-1] + 1 if numbers else 1)
    if not numbers:
        raise RunError(f"nothing to resume in {above}: start without --resume")
    return above / str(numbers[-1])


def take_lock(folder: Path) -> Any:
    """Take the folder's lock: it ends with the process, however that ends."""
    file = open(folder / "lock", "a+")  # noqa: SIM115 (held while the run lasts)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise RunError(
            f"run folder {folder} is in use by process {holder}: wait, or give another --run-dir"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def write_config(config: RunConfig, folder: Path) -> None:
    """Write config.json, or with resume check that it is the same run."""
    path = folder / "config.json"
    now = {"experiment": experiment_of(config), **plain(dataclasses.asdict(config))}
    if path.exists():
        if not getattr(config, "resume", False):
            again = "go on with --resume, or " if hasattr(config, "resume") else ""
            raise RunError(f"{folder} already holds a run: {again}give another --run-dir")
        _check_same(path, now, (*MAY_DIFFER, *type(config).evaluation))
    write_json(path, now)


def read_config(path: Path, remedy: str = "mend it, or start anew") -> dict[str, Any]:
    """Read a run's config.json; raises RunError where it is no object."""
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored, dict):
            raise ValueError("not an object")
    except (ValueError, OSError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({error}): {remedy}") from error
    return stored


def _check_same(path: Path, now: Mapping[str, Any], free: Sequence[str]) -> None:
    before = read_config(path)
    for field in before.keys() | now.keys():
        if field not in now:
            near = difflib.get_close_matches(field, now, n=1)
            raise RunError(f"{path} has the unknown field {field!r}; nearest: {near or 'none'}")
        if field not in free and before.get(field, now[field]) != now[field]:
            raise RunError(
                f"{path} has {field} = {before[field]!r}, got {now[field]!r}: "
                "resume with the options that the run began with"
            )


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is whole or not there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(value, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        # Python's own message does not always say which file.
        raise OSError(
            error.errno, f"{error.strerror}; make room, then resume", str(path)
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Write texts one below the other, with a rule between them."""
    path.write_text(f"\n{'-' * 80}\n".join(texts) + "\n")


def plain(value: Any) -> Any:
    """Make JSON of numbers, arrays and containers of them; not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
