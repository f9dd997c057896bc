"""The shared wiring of the experiments. Each experiment's own test is in tests/experiments."""

import dataclasses
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import _command, _config, _pictures, _run, _system, diffusion, flow_matching, vae
from experiments.__main__ import experiments
from genjax.training import CheckpointError, Checkpoints, Stopped

from .training import tiny

ROOT = Path(__file__).parents[1]


def config(tmp_path, **changes):
    return tiny.Config(run_dir=str(tmp_path / "run"), **{"steps": 6, "save_every": 2, **changes})


def final(folder):
    with np.load(folder / "final.npz") as file:
        return {name: file[name] for name in file.files}


def test_every_experiment_is_listed_with_a_line():
    found = experiments()
    assert all(line.endswith(".") for line in found.values()), found
    files = {path.stem for path in (ROOT / "experiments").glob("[!_]*.py")}
    assert {f"experiments.{name}" for name in files} <= found.keys()
    code = "import experiments.__main__, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_run_leaves_its_files(tmp_path):
    summary = tiny.main(config(tmp_path))
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["seconds"] >= summary["training_seconds"] > 0
    assert summary["peak_memory_mb"] > 50
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 16
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6
    assert Checkpoints(folder / "checkpoints").steps() == [4, 6]


def test_a_budget_of_seconds_ends_a_run_and_the_summary_says_so(tmp_path, capsys):
    summary = tiny.main(config(tmp_path, steps=10**6, save_every=10**6, max_seconds=0.02))
    done = summary["steps_done"]
    assert 1 < done < 10**6
    assert summary["ended_by_budget"]
    assert summary["training_seconds"] >= summary["first_call_seconds"] + 0.02
    assert f"max_seconds ended training after {done} of 1000000 steps" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [done]
    # A resumed run goes on from there, and may have another budget.
    longer = tiny.main(config(tmp_path, steps=done + 2, resume=True))
    assert (longer["steps_done"], longer["ended_by_budget"]) == (done + 2, False)


def test_samples_and_what_they_cost(tmp_path):
    calls = []
    with _run.start_run(config(tmp_path)) as run:
        samples, cost = _system.save_samples(
            run, lambda: calls.append(0) or np.arange(6.0).reshape(3, 2), evaluations=7
        )
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "samples.npy"), samples)
    assert len(calls) == 2  # compiled, then timed
    assert (cost["samples"], cost["sampling_evaluations"]) == (3, 7)
    assert 0 <= cost["sampling_seconds"] < 1


def test_a_longer_resumed_run_equals_one(tmp_path):
    tiny.main(config(tmp_path, steps=4))
    tiny.main(config(tmp_path, steps=8, resume=True))
    tiny.main(config(tmp_path / "whole", steps=8))
    resumed, whole = final(tmp_path / "run"), final(tmp_path / "whole" / "run")
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name])


def test_the_printed_command_resumes_with_the_same_options(tmp_path):
    """Every kind of option, through the shell's quoting and the command line's parser."""
    folder = tmp_path / "my run"
    given = flow_matching.Config(
        methods=("flow", "ot"), sigma_min=1e-3, conditional=True, progress=False, data_dir="a b",
        devices=1, dataset="digits", seed=7, max_seconds=0.5,
    )  # fmt: skip
    given = dataclasses.replace(given, run_dir=str(folder))
    _run.start_run(given).close()
    python, flag, module, *options = shlex.split(_run.resume_command(given, folder))
    assert (python, flag, module) == (sys.executable, "-m", "experiments.flow_matching")
    assert options == ["--resume", "--run-dir", str(folder)]
    parsed = _command.read(flow_matching.Config, None, options)
    assert parsed == dataclasses.replace(given, resume=True)
    # Only what changes is typed: of evaluation anything may, of training only how long.
    changed = _command.read(flow_matching.Config, None, [*options, "--samples", "9", "--seed", "8"])
    assert (changed.samples, changed.methods, changed.seed) == (9, ("flow", "ot"), 8)
    with pytest.raises(_run.RunError, match="has seed = 7, got 8"):
        _run.start_run(changed)
    _run.start_run(dataclasses.replace(changed, seed=7)).close()


