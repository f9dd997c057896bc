"""What every experiment shares: common options, the run's folder, the loop, and the summary."""

import dataclasses
import difflib
import fcntl
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._command import USAGE, experiment_of, read, resume_command, runs_of
from experiments._config import MAY_DIFFER, RunConfig, TrainConfig
from genjax import checks
from genjax.data import NotPreparedError
from genjax.training import (
    CheckpointError,
    Checkpoints,
    NonFiniteError,
    Stopped,
    initialize_distributed,
    loop,
)


class RunError(RuntimeError):
    """A run cannot begin or go on; the message says what to do."""


@dataclasses.dataclass
class Run:
    """A run that has its folder, and the folder's lock until `close`."""

    config: Any
    folder: Path
    lock: Any
    begun: float
    checkpoints: Checkpoints | None = None
    training_seconds: float = 0.0
    first_call_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    steps_done: int | None = None
    ended_by_budget: bool = False

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Stopped):  # of runs inside a run the outermost is the one to resume
            error.resume = resume_command(self.config, self.folder)
        self.close()

    def close(self) -> None:
        """Let orbax's threads end and let go of the folder."""
        try:
            if self.checkpoints is not None:
                self.checkpoints.close()
        finally:
            if self.lock is not None:
                self.lock.close()


def launch(main: Callable[[Any], Any], config_type: type) -> None:
    """Read the command line into the Config and run main. What the user can mend ends in one line
    instead of a trace: with status 2 a mistake, and so every ValueError, else with 1."""
    config = read(config_type, sys.modules[main.__module__].__doc__)
    keep_compiled_programs()
    try:
        # What trains nothing has no such options.
        given = [getattr(config, name, None) for name in ("coordinator", "processes", "process")]
        if given[0] is not None or "JAX_COORDINATOR_ADDRESS" in os.environ:
            initialize_distributed(*given)
        main(config)
    except Stopped as stop:
        if stop.resume and jax.process_index() == 0:
            print(f"resume with: {stop.resume}", file=sys.stderr, flush=True)
        raise
    except (CheckpointError, NonFiniteError, OSError) as error:
        sys.exit(_one_line(error))
    except (RunError, NotPreparedError, ValueError, ImportError) as error:
        print(_one_line(error), file=sys.stderr, flush=True)
        sys.exit(USAGE)


def _one_line(error: Exception) -> str:
    notes = getattr(error, "__notes__", [])
    return " ".join("; ".join([f"error: {error}", *notes]).split())


def keep_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, so that a second run begins at once.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "genjax" / "jax"))


def start_run(config: RunConfig) -> Run:
    """Make (or with resume: open) the run's folder, lock it and write config.json.

    Use the result in a `with`. Raises RunError where the folder is in use, holds another run, or
    cannot be written.
    """
    if isinstance(config, TrainConfig):
        positive = ("steps", "batch_size", "steps_per_call", "accumulate", "save_every", "keep")
        for field in (*positive, "log_every"):
            checks.integer(field, getattr(config, field), 1)
        for field in ("prefetch", "profile"):
            checks.integer(field, getattr(config, field), 0)
        checks.at_least("max_seconds", config.max_seconds, 0)
    if jax.process_count() > 1 and config.run_dir is None:
        raise RunError("several processes need one --run-dir, a folder that all of them see")
    folder = _choose_folder(config)
    if jax.process_index() > 0:  # the first process holds the lock and writes
        return Run(config, folder, None, time.monotonic())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        raise RunError(
            f"run folder {folder} cannot be written ({error.strerror}): give another --run-dir"
        ) from error
    try:
        _write_config(config, folder)
    except BaseException:
        lock.close()
        raise
    print(f"run folder: {folder}", flush=True)
    return Run(config, folder, lock, time.monotonic())


