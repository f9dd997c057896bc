"""Compare the speed of this checkout's genjax with another's: two processes, in alternating rounds.

    git worktree add ../before COMMIT
    python -m experiments.benchmarks.paired ../before --workloads vae realnvp

Both processes run this checkout's benchmarks, each with its own genjax. A ratio is the median over
rounds of (time before / time now): 1 or more is not slower. `result` is the loss or the value that
the last call gave.
"""

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from experiments.benchmarks import flows, sinkhorn, unet, vae
from experiments.benchmarks._models import repeat
from experiments.benchmarks._workload import OURS, Options, Row, Side, compare, launch

ROOT = Path(__file__).parents[2]
# genjax is imported from the checkout that is named, experiments from the working folder.
WORKER = """import sys; sys.path.insert(0, sys.argv[1]); import genjax; del sys.path[0]
from experiments.benchmarks import paired; paired.work()"""


def sinkhorn_side(n: int, d: int, eps: float) -> Side:
    x, y, mean = sinkhorn.clouds(n, d)
    return sinkhorn.genjax_side(x, y, eps * mean, sinkhorn.Config())


# Of each case what makes its side, and the calls in one timing.
CASES: dict[str, tuple[Callable[[], Side], int]] = {
    "vae": (vae.genjax_step, 20),
    "realnvp": (partial(flows.jax_side, OURS, "train"), 10),
    "unet": (lambda: unet.ours(unet.Config())["train"], 1),
}
for n, d, eps in itertools.product((256, 1024), (2, 64), (0.1, 0.01, 0.001)):
    CASES[f"sinkhorn n={n} d={d} eps={eps:g}"] = (partial(sinkhorn_side, n, d, eps), 5)


@dataclasses.dataclass(frozen=True)
class Config(Options):
    before: tyro.conf.Positional[Path] = Path("../before")  # the other checkout


def work() -> None:
    """Run the case that each line of standard input names, and print its result."""
    made = cache(lambda name: repeat(CASES[name][0](), CASES[name][1]))
    for line in sys.stdin:
        print(float(np.ravel(jax.tree.leaves(made(line.strip())())[0])[0]), flush=True)


def main(config: Config) -> list[Row]:
    options: Any = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    places = {OURS: ROOT, "before": (config.before / "genjax").resolve(strict=True).parent}
    command = [sys.executable, "-c", WORKER]
    workers = {k: subprocess.Popen([*command, str(v)], **options) for k, v in places.items()}

    def ask(worker: Any, case: str) -> float:
        print(case, file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    checks = lambda results: {k: {"result": x} for k, x in results.items()}  # noqa: E731
    rows: list[Row] = []
    for case, (_, calls) in CASES.items():
        if case.startswith(config.workloads or ""):
            makers = {k: partial(partial, ask, worker, case) for k, worker in workers.items()}
            rows += compare(case, makers, config, targets=0.97, checks=checks, units=calls)
    for worker in workers.values():
        worker.communicate()
    return rows


if __name__ == "__main__":
    launch(main, Config)
