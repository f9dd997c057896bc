"""Runs sampled again and put side by side, of every family that samples."""

import ast
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import _panels, _pictures, _run, _system, compare, gan, rlhf, sample
from tests.experiments import stub

ROOT = Path(__file__).parents[2]
QUICK = {"steps": 4, "steps_per_call": 2, "batch_size": 8, "log_every": 1, "devices": 1,
         "progress": False}  # fmt: skip
TRANSFORMER = {"width": 8, "depth": 1, "heads": 2}
NET = {"width": 8, "depth": 1}
SMALL = {
    "bridge": NET,
    "continuous_flow": {**NET, "solver_steps": 2},
    "deep_image_prior": {"size": 16, "channels": (4, 8), "batch_size": 1},
    "diffusion": {**NET, "num_steps": 2},
    "f_gan": NET,
    "features": {"width": 8, "channels": (4, 8)},
    "few_step": {**NET, "conditional": True},
    "flow": {"model": "tarflow", "width": 8, "layers": 2, "depth": 1},
    "flow_matching": {**NET, "sample_steps": 2, "methods": ("flow",)},
    "gan": {**NET, "conditional": True},
    "hierarchical_vae": {"latents": (3, 2), "sides": (1, 2), "width": 8},
    "language_model": {**TRANSFORMER, "vocabulary": 256, "length": 16, "samples": 2},
    "latent": {**NET, "features": 2, "channels": (4, 8), "num_steps": 2},
    "long_range": {"width": 8, "depth": 1, "length": 16},
    "masked_diffusion": {**TRANSFORMER, "num_steps": 2},
    "mutual_information": {"width": 8},
    "pixelcnn": {"features": 4, "layers": 2, "first_kernel": 3},
    "rlhf": {**TRANSFORMER, "imitation": 2},
    "sinkhorn_gan": {**NET, "num_iterations": 2},
    "stylegan": {"width": 8, "groups": 2},
    "vae": {**NET, "latent_dim": 2},
    "vqvae": {"codes": 4, "channels": (4, 8), "prior_width": 8, "prior_depth": 1},
    "wgan": NET,
}  # fmt: skip
SAMPLES_NOTHING = ("features", "long_range", "mutual_information")


