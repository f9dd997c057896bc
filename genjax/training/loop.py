"""The loop around a compiled step: batches in, metrics out, checkpoints, and a clean stop."""

import collections
import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genjax import checks
from genjax.training.checkpoint import Checkpoints
from genjax.training.record import EVALUATION, MetricsLog
from genjax.training.state import is_float, leaf_name
from genjax.training.update import first_bad_term
from genjax.typing import Batch

__all__ = ["NonFiniteError", "Stopped", "fit"]

Numbers = Mapping[str, Any]


class NonFiniteError(FloatingPointError):
    """Training met a number that is not finite; the message names the step and the term."""


class Stopped(SystemExit):
    """A signal ended the run after its state was saved; the process leaves with the status that
    shells give it (130 after SIGINT, 143 after SIGTERM), so that what waits for its end stops too.
    """

    def __init__(self, message: str, status: int):
        super().__init__(status)
        self.message = message
        self.resume: str | None = None  # the command that goes on, where the caller knows it

    def __str__(self) -> str:
        return self.message


def fit(
    state: Any,
    step_fn: Callable[[Any, Batch], tuple[Any, Numbers]],
    batches: Callable[[int], Batch],
    *,
    num_steps: int,
    folder: str | os.PathLike,
    checkpoints: Checkpoints | None = None,
    save_every: int = 1000,
    steps_per_call: int = 1,
    log_every: int = 1,
    evaluate: Callable[[Any], Numbers] | None = None,
    evaluate_every: int = 0,
    tensorboard: bool = False,
    progress: bool = True,
    max_seconds: float | int = 0.0,
    prefetch: int = 2,
    timings: dict[str, float] | None = None,
    on_metrics: Callable[[int, dict[str, float]], None] | None = None,
) -> Any:
    """Train from `state.step` to `num_steps` and return the last state.

    batches(n) is the batch of step n and of n alone, so that no place in the data is saved. With
    steps_per_call = k, step_fn takes k batches stacked; calls end at multiples of k, so that a
    resumed run makes the same calls. Metrics are read while the next call runs and go to
    metrics.jsonl in `folder`. evaluate(state) gives numbers every `evaluate_every` steps, logged
    under "eval/" and saved with the checkpoint; where checkpoints.best names one of them, they must
    hold it (ValueError). The last state is always saved, also where no step is left to do.

    With `max_seconds` training ends after the first call at whose end that many seconds have passed
    since the end of the very first one, which compiles (0: no limit); evaluations count.

    The batches of `prefetch` further calls are made in threads while a call runs (0, or on several
    CPU devices: each when its call comes), and put on the devices where step_fn has a `place`.
    timings: is given data_wait_seconds, how long calls but the first waited for their batches.

    on_metrics(step, metrics): a hook for other trackers, called by the first process with each line
    of metrics.jsonl, for which training waits; a resumed run gives again the steps after its
    checkpoint. progress: a bar on standard error, or without a terminal a line every 30 seconds.

    Raises NonFiniteError at the first step with a number that is not finite, before anything
    later is saved. An error in `batches`, `evaluate` or `on_metrics` is raised after the state is
    saved. SIGTERM and SIGINT save the state and raise Stopped (exit status 143, 130); a second acts
    as usual.

    >>> import tempfile
    >>> loss = lambda params, key, batch: ((params - batch) ** 2, {})
    >>> step = lambda state, batch: train_step(loss, optax.sgd(0.5), state, batch)
    >>> state = init_state(jnp.zeros(()), optax.sgd(0.5), jax.random.key(0))
    >>> options = dict(num_steps=3, folder=tempfile.mkdtemp(), progress=False)
    >>> float(fit(state, step, lambda n: jnp.full(4, 2.0), **options).params)
    2.0
    """
    with checks.extra("train", "fit"):
        from genjax.training.progress import Progress

    _check_counts(1, save_every=save_every, log_every=log_every, steps_per_call=steps_per_call)
    _check_counts(0, num_steps=num_steps, evaluate_every=evaluate_every, prefetch=prefetch)
    checks.at_least("max_seconds", max_seconds, 0)
    first = jax.process_index() == 0
    log = MetricsLog(folder, start=int(state.step), tensorboard=tensorboard) if first else None
    given = (state, step_fn, batches, num_steps, steps_per_call, log, log_every, checkpoints)
    # Emulated devices abort when calls pile up, and calls in flight would outlast a budget.
    block = bool(max_seconds) or _on_several_cpus()
    if block:  # what made the state may still be under way
        jax.block_until_ready(state)
    with contextlib.ExitStack() as closing:
        threads = closing.enter_context(_threads(prefetch))
        run = _Training(*given, threads, prefetch, on_metrics)
        if checkpoints is not None:
            closing.callback(checkpoints.wait)
        closing.enter_context(contextlib.nullcontext() if log is None else log)
        bar = Progress(num_steps, run.step, shown=progress and first)
        closing.callback(bar.close)
        signals = closing.enter_context(_noted_signals())
        run.loop(bar, signals, block, evaluate, evaluate_every, save_every, max_seconds)
        run.read_metrics()
        if timings is not None:
            timings["data_wait_seconds"] = run.waited
    return run.state


