"""Short runs of preferences and of rlhf, whole, and their parts against what they must be."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _system, preferences, rlhf
from genjax import alignment

FEW = preferences.Config(
    vocabulary=3,
    length=2,
    steps=150,
    batch_size=64,
    seeds=2,
    learning_rate=0.1,
    objectives=("rloo", "dpo"),
)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences") / "run"
    return folder, preferences.main(dataclasses.replace(FEW, run_dir=str(folder)))


@pytest.mark.slow
def test_preferences(few):
    folder, summary = few
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (folder / "preferences.png").stat().st_size > 1000
    for name in FEW.objectives:
        row = summary[name]
        assert 0.3 < row["share"] <= 1
        assert row["reward"] - FEW.beta * row["kl"] <= summary["optimum"] + 1e-5
        assert row["miss"] > 0


def test_the_problem_is_whole(x64):
    """Probabilities of all strings sum to 1 under any table; the optimum is 100% of the way."""
    problem = preferences.make_problem(FEW)
    assert len(problem.strings) == 9
    table = jax.random.normal(jax.random.key(3), (int(problem.prefixes.max()) + 1, 3))
    total = jnp.exp(problem.log_probs(table).sum(1)).sum()
    np.testing.assert_allclose(total, 1, rtol=1e-10)
    log_best, best = alignment.optimal_policy(problem.sums, problem.rewards, beta=FEW.beta)
    # The table whose strings have the optimum's law: sums of it over what continues a prefix.
    logits = np.full(table.shape, -np.inf)
    for prefixes, string, log_p in zip(problem.prefixes, problem.strings, log_best, strict=True):
        for row, token in zip(prefixes, string, strict=True):
            logits[row, token] = np.logaddexp(logits[row, token], log_p)
    found = preferences.measure(problem, log_best, best, jnp.asarray(logits))
    np.testing.assert_allclose(found["share"], 1, rtol=1e-9)
    np.testing.assert_allclose(found["miss"], 0, atol=1e-9)


def test_strings_are_chosen_by_their_law(key):
    log_p = jnp.log(jnp.array([0.5, 0.0, 0.2, 0.3]))
    counts = np.bincount(preferences.choose(key, log_p, 10_000), minlength=4) / 10_000
    np.testing.assert_allclose(counts, np.exp(log_p), atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", preferences.OBJECTIVES)
def test_every_objective_has_a_loss_for_each_row(name, key):
    problem = preferences.make_problem(FEW)
    num = int(problem.prefixes.max()) + 1
    params = {"policy": jnp.zeros((num, 3)), "values": jnp.zeros(num)}
    objective = preferences.OBJECTIVES[name]
    gradient = jax.grad(lambda p: jnp.mean(objective(problem, p, key, 16)))(params)
    assert objective(problem, params, key, 16).shape == (16,)
    assert np.isfinite(gradient["policy"]).all()


@pytest.mark.slow
def test_the_marks_of_preferences(tmp_path):
    config = preferences.Config(objectives=("rloo", "dpo"), run_dir=str(tmp_path / "run"))
    summary = preferences.main(config)
    assert summary["rloo"]["share"] >= 0.99
    assert summary["dpo"]["share"] >= 0.97
    assert summary["dpo"]["miss"] <= 0.05


SHORT = rlhf.Config(
    imitation=4,
    steps=8,
    steps_per_call=2,
    batch_size=16,
    width=16,
    depth=1,
    heads=2,
    devices=1,
    progress=False,
    log_every=1,
)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlhf") / "run"
    config = dataclasses.replace(SHORT, algorithm="ppo", reward="model", run_dir=str(folder))
    return folder, rlhf.main(config)


@pytest.mark.slow
def test_rlhf(short):
    folder, summary = short
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (folder / "rlhf.png").stat().st_size > 1000
    assert {"right", "right_before", "kl", "judged"} <= summary.keys()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # The reference is the policy at step 4: their difference there is rounding, squared.
    assert all(abs(row["kl"]) < 1e-12 for row in rows[:5])
    assert any(row["kl"] > 0 for row in rows[5:])
    samples = np.load(folder / "samples.npy")
    np.testing.assert_array_equal(np.mean(rlhf.is_right(samples)), np.float32(summary["right"]))


@pytest.mark.slow
def test_rlhf_reopens(short):
    folder, _ = short
    _, params, _ = _system.reopen(folder)
    assert {"policy", "values", "judge", "reference"} == params.keys()


def test_additions():
    """Prompts, answers, and a wrong answer that is never right."""
    data = rlhf.load_data(SHORT)
    together = np.concatenate([data.train["x"], data.test["x"]])
    assert len({tuple(row) for row in together}) == 10_000
    prompts = jnp.array([[3, 7, 10, 9, 5, 11], [0, 0, 10, 0, 4, 11]])
    np.testing.assert_array_equal(rlhf.sums(prompts), [132, 4])
    np.testing.assert_array_equal(rlhf.spelled(rlhf.sums(prompts)), [[2, 3, 1], [4, 0, 0]])
    right = jnp.concatenate([prompts, rlhf.spelled(rlhf.sums(prompts))], axis=1)
    np.testing.assert_array_equal(rlhf.is_right(right), [1, 1])
    many = jnp.resize(rlhf.sums(prompts), (2000,))
    other = rlhf.wrong(jax.random.key(0), many)
    assert not np.any(other == many)
    assert (other.min(), other.max()) == (0, 198)


def test_options_out_of_range():
    data = rlhf.load_data(SHORT)
    for changes, message in (
        ({"group": 1}, "group must be at least 2"),
        ({"group": 5}, "batch_size / accumulate must be a multiple of group = 5, got 16"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"right": 1.5}, "right must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            rlhf.build(dataclasses.replace(SHORT, **changes), data)
    with pytest.raises(ValueError, match="did you mean 'ppo'"):
        preferences.main(dataclasses.replace(FEW, objectives=("dppo",)))