def test_resume_takes_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        _run.start_run(flow_matching.Config(seed=seed)).close()
    parsed = _command.read(flow_matching.Config, None, ["--resume", "--steps", "3"])
    assert (parsed.seed, parsed.steps) == (2, 3)
    assert parsed.run_dir == str(tmp_path / "runs" / "flow_matching" / "2")
    # A run of before an option was there has its default.
    path = tmp_path / "runs/flow_matching/2/config.json"
    stored = json.loads(path.read_text())
    del stored["epsilon"]
    path.write_text(json.dumps(stored))
    assert _command.read(flow_matching.Config, None, ["--resume"]).epsilon == parsed.epsilon


@pytest.mark.parametrize(
    ("options", "value"),
    [("", None), ("--in-memory", True), ("--no-in-memory", False), ("--in_memory False", False)],
)
def test_an_option_that_may_be_left_open_is_a_flag(options, value):
    given = ["--steps", "3", *options.split(), "--seed", "4"]
    read = _command.read(vae.Config, None, given)
    assert (read.in_memory, read.steps, read.seed) == (value, 3, 4)


def test_a_command_without_options_has_the_defaults():
    assert _command.read(flow_matching.Config, None, []) == flow_matching.Config()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--stpes 5", "there is no option --stpes; did you mean --steps? (--help lists them all)"),
        ("--steps x", "Error parsing --steps: invalid literal for int() with base 10: 'x'"),
        ("--sampler hein", "'predictor_corrector'], got 'hein'; did you mean 'heun'?"),
        ("--prediction=scor", "got 'scor'; did you mean 'score'?"),
        ("--steps", "--steps"),
    ],
)
def test_a_mistake_in_an_option_ends_in_one_line(options, line, capsys):
    with pytest.raises(SystemExit) as end:
        _command.read(diffusion.Config, None, options.split())
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert line in said


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--dataset minst", "got 'minst'; did you mean 'mnist'?"),
        ("--batch-size 5000", "at most the split's 1437 examples, got 5000"),
        ("--run-dir gs://bucket/run", "--run-dir must be a local folder"),
    ],
)
def test_a_mistake_in_a_value_ends_in_one_line(options, line, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vae", *options.split()])
    with pytest.raises(SystemExit) as end:
        _run.launch(vae.main, vae.Config)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert line in said


def test_memory_that_does_not_suffice_ends_in_one_line(capsys, monkeypatch):
    def main(config):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(sys, "argv", ["tiny"])
    with pytest.raises(SystemExit) as end:
        _run.launch(main, tiny.Config)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: Out of memory allocating 9 bytes. Take less at once: a smaller")
    assert said.count("\n") == 1


def test_of_a_run_inside_a_run_the_outer_one_is_resumed(tmp_path, monkeypatch, capsys):
    def main(config):
        with _run.start_run(config) as run:
            inner = dataclasses.replace(config, run_dir=str(run.folder / "part"), seed=1)
            with _run.start_run(inner):
                raise Stopped("stopped", 143)

    monkeypatch.setattr(sys, "argv", ["tiny", "--run-dir", str(tmp_path / "run"), "--steps", "9"])
    with pytest.raises(SystemExit) as stop:
        _run.launch(main, tiny.Config)
    assert stop.value.code == 143
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("resume with:")]
    assert line.endswith(f"--resume --run-dir {tmp_path / 'run'}")


def test_resume_needs_the_same_options_and_a_whole_config(tmp_path):
    tiny.main(config(tmp_path))
    with pytest.raises(_run.RunError, match="has seed = 0, got 3: resume with the options"):
        _run.start_run(config(tmp_path, seed=3, resume=True))
    path = tmp_path / "run" / "config.json"
    path.write_text('{"sed": 1}')
    with pytest.raises(_run.RunError, match=r"unknown field 'sed'; nearest: \['seed'"):
        _run.start_run(config(tmp_path, resume=True))


