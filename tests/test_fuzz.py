"""Files of a run with anything in them: a message, or what was saved; and nothing is executed."""

import ast
import contextlib
import copy
import json
import logging
import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import _config, _run
from genjax.training import CheckpointError, Checkpoints, export_npz, init_state, load_npz
from genjax.training.record import MetricsLog, read_metrics

from .training import tiny

ROOT = pathlib.Path(__file__).parents[1]
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def fuzz(examples):
    return settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=QUIET
    )


class Trap:
    """Whoever unpickles this writes a file."""

    mark = pathlib.Path(".executed")

    def __reduce__(self):
        return (pathlib.Path.write_text, (self.mark, "executed"))


@pytest.fixture(autouse=True)
def nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.setattr(Trap, "mark", tmp_path / "executed")
    yield
    assert not (tmp_path / "executed").exists()


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -1, 0, 1.5])
PLAIN = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
JSON = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@st.composite
def altered(draw, value):
    """The same JSON with one place of it replaced or left out."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    place = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    value = copy.copy(value)
    if draw(st.integers(0, 4)) == 0:
        del value[place]
    else:
        value[place] = draw(altered(value[place]))
    return value


@st.composite
def damaged(draw, data):
    """The bytes cut short, with bits flipped, replaced, or as altered JSON where they are JSON."""
    kinds = ["cut", "flip", "splice", "bytes", "pickle", "deep"]
    with contextlib.suppress(ValueError):
        parsed = json.loads(data)
        kinds += ["json"] * 6
    kind = draw(st.sampled_from(kinds))
    if kind == "json":
        return json.dumps(draw(altered(parsed))).encode()
    if kind == "bytes" or not data:
        return draw(st.binary(max_size=200))
    if kind == "pickle":
        return pickle.dumps(Trap())
    if kind == "deep":
        return b"[" * 3000  # deeper than Python recurs
    at = draw(st.integers(0, len(data) - 1))
    if kind == "cut":
        return data[:at]
    if kind == "splice":
        return data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
    return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The options of a run, whose folder has its config.json."""
    made = tiny.Config(run_dir=str(tmp_path_factory.mktemp("config") / "run"), steps=6)
    with _run.start_run(made):
        pass
    return made


@fuzz(200)
@given(st.data())
def test_a_config_file_is_accepted_or_refused_with_a_message(config, data):
    path = pathlib.Path(config.run_dir, "config.json")
    original = path.read_bytes()
    contents = data.draw(damaged(original))
    path.write_bytes(contents)
    resumed = tiny.Config(**{**vars(config), "resume": True})
    message = None
    try:
        with _run.start_run(resumed):
            # What it accepts says the same, as far as it says anything.
            found, now = json.loads(contents), json.loads(original)
            assert all(found[k] == now[k] for k in found if k not in _config.MAY_DIFFER)
    except _run.RunError as error:
        message = str(error)
    left = path.read_bytes()
    path.write_bytes(original)
    if message is not None:
        assert str(path) in message
        assert left == contents  # for its owner to mend


@fuzz(100)
@given(st.data())
def test_a_metrics_file_keeps_the_lines_that_are_whole(tmp_path, data):
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": i, "loss": 0.5, "seconds": float(i)} for i in range(4)]
    texts = [json.dumps(line).encode() for line in whole]
    hit = data.draw(st.integers(0, 3))
    texts[hit] = data.draw(damaged(texts[hit]))
    path.write_bytes(b"\n".join(texts) + b"\n")
    log = MetricsLog(tmp_path, start=4)
    log.write(4, {"loss": 0.25})
    log.close()
    rest = [line for line in read_metrics(path) if line in whole or line["step"] == 4]
    assert [line["step"] for line in rest][-1] == 4
    assert len(rest) >= 4
    assert all(isinstance(line["step"], int) for line in read_metrics(path))


def make_state(step=0):
    params = {"w": jnp.arange(6.0).reshape(2, 3) + step, "half": jnp.ones(4, jnp.bfloat16)}
    state = init_state(params, optax.adam(0.1), jax.random.key(3), ema_decays=(0.9,))
    return state.replace(step=jnp.int32(step))


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with whole checkpoints of steps 1 and 2, and the files of the second."""
    folder = tmp_path_factory.mktemp("checkpoints") / "clean"
    made = Checkpoints(folder, best="bound")
    for step in (1, 2):
        made.save(step, make_state(step), {"bound": 1.0 / step})
    made.close()
    files = [path.relative_to(folder) for path in sorted(folder.glob("2/**/*")) if path.is_file()]
    return folder, files


@fuzz(25)
@given(st.data())
def test_a_damaged_checkpoint_is_found_out(checkpoints, caplog, data):
    clean, files = checkpoints
    folder = clean.with_name("damaged")
    for old in (folder, folder.with_name("damaged-damaged")):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(clean, folder)
    path = folder / data.draw(st.sampled_from(files))
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    caplog.clear()
    store = Checkpoints(folder, best="bound")
    with caplog.at_level(logging.WARNING, logger="genjax"):
        step, state = store.restore(make_state())
    # Either the damage is in a file that holds nothing of the state, or it is found.
    same(state, make_state(step))
    assert ("going back to step 1" in caplog.text) == (step == 1)
    best, state = store.restore_best(make_state())
    same(state, make_state(best))
    store.save(3, make_state(3), {"bound": 0.1})
    store.close()
    step, state = Checkpoints(folder, best="bound").restore(make_state())
    assert step == 3
    same(state, make_state(3))


def test_strangers_among_the_checkpoints(checkpoints, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(checkpoints[0], folder)
    (folder / "٣").mkdir()  # a decimal, but not a step of ours
    (folder / "007").mkdir()
    (folder / "9").write_text("not a folder")
    (folder / "notes.txt").write_text("mine")
    step, state = Checkpoints(folder).restore(make_state())
    assert step == 2
    same(state, make_state(2))
    assert (folder / "notes.txt").exists()
    store = Checkpoints(folder)
    store.save(3, make_state(3))
    store.close()
    assert store.restore(make_state())[0] == 3
    for record in folder.glob("*/record/metadata"):
        record.write_text("")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* read:.*/2 is not of this"):
        Checkpoints(folder).restore(make_state())


@fuzz(60)
@given(st.data())
def test_damaged_parameters_are_refused(tmp_path, data):
    path, params = tmp_path / "params.npz", {"w": np.arange(6.0), "b": np.ones(2, np.int32)}
    export_npz(path, params)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found, message = {}, f"{path} is not an .npz of parameters, or is damaged"
    try:
        found = load_npz(path)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{path} is not an .npz of parameters, or is damaged")
    for name, value in found.items():  # the damage is in what no array is read from
        np.testing.assert_array_equal(value, params[name])


def test_objects_in_a_file_of_parameters_are_refused(tmp_path):
    np.savez(tmp_path / "params.npz", w=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match=r"is not an \.npz of parameters, or is damaged"):
        load_npz(tmp_path / "params.npz")


FORBIDDEN = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}


@pytest.mark.parametrize("room", ["genjax", "experiments"])
def test_no_code_is_made_of_files(room):
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            if isinstance(node, ast.ImportFrom):
                names.append(node.module)
            assert not {name.split(".")[0] for name in names} & FORBIDDEN, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant)
                assert node.value.value is False, path