def begin(module, folder, **options):
    """Train a few steps and leave an unfinished run: checkpoints and metrics.jsonl."""
    config = module.Config(run_dir=str(folder), **{**QUICK, **options})
    data = module.load_data(config)
    system = module.build(config, data)
    training = _system.prepare(config, system, data)
    with _run.start_run(config) as run:
        return config, data, system, run, _run.fit(run, *training)


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """A finished run in the plane, but for the scores."""
    folder = tmp_path_factory.mktemp("points") / "stub" / "1"
    config, data, system, run, state = begin(stub, folder, dataset="8gaussians", ema=0.5)
    params = _system.weights(config, system, state)
    measures = _system.Measures(config, system, data)
    _system.save_samples(run, lambda: measures.sample(params), evaluations=1)
    _run.finish(run, {"score": {"far": 0.25}, "parameters": 2})
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An unfinished run of images with labels."""
    folder = tmp_path_factory.mktemp("images") / "gan" / "2"
    begin(gan, folder, **SMALL["gan"])
    return folder


def again(folder, **options):
    found = sample.main(sample.Config(run=str(folder), **options))
    return np.load(found["samples"]), found


def test_samples_of_a_run_are_its_own_unless_an_option_says_otherwise(points, tmp_path, capsys):
    own, out = np.load(points / "samples.npy"), str(tmp_path / "new" / "some.png")
    samples, found = again(points)
    np.testing.assert_array_equal(samples, own)
    assert found["title"] == "2000 samples of stub/1, step 4\nseed 0"
    assert _pictures.caption(points / "samples.png") == "stub/1, step 4"
    assert (points / "curves.png").stat().st_size > 5000
    assert (points / "again.png").stat().st_size > 1000
    assert "stub/1, step 4" in capsys.readouterr().out
    # The same noise about another mean.
    raw, found = again(points, raw=True, out=out)
    means = [_system.reopen(points, averaged=flag)[1]["mean"] for flag in (False, True)]
    apart = np.broadcast_to(means[0] - means[1], raw.shape)
    np.testing.assert_allclose(raw - samples, apart, atol=1e-5)
    assert np.abs(apart).min() > 1e-3
    assert found["title"].endswith(", raw weights")
    assert {path.name for path in Path(out).parent.iterdir()} == {"some.npy", "some.png"}
    other, _ = again(points, seed=5, num_samples=3, out=out)
    assert other.shape == (3, 2)
    assert not np.isin(other, own).any()


@pytest.mark.slow
def test_images_of_a_run_that_has_not_ended(images, tmp_path):
    samples, found = again(images, num_samples=7, out=str(tmp_path / "a"))
    assert samples.shape == (7, 8, 8, 1)
    assert samples.dtype == np.uint8
    assert "7 samples of gan/2, step 4" in found["title"]


def test_an_option_that_a_run_has_not_is_refused_with_those_that_it_has(images, tmp_path):
    path = tmp_path / "config.json"
    stored = {"experiment": "experiments.flow_matching", "sample_steps": 100, "devices": 64}
    path.write_text(json.dumps(stored))
    assert sample.given(sample.Config(run="", num_steps=3), tmp_path) == {
        "sample_steps": 3,
        "devices": None,  # there are not so many here
    }
    with pytest.raises(_run.RunError, match="have no guidance: they have num_steps"):
        sample.given(sample.Config(run="", guidance=2.0), tmp_path)
    with pytest.raises(_run.RunError, match=r"experiments\.gan, .*: they have no options"):
        again(images, sampler="heun")
    with pytest.raises(ValueError, match="num_samples must be"):
        again(images, num_samples=0)


def test_of_trainings_inside_a_run_the_last_one_is_sampled(tmp_path):
    for name in ("flow", "ot"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "seconds": 0.1}\n')
    (tmp_path / "ot" / "metrics.jsonl").write_text('{"step": 3, "loss": null}\n{"step": 4, "x": 2}')
    assert sample.trained_in(tmp_path) == tmp_path / "ot"
    assert sample.trained_in(tmp_path / "flow") == tmp_path / "flow"
    for folder, steps in ((tmp_path / "flow", 30), (tmp_path / "ot", 20)):
        (folder / "training.json").write_text(json.dumps({"steps_done": steps, "best_step": 10}))
    name = tmp_path.name
    (tmp_path / "config.json").write_text("{}")
    inside = _pictures.caption(tmp_path / "ot" / "a.png")
    assert inside.endswith(f"{name}/ot, step 10")
    (tmp_path / "flow" / "training.json").write_text('{"steps_done": 30}')
    assert _pictures.caption(tmp_path / "a.png").endswith(f"{name}, step 30")
    assert _pictures.caption(tmp_path.parent / "none" / "a.png").endswith("/none")
    assert _panels.curves(tmp_path) == {"loss": {"": ([0], [1.0])}, "x": {"ot": ([4], [2])}}


def test_runs_side_by_side(points, images, tmp_path, capsys):
    out = tmp_path / "both" / "compare.png"
    found = compare.main(compare.Config(runs=(str(points), str(images)), out=str(out)))
    assert found["runs"] == ["stub/1", "gan/2"]
    assert found["options that differ"]["dataset"] == ["8gaussians", "digits"]
    assert "seed" not in found["options that differ"]  # the same
    assert "spread" not in found["options that differ"]  # one run's alone
    assert found["figures"]["score.far"] == ["0.25", ""]
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines]
    assert cells[0] == ["stub/1", "gan/2"]
    assert ["not", "ended"] in cells
    assert ["parameters", "2"] in cells
    assert lines[-1] == f"in {out}"
    assert out.stat().st_size > 10_000


def test_texts_are_shown_whatever_they_hold():
    from matplotlib.figure import Figure

    axis = Figure().add_subplot()
    _panels.show_text(axis, ["a\tb\nc", "$x$ \u6f22", "é"])
    assert axis.texts[0].get_text() == "a·b c\n\\$x\\$ ·\né"


def test_runs_have_the_shortest_names_that_tell_them_apart():
    paths = [Path(path) for path in ("/a/runs/vae/1", "/b/runs/vae/1", "/b/runs/gan/2")]
    assert compare.named(paths[1:]) == ["vae/1", "gan/2"]
    assert compare.named(paths) == ["a/runs/vae/1", "b/runs/vae/1", "b/runs/gan/2"]
    with pytest.raises(_run.RunError, match="give the folders of the runs"):
        compare.main(compare.Config(runs=()))


def test_answers_of_the_additions_are_read_as_numbers():
    tokens = np.int32([[1, 2, 10, 3, 4, 11, 6, 4, 0]])
    assert rlhf.texts(rlhf.Config(), tokens) == ["12+34=046"]


def test_the_hundred_that_are_shown_have_a_class_to_a_column():
    labels = np.repeat(np.arange(10), 12)
    shown = _pictures.hundred(np.zeros((120, 1)), labels).reshape(10, 10)
    np.testing.assert_array_equal(labels[shown], np.tile(np.arange(10), (10, 1)))
    np.testing.assert_array_equal(_pictures.hundred(np.zeros((3, 1)), labels[:3]), [0, 1, 2])


def test_every_system_is_in_the_list():
    """A new family samples again too."""
    trees = {path.stem: ast.parse(path.read_text())
             for path in (ROOT / "experiments").glob("[!_]*.py")}  # fmt: skip
    builds = {
        name
        for name, tree in trees.items()
        if any(isinstance(node, ast.FunctionDef) and node.name == "build" for node in tree.body)
    }
    assert builds == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_every_family(name, points, tmp_path):
    module, folder = importlib.import_module(f"experiments.{name}"), tmp_path / name / "1"
    begin(module, folder, **SMALL[name])
    if name in SAMPLES_NOTHING:
        with pytest.raises(_run.RunError, match=f"experiments.{name}, which samples nothing"):
            again(folder)
    else:
        samples, found = again(folder, num_samples=1 if name == "deep_image_prior" else 6)
        assert samples.shape[0] == len(found["texts"] or samples)
        assert np.isfinite(samples.astype(np.float64)).all()
        text = folder / "again.txt"
        assert text.exists() == (name in ("language_model", "rlhf"))
        assert (folder / "again.png").stat().st_size > 1000
    out = str(tmp_path / "compare.png")
    found = compare.main(compare.Config(runs=(str(folder), str(points)), out=out))
    assert found["options that differ"]["experiment"][0].startswith(f"experiments.{name}"[:20])
    assert Path(out).stat().st_size > 10_000
