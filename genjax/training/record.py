"""What a run writes down while it trains: metrics.jsonl always, TensorBoard when asked."""

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EVALUATION = "eval/"


def local_folder(folder: str | os.PathLike) -> Path:
    """The folder as a path; raises ValueError for an address (gs://...), which Path would take for
    a local folder of that name."""
    if re.match(r"\w{2,}:/", str(folder)):  # pathlib makes one slash of two
        raise ValueError(f"folder must be a local one, got {str(folder)!r}")
    return Path(folder)


class MetricsLog:
    """metrics.jsonl in the run's folder: one JSON object a line, the newest last.

    Line n of training is the update from step n to n + 1, made with batch n; keys of an
    evaluation begin with "eval/". Numbers that are not finite are written as null. Opening at a
    later step drops the lines that are about to be written again, and a torn last line.
    """

    def __init__(self, folder: str | os.PathLike, *, start: int = 0, tensorboard: bool = False):
        folder = local_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._board = _summary_writer(folder, start) if tensorboard else None
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if _is_before(line, start)]
        self._offset = _seconds(kept[-1]) if kept else 0.0
        partial = self.path.with_name(".metrics.jsonl")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self.path)
        self._file = open(self.path, "a")  # noqa: SIM115 (closed by close)
        self._begun = self._flushed = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, those before a resume included."""
        return self._offset + time.monotonic() - self._begun

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line; it reaches the disk within about a second."""
        numbers = {name: float(value) for name, value in values.items()}
        clean = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        self._file.write(
            json.dumps({"step": step, **clean, "seconds": round(self.seconds, 3)}) + "\n"
        )
        if time.monotonic() - self._flushed > 1:
            self.flush()
        if self._board is not None:
            for name, x in numbers.items():
                self._board.add_scalar(name, x, step)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            # Python's own message does not say which file.
            raise OSError(
                error.errno, f"{error.strerror}; make room, then resume", str(self.path)
            ) from error
        self._flushed = time.monotonic()
        if self._board is not None:
            self._board.flush()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        # What ended the training says more than a log that cannot be closed.
        with contextlib.suppress(*([] if kind is None else [OSError])):
            self.close()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl that are whole; none where there is no file."""
    if not Path(path).exists():
        return []
    lines = []
    for text in Path(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _seconds(line: Mapping[str, Any]) -> float:
    """The seconds of a line that may hold anything there."""
    value = line.get("seconds")
    return value if isinstance(value, float) and math.isfinite(value) else 0.0


def _is_before(line: Mapping[str, Any], start: int) -> bool:
    evaluation = any(name.startswith(EVALUATION) for name in line)
    return line["step"] < start + evaluation


def _summary_writer(folder: Path, start: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard was asked for but tensorboardX is not installed: install the extra "
            "'tensorboard', or go without (metrics.jsonl holds the same numbers)"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=start)
