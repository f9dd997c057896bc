"""How far a training is: a bar in a terminal, elsewhere a line now and then."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

__all__ = ["Progress"]

EVERY = 30.0  # seconds between two lines


class Progress:
    """tqdm's bar where standard error is a terminal; else lines on it, the first one after
    `EVERY` seconds. Nothing where it is not shown."""

    def __init__(self, total: int, step: int, *, shown: bool):
        hidden = None if shown else True  # None: where stderr is no terminal
        self._bar = tqdm(total=total, initial=step, dynamic_ncols=True, disable=hidden)
        self._lines = shown and self._bar.disable
        self._total, self._step = total, step
        self._said = step
        self._last = time.monotonic()

    def update(self, step: int, row: Mapping[str, Any]) -> None:
        """A call has ended at that step; row: the newest numbers, where some are read."""
        if row and not self._bar.disable:
            self._bar.set_postfix(row, refresh=False)
        self._bar.update(step - self._step)
        self._step, now = step, time.monotonic()
        if self._lines and now - self._last >= EVERY:
            print(self._line(now, row), file=sys.stderr, flush=True)
            self._said, self._last = step, now

    def _line(self, now: float, row: Mapping[str, Any]) -> str:
        """Step, rate since the last line, time left at that rate, and the loss."""
        rate = (self._step - self._said) / max(now - self._last, 1e-9)
        text = f"step {self._step} of {self._total}, {rate:.3g} steps/s"
        if rate:
            text += f", {_clock((self._total - self._step) / rate)} left"
        name = "loss" if "loss" in row else next(iter(row), None)
        return text if name is None else f"{text}, {name} {float(row[name]):.4g}"

    def close(self) -> None:
        self._bar.close()


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds: "1:02:03", "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
