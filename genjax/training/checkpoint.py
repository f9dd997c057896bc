"""Checkpoints by orbax: atomic, asynchronous, checked by checksum.

A checkpoint is the whole state as host arrays by their names, so it does not know how many devices
wrote it and in which layout, and a record of every array's type, shape and checksum. What does not
agree with its record, or with the state that is asked for, is refused.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax import checks
from genjax.training.record import EVALUATION, local_folder
from genjax.training.state import check_layout, is_key, leaf_name

__all__ = ["CheckpointError", "Checkpoints"]

log = logging.getLogger("genjax")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those that exist can be read."""


class Checkpoints:
    """The checkpoints of one run in one folder, named by their step.

    keep: how many of the newest stay. best: a metric's name, with or without the "eval/" of
    `fit`; the checkpoint where it is smallest (largest with mode="max"; the first of equal ones)
    stays too. A metric that is not finite is never the best. Saving returns once the state is
    copied and goes on in the background; `wait` (or the next save) raises what went wrong there.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 3,
        best: str | None = None,
        mode: str = "min",
    ):
        checks.integer("keep", keep, 1)
        checks.one_of("mode", mode, ("min", "max"))
        self.folder, self.keep, self.best, self.mode = local_folder(folder), keep, best, mode
        self.folder = self.folder.absolute()
        self._writer: Any = None
        self._saved: int | None = None

    def steps(self) -> list[int]:
        """List the steps that have a finished checkpoint (whole or not), in order."""
        if not self.folder.is_dir():
            return []
        names = [path.name for path in self.folder.iterdir() if path.name.isdecimal()]
        return sorted(int(name) for name in names if str(int(name)) == name)

    def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Begin to save the state under its step; a step that is just saved is not saved again.

        Every leaf comes back as it was: arrays of any number type (jax or numpy, empty ones too),
        PRNG keys, Python numbers. Raises TypeError by name for any other leaf. Without metrics it
        is no candidate for the best. Raises ValueError where they lack it.
        """
        if step == self._saved:
            return
        ocp = _orbax()

        record = _layout(state)
        arrays = dict(zip(record, to_host(state), strict=True))
        if not arrays:
            raise ValueError("state must hold at least one array, got none")
        for name, x in arrays.items():
            if x.dtype.kind not in "biufcV" or x.dtype.names:
                raise TypeError(f"{name} cannot be saved: {record[name][0]} is not a number")
            record[name].append(_checksum(x))
        # orbax wants plain JSON.
        numbers = None if metrics is None else {k: float(v) for k, v in metrics.items()}
        if numbers is not None and self.best is not None:
            self._score(numbers)
        self.wait()
        try:
            if self._writer is None:
                self._remove_partial()
                self.folder.mkdir(parents=True, exist_ok=True)
                # Else orbax's threads wait for folders that could not be made, and for minutes
                # the process cannot end.
                options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
                self._writer = ocp.AsyncCheckpointer(
                    ocp.CompositeCheckpointHandler(), async_options=options
                )
            self._writer.save(
                self.folder / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave({n: _stored(x) for n, x in arrays.items()}),
                    record=ocp.args.JsonSave({"leaves": record, "metrics": numbers}),
                ),
            )
        except Exception as error:
            raise self._failed(step, error) from error
        self._saved = step

    def wait(self) -> None:
        """Wait until what was begun is on the disk, then remove what need not stay."""
        if self._writer is not None:
            try:
                self._writer.wait_until_finished()
            except Exception as error:
                raise self._failed(self._saved, error) from error
            self._prune()

    def close(self) -> None:
        """Wait, then let orbax's threads end."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                writer, self._writer = self._writer, None
                writer.close()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Read the newest whole checkpoint: (step, state), or None where there are none at all.

        `like` is a state of the same run, for its structure, types and devices. A newer checkpoint
        that is damaged or foreign is passed over with a warning and moved aside, so that its step
        can be saved again. Raises CheckpointError, naming each reason, where none can be read.
        """
        self.wait()
        found = self._first_whole([*reversed(self.steps())], like)
        if found is not None:
            self._saved = found[0]  # it is on the disk: an error before the next step saves nothing
        return found

    def restore_best(self, like: Any) -> tuple[int, Any] | None:
        """Read the checkpoint with the best metric; None where none has it and finite.

        One that is damaged is passed over as in `restore`, for the next best.
        """
        if self.best is None:
            raise ValueError("best must name a metric when the Checkpoints are made, got None")
        self.wait()
        best = self._from_the_best()
        others = [step for step in reversed(self.steps()) if step not in best]
        found = self._first_whole([*best, *others], like) if best else None
        return found if found is not None and found[0] in best else None

    def _first_whole(self, steps: Sequence[int], like: Any) -> tuple[int, Any] | None:
        """The first of the steps that can be read; those before it are moved aside. Raises
        CheckpointError where none can be."""
        reasons: dict[int, str] = {}
        for step in steps:
            try:
                state = self.read(step, like)
            except CheckpointError as error:
                reasons[step] = str(error)
                continue
            for bad, reason in reasons.items():
                aside = self._move_aside(bad)
                log.warning("%s; moved to %s; going back to step %d", reason, aside, step)
            return step, state
        if reasons:
            listed = "\n  ".join(reasons.values())
            raise CheckpointError(f"no checkpoint in {self.folder} can be read:\n  {listed}")
        return None

    def read(self, step: int, like: Any) -> Any:
        """Read one checkpoint into the structure and devices of `like`; checks every array."""
        ocp = _orbax()

        path = self.folder / str(step)
        name = f"checkpoint {path}"
        try:
            found = self._read_record(step)["leaves"]
            check_layout(found, _layout(like))
        except Exception as error:
            raise CheckpointError(f"{name} is not of this run or is damaged: {error}") from error
        arrays = dict(zip(_layout(like), to_host(like, empty=True), strict=True))
        try:
            with ocp.StandardCheckpointer() as reader:
                stored = {leaf: _stored(x) for leaf, x in arrays.items()}
                stored = reader.restore(path / "state", stored)
        except Exception as error:
            raise CheckpointError(f"{name} is damaged: {_reason(error)}") from error
        for leaf, x in arrays.items():
            arrays[leaf] = _unstored(stored[leaf], x)
            if [_checksum(arrays[leaf])] != found[leaf][2:]:
                raise CheckpointError(f"{name} is damaged: the checksum of {leaf} does not agree")
        return from_host([*arrays.values()], like)

    def _score(self, metrics: Mapping[str, float]) -> float:
        for name in (f"{self.best}", f"{EVALUATION}{self.best}"):
            if name in metrics:
                return metrics[name]
        raise ValueError(f"metrics must hold best = {self.best!r}, got {sorted(metrics)}")

    def _from_the_best(self) -> list[int]:
        """The steps that have a score, the best first."""
        scores = {}
        for step in self.steps() if self.best is not None else []:
            # Left out where it is damaged, or was saved without an evaluation.
            with contextlib.suppress(Exception):
                scores[step] = float(self._score(self._read_record(step)["metrics"]))
        # NaN compares false with everything: min and max would keep it where it comes first.
        scores = {step: score for step, score in scores.items() if math.isfinite(score)}
        return sorted(scores, key=lambda step: scores[step], reverse=self.mode == "max")

    def _prune(self) -> None:
        """Remove all but the newest and the best; the first process does it for all."""
        for step in self.steps()[: -self.keep] if jax.process_index() == 0 else []:
            if step not in self._from_the_best()[:1]:
                shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def _remove_partial(self) -> None:
        """Remove what a killed or failed save left half written."""
        for path in self.folder.glob("*.orbax-checkpoint-tmp*") if jax.process_index() == 0 else []:
            shutil.rmtree(path, ignore_errors=True)

    def _read_record(self, step: int) -> Any:
        path = self.folder / str(step) / "record"
        if not path.is_dir():
            raise FileNotFoundError("it has no record of its contents")
        return json.loads((path / "metadata").read_text())

    def _move_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint to a name that nothing takes for a step."""
        place = self.folder.with_name(self.folder.name + "-damaged")
        if jax.process_index() == 0:
            place.mkdir(exist_ok=True)
            target = place / str(step)
            while target.exists():
                target = target.with_name(target.name + "-again")
            (self.folder / str(step)).rename(target)
        return place

    def _failed(self, step: int | None, error: Exception) -> CheckpointError:
        """Clear away what is half written (the disk may be full) and say what still stands."""
        writer, self._writer, self._saved = self._writer, None, None
        with contextlib.suppress(Exception):
            writer.close()
        self._remove_partial()
        whole = [s for s in self.steps() if s != step]
        kept = f"the newest whole one is step {whole[-1]}" if whole else "there is no earlier one"
        return CheckpointError(
            f"checkpoint {step} could not be saved in {self.folder}: {_reason(error)}; {kept}. "
            "Make room (or the folder writable), then resume"
        )


def _reason(error: Exception) -> str:
    """Say in a line what went wrong; of the long texts of tensorstore what the system said."""
    text = str(error).strip() or type(error).__name__
    system = re.search(r": ([^:\[\]\"]+) \[(?:os_error_code|tensorstore_spec)", text)
    return system[1] if system else text.splitlines()[0][:200]


def _orbax() -> Any:
    """Import orbax, and keep it from printing what is raised here in one line anyway.

    It logs an error several times with long traces. When one array fails it closes its event loop.
    Tensorstore reports further failures to the closed loop, as exceptions that nobody can catch,
    and asyncio logs those that nobody retrieves.
    """
    with checks.extra("train", "Checkpoints"):
        import orbax.checkpoint as ocp

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_from_elsewhere)
    if getattr(sys.unraisablehook, "__name__", "") != "_no_stragglers":
        before = sys.unraisablehook

        def _no_stragglers(unraisable: Any) -> None:
            if "Event loop is closed" not in str(unraisable.exc_value):
                before(unraisable)

        sys.unraisablehook = _no_stragglers
    return ocp


def _from_elsewhere(record: logging.LogRecord) -> bool:
    # asyncio names the file of a failed task in its message.
    task = record.getMessage() if record.name == "asyncio" else ""
    return "orbax" not in record.pathname + task


def to_host(tree: Any, empty: bool = False) -> list[np.ndarray]:
    """Copy the leaves to numpy arrays (keys as their data); only their layout where `empty`.

    A copy, not a view: the next step is given the buffers back while the disk is still busy.
    """

    def copy(x: Any) -> np.ndarray:
        x = jax.random.key_data(x) if is_key(x) else x
        if not empty and not getattr(x, "is_fully_addressable", True) and not x.is_fully_replicated:
            from jax.experimental import multihost_utils

            x = multihost_utils.process_allgather(x, tiled=True)  # into the host's memory
        return np.empty(x.shape, x.dtype) if empty and hasattr(x, "dtype") else np.array(x)

    return [copy(x) for x in jax.tree.leaves(tree)]


def from_host(arrays: list[np.ndarray], like: Any) -> Any:
    """Make of host arrays what the leaves of `like` are, on the same devices."""

    def put(x: np.ndarray, old: Any) -> Any:
        if isinstance(old, np.ndarray | np.generic):
            return x if isinstance(old, np.ndarray) else x[()]
        if not hasattr(old, "dtype"):
            return type(old)(x.item())
        if is_key(old):
            new = jax.random.wrap_key_data(jnp.array(x), impl=jax.random.key_impl(old))
            return jax.device_put(new, old.sharding) if getattr(old, "committed", False) else new
        if not getattr(old, "committed", False):
            return jnp.array(x)
        # Each device is given its part alone; a copy, which may be donated.
        return jax.make_array_from_callback(x.shape, old.sharding, lambda index: np.array(x[index]))

    leaves, structure = jax.tree.flatten(like)
    return structure.unflatten(map(put, arrays, leaves))


def _layout(tree: Any) -> dict[str, list]:
    """The type and the shape of every leaf, by its name; raises ValueError where two share one."""
    found: dict[str, list] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = leaf_name(path)
        if name in found:
            raise ValueError(f"two leaves of the state have the name {name!r}")
        found[name] = [str(getattr(x, "dtype", type(x).__name__)), list(np.shape(x))]
    return found


def _stored(x: np.ndarray) -> np.ndarray:
    """The array itself, or where orbax does not take it (empty, bfloat16, int4) its bytes and 0."""
    if x.size and x.dtype.isbuiltin == 1 and x.dtype.char in "?bBhHiIlLqQefdFD":
        return x
    return np.frombuffer(x.tobytes() + b"\0", np.uint8)


def _unstored(stored: np.ndarray, like: np.ndarray) -> np.ndarray:
    if stored.dtype == like.dtype and stored.shape == like.shape:
        return stored
    return np.frombuffer(bytearray(stored[:-1]), like.dtype).reshape(like.shape)


def _checksum(x: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(x).tobytes(), digest_size=16).hexdigest()
