"""Short runs of the models of few steps, whole: what they write, and that they learn."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import _run, _system, diffusion, few_step

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


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    config = diffusion.Config(
        width=16, depth=1, steps=4, steps_per_call=2, batch_size=16, num_steps=2, num_samples=20,
        likelihood_steps=0, run_dir=str(folder), **QUICK,
    )  # fmt: skip
    diffusion.main(config)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options", "evaluations"),
    [
        ("progressive", {"first_steps": 4, "num_steps": 2}, 2),
        ("matching", {}, 1),
        ("consistency", {"levels": 20}, 1),
    ],
)
def test_a_finished_diffusion_run_is_distilled(method, options, evaluations, teacher, tmp_path):
    config = dataclasses.replace(
        SMALL, method=method, teacher=teacher, conditional=False, steps=4, steps_per_call=2,
        run_dir=str(tmp_path / "run"), **options,
    )  # fmt: skip
    summary = few_step.main(config)
    assert summary["sampling_evaluations"] == evaluations
    assert np.load(tmp_path / "run" / "samples.npy").shape == (1437, 8, 8, 1)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [x for row in rows for name, x in row.items() if name.endswith("loss")]
    assert np.isfinite(losses).all()


def test_distillation_needs_a_teacher():
    for method in ("progressive", "matching"):
        with pytest.raises(_run.RunError, match=f"method {method} needs --teacher"):
            few_step.main(few_step.Config(method=method, **QUICK))


def test_a_transformer_needs_images():
    with pytest.raises(ValueError, match="dataset must be of images, got '8gaussians'"):
        few_step.main(few_step.Config(dataset="8gaussians", network="dit", **QUICK))
