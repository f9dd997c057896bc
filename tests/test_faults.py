"""Fault drills: whatever happens to a run, nothing saved is lost and the message says what to do.

`pytest tests/test_faults.py --rounds 20` does every drill twenty times. What happens to a process
as a whole is done to a process of its own, the rest here.
"""

import contextlib
import datetime
import os
import random
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import _run
from genjax.data import batch_at, load
from genjax.training import CheckpointError, Checkpoints, NonFiniteError
from genjax.training.record import MetricsLog, read_metrics

from .training import tiny
from .training.forks import Forks

STEPS, SAVE_EVERY = 24, 4
OPTIONS = ("--steps", STEPS, "--save-every", SAVE_EVERY)


@pytest.fixture(scope="module")
def forks():
    with Forks() as started:
        yield started


def here(folder, fault=lambda step, batch: None, **options):
    """Run the tiny experiment in this process; the fault is called with every step and batch."""
    options = {"steps": STEPS, "save_every": SAVE_EVERY, **options}
    return tiny.main(tiny.Config(run_dir=str(folder), **options), fault)


def final(folder):
    with np.load(folder / "final.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def check_equal(folder, expected):
    got = final(folder)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    # and the log has every step once
    lines = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
    assert lines == list(range(STEPS))


def saved(folder):
    return Checkpoints(folder / "checkpoints").steps()


def wait_for(step, folder):
    """Wait until the checkpoint of a step, which is written in the background, is whole."""
    end = time.monotonic() + 60
    while step not in saved(folder):
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of a run in this process that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    here(folder)
    return final(folder)


@pytest.fixture(
    scope="module",
    params=["1", pytest.param("4", marks=pytest.mark.slow)],
    ids=["single", "several"],
)
def whole_fork(request, forks, tmp_path_factory):
    """Options, and the end of a run in a process of its own that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    options = [*OPTIONS, "--steps-per-call", request.param]
    done = forks.run(folder, *options)
    assert done.returncode == 0, done.stderr
    return options, final(folder)


def test_killed_three_times_and_resumed_is_bit_equal(whole_fork, forks, tmp_path):
    options, expected = whole_fork
    folder = tmp_path / "run"
    # Other steps and delays in every run of the tests: some kills fall into the writing of a file.
    steps = sorted(random.sample(range(STEPS - 4), 3))
    faults = [f"SIGKILL {step} {random.choice(['', 0.005, 0.02])}" for step in steps]
    for attempt, fault in enumerate(faults):
        killed = forks.run(folder, *options, *["--resume"] * (attempt > 0), fault=fault)
        if killed.returncode == 0:  # it was done before the signal came
            break
        assert killed.returncode == -9, (faults, killed.stderr)
    if options[-1] == "1" and len(saved(folder)) > 1:
        newest = folder / "checkpoints" / str(saved(folder)[-1])
        for path in (newest / "state").glob("d/*"):
            path.write_bytes(path.read_bytes()[:-20])  # and the newest is cut short
    done = forks.run(folder, *options, "--resume")
    assert done.returncode == 0, (faults, done.stderr)
    check_equal(folder, expected)


def test_sigterm_saves_and_ends_cleanly(whole_fork, forks, tmp_path):
    options, expected = whole_fork
    step = random.randrange(STEPS - 4)
    stopped = forks.run(tmp_path / "run", *options, fault=f"SIGTERM {step}")
    assert stopped.returncode == 143
    reached = saved(tmp_path / "run")[-1]
    assert step < reached <= step + 4
    message = f"stopped by SIGTERM at step {reached} of {STEPS}, the state is saved: resume to go"
    assert message in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    # One line goes on as it stands.
    (line,) = re.findall(r"^resume with: (.*)$", stopped.stderr, re.MULTILINE)
    python, _, module, *again = shlex.split(line)
    assert (python, module) == (sys.executable, "tests.training.tiny")
    assert again == ["--resume", "--run-dir", str(tmp_path / "run")]
    assert forks.run(tmp_path / "run", *again).returncode == 0
    check_equal(tmp_path / "run", expected)


def test_a_nan_batch_ends_with_one_line(forks, tmp_path):
    stopped = forks.run(tmp_path / "run", *OPTIONS, fault="NAN 10")
    assert stopped.returncode == 1
    (line,) = stopped.stderr.strip().splitlines()
    assert line.startswith("error: absolute is not finite (nan) at step 10; ")
    assert "its batch is not finite in 'x'; the last good checkpoint: step 8 in " in line


def test_a_nan_batch_that_is_mended_leaves_no_trace(whole, tmp_path):
    def fault(step, batch):
        if step == 13:
            batch["x"][3, 1] = np.nan

    with pytest.raises(NonFiniteError, match="at step 13; its batch is not finite in 'x'"):
        here(tmp_path, fault)
    here(tmp_path, resume=True)
    check_equal(tmp_path, whole)


@contextlib.contextmanager
def small_disk(folder):
    """Yield what fills and what empties a disk in memory."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs may be mounted here")
    ballast = folder / "ballast"

    def fill():
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    try:
        yield fill, ballast.unlink
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def small_files(folder):
    """Yield what limits the size of files, and what lifts the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield (
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1])),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limited", [small_disk, small_files])
def test_a_full_disk_keeps_what_was_saved(limited, whole, tmp_path):
    with limited(tmp_path) as (fill, empty):
        folder = tmp_path / "run"
        # Right before a step that is saved, and amid those that are not.
        at = random.choice([11, 12, 13])

        def fault(step, batch):
            if step == at:
                wait_for(newest, folder)
                fill()

        newest = at // SAVE_EVERY * SAVE_EVERY
        # Older checkpoints stay: removing one would make room for the next.
        with pytest.raises(CheckpointError) as error:
            here(folder, fault, keep=10)
        assert f"could not be saved in {folder / 'checkpoints'}" in str(error.value)
        assert f"the newest whole one is step {newest}. Make room" in str(error.value)
        assert saved(folder)[-1] == newest
        with pytest.raises((CheckpointError, OSError), match=r"(?i)make room"):  # still full
            here(folder, resume=True, keep=10)
        empty()
        here(folder, resume=True)
        check_equal(folder, whole)
        # Nothing half written is left.
        assert {int(path.name) for path in (folder / "checkpoints").iterdir()} == set(saved(folder))


def test_the_data_folder_is_removed(whole, tmp_path):
    data, away = tmp_path / "data", tmp_path / "away"
    load("digits", "test", data_dir=data)
    opened, unopened = (load("digits", "test", data_dir=data, in_memory=False)[0] for _ in "ab")

    def fault(step, batch):
        if step == 13:
            data.rename(away)
        # What is open can be read on; what is opened only now cannot.
        for records in (opened, unopened) if step >= 17 else (opened,):
            batch_at(records, seed=0, step=step, batch_size=8)

    message = f"the data in {data}.* cannot be read .*: put the folder back"
    with pytest.raises(OSError, match=message) as error:
        here(tmp_path / "run", fault)
    assert error.value.__notes__ == ["the state of step 17 is saved: mend this, then resume"]
    assert saved(tmp_path / "run")[-1] == 17
    away.rename(data)
    here(tmp_path / "run", resume=True)
    check_equal(tmp_path / "run", whole)


def test_two_runs_in_one_folder(forks, tmp_path):
    config = tiny.Config(run_dir=str(tmp_path / "run"))
    with _run.start_run(config):
        message = f"is in use by process {os.getpid()}: wait, or give another --run-dir"
        with pytest.raises(_run.RunError, match=message):
            _run.start_run(tiny.Config(run_dir=str(tmp_path / "run"), resume=True))
        second = forks.run(tmp_path / "run", "--resume")  # the lock holds between processes
        assert second.returncode == 2
        assert second.stderr.startswith("error: run folder ")
        assert message in second.stderr
    with _run.start_run(tiny.Config(run_dir=str(tmp_path / "run"), resume=True)):  # free again
        pass
    with pytest.raises(_run.RunError, match="already holds a run: go on with --resume"):
        _run.start_run(config)


def test_the_clock_moves_back(whole, tmp_path, monkeypatch):
    """An hour back while training, a day before the resume, and the files' times reversed."""
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    monkeypatch.setattr(time, "time_ns", lambda: int((real() + offset[0]) * 1e9))

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)

    monkeypatch.setattr(datetime, "datetime", Clock)

    def fault(step, batch):
        offset[0] = -3600.0 if step >= 8 else 0.0
        if step == 17:
            raise FileNotFoundError("stop here")

    with pytest.raises(FileNotFoundError):
        here(tmp_path, fault)
    offset[0] = -86400.0
    for age, step in enumerate(saved(tmp_path)):
        os.utime(tmp_path / "checkpoints" / str(step), (real() - 1e5 * age,) * 2)
    here(tmp_path, resume=True)
    check_equal(tmp_path, whole)
    seconds = [line["seconds"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert seconds == sorted(seconds)


@contextlib.contextmanager
def nobody():
    """Not as root, whom no permission stops."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_path(tmp_path):
    """A folder that anybody can reach and write to, and may be made read-only."""
    for path in (tmp_path, *tmp_path.parents):
        if Path(tempfile.gettempdir()).resolve() in path.parents:
            path.chmod(0o755)
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o777)


def test_a_read_only_run_folder_is_refused(open_path):
    open_path.chmod(0o555)
    message = r"run folder .*run cannot be written \(Permission denied\): give another --run-dir"
    with nobody(), pytest.raises(_run.RunError, match=message):
        here(open_path / "run")
    (open_path / "file").write_text("")
    with pytest.raises(_run.RunError, match=r"cannot be written \(Not a directory\): give another"):
        here(open_path / "file" / "run")


def test_an_address_is_no_run_folder(tmp_path, monkeypatch):
    """It would make a local folder "gs:"."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(_run.RunError, match="--run-dir must be a local folder, got 's3://b/run'"):
        here("s3://b/run")
    for make in (Checkpoints, MetricsLog):
        with pytest.raises(ValueError, match="folder must be a local one, got 's3:/b/run'"):
            make(Path("s3://b/run"))
    assert not [*tmp_path.iterdir()]


def test_a_run_folder_that_becomes_read_only(whole, open_path):
    folder = open_path / "run"

    def fault(step, batch):
        if step == 14:
            wait_for(12, folder)
            (folder / "checkpoints").chmod(0o555)

    with nobody(), pytest.raises(CheckpointError) as error:
        here(folder, fault)
    assert "the newest whole one is step 12. " in str(error.value)
    assert "(or the folder writable), then resume" in str(error.value)
    (folder / "checkpoints").chmod(0o777)
    here(folder, resume=True)
    check_equal(folder, whole)


@pytest.mark.slow
def test_a_process_that_cannot_save_ends_at_once(forks, open_path):
    # Not while a thread of the checkpointer waits: the alarm of a fork would kill it.
    stopped = forks.run(open_path / "run", *OPTIONS, fault="READONLY 10")
    assert stopped.returncode == 1, stopped.stderr
    (line,) = stopped.stderr.strip().splitlines()
    assert line.startswith("error: checkpoint 12 could not be saved in ")
