"""What every experiment shares: common options, the run's folder, the loop, and the summary."""

import dataclasses
import functools
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax

from experiments._command import USAGE, read, resume_command
from experiments._config import RunConfig, TrainConfig, check_numbers
from experiments._folder import (
    RunError,
    choose_folder,
    plain,
    read_config,
    take_lock,
    write_config,
    write_json,
    write_texts,
)
from experiments._machine import machine, start_line
from experiments._panels import save_log
from genjax.data import NotPreparedError
from genjax.training import (
    CheckpointError,
    Checkpoints,
    NonFiniteError,
    Stopped,
    initialize_distributed,
    loop,
)

__all__ = [
    "Run",
    "RunConfig",
    "RunError",
    "TrainConfig",
    "batches",
    "best_state",
    "finish",
    "fit",
    "launch",
    "read_config",
    "start_run",
    "write_json",
    "write_texts",
]


@dataclasses.dataclass
class Run:
    """A run that has its folder, and the folder's lock until `close`."""

    config: Any
    folder: Path
    lock: Any
    begun: float
    machine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parameters: int | None = None
    checkpoints: Checkpoints | None = None
    training_seconds: float = 0.0
    first_call_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    steps_done: int | None = None
    ended_by_budget: bool = False
    best_step: int | None = None  # of the state that is reported, where that is not the last

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        stop = error if isinstance(error, Stopped) else _interrupt(error)
        if stop is not None:  # of runs inside a run the outermost is the one to resume
            stop.resume = resume_command(self.config, self.folder)
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
        check_numbers(config)
        # What trains nothing has no such options, and diffusion's `process` is that of its noise.
        given = [getattr(config, name, None) for name in ("coordinator", "processes", "process")]
        given[2] = given[2] if isinstance(given[2], int) else None
        if given != [None] * 3 or "JAX_COORDINATOR_ADDRESS" in os.environ:
            initialize_distributed(*given)
        main(config)
    except Stopped as stop:
        if stop.resume and jax.process_index() == 0:
            print(f"resume with: {stop.resume}", file=sys.stderr, flush=True)
        raise
    except KeyboardInterrupt as stop:
        _end_interrupted(stop)
    except (CheckpointError, NonFiniteError, OSError) as error:
        sys.exit(_one_line(error))
    except (RunError, NotPreparedError, ValueError, ImportError) as error:
        if (stop := _interrupt(error)) is not None:
            _end_interrupted(stop)
        print(_one_line(error), file=sys.stderr, flush=True)
        sys.exit(USAGE)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = str(error).partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0]
        ways = "Take less at once: a smaller --batch-size, or --accumulate, its parts in turn"
        print(_one_line(RunError(f"{why} {ways}")), file=sys.stderr, flush=True)
        sys.exit(USAGE)


def _interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The Ctrl-C that an error is of: jax may turn one into an error of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def _end_interrupted(stop: KeyboardInterrupt) -> NoReturn:
    """End after Ctrl-C outside of the training, which has its own way to stop."""
    resume = getattr(stop, "resume", None)
    print("stopped by SIGINT", file=sys.stderr, flush=True)
    if resume and jax.process_index() == 0:
        print(f"resume with: {resume}", file=sys.stderr, flush=True)
    sys.exit(130)


def _one_line(error: Exception) -> str:
    """The error and its notes; what jax notes is of its own frames."""
    notes = [n for n in getattr(error, "__notes__", []) if "JAX_TRACEBACK_FILTERING" not in n]
    return " ".join("; ".join([f"error: {error}", *notes]).split())


def keep_compiled_programs() -> None:
    """Keep compiled programs in the user's cache folder, so that a second run begins at once.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=0 keeps none.
    """
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "genjax" / "jax"))


