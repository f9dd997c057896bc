"""Training from images that the memory limit does not hold, killed amid an epoch and resumed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genjax.data import load

from .streamed import LIMIT

ROOT = Path(__file__).parents[2]
STEPS, BATCH, KILL_AT = 17, 8, 14  # five steps an epoch: 12, where it goes on, is amid one
DEVICES = {"replicated": 1, "fsdp": 2}  # on one alone batches are made ahead, in threads


@pytest.fixture
def images(tmp_path):
    """48 colour images, 43 of them to train on."""
    rng, place = np.random.default_rng(0), tmp_path / "images"
    place.mkdir()
    for i in range(48):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return place


def end_of(folder):
    with np.load(folder / "end.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_streamed_killed_amid_an_epoch_and_resumed_is_bit_equal(layout, images, tmp_path):
    options = {"dataset": f"folder:{images}", "data-dir": tmp_path / "data", "image-size": 8}
    train, _ = load(options["dataset"], data_dir=options["data-dir"], image_size=8)
    assert train["x"].nbytes > LIMIT
    assert len(train["x"]) // BATCH == 5
    options |= {"batch-size": BATCH, "steps": STEPS, "save-every": 3, "steps-per-call": 1}
    options |= {"sharding": layout, "width": 32, "depth": 1, "log-every": 1}
    line = [sys.executable, "-m", "tests.training.streamed", "--no-curves", "--no-progress"]
    line += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    flags = f"--xla_force_host_platform_device_count={DEVICES[layout]}"
    environment = {**os.environ, "XLA_FLAGS": flags}

    def run(folder, *more, **variables):
        given = [*line, "--run-dir", str(folder), *more]
        place = {"cwd": ROOT, "env": environment | variables}
        return subprocess.run(given, **place, capture_output=True, text=True, check=False)

    runs = {name: tmp_path / name for name in ("whole", "in_memory", "killed")}
    for name in ("whole", "in_memory"):
        done = run(runs[name], *["--in-memory"] * (name == "in_memory"))
        assert done.returncode == 0, done.stdout + done.stderr
    killed = run(runs["killed"], KILL_AT=str(KILL_AT))
    assert killed.returncode == -9, killed.stderr
    again = run(runs["killed"], "--resume")
    assert again.returncode == 0, again.stderr
    assert "resumed at step 12" in again.stdout, again.stdout
    expected = end_of(runs["whole"])
    for name in ("in_memory", "killed"):
        got = end_of(runs[name])
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(got[key], value, err_msg=key)