def test_all_checkpoints_damaged_is_an_error_not_a_fresh_start(tmp_path):
    tiny.main(config(tmp_path))
    for record in (tmp_path / "run" / "checkpoints").glob("*/record/metadata"):
        record.write_text("")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        tiny.main(config(tmp_path, resume=True))


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(_run.RunError, match="nothing to resume"):
        _run.start_run(tiny.Config(resume=True))
    for number in ("1", "2"):
        with _run.start_run(tiny.Config()) as run:
            assert run.folder == tmp_path / "runs" / "tiny" / number
    with _run.start_run(tiny.Config(resume=True)) as run:
        assert run.folder.name == "2"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer, got 2.5"),
        ({"prefetch": -1}, ValueError, "prefetch must be at least 0, got -1"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be at least 0, got nan"),
        ({"max_seconds": -1.0}, ValueError, "max_seconds must be at least 0, got -1.0"),
    ],
)
def test_options_out_of_range(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        _run.start_run(config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_numbers_are_checked_before_anything_is_built():
    command = [sys.executable, "-m", "experiments.wgan", "--n-critic", "0"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: n_critic must be at least 1, got 0\n"
    takes_runs = ("experiments.compare", "experiments.sample")
    for name in experiments():
        if ".benchmarks" not in name and name not in takes_runs:
            _config.check_numbers(importlib.import_module(name).Config())


def test_every_field_has_a_docstring():
    help_text = subprocess.run(
        [sys.executable, "-m", "tests.training.tiny", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for field in dataclasses.fields(tiny.Config):
        assert "--" + field.name.replace("_", "-") in help_text
    assert "Seed of everything random" in help_text


def test_pictures(tmp_path):
    from matplotlib import image

    pixels = np.zeros((3, 4, 5, 1))
    pixels[0] = 16
    pixels[1, 1, 2] = 8
    path = _pictures.save_grid(tmp_path / "a.png", pixels, columns=2, high=16, pixel=1, title="a")
    above, sheet = np.split(image.imread(path), [-9])  # the title, then the images
    assert sheet.shape[1] == above.shape[1] > 11
    assert 0.01 < np.mean(above[..., :3] < 0.5) < 0.5
    np.testing.assert_allclose(sheet[:, 11:, :3], 1)
    np.testing.assert_allclose(sheet[:4, :5, :3], 1)
    np.testing.assert_allclose(sheet[1, 8, :3], 0.5, atol=0.01)
    np.testing.assert_allclose(sheet[5:, :5, :3], 0)
    points = np.random.default_rng(0).normal(size=(20, 2))
    sets = {"data": points, "model": points}
    assert _pictures.save_points(tmp_path / "b.png", sets, title="b").exists()
    curve = {"loss": (np.arange(3), np.ones(3))}
    assert _pictures.save_curves(tmp_path / "c.png", curve, title="c", log_y=True).exists()
    with pytest.raises(ValueError, match=r"images must be \[n, height, width, 1 or 3\]"):
        _pictures.save_grid(tmp_path / "d.png", np.zeros((4, 5)), title="d")


@pytest.mark.parametrize("inside", [KeyboardInterrupt, ValueError])
def test_ctrl_c_after_training_ends_in_the_command_that_resumes(
    tmp_path, monkeypatch, capsys, inside
):
    """Also where it comes out of jax as an error of another kind."""

    def main(config):
        with _run.start_run(config):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as stop:
                raise (stop if inside is KeyboardInterrupt else ValueError("in jax")) from None

    monkeypatch.setattr(sys, "argv", ["tiny", "--run-dir", str(tmp_path / "run"), "--steps", "9"])
    with pytest.raises(SystemExit) as end:
        _run.launch(main, tiny.Config)
    assert end.value.code == 130
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "stopped by SIGINT"
    assert said[1].endswith(f"--resume --run-dir {tmp_path / 'run'}")


def test_notes_of_jax_are_not_the_user_s(capsys):
    error = ValueError("layers must be at least 2")
    error.add_note("For simplicity, JAX has removed its frames. Set JAX_TRACEBACK_FILTERING=off")
    error.add_note("mend this")
    assert _run._one_line(error) == "error: layers must be at least 2; mend this"


@pytest.mark.parametrize("option", ["--processes", "--process"])
def test_several_processes_need_all_three(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "argv", ["tiny", option, "2"])
    with pytest.raises(SystemExit):
        _run.launch(tiny.main, tiny.Config)
    assert "give all three or none" in capsys.readouterr().err


def test_a_noising_process_is_no_process_of_several(monkeypatch):
    """diffusion's --process names its noise; a run of one process begins."""
    monkeypatch.setattr(sys, "argv", ["diffusion", "--process", "vp"])
    begun = []

    def main(config):
        begun.append(config)

    _run.launch(main, diffusion.Config)
    assert begun[0].process == "vp"