def start_run(config: RunConfig) -> Run:
    """Make (or with resume: open) the run's folder, lock it, write config.json and machine.json,
    and say where it is and with what it is made.

    Use the result in a `with`. Raises RunError where the folder is in use, holds another run, or
    cannot be written.
    """
    check_numbers(config)
    if jax.process_count() > 1 and config.run_dir is None:
        raise RunError("several processes need one --run-dir, a folder that all of them see")
    folder = choose_folder(config)
    found = machine(getattr(config, "devices", None))
    if jax.process_index() > 0:  # the first process holds the lock and writes
        return Run(config, folder, None, time.monotonic(), found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder)
    except OSError as error:
        raise RunError(
            f"run folder {folder} cannot be written ({error.strerror}): give another --run-dir"
        ) from error
    try:
        write_config(config, folder)
        write_json(folder / "machine.json", found)
    except BaseException:
        lock.close()
        raise
    print(f"run folder: {folder}", flush=True)
    if not (folder.parent / "config.json").exists():  # a run inside a run has said so
        print(start_line(found), flush=True)
    return Run(config, folder, lock, time.monotonic(), found)


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
        _say(f"resumed at step {found[0]}" if found else "no checkpoint yet: from the start")
        state = found[1] if found else state
    run.parameters = sum(math.prod(jax.numpy.shape(x)) for x in jax.tree.leaves(state.params))
    rest = max(config.steps - int(state.step), 0)
    _say(
        f"{run.parameters:,} parameters, {rest:,} steps to go; compiling"
        if rest
        else "no step left"
    )
    begun, timings = time.monotonic(), {}
    profile = Profile(run.folder / "profile", -(-config.profile // config.steps_per_call))

    @functools.wraps(step_fn)  # with what the loop asks a compiled step for
    def timed(state: Any, batch: Any) -> Any:
        """The step; the first call, which compiles, is waited for and timed."""
        result = step_fn(state, batch)
        if not run.first_call_seconds:
            jax.block_until_ready(result)
            run.first_call_seconds = time.monotonic() - begun
            _say(f"the first call took {run.first_call_seconds:.1f} s, compilation included")
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
        _say(f"max_seconds ended training after {run.steps_done} of {config.steps} steps")
    return state


def _say(text: str) -> None:
    """A line of the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


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
    if found is None:
        return like
    run.best_step = found[0]
    if jax.process_index() == 0:
        write_json(run.folder / "training.json", _progress(run))
    return found[1]


def batches(config: TrainConfig, arrays: Any) -> Callable[[int], Any]:
    """Give the batch of each step: a function of (seed, step), this process' share of it."""
    from genjax.data import batch_at, crop_and_flip

    place, count = jax.process_index(), jax.process_count()
    share = {"batch_size": config.batch_size, "process_index": place, "process_count": count}

    def varied(step: int) -> Any:
        batch = batch_at(arrays, seed=config.seed, step=step, **share)
        if not (config.shift or config.flip):
            return batch
        if getattr(batch.get("x"), "ndim", 0) != 4:
            raise ValueError(f"shift and flip are for images, got {config.dataset!r}")
        how = {"shift": config.shift, "flip": config.flip}
        first = place * len(batch["x"])
        moved = crop_and_flip(batch["x"], seed=config.seed, step=step, first_row=first, **how)
        return {**batch, "x": moved}

    return varied


def finish(run: Run, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Write summary.json (with seconds and peak memory), say where things are, end the run."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on macOS bytes
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    counted = {} if run.parameters is None else {"parameters": run.parameters}
    full = {
        **{key: plain(value) for key, value in {**counted, **summary}.items()},
        "seconds": round(time.monotonic() - run.begun, 3),
        **_progress(run),
        "peak_memory_mb": round(used / (1024 * (1024 if sys.platform == "darwin" else 1)), 1),
        **({} if device is None else {"peak_device_memory_mb": round(device / 2**20, 1)}),
        "machine": dict(run.machine),
    }
    if jax.process_index() > 0:
        run.close()
        return full
    write_json(run.folder / "summary.json", full)
    if getattr(run.config, "curves", True):
        save_log(run.folder)
    run.close()
    for key, value in full.items():
        if key == "machine":  # said at the start
            continue
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
        **({} if run.best_step is None else {"best_step": run.best_step}),
    }