def fit(
    run: Run,
    state: Any,
    step_fn: Callable[..., Any],
    batches: Callable[[int], Any],
    *,
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    best: str | None = None,
) -> Any:
    """Train to `config.steps` and return the last state; resumes where the config says so.

    With `config.max_seconds` it may end earlier; the summary then says so (`ended_by_budget`), and
    before it training.json, which is written when training has ended.

    batches(step) is the batch of one step. evaluate(state) gives named numbers; the checkpoint
    where `best` among them is smallest is kept, see `best_state`.
    """
    config = run.config
    run.checkpoints = Checkpoints(run.folder / "checkpoints", keep=config.keep, best=best)
    if config.resume:
        found = run.checkpoints.restore(state)
        print(f"resumed at step {found[0]}" if found else "no checkpoint yet: from the start")
        state = found[1] if found else state
    begun, timings = time.monotonic(), {}
    profile = Profile(run.folder / "profile", -(-config.profile // config.steps_per_call))

    @functools.wraps(step_fn)  # with what the loop asks a compiled step for
    def timed(state: Any, batch: Any) -> Any:
        """The step; the first call, which compiles, is waited for and timed."""
        result = step_fn(state, batch)
        if not run.first_call_seconds:
            jax.block_until_ready(result)
            run.first_call_seconds = time.monotonic() - begun
        profile.after_call(result)
        return result

    try:
        state = loop.fit(
            state,
            timed,
            batches,
            num_steps=config.steps,
            folder=run.folder,
            checkpoints=run.checkpoints,
            save_every=config.save_every,
            steps_per_call=config.steps_per_call,
            log_every=config.log_every,
            evaluate=evaluate,
            evaluate_every=config.evaluate_every,
            tensorboard=config.tensorboard,
            progress=config.progress,
            max_seconds=config.max_seconds,
            prefetch=config.prefetch,
            timings=timings,
        )
    except Stopped as stop:
        print(stop.message, file=sys.stderr, flush=True)
        raise
    finally:
        profile.end()
    run.data_wait_seconds = timings["data_wait_seconds"]
    run.training_seconds = time.monotonic() - begun
    run.steps_done = int(state.step)
    run.ended_by_budget = run.steps_done < config.steps
    if jax.process_index() == 0:
        write_json(run.folder / "training.json", _progress(run))
    if run.ended_by_budget:
        print(f"max_seconds ended training after {run.steps_done} of {config.steps} steps")
    return state


class Profile:
    """A trace of the calls after the first one: so many of them, or up to the end of training."""

    def __init__(self, folder: Path, calls: int):
        self.folder, self.calls, self.count = folder, calls if jax.process_index() == 0 else 0, 0

    def after_call(self, result: Any) -> None:
        self.count += 1
        if self.count == 1 and self.calls:
            jax.profiler.start_trace(str(self.folder))
        elif self.count == self.calls + 1 and self.calls:
            jax.block_until_ready(result)
            self.end()

    def end(self) -> None:
        """Write the trace that is under way, if there is one."""
        if self.calls and self.count:
            self.calls = 0
            jax.profiler.stop_trace()
            print(f"trace in {self.folder}", flush=True)


def best_state(run: Run, like: Any) -> Any:
    """Read the state with the best evaluation; `like` itself where none was saved."""
    found = run.checkpoints.restore_best(like) if run.checkpoints is not None else None
    return like if found is None else found[1]


def batches(config: TrainConfig, arrays: Any) -> Callable[[int], Any]:
    """Give the batch of each step: a function of (seed, step), this process' share of it."""
    from genjax.data import batch_at

    return lambda step: batch_at(
        arrays,
        seed=config.seed,
        step=step,
        batch_size=config.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def finish(run: Run, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Write summary.json (with seconds and peak memory), say where things are, end the run."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    full = {
        **{key: _plain(value) for key, value in summary.items()},
        "seconds": round(time.monotonic() - run.begun, 3),
        **_progress(run),
        "peak_memory_mb": round(used / (1024 * (1024 if sys.platform == "darwin" else 1)), 1),
        **({} if device is None else {"peak_device_memory_mb": round(device / 2**20, 1)}),
    }
    if jax.process_index() > 0:
        run.close()
        return full
    write_json(run.folder / "summary.json", full)
    run.close()
    for key, value in full.items():
        print(f"  {key}: {value:.4f}" if isinstance(value, float) else f"  {key}: {value}")
    pictures = sorted(path.name for path in run.folder.glob("*.png"))
    print(f"in {run.folder}: {', '.join(['summary.json', 'metrics.jsonl', *pictures])}", flush=True)
    return full


def _progress(run: Run) -> dict[str, Any]:
    """What the summary says of the training."""
    if run.steps_done is None:
        return {"training_seconds": round(run.training_seconds, 3)}
    return {
        "training_seconds": round(run.training_seconds, 3),
        "first_call_seconds": round(run.first_call_seconds, 3),
        "data_wait_seconds": round(run.data_wait_seconds, 3),
        "steps_done": run.steps_done,
        "ended_by_budget": run.ended_by_budget,
    }


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


def _plain(value: Any) -> Any:
    """Make JSON of numbers, arrays and containers of them; not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _choose_folder(config: RunConfig) -> Path:
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


def _lock(folder: Path) -> Any:
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


def _write_config(config: RunConfig, folder: Path) -> None:
    """Write config.json, or with resume check that it is the same run."""
    path = folder / "config.json"
    now = {"experiment": experiment_of(config), **_plain(dataclasses.asdict(config))}
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
