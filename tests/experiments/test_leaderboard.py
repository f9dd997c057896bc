"""The leaderboard: a tiny one, whole, and its parts."""

import dataclasses
import importlib
import json
import math

import jax
import numpy as np
import pytest
from matplotlib import image

from experiments import _data, _judge, _run, leaderboard
from experiments import _leaderboard_report as report
from experiments import _leaderboard_runs as runs
from experiments import _leaderboard_scores as scores
from experiments._system import Row
from genjax.data import DENSITIES, DataSpec, load

STUB = "tests.experiments.stub"
TINY = {
    "wide": Row("wide", "Wide", {}, {"spread": 2.0}, module=STUB),
    "broken": Row("broken", "Broken", {}, {"spread": -1.0}, module=STUB),
    "narrow": Row("narrow", "Narrow", {}, {"spread": 0.1}, module=STUB),
}
TINY_CONFIG = leaderboard.Config(dataset="8gaussians", seconds_per_family=0.2, calibrate=0.0)


def reference(dataset):
    return _judge.reference(_data.load_data(leaderboard.Config(dataset=dataset)))


@pytest.fixture(scope="module")
def digits():
    return reference("digits")


@pytest.mark.slow
def test_two_families_and_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(leaderboard, "rows_of", lambda _: TINY)
    monkeypatch.setattr(leaderboard, "floors", lambda *_: [])  # have a test of their own
    config = dataclasses.replace(TINY_CONFIG, run_dir=str(tmp_path))
    board = leaderboard.main(config)
    assert board == json.loads((tmp_path / "leaderboard.json").read_text())
    rows = {row["title"]: row for row in board["rows"]}
    assert list(rows) == ["Test split, the ceiling", "Wide", "Broken", "Narrow"]

    # The one that fails says why and stops nobody.
    failed = rows["Broken"]
    assert (failed["mean"], failed["runs"]) == ({}, [])
    assert failed["reason"] == "spread must be at least 0, got -1.0"
    text = (tmp_path / "leaderboard.md").read_text()
    assert "Features: the points themselves." in text
    assert "| Broken | failed: spread must be at least 0, got -1.0 |" in text

    # The budget ended the training; costs are read from the run.
    mean, summary = rows["Wide"]["mean"], runs._read(tmp_path / "wide/seed0/summary.json")
    assert summary["ended_by_budget"]
    assert 1 < mean["steps"] < 10**6
    assert 0.2 <= mean["training_seconds"] < 3
    assert (mean["evaluations"], mean["parameters"]) == (7, 2)
    # Eight modes on a circle of radius 2: a wide Gaussian finds them all and lies mostly beside.
    ceiling, narrow = rows["Test split, the ceiling"]["mean"], rows["Narrow"]["mean"]
    assert ceiling["precision"] > 0.9 > mean["precision"] > narrow["precision"]
    assert mean["recall"] > 0.9 > narrow["recall"]
    assert ceiling["frechet"] < mean["frechet"] < narrow["frechet"]

    # Every value with its provenance.
    measured = {m["metric"]: m for m in rows["Narrow"]["runs"][0]["measured"]}
    assert measured["precision_recall"]["counts"] == [1000, 1000]
    assert measured["precision_recall"]["extractor"] == "none"
    assert (measured["kid"]["seed"], measured["kid"]["dtype"]) == (0, "float32")
    assert (tmp_path / "leaderboard.png").stat().st_size > 10_000

    # A second call reuses what is finished and gives the same numbers.
    config = dataclasses.replace(config, families=("wide",))
    written = (tmp_path / "wide/seed0/summary.json").stat().st_mtime_ns
    again = {row["title"]: row for row in leaderboard.main(config)["rows"]}
    assert again["Wide"]["runs"][0]["reused"]
    assert again["Wide"]["mean"] == mean
    assert (tmp_path / "wide/seed0/summary.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_scores_are_those_of_the_metrics(digits):
    """Blocks of as many samples as the test split has, each against the whole training split."""
    samples = load("digits", "train")[0]["x"][:800]
    records = _judge.score(digits, samples)
    found = _judge.numbers(records)
    for record in records:
        used = ("none", (1437, 360, 360)) if "memor" in record.metric else ("digits", (1437, 360))
        assert (record.extractor, record.counts) == used
    assert len({record.hash for record in records}) == 2
    views = [digits.views(samples[i : i + 360])["features"] for i in (0, 360)]
    pairs = [_judge.PRECISION_RECALL(digits.train["features"], view, k=3) for view in views]
    np.testing.assert_allclose(found["precision"], np.mean([p.precision for p in pairs]), rtol=1e-5)
    np.testing.assert_allclose(found["recall"], np.mean([p.recall for p in pairs]), rtol=1e-5)
    real = digits.train["features"].astype(np.float64)
    expected = []
    for view in views:
        c0, c1 = np.cov(real.T), np.cov(view.astype(np.float64).T)
        root = np.sqrt(np.maximum(np.linalg.eigvals(c0 @ c1).real, 0)).sum()
        gap = np.sum((real.mean(0) - view.mean(0)) ** 2)
        expected.append(gap + np.trace(c0) + np.trace(c1) - 2 * root)
    np.testing.assert_allclose(found["frechet"], np.mean(expected), rtol=1e-4)
    # Copies of the training split are precise, and memorised.
    assert found["precision"] == found["memorised"] == 1
    with pytest.raises(ValueError, match="samples must be at least 360, got 100"):
        _judge.score(digits, samples[:100])
    with pytest.raises(ValueError, match="shape"):
        _judge.score(digits, samples[:, :4])


@pytest.mark.slow
def test_the_plane():
    data = reference("8gaussians")
    assert data.extractor is None
    x = np.asarray(DENSITIES["8gaussians"].sample(jax.random.key(5), data.count))
    found = _judge.numbers(_judge.score(data, x))
    assert found["precision"] > 0.9
    assert found["coverage"] > 0.9
    assert found["frechet"] < 0.05
    with pytest.raises(ValueError, match="finite"):
        _judge.score(data, np.where(np.arange(len(x))[:, None] == 3, np.nan, x))
    costs = scores.costs({"test_log_likelihood": -2.0, "samples": 10}, data.data.spec)
    assert costs == {"bits_per_dim": pytest.approx(2 / (2 * math.log(2)))}


def test_the_number_of_steps_is_measured(tmp_path, monkeypatch):
    """Ten steps a call, 0.5 s for 20 steps after the first call: 40 steps a second, 240 in 6 s."""
    asked = []

    def run(family, place, options, log, timeout, until):
        asked.append(options)
        place = place / "deeper"
        place.mkdir(parents=True)
        training = {"training_seconds": 3.5, "first_call_seconds": 3.0, "steps_done": 30}
        _run.write_json(place / "training.json", training)
        _run.write_json(place / "config.json", {"steps_per_call": 10})
        assert until()

    monkeypatch.setattr(runs, "_run", run)
    given = (TINY["wide"], tmp_path, {"seed": 4, "max_seconds": 6.0}, 6.0, 0.1, 9.0)
    assert runs.steps_within(*given) == (240, None)
    assert asked[0]["max_seconds"] == pytest.approx(0.6)
    assert runs.steps_within(*given) == (240, None)  # read again, for any seed
    assert len(asked) == 1


def test_how_a_process_is_called_and_what_it_says(tmp_path):
    words = runs.arguments(
        {"methods": ("flow", "ot"), "conditional": True, "steps": 3, "x_y": None}
    )
    assert words == ["--methods", "flow", "ot", "--conditional", "--steps", "3"]
    log = tmp_path / "log"
    log.write_text("Traceback\nValueError: no\n\n----\n")
    assert runs.last_line(log) == "ValueError: no"
    slow = runs._run(Row("", "", module="experiments"), tmp_path / "run", {}, log, timeout=0.01)
    assert slow == "took more than 0.01 seconds"


def test_table_of_several_seeds():
    entries = [
        {"values": {"precision": 0.5, "kid": 0.001}},
        {"values": {"precision": 0.7, "kid": 0.001, "parameters": 12345}},
    ]
    rows = [leaderboard.row("two", entries), leaderboard.row("none", [], "a | b\nc")]
    assert rows[0]["mean"]["precision"] == pytest.approx(0.6)
    assert rows[0]["spread"]["precision"] == pytest.approx(0.1414, abs=1e-4)
    lines = report.table(rows).splitlines()
    assert "0.600 ± 0.141" in lines[2]
    assert "12,345" in lines[2]
    assert "failed: a / b c" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_bits_say_what_they_are():
    """Beside the number, and only beside one: exact, a bound, or an estimate by a solver."""
    families = leaderboard.rows_of(leaderboard.MODULES)
    kinds = {name: (f.of_bits("images"), f.of_bits("points")) for name, f in families.items()}
    assert kinds["pixelcnn"] == ("exact", "exact")
    assert kinds["realnvp"] == ("bound", "exact")
    assert kinds["vae"][0] == "bound"
    assert kinds["diffusion"] == kinds["continuous_flow"] == ("estimate", "estimate")
    entries = [{"values": {"bits_per_dim": 2.0}}, {"values": {"precision": 0.5}}]
    rows = [leaderboard.row("a", [e], bits="bound") for e in entries]
    head, _, first, second = (
        [cell.strip() for cell in line.split("|")] for line in report.table(rows).splitlines()
    )
    at = head.index("bits/dim")
    assert head[at + 1] == "which are"
    assert first[at : at + 2] == ["2.000", "bound"]
    assert second[at : at + 2] == ["", ""]


def test_every_row_names_options_that_its_experiment_has():
    for name, row in leaderboard.rows_of(leaderboard.MODULES).items():
        module = importlib.import_module(row.module)
        fields = {field.name for field in dataclasses.fields(module.Config)}
        for options in (row.images, row.plane, row.larger):
            assert set(options or {}) <= fields, name
        if row.trained:
            assert {"steps", "max_seconds", "devices"} <= fields
            assert callable(module.build)


def test_larger_images_take_their_own_options_and_the_rows_meant_for_them():
    """Digits are 8x8; 28x28 takes the changes, and by itself only the rows that have such."""
    small, large, plane = (
        DataSpec(name, kind, shape, levels, None)
        for name, kind, shape, levels in [
            ("digits", "images", (8, 8, 1), 17),
            ("mnist", "images", (28, 28, 1), 256),
            ("moons", "points", (2,), None),
        ]
    )
    both = Row("both", "", {"width": 8, "depth": 2}, {"width": 4}, larger={"width": 64})
    digits_only = Row("digits_only", "", {"width": 8})
    as_digits = Row("as_digits", "", {"width": 8}, larger={})
    of = leaderboard.options_of
    assert of(both, small) == {"width": 8, "depth": 2}
    assert of(both, large) == {"width": 64, "depth": 2}
    assert of(both, plane) == {"width": 4}
    assert of(digits_only, large) == of(as_digits, large) == {"width": 8}
    assert of(as_digits, plane) is of(Row("none", ""), small) is None
    assert of(both, small._replace(kind="tokens")) is None
    meant = {r.name: [leaderboard.is_meant(r, s) for s in (small, large, plane)]
             for r in (both, digits_only, as_digits)}  # fmt: skip
    assert meant == {
        "both": [True, True, True],
        "digits_only": [True, False, False],
        "as_digits": [True, True, False],
    }


def test_bad_input(tmp_path):
    for match, options in [
        ("did you mean 'diffusion'", {"families": ("difusion",)}),
        ("seeds must be at least 1, got 0", {"seeds": 0}),
        ("seconds_per_family must be", {"seconds_per_family": 0.0}),
        ("did you mean 'digits'", {"dataset": "digit"}),
    ]:
        with pytest.raises(ValueError, match=match):
            leaderboard.main(leaderboard.Config(run_dir=str(tmp_path / "board"), **options))
    assert not (tmp_path / "board").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "bits"), [("digits", (2.6, 3.3)), ("8gaussians", (1, 2))])
