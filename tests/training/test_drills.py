"""Runs that are killed, stopped or broken in their own process, then resumed."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genjax.training import Checkpoints

ROOT = Path(__file__).parents[2]
STEPS = 24


def run(folder, *options, signal="SIGUSR1 -1"):
    """Run the tiny experiment on one device in a process of its own."""
    command = [sys.executable, "-m", "tests.training.tiny", "--run-dir", str(folder)]
    return subprocess.run(
        [*command, "--steps", str(STEPS), "--save-every", "3", *options],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "TINY_SIGNAL": signal},
        capture_output=True,
        text=True,
        timeout=300,
    )


def final(folder):
    with np.load(folder / "final.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module", params=["1", "4"], ids=["single", "several"])
def whole(request, tmp_path_factory):
    """The options, and the end of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = ["--steps-per-call", request.param]
    done = run(folder, *options)
    assert done.returncode == 0, done.stderr
    return options, final(folder)


def test_killed_three_times_and_resumed_is_bit_equal(whole, tmp_path):
    options, expected = whole
    folder = tmp_path / "run"
    # Seeded by the process, so that every run of the tests kills elsewhere.
    steps = sorted(random.sample(range(STEPS), 3))
    for attempt, step in enumerate(steps):
        resume = ["--resume"] if attempt else []
        killed = run(folder, *options, *resume, signal=f"SIGKILL {step}")
        assert killed.returncode == -9, (steps, killed.stderr)
    if options[-1] == "1" and len(Checkpoints(folder / "checkpoints").steps()) > 1:
        newest = Checkpoints(folder / "checkpoints").steps()[-1]
        for path in (folder / "checkpoints" / str(newest) / "state").glob("d/*"):
            path.write_bytes(path.read_bytes()[:-20])  # and the newest is cut short
    done = run(folder, *options, "--resume")
    assert done.returncode == 0, (steps, done.stderr)
    got = final(folder)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=f"{name}, killed at {steps}")


def test_sigterm_saves_and_ends_cleanly(tmp_path):
    stopped = run(tmp_path / "run", signal="SIGTERM 7")
    assert stopped.returncode == 0
    assert "stopped by SIGTERM at step 8 of 24, the state is saved" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 8
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_nan_batch_ends_with_one_line(tmp_path):
    stopped = run(tmp_path / "run", "--nan-at", "10")
    assert stopped.returncode == 1
    (line,) = stopped.stderr.strip().splitlines()
    assert line.startswith("error: absolute is not finite (nan) at step 10; ")
    assert "last good checkpoint: step 9" in line