def _check_counts(least: int, **counts: int) -> None:
    for name, value in counts.items():
        checks.integer(name, value, least)


@dataclasses.dataclass
class _Training:
    """The state on its way from step to step, with the metrics of the call that is under way."""

    state: Any
    step_fn: Callable[[Any, Batch], tuple[Any, Numbers]]
    batches: Callable[[int], Batch]
    num_steps: int
    steps_per_call: int
    log: MetricsLog | None
    log_every: int
    checkpoints: Checkpoints | None
    threads: ThreadPoolExecutor | None
    prefetch: int
    on_metrics: Callable[[int, dict[str, float]], None] | None = None
    ahead: collections.deque[Future] = dataclasses.field(default_factory=collections.deque)
    waited: float = 0.0  # seconds, for batches
    pending: tuple[int, int, Any] | None = None  # first step, number of steps, metrics
    begun: float | None = None  # when the first call ended

    def __post_init__(self) -> None:
        self.step = self.before = int(self.state.step)  # after the last call, and before it

    def loop(
        self,
        bar: Any,
        signals: list[str],
        block: bool,
        evaluate: Callable[[Any], Numbers] | None,
        evaluate_every: int,
        save_every: int,
        max_seconds: float | int,
    ) -> None:
        """Call, evaluate and save until the steps are done or the seconds are up."""
        best = self.checkpoints is not None and self.checkpoints.best is not None
        while self.step < self.num_steps:
            bar.update(self.step, self.advance(block))
            scores = None
            if evaluate is not None and self.reached(evaluate_every):
                scores = self.evaluate(evaluate)
            over = self.is_over(max_seconds)
            done = over or self.step == self.num_steps
            if done or self.reached(save_every) or (best and scores is not None):
                self.save(scores)
            self.stop_after(signals)
            if over:
                return
        # Where no step was left to do, a state that is on the disk stays as it is.
        if self.checkpoints is not None and self.step not in self.checkpoints.steps():
            self.save()

    def advance(self, block: bool) -> Numbers:
        """Make one call, and read the metrics of the call before it."""
        count = self._count(self.step)
        with self._saved_on_error():
            batch = self._next_batch()
        self.state, metrics = self.step_fn(self.state, batch)
        if block:
            jax.block_until_ready(self.state)
        self.begun = self.begun or time.monotonic()
        before, self.pending = self.pending, (self.step, count, metrics)
        self.before, self.step = self.step, self.step + count
        return self._read(before)

    def _count(self, step: int) -> int:
        """Steps of the call that begins at this step."""
        end = (step // self.steps_per_call + 1) * self.steps_per_call
        return min(self.num_steps, end) - step

    def _next_batch(self) -> Batch:
        """The batches of the next call, made ahead where there are threads."""
        begun = time.monotonic()
        if self.threads is None:
            batch = self._make(self.step, self._count(self.step))
        else:
            step = self.step
            for i in range(self.prefetch + 1):
                count = self._count(step)
                if i >= len(self.ahead) and count > 0:
                    self.ahead.append(self.threads.submit(self._make, step, count))
                step += count
            batch = self.ahead.popleft().result()
        if self.pending is not None:
            self.waited += time.monotonic() - begun
        return batch

    def _make(self, step: int, count: int) -> Batch:
        parts = [self.batches(step + i) for i in range(count)]
        several = self.steps_per_call > 1
        batch = jax.tree.map(lambda *x: np.stack(x), *parts) if several else parts[0]
        place = getattr(self.step_fn, "place", None)
        return batch if place is None or self.threads is None else place(batch)

    @contextlib.contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Save the state before an error of the caller's own functions ends the training."""
        try:
            yield
        except Exception as error:
            self.save()
            if self.checkpoints is not None:
                error.add_note(f"the state of step {self.step} is saved: mend this, then resume")
            raise

    def reached(self, every: int) -> bool:
        """Whether the last call reached a multiple of `every`; never where that is 0."""
        return every > 0 and self.step // every > self.before // every

    def evaluate(self, evaluate: Callable[[Any], Numbers]) -> Numbers:
        """Evaluate the state and log the scores."""
        self.read_metrics()
        with self._saved_on_error():
            scores = {EVALUATION + name: float(x) for name, x in evaluate(self.state).items()}
        self._write(self.step, scores)
        return scores

    def save(self, scores: Numbers | None = None) -> None:
        """Save the state, once its metrics and parameters are known to be finite."""
        self.read_metrics()
        if self.checkpoints is None:
            return
        leaves = jax.tree_util.tree_leaves_with_path(self.state.params)
        flags = _finite([x for _, x in leaves if is_float(x)])
        for path, finite in zip([p for p, x in leaves if is_float(x)], flags, strict=True):
            if not finite:
                raise NonFiniteError(
                    f"parameter {leaf_name(path)} is not finite after {self.step} steps, though "
                    "the loss and its gradient were: look at the optimiser; this state is not saved"
                )
        try:
            if self.log is not None:
                self.log.flush()  # a resumed run writes no line from before its checkpoint again
        finally:
            self.checkpoints.save(self.step, self.state, scores)

    def is_over(self, max_seconds: float | int) -> bool:
        """Whether the seconds are up, counted from the end of the first call."""
        if not max_seconds:
            return False
        return _anywhere(time.monotonic() - (self.begun or 0.0) >= max_seconds)

    def stop_after(self, signals: list[str]) -> None:
        """Save and raise Stopped where a signal came, to any of the processes."""
        if _anywhere(bool(signals)):
            self.save()
            name = signals[0] if signals else "a signal to another process"
            place = f"at step {self.step} of {self.num_steps}"
            status = 128 + (signal.Signals[signals[0]] if signals else signal.SIGTERM)
            raise Stopped(f"stopped by {name} {place}, the state is saved: resume to go on", status)

    def read_metrics(self) -> Numbers:
        """Read the metrics of the last call, write them, raise where they are not finite."""
        pending, self.pending = self.pending, None
        return self._read(pending)

    def _read(self, pending: tuple[int, int, Any] | None) -> Numbers:
        if pending is None:
            return {}
        step, count, metrics = pending
        rows = {name: np.reshape(x, -1) for name, x in jax.device_get(dict(metrics)).items()}
        flags = rows.pop("finite", np.ones(count, bool))
        row: Numbers = {}
        for i in range(count):
            row = {name: x[i] for name, x in rows.items()}
            bad = not flags[i] or not all(np.isfinite(x) for x in row.values())
            if bad or (step + i) % self.log_every == 0:
                self._write(step + i, row, tell=not bad)
            if bad:
                raise NonFiniteError(self._explain(step + i, row))
        return row

    def _write(self, step: int, row: Numbers, *, tell: bool = True) -> None:
        """A line of metrics.jsonl, told to the caller's hook too."""
        if self.log is None:
            return
        self.log.write(step, row)
        if self.on_metrics is not None and tell:
            with self._saved_on_error():
                self.on_metrics(step, {name: float(x) for name, x in row.items()})

    def _explain(self, step: int, row: Numbers) -> str:
        term = first_bad_term(dict(row)) or "a term"
        text = f"{term} is not finite ({row.get(term)}) at step {step}"
        for path, x in jax.tree_util.tree_leaves_with_path(self.batches(step)):
            x = np.asarray(x)
            if x.dtype.kind == "f" and not np.isfinite(x).all():
                text += f"; its batch is not finite in {leaf_name(path) or 'its array'!r}"
                break
        if self.checkpoints is not None:
            self.checkpoints.wait()
            saved = self.checkpoints.steps()
            kept = f"step {saved[-1]} in {self.checkpoints.folder}" if saved else "none"
            text += f"; the last good checkpoint: {kept}"
        return text


def _on_several_cpus() -> bool:
    """Whether programs may run on several CPU devices, as emulated ones."""
    return jax.default_backend() == "cpu" and jax.device_count() > 1


@contextlib.contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor | None]:
    """As many threads, which end with the context and drop what they have not begun.

    None for 0, and on several CPU devices: XLA has room for 32 computations in flight on each. A
    thread that dispatches more, as one that makes a batch by operations outside jit, can take the
    room of one device's part of a step, and both wait for ever (jaxlib 0.10.2).
    """
    if not count or _on_several_cpus():
        yield None
        return
    threads = ThreadPoolExecutor(min(count, 4), "batches")
    try:
        yield threads
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[str]]:
    """Note SIGTERM and SIGINT in the list that is given; after the first they act as usual."""
    came: list[str] = []
    before: dict[Any, Any] = {}

    def restore() -> None:
        while before:
            number, handler = before.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def note(number: int, frame: Any) -> None:
        came.append(signal.Signals(number).name)
        restore()

    # Only the main thread may set handlers.
    if threading.current_thread() is threading.main_thread():
        before.update({n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)})
    try:
        yield came
    finally:
        restore()


@jax.jit
def _all_finite(leaves: list[Any]) -> Any:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])


def _finite(leaves: list[Any]) -> np.ndarray:
    """Whether each array is finite, looked at where its parts lie."""
    return np.asarray(_all_finite(leaves)) if leaves else np.empty(0, bool)


def _anywhere(flag: bool) -> bool:
    """Whether the flag is set in any of the processes, which must all stop at one step."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