def test_floors(dataset, bits):
    data = reference(dataset)
    ceiling = _judge.numbers(_judge.score(data, scores.ceiling(data.data)[0]))
    for make in scores.floors(data.data, 0).values():
        samples, costs = make()
        assert samples.dtype == (np.uint8 if dataset == "digits" else np.float32)
        assert bits[0] < costs["bits_per_dim"] < bits[1]
        found = _judge.numbers(_judge.score(data, samples))
        # The plane's law is a mixture of Gaussians: its floors lie within the ceiling's own error.
        low, high = (1, 30) if dataset == "digits" else (0.1, 10)
        assert low * ceiling["frechet"] < found["frechet"] < high * ceiling["frechet"]
        assert found["precision"] > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["digits", "8gaussians"])
def test_every_family_leaves_a_row(dataset, tmp_path):
    options = {"dataset": dataset, "seconds_per_family": 1.0, "run_dir": str(tmp_path)}
    board = leaderboard.main(leaderboard.Config(**options))
    assert [row["title"] for row in board["rows"] if row["reason"]] == []
    images = dataset == "digits"
    expected = [
        f.title
        for f in leaderboard.rows_of(leaderboard.MODULES).values()
        if (f.images if images else f.plane) is not None
    ]
    assert [row["title"] for row in board["rows"]][3:] == expected
    assert all(row["mean"]["training_seconds"] < 10 for row in board["rows"][3:])
    assert image.imread(tmp_path / "leaderboard.png").ndim == 3
    again = leaderboard.main(leaderboard.Config(**options))
    assert all(run["reused"] for row in again["rows"][3:] for run in row["runs"])


def test_features_of_other_images_are_their_pixels_in_the_unit_interval():
    """Distances that depend on a unit do not depend on the number of levels."""
    data = _data.load_data(leaderboard.Config(dataset="digits"))
    other = data._replace(spec=data.spec._replace(name="other"))
    of = _judge.reference(other)
    assert of.extractor is None
    np.testing.assert_array_equal(of.train["plain"].max(), 16)
    np.testing.assert_allclose(of.train["features"], of.train["plain"] / 16)
    np.testing.assert_allclose(of.views(other.test["x"])["features"], of.test["features"])
