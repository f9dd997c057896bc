"""docs/add_a_model.md, executed: its files are written, imported, tested, trained and compared."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import experiments
import genjax
from experiments import _leaderboard_runs as runs
from experiments import leaderboard

PAGE = (Path(__file__).parents[1] / "docs" / "add_a_model.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The page's files beside a checkout's own, for this test."""
    for name, text in BLOCKS.items():
        if name.endswith(".py"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    for package in (genjax, experiments):
        places = [*package.__path__, str(tmp_path / package.__name__)]
        monkeypatch.setattr(package, "__path__", places)
    yield tmp_path
    for name in ("genjax.energy", "experiments.energy"):
        sys.modules.pop(name, None)


def run_here(family, place, options, log, timeout):
    """A run of the leaderboard in this process, with a small network."""
    module = importlib.import_module(family.module)
    small = {"width": 8, "steps": 4, "steps_per_call": 2, "batch_size": 16, "progress": False}
    module.main(module.Config(**{**options, **small}, run_dir=str(place)))


def test_it_fits_in_150_lines():
    assert list(BLOCKS) == [
        "genjax/energy/__init__.py",
        "tests/energy/test_energy.py",
        "experiments/energy.py",
        "reopen",
    ]
    code = [line for text in BLOCKS.values() for line in text.splitlines() if line.strip()]
    assert len(code) <= 150, len(code)


def test_the_loss_meets_its_oracle(files):
    spec = importlib.util.spec_from_file_location("page", files / "tests/energy/test_energy.py")
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    tests.test_value()
    tests.test_gradient()
    with pytest.raises(ValueError, match=r"len\(y\) must be at least 2, got 1"):
        tests.energy_distance(jax.numpy.zeros((3, 2)), jax.numpy.zeros((1, 2)))


def test_from_the_experiment_to_its_row_and_back(files, monkeypatch):
    monkeypatch.setattr(leaderboard, "MODULES", ("energy",))
    monkeypatch.setattr(leaderboard, "floors", lambda *_: [])
    monkeypatch.setattr(runs, "_run", run_here)
    folder = files / "board"
    board = leaderboard.main(
        leaderboard.Config(dataset="8gaussians", calibrate=0.0, run_dir=str(folder))
    )
    row = board["rows"][-1]
    assert (row["title"], row["reason"], row["options"]["latent_dim"]) == (
        "Energy distance",
        None,
        2,
    )
    assert {"precision", "recall", "frechet", "parameters", "steps"} <= row["mean"].keys()
    run = folder / "energy" / "seed0"
    assert json.loads((run / "config.json").read_text())["experiment"] == "experiments.energy"
    found = {"folder": run, "jax": jax}
    exec(BLOCKS["reopen"], found)
    assert found["images"].shape == (64, 2)
    averaged, raw = (jax.tree.leaves(found[name])[0] for name in ("params", "raw"))
    assert not np.array_equal(averaged, raw)
