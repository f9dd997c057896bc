import functools
import json
import os
import signal
import threading
import time

import jax
import numpy as np
import optax
import pytest

from genjax.training import (
    Checkpoints,
    NonFiniteError,
    Stopped,
    data_mesh,
    fit,
    init_state,
    loop,
    make_train_step,
    progress,
)
from genjax.training.record import MetricsLog, read_metrics

from .problem import make_batch, make_params, noisy_loss

ADAM = optax.adam(0.01)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Of the emulated devices these steps use one: batches are made in threads, calls overlap."""
    monkeypatch.setattr(loop, "_on_several_cpus", lambda: False)


def start():
    return init_state(make_params(), ADAM, jax.random.key(0), ema_decays=[0.9])


@functools.cache  # compiled once for all tests
def make_step(steps_per_call=1, optimizer=ADAM):
    return make_train_step(noisy_loss, optimizer, mesh=data_mesh(1), steps_per_call=steps_per_call)


def train(folder, batches=make_batch, steps_per_call=1, **options):
    options = {"num_steps": 7, "save_every": 2, **options}
    checkpoints = Checkpoints(folder / "checkpoints")
    try:
        return fit(
            start(),
            make_step(steps_per_call),
            batches,
            folder=folder,
            checkpoints=checkpoints,
            steps_per_call=steps_per_call,
            **options,
        )
    finally:
        checkpoints.close()


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a.params, b.params)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_batches_are_made_in_threads_but_not_on_several_cpu_devices(tmp_path, monkeypatch):
    """There XLA's queue is short, and a thread that fills it would stop the step for good."""
    makers = []

    def batches(i):
        makers.append(threading.current_thread())
        return make_batch(i)

    ahead = train(tmp_path / "ahead", batches)
    assert len(makers) == 7
    assert threading.main_thread() not in makers
    monkeypatch.undo()
    makers.clear()
    assert loop._on_several_cpus()
    equal(train(tmp_path / "here", batches), ahead)
    assert makers == [threading.main_thread()] * 7


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_metrics_are_those_of_the_steps(tmp_path, steps_per_call):
    final = train(tmp_path, steps_per_call=steps_per_call)
    step, state, losses = make_step(), start(), []
    for i in range(7):
        state, metrics = step(state, make_batch(i))
        losses.append(float(metrics["loss"]))
    assert int(final.step) == 7
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), final.params, state.params
    )
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(7))
    np.testing.assert_allclose([line["loss"] for line in lines], losses, rtol=1e-5)
    assert set(lines[0]) == {"step", "loss", "absolute", "grad_norm", "seconds"}
    # Multiples of 2 that a call reached, and the end; the three newest stay.
    expected = [4, 6, 7] if steps_per_call == 1 else [3, 6, 7]
    assert Checkpoints(tmp_path / "checkpoints").steps() == expected


