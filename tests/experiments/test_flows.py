"""Short runs of the flow experiments, whole: what they write, and that they learn."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from experiments import _run, _system, continuous_flow, flow, flow_matching
from genjax.data import DataSpec

QUICK = {"devices": 1, "progress": False, "log_every": 10}
DIGITS = DataSpec("digits", "images", (8, 8, 1), 17, 10)
SMALL = flow.Config(
    model="spline",
    layers=2,
    width=16,
    depth=1,
    bins=8,
    dropout=0.0,
    learning_rate=2e-2,
    steps=60,
    batch_size=64,
    steps_per_call=20,
    evaluate_every=20,
    draws=1,
    **QUICK,
)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_spline_flow_of_digits(tmp_path):
    folder = tmp_path / "run"
    summary = flow.main(dataclasses.replace(SMALL, run_dir=str(folder)))
    assert json.loads((folder / "summary.json").read_text()) == summary
    # The identity on the unit interval has log2 17 = 4.09 bits; margins alone reach 2.8.
    assert summary["bits_per_dim"] < 3.5
    np.testing.assert_allclose(
        summary["bits_per_dim"], -summary["test_log_likelihood"] / (64 * np.log(2)), rtol=1e-5
    )
    assert summary["best_step"] in (20, 40, 60)
    for name in ("samples.png", "params.npz", "config.json"):
        assert (folder / name).stat().st_size > 500
    assert rows(folder)[-1]["step"] > 0
    # Reopened: the weights of the best step, which are the exported ones.
    _, params, _ = _system.reopen(folder)
    with np.load(folder / "params.npz") as file:
        np.testing.assert_array_equal(params["margins"], file["margins"])


@pytest.mark.slow
def test_a_short_run_of_flow_matching_leaves_its_files(tmp_path):
    folder = tmp_path / "run"
    config = flow_matching.Config(
        run_dir=str(folder), methods=("ot",), width=8, depth=1, steps=20, steps_per_call=10,
        batch_size=32, samples=64, sample_steps=4, **QUICK,
    )  # fmt: skip
    summary = flow_matching.main(config)
    assert np.isfinite(summary["distance_ot"])
    with np.load(folder / "ot" / "params.npz") as file:
        assert summary["parameters"] == sum(file[name].size for name in file.files)
    assert (folder / "samples.png").stat().st_size > 1000
    assert _system.reopen(folder / "ot")[2].methods == ("ot",)


@pytest.mark.slow
def test_flow_matching_with_reflow_and_coupling(tmp_path):
    folder = tmp_path / "run"
    config = flow_matching.Config(
        run_dir=str(folder), width=32, depth=2, steps=200, steps_per_call=100, batch_size=64,
        ema=0.98, learning_rate=5e-3, reflow_pairs=1024, samples=1000, sample_steps=20, **QUICK,
    )  # fmt: skip
    summary = flow_matching.main(config)
    assert summary["distance_flow"] < 0.5 * summary["distance_flow_one_step"]
    assert summary["distance_reflow_one_step"] < 0.5 * summary["distance_flow_one_step"]
    assert summary["curvature_ot"] < 0.5 * summary["curvature_flow"]
    assert summary["curvature_reflow"] < 0.5 * summary["curvature_flow"]
    assert (folder / "samples.png").stat().st_size > 1000
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"flow", "reflow", "ot"}
    assert _system.reopen(folder / "ot")[2].methods == ("ot",)
    with pytest.raises(_run.RunError, match="neither a checkpoint"):
        _system.reopen(folder)


def test_exact_assignment_is_the_optimal_one():
    cost = jax.random.uniform(jax.random.key(0), (9, 9))
    index = flow_matching.exact_assignment(cost)
    rows, columns = linear_sum_assignment(cost)
    got = float(jnp.sum(cost[index, jnp.arange(9)]))
    np.testing.assert_allclose(got, np.asarray(cost)[rows, columns].sum(), rtol=1e-6)
    np.testing.assert_array_equal(jax.jit(flow_matching.exact_assignment)(cost), index)


def test_batches_are_paired_within_the_class_by_the_exact_assignment():
    """The noise is a function of the step; no exchange within a class shortens the paths."""
    config = flow_matching.Config(dataset="digits", conditional=True, seed=3)
    rng = np.random.default_rng(0)
    given = {
        "x": rng.integers(0, 17, (12, 8, 8, 1)).astype(np.uint8),
        "label": np.repeat(np.int32([0, 1, 2]), 4),
    }
    batch = flow_matching.paired(config, DIGITS.scaling(), lambda step: given)
    found, again, other = batch(5), batch(5), batch(6)
    for name in ("x0", "x1", "label"):
        np.testing.assert_array_equal(found[name], again[name])
    assert not np.isin(found["x0"], other["x0"]).any()
    np.testing.assert_array_equal((found["x1"] + 1) / 2 * 17 // 1, given["x"])
    flat = [found[name].reshape(3, 4, 64).astype(np.float64) for name in ("x0", "x1")]
    for x0, x1 in zip(*flat, strict=True):
        cost = np.square(x0[:, None] - x1[None]).sum(-1)
        rows, columns = linear_sum_assignment(cost)
        np.testing.assert_allclose(np.trace(cost), cost[rows, columns].sum(), rtol=1e-9)


@pytest.mark.slow
def test_continuous_flow_learns(tmp_path):
    config = continuous_flow.Config(
        run_dir=str(tmp_path / "run"), width=16, depth=1, steps=150, steps_per_call=25,
        batch_size=128, solver_steps=4, **QUICK,
    )  # fmt: skip
    summary = continuous_flow.main(config)
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3
    assert summary["kl_to_exact"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["planar", "realnvp", "spline"])
def test_two_dimensional_flows_learn(model, tmp_path):
    config = dataclasses.replace(
        SMALL, model=model, dataset="moons", run_dir=str(tmp_path / "run"), width=32,
        layers=8, steps=200, learning_rate=1e-2,
    )  # fmt: skip
    summary = flow.main(config)
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0] - 0.2
    assert summary["kl_to_exact"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["realnvp", "glow", "tarflow"])
def test_image_flows_learn(model, tmp_path):
    layers = {"realnvp": 2, "glow": 1, "tarflow": 2}[model]
    config = dataclasses.replace(
        SMALL, model=model, layers=layers, run_dir=str(tmp_path / "run"), learning_rate=5e-3
    )
    assert flow.main(config)["bits_per_dim"] < 4.0


@pytest.mark.slow
def test_conditional_tarflow_with_noise_gives_denoised_samples(tmp_path):
    config = dataclasses.replace(
        SMALL, model="tarflow", noise=0.2, conditional=True, guidance=1.0, layers=2,
        run_dir=str(tmp_path / "run"), learning_rate=5e-3,
    )  # fmt: skip
    summary = flow.main(config)
    assert "bits_per_dim" not in summary
    assert (tmp_path / "run" / "samples.png").stat().st_size > 1000


def test_bad_options_are_named():
    cases = [
        ("for images", dataclasses.replace(SMALL, model="glow", dataset="moons")),
        ("held_out", dataclasses.replace(SMALL, held_out=0.0)),
        ("tarflow", dataclasses.replace(SMALL, conditional=True)),
    ]
    for match, config in cases:
        with pytest.raises(ValueError, match=match):
            flow.main(config)
    with pytest.raises(ValueError, match="flow before reflow"):
        flow_matching.main(flow_matching.Config(methods=("reflow",)))
    with pytest.raises(ValueError, match="classes"):
        flow_matching.main(flow_matching.Config(conditional=True))
