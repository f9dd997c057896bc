"""The benchmark table: sides in turn, ratios, targets, what a compiled program sends."""

import importlib
import io
import json
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import (
    _ceilings,
    _table,
    _timing,
    _workload,
    paired,
    scaling,
    unbalanced,
)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves."""
    now = [0.0]
    fake = types.SimpleNamespace(
        perf_counter=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    monkeypatch.setattr(_timing, "time", fake)
    return fake


def test_sides_are_timed_in_turn(clock):
    order = []

    def side(name, seconds):
        def call():
            order.append(name)
            clock.sleep(seconds)

        return call

    sides = {"genjax": side("a", 0.002), "peer": side("b", 0.008)}
    times = _timing.in_turn(sides, rounds=4, calls=2, units=2, pause=0)
    assert "".join(order) == "aabb" + "aabb" + "bbaa" + "aabb" + "bbaa"
    assert len(times["peer"].rounds) == 4
    assert times["peer"].median == pytest.approx(4)  # two units in a call
    assert _timing.ratio(times["peer"], times["genjax"]) == pytest.approx(4)
    assert times["genjax"].first == pytest.approx(2)


def test_time_is_bounded(clock):
    times = _timing.in_turn({"a": lambda: clock.sleep(0.01)}, rounds=1000, seconds=0.045, pause=0)
    assert len(times["a"].rounds) == 5


def test_short_calls_are_warmed_after_a_pause(clock):
    order = []

    def side(name, seconds):
        def call():
            order.append(name)
            clock.sleep(seconds)

        return call

    sides = {"genjax": side("a", 0.002), "peer": side("b", 0.03)}
    times = _timing.in_turn(sides, rounds=3, warm=0, pause=1)
    assert "".join(order) == "ab" + "ab" + "baa" + "aab"
    assert times["genjax"].rounds == pytest.approx([2] * 3)


def test_memory_of_the_first_call():
    kept = []
    _, small = _timing.watched(lambda: None)
    _, large = _timing.watched(lambda: kept.append(np.ones(8_000_000)))
    if large is None:
        pytest.skip("this system does not say")
    assert small < 30
    assert large > 50


def rows():
    ours, theirs = _timing.Times([2.0, 4.0], 9.0, 1.0), _timing.Times([6.0, 8.0], 7.0, None)
    return _table.make_rows(
        "vae",
        {"genjax": ours, "torch": theirs},
        case="n=4",
        targets={"torch": 3.0},
        checks={"torch": {"difference": 1e-7}},
        work={"flops": 1e6, "bytes": 3e6},
        notes={"zuko": "zuko is not installed"},
    )


def test_rows_and_targets():
    own, torch, zuko = rows()
    assert (own.ms, own.ratio, own.met) == (3.0, None, None)
    assert torch.ratio == 2.5  # the median of 3 and 2
    assert torch.met is False
    assert zuko.note == "zuko is not installed"
    assert [_table.Row(**row) for row in _table.to_json(rows())] == rows()
    lost = _table.Row("vae", "", "torch", checks={"loss": float("nan"), "error": 1e-7})
    assert _table.to_json([lost])[0]["checks"] == {"loss": None, "error": 1e-7}


def test_the_table_has_a_line_for_each_row():
    # 1e6 flops at 1e9 a second take 1 ms, 3e6 bytes at 2e9 a second 1.5: half of 3.
    text = _table.markdown(rows(), {"flops": 1e9, "bytes": 2e9})
    lines = text.splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    assert "| 50% |" in lines[2]
    assert "| 2.50 | 3.00 | **no** |" in lines[3]
    assert "difference 1.0e-07" in lines[3]
    assert "zuko is not installed" in lines[4]


def test_the_summary_has_a_line_for_each_case():
    lines = _table.summary(rows()).splitlines()
    assert lines[2:] == ["| vae n=4 | 3.00 | **torch 2.50 (3)** |"]


def test_a_peer_that_diverged_is_not_compared(capsys):
    sides = {"genjax": 2.0, "ott": 9.0, "pot": 9.0}
    times = {name: _timing.Times([ms], 7.0, None) for name, ms in sides.items()}
    checks = {"genjax": {"error": 1e-4}, "ott": {"value": float("-inf"), "error": 3e300}}
    found = _table.make_rows("sinkhorn", times, targets=3.0, checks=checks)
    own, ott, pot = _table.show(found)
    assert (ott.ms, ott.ratio, ott.target, ott.met) == (9.0, None, None, None)
    assert (own.note, ott.note, pot.note, pot.met) == ("", "diverged", "", True)
    assert "diverged  value -inf  error 3.0e+300" in capsys.readouterr().out
    assert "| diverged |" in _table.markdown(found, {}).splitlines()[3]
    lines = _table.summary(found).splitlines()
    assert lines[2:] == ["| sinkhorn | 2.00 | ott diverged, pot 4.50 (3) |"]
    with pytest.raises(FloatingPointError, match=r"n=4: genjax found no answer.*nan"):
        _table.make_rows("sinkhorn", times, case="n=4", checks={"genjax": {"error": float("nan")}})


def test_a_peer_that_is_missing_is_named(capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'peer'", name="peer")

    sides, notes = _workload.build({"genjax": lambda: 1, "other": missing})
    assert list(sides) == ["genjax"]
    assert notes == {"other": "peer is not installed"}
    assert "# other skipped: peer is not installed" in capsys.readouterr().out


def test_the_sides_of_a_workload_become_rows(clock):
    asked = []

    def peer():
        clock.sleep(0.006)
        return 5

    found = _workload.compare(
        "vae",
        {"genjax": lambda: lambda: clock.sleep(0.002), "torch": lambda: peer, "jax": lambda: peer},
        _workload.Options(rounds=3, torch=False),
        checks=lambda results: {name: {"result": x or 0} for name, x in results.items()},
        work=lambda: asked.append(clock.perf_counter()) or {"flops": 1.0},
        pause=0,
    )
    assert [(row.side, row.note) for row in found] == [
        ("genjax", ""),
        ("jax", ""),
        ("torch", "not asked for"),
    ]
    assert found[1].ratio == pytest.approx(3)
    assert found[1].checks == {"result": 5}
    assert found[0].work == {"flops": 1.0}
    assert asked == [clock.perf_counter()]  # after the timing


def test_every_job_has_its_options_and_the_names_of_earlier_rows_stay():
    for name, job in benchmarks.JOBS.items():
        module = importlib.import_module(f"experiments.benchmarks.{job.module}")
        assert module.Config(**job.options | job.quick), name
        assert callable(module.main)
    path = Path(benchmarks.__file__).parent / "results" / "cpu-2-cores.json"
    earlier = json.loads(path.read_text())["workloads"]
    assert {name for name in earlier if not name.startswith("startup")} <= set(benchmarks.JOBS)


def test_sides_of_unbalanced_transport_agree():
    own, pot = unbalanced.main(unbalanced.Config(n=(24,), eps=(0.1,), rounds=2))
    assert own.checks["value"] == pytest.approx(pot.checks["value"], rel=1e-4)
    assert max(own.checks["marginal_error"], pot.checks["marginal_error"]) <= 1e-3


def test_two_checkouts_are_compared(monkeypatch, tmp_path, capsys):
    (tmp_path / "genjax").mkdir()
    monkeypatch.setattr(paired, "CASES", {"vae": (None, 4), "unet": (None, 1)})
    monkeypatch.setattr(
        paired, "WORKER", "import sys\nfor line in sys.stdin: print(len(line), flush=True)"
    )
    found = paired.main(paired.Config(before=tmp_path, rounds=2, workloads=("va",)))
    assert [(row.workload, row.side) for row in found] == [("vae", "genjax"), ("vae", "before")]
    assert found[1].ratio > 0
    assert found[1].checks == {"result": 4.0}
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        paired.main(paired.Config(before=tmp_path / "elsewhere"))


def test_the_worker_runs_what_it_is_told(monkeypatch, capsys):
    calls = []
    side = lambda: calls.append(1) or {"loss": jnp.full(3, 7.0)}  # noqa: E731
    monkeypatch.setattr(paired, "CASES", {"vae": (lambda: side, 4)})
    monkeypatch.setattr("sys.stdin", io.StringIO("vae\nvae\n"))
    paired.work()
    assert capsys.readouterr().out == "7.0\n7.0\n"
    assert len(calls) == 8


def test_work_of_a_program():
    import jax

    x = jnp.ones((64, 32))
    work = _ceilings.work_of(jax.jit(lambda x: jnp.exp(x @ x.T)), x)
    assert work["flops"] == pytest.approx(2 * 64 * 64 * 32, rel=0.1)
    assert work["exps"] == 64 * 64


def test_bytes_that_travel():
    program = """
      %all-reduce.1 = f32[10,4]{1,0} all-reduce(%dot), channel_id=1
      %all-reduce = (f32[784,400]{1,0}, f32[], bf16[3]{0}) all-reduce(%a, %b, %c), to_apply=%add
      %all-gather-start = f32[8]{0} all-gather-start(%p), dimensions={0}
      %fusion = f32[100]{0} fusion(%all-reduce.1), calls=%inner
    """
    found = scaling.collectives(program)
    assert found == {"all-reduce": 160 + 4 * 784 * 400 + 4 + 6, "all-gather": 32}


def test_the_command_writes_one_table(tmp_path, monkeypatch):
    made = {"ceilings": [_table.Row("ceiling", "", "flops", checks={"per_second": 1e9})]}
    monkeypatch.setattr(benchmarks, "run", lambda name, job, config: made.get(name, rows()))
    benchmarks.main(benchmarks.Config(only=("vae",), out=tmp_path))
    benchmarks.main(benchmarks.Config(only=("metrics",), out=tmp_path))  # keeps the other
    found = json.loads((tmp_path / "benchmarks.json").read_text())
    assert list(found["workloads"]) == ["ceilings", "vae", "metrics"]
    assert found["versions"]["jax"]
    text = (tmp_path / "benchmarks.md").read_text()
    assert "1.0 GFLOP/s" in text
    assert "Targets met: 0 of 2" in text
    with pytest.raises(ValueError, match=r"only must be one of .*got 'vea'; did you mean 'vae'"):
        benchmarks.main(benchmarks.Config(only=("vea",), out=tmp_path))


def test_a_workload_that_fails_becomes_a_row(tmp_path):
    job = benchmarks.Job("nothing_of_the_kind")
    (row,) = benchmarks.run("x", job, benchmarks.Config(out=tmp_path, timeout=60))
    assert row.note.startswith("failed: ModuleNotFoundError")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--workloads", "stp"], "workloads must be one of ['step', 'sampling'], got 'stp'; did"),
        (["--round", "3"], "there is no option --round; did you mean --rounds?"),
    ],
)
def test_a_mistake_ends_in_one_line(args, line, monkeypatch, capsys):
    module = importlib.import_module("experiments.benchmarks.pixelcnn")
    monkeypatch.setattr(sys, "argv", ["pixelcnn", *args])
    with pytest.raises(SystemExit) as end:
        _workload.launch(module.main, module.Config)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert line in said
    assert said.count("\n") == 1
