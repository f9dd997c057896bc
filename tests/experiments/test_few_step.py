"""Short runs of the models of few steps, whole: what they write, and that they learn."""

import dataclasses

import numpy as np
import pytest

from experiments import _system, few_step

QUICK = {"devices": 1, "progress": False, "log_every": 10}
SMALL = few_step.Config(
    width=8, depth=1, steps=20, steps_per_call=10, batch_size=32, conditional=True, **QUICK
)


@pytest.mark.slow
def test_a_short_run_leaves_its_files(tmp_path):
    folder = tmp_path / "run"
    summary = few_step.main(dataclasses.replace(SMALL, run_dir=str(folder)))
    assert summary["precision_1_steps"] == summary["precision"]
    assert 0 <= summary["label_accuracy"] <= 1
    assert summary["sampling_evaluations"] == 1
    assert (folder / "steps.png").stat().st_size > 1000
    system, _, config = _system.reopen(folder, num_steps=3)
    assert (system.evaluations, config.width) == (3, 8)


@pytest.mark.slow
def test_two_shortcut_steps_reach_the_modes(tmp_path):
    config = few_step.Config(
        dataset="8gaussians", method="shortcut", num_steps=2, width=64, steps=2000,
        steps_per_call=100, dropout=0.0, run_dir=str(tmp_path / "run"), **QUICK,
    )  # fmt: skip
    summary = few_step.main(config)
    assert summary["modes"] == 8
    assert np.load(tmp_path / "run" / "samples.npy").shape == (10_000, 2)


def test_a_transformer_needs_images():
    with pytest.raises(ValueError, match="dataset must be of images, got '8gaussians'"):
        few_step.main(few_step.Config(dataset="8gaussians", network="dit", **QUICK))