def test_evaluation_and_thinned_log(tmp_path):
    train(
        tmp_path,
        evaluate=lambda state: {"step_now": state.step, "nan": np.nan},
        evaluate_every=3,
        log_every=5,
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [0, 5]
    evaluations = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    assert [line["eval/step_now"] for line in evaluations] == [3, 6]
    assert evaluations[0]["eval/nan"] is None


def test_the_hook_is_given_the_lines(tmp_path):
    told = []
    train(tmp_path, log_every=2, evaluate_every=3, evaluate=lambda state: {"step": state.step},
          on_metrics=lambda step, metrics: told.append({"step": step, **metrics}))  # fmt: skip
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert told == [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    assert {type(x) for row in told for k, x in row.items() if k != "step"} == {float}


@pytest.mark.parametrize("at", [3, 6])
def test_an_error_of_the_hook_leaves_the_state_that_was_reached(tmp_path, at):
    """Its numbers are read while the next call runs: that call's state is saved, or the last."""

    def broken(step, metrics):
        if step == at:
            raise KeyError("tracker")

    with pytest.raises(KeyError, match="tracker") as error:
        train(tmp_path / "a", save_every=100, on_metrics=broken)
    saved = min(at + 2, 7)
    assert error.value.__notes__ == [f"the state of step {saved} is saved: mend this, then resume"]
    step, state = Checkpoints(tmp_path / "a" / "checkpoints").restore(start())
    assert step == saved
    equal(state, train(tmp_path / "b", num_steps=saved))
    told = []
    with pytest.raises(NonFiniteError):
        train(tmp_path / "c", nan_at(3), on_metrics=lambda step, metrics: told.append(step))
    assert told == [0, 1, 2]


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    now = iter(np.arange(0.0, 1e4, 10.0).tolist())
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    bar = progress.Progress(1000, 100, shown=True)
    for step in (110, 120, 130, 140, 150, 160):
        bar.update(step, {"other": 1.0, "loss": np.float32(0.25)} if step > 110 else {})
    bar.close()
    assert capsys.readouterr().err.splitlines() == [
        "step 130 of 1000, 1 steps/s, 14:30 left, loss 0.25",
        "step 160 of 1000, 1 steps/s, 14:00 left, loss 0.25",
    ]
    quiet = progress.Progress(1000, 0, shown=False)
    for step in range(1, 9):
        quiet.update(step, {"loss": 1.0})
    assert capsys.readouterr().err == ""
    assert progress._clock(3723.4) == "1:02:03"


def nan_at(step):
    def batches(i):
        batch = make_batch(i)
        if i == step:
            batch["y"][2] = np.nan
        return batch

    return batches


@pytest.mark.parametrize("steps_per_call", [1, 3])
@pytest.mark.parametrize("step", [0, 4, 6])
def test_a_nan_stops_at_its_step(tmp_path, steps_per_call, step):
    with pytest.raises(NonFiniteError, match=rf"absolute .* at step {step}; .*finite in 'y'") as e:
        train(tmp_path, nan_at(step), steps_per_call=steps_per_call)
    saved = Checkpoints(tmp_path / "checkpoints").steps()
    assert all(s <= step for s in saved)
    assert f"last good checkpoint: {f'step {saved[-1]}' if saved else 'none'}" in str(e.value)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == step
    if saved:  # what was saved is what the steps before the NaN made
        _, state = Checkpoints(tmp_path / "checkpoints").restore(start())
        expected, one = start(), make_step()
        for i in range(saved[-1]):
            expected, _ = one(expected, make_batch(i))
        close(state, expected)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    broken = optax.chain(optax.sgd(1.0), optax.scale(np.inf))
    state = init_state(make_params(), broken, jax.random.key(0))
    checkpoints = Checkpoints(tmp_path / "c")
    with pytest.raises(NonFiniteError, match="parameter in/b is not finite after 1 steps"):
        fit(
            state,
            make_step(optimizer=broken),
            make_batch,
            num_steps=1,
            folder=tmp_path,
            checkpoints=checkpoints,
        )
    assert checkpoints.steps() == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_stops(tmp_path, name):
    def batches(i):
        if i == 3:
            os.kill(os.getpid(), signal.Signals[name])
        return make_batch(i)

    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped, match=f"{name} at step 4 of 7, the state is saved") as stopped:
        train(tmp_path, batches, save_every=100, prefetch=0)
    assert stopped.value.code == {"SIGINT": 130, "SIGTERM": 143}[name]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    step, state = Checkpoints(tmp_path / "checkpoints").restore(start())
    assert step == 4
    resumed = fit(state, make_step(), make_batch, num_steps=7, folder=tmp_path)
    equal(resumed, train(tmp_path / "whole"))
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(7))


def test_the_last_state_is_always_saved(tmp_path):
    """Also where no step is left to do (once), and where `evaluate` fails."""
    state, checkpoints = start(), Checkpoints(tmp_path / "checkpoints")
    options = {"num_steps": 0, "folder": tmp_path, "checkpoints": checkpoints}
    assert fit(state, make_step(), make_batch, **options) is state
    step, again = checkpoints.restore(state)
    assert step == 0
    equal(again, state)
    fit(
        again,
        make_step(),
        make_batch,
        **{**options, "checkpoints": Checkpoints(checkpoints.folder)},
    )
    with pytest.raises(ZeroDivisionError) as error:
        train(tmp_path / "fails", evaluate=lambda state: 1 / 0, evaluate_every=3, save_every=100)
    assert error.value.__notes__ == ["the state of step 3 is saved: mend this, then resume"]
    assert Checkpoints(tmp_path / "fails" / "checkpoints").steps() == [3]


