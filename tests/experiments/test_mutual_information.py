"""Mutual information of Gaussians, which is known: -log(1 - rho^2) / 2 for each dimension."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _run
from experiments import mutual_information as mi
from experiments._system import prepare, reopen


@pytest.mark.parametrize("estimator", ["mine", pytest.param("nwj", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_estimate_comes_near_the_truth(estimator, tmp_path):
    options = {"steps": 150, "steps_per_call": 50, "learning_rate": 1e-2, "ema": 0.95, "width": 32}
    config = mi.Config(run_dir=str(tmp_path / "run"), estimator=estimator, **options)
    summary = mi.main(config)
    np.testing.assert_allclose(summary["truth"], 0.1438410, rtol=1e-6)  # log(4 / 3) / 2
    assert summary["error"] < 0.025, summary
    assert (tmp_path / "run" / "estimate.png").exists()
    _, params, again = reopen(tmp_path / "run")
    pairs = jnp.asarray(mi.load_data(again).test["x"])
    bound = mi.BOUNDS[estimator](*mi.scores(again, params, pairs)).bound
    np.testing.assert_allclose(bound, summary["estimate"], rtol=1e-4)


@pytest.mark.parametrize("estimator", ["donsker_varadhan", "nwj"])
def test_a_perfect_critic_is_worth_the_truth(estimator):
    config = mi.Config(rho=0.6, dims=2, estimator=estimator)
    pairs = jnp.asarray(mi.sample_pairs(config, np.random.default_rng(0), 100_000))

    def log_ratio(pairs):
        x, y = pairs[:, :2], pairs[:, 2:]
        given = (y - 0.6 * x) ** 2 / (1 - 0.6**2) + np.log(1 - 0.6**2)
        return jnp.sum(y**2 - given, axis=1) / 2

    apart = jnp.concatenate([pairs[:, :2], jnp.roll(pairs[:, 2:], 1, axis=0)], axis=1)
    real, fake = log_ratio(pairs), log_ratio(apart)
    real, fake = (real + 1, fake + 1) if estimator == "nwj" else (real, fake)
    bound = mi.BOUNDS[estimator](real, fake).bound
    np.testing.assert_allclose(bound, -np.log(1 - 0.6**2), atol=0.02)


def test_the_average_of_mine_is_carried_by_the_state():
    config = mi.Config(batch_size=64, devices=1, steps_per_call=1, average=0.9)
    training = prepare(config, mi.build(config, mi.load_data(config)), mi.load_data(config))
    state, expected = training.state, None
    assert state.carry == -jnp.inf
    for step in range(3):
        fake = mi.scores(config, state.params, jnp.asarray(training.batches(step)["x"]))[1]
        now = float(jnp.mean(jnp.exp(fake)))
        expected = now if expected is None else 0.9 * expected + 0.1 * now
        state, _ = jax.block_until_ready(training.step_fn(state, training.batches(step)))
        np.testing.assert_allclose(state.carry, np.log(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--rho", "1"], "rho must lie in (-1, 1), got 1.0"), (["--dims", "0"], "dims must be at le")],
)
def test_a_mistake_gives_one_line(option, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mutual_information", *option])
    with pytest.raises(SystemExit) as ended:
        _run.launch(mi.main, mi.Config)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