@pytest.mark.parametrize("best", ["fid", "eval/fid"])
def test_the_best_by_the_name_that_evaluate_gives(tmp_path, best):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, best=best)
    scores = iter([0.3, np.nan, 0.2, 0.4])
    options = {"num_steps": 4, "folder": tmp_path, "checkpoints": checkpoints, "evaluate_every": 1}
    fit(start(), make_step(), make_batch, **options, evaluate=lambda _: {"fid": next(scores)})
    assert checkpoints.restore_best(start())[0] == 3
    assert checkpoints.steps() == [3, 4]
    checkpoints.close()
    other = Checkpoints(tmp_path / "other", best="kid")
    with pytest.raises(ValueError, match=r"must hold best = 'kid', got \['eval/fid'\]"):
        fit(
            start(),
            make_step(),
            make_batch,
            **{**options, "checkpoints": other},
            evaluate=lambda _: {"fid": 1.0},
        )


@pytest.mark.parametrize("steps_per_call", [1, 3])
def test_a_budget_ends_training_after_a_call(tmp_path, steps_per_call):
    def slow(state, batch):
        time.sleep(0.05 if int(state.step) else 1.0)  # the first call is not counted
        return make_step(steps_per_call)(state, batch)

    options = {"num_steps": 10**6, "save_every": 10**6, "max_seconds": 0.3}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    options |= {"folder": tmp_path, "checkpoints": checkpoints, "steps_per_call": steps_per_call}
    state = fit(start(), slow, make_batch, **options)
    checkpoints.close()
    done, calls = int(state.step), int(state.step) / steps_per_call
    assert 2 <= calls <= 8
    assert calls == int(calls)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [done]  # the last state is saved
    same = fit(start(), make_step(), make_batch, num_steps=done, folder=tmp_path / "whole")
    close(state, same)


def test_log_drops_what_is_written_again_and_torn_lines(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(4):
        log.write(step, {"loss": 1.0})
    log.write(4, {"eval/bound": 2.0})
    log.write(4, {"loss": 1.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    MetricsLog(tmp_path, start=4).close()
    kept = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in kept] == [0, 1, 2, 3, 4]
    assert "eval/bound" in kept[-1]


def test_tensorboard(tmp_path, monkeypatch):
    train(tmp_path, num_steps=2, tensorboard=True)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="tensorboardX is not installed: install the extra"):
        train(tmp_path / "other", tensorboard=True)


def test_bad_input(tmp_path, unchecked):
    for name in ("save_every", "steps_per_call", "log_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            fit(start(), make_step(), make_batch, folder=tmp_path, **{"num_steps": 3, name: 0})
    with pytest.raises(TypeError, match=r"num_steps must be an integer, got 2\.5"):
        fit(start(), make_step(), make_batch, folder=tmp_path, num_steps=2.5)
    with pytest.raises(ValueError, match="max_seconds must be at least 0, got -1"):
        fit(start(), make_step(), make_batch, folder=tmp_path, num_steps=2, max_seconds=-1.0)


def test_an_evaluation_after_the_first_call_is_in_the_budget(tmp_path):
    def evaluate(state):
        time.sleep(0.4)
        return {"score": 1.0}

    options = {"num_steps": 100, "folder": tmp_path, "max_seconds": 0.3, "evaluate_every": 1}
    assert int(fit(start(), make_step(), make_batch, evaluate=evaluate, **options).step) == 1


def test_data_that_are_gone_at_the_first_batch_of_a_resumed_run_are_what_is_named(tmp_path):
    train(tmp_path, num_steps=3)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    _, state = checkpoints.restore(start())

    def gone(step):
        raise FileNotFoundError("data folder gone")

    options = {"num_steps": 9, "folder": tmp_path, "checkpoints": checkpoints}
    with pytest.raises(FileNotFoundError, match="data folder gone") as error:
        fit(state, make_step(), gone, **options)
    assert error.value.__notes__ == ["the state of step 3 is saved: mend this, then resume"]
