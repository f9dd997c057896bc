"""What every experiment shares: a system that trains, and a run folder that opens again."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _keys, _system
from experiments._data import Data, Points, load_data
from experiments._run import RunError
from experiments._system import System, reopen
from genjax.data import DataSpec, Scaling
from tests.experiments import stub

CONFIG = stub.Config(
    dataset="8gaussians", steps=4, save_every=2, batch_size=8, devices=1, progress=False, ema=0.5
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub") / "run"
    return folder, stub.main(dataclasses.replace(CONFIG, run_dir=str(folder)))


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished[0], tmp_path / "run")


def test_a_run_leaves_its_files(finished):
    folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (summary["parameters"], summary["sampling_evaluations"]) == (2, 7)
    assert np.load(folder / "samples.npy").shape == (2000, 2)
    assert 0 <= summary["modes"] <= 8
    assert (folder / "samples.png").stat().st_size > 1000
    stored = json.loads((folder / "config.json").read_text())
    assert stored["experiment"] == "tests.experiments.stub"


def test_a_reopened_run_samples_what_it_left(finished):
    folder, _ = finished
    system, params, config = reopen(folder)
    key = _system.keys(config.seed).sample
    samples = jax.jit(lambda params: system.sample(params, key, 2000))(params)
    np.testing.assert_array_equal(samples, np.load(folder / "samples.npy"))
    assert config == dataclasses.replace(CONFIG, run_dir=str(folder))
    assert reopen(folder, spread=3.0)[2].spread == 3.0


def test_averaged_and_raw_weights_are_those_of_the_steps(finished):
    data = load_data(CONFIG)
    state, step_fn, batches = _system.prepare(CONFIG, stub.build(CONFIG, data), data)
    path = []
    for step in range(CONFIG.steps):
        state, _ = jax.block_until_ready(step_fn(state, batches(step)))
        path.append(np.asarray(state.params["mean"]))
    averaged, raw = (reopen(finished[0], averaged=flag)[1]["mean"] for flag in (True, False))
    np.testing.assert_array_equal(raw, path[-1])
    mean = np.average(path, axis=0, weights=0.5 ** np.arange(4)[::-1])
    np.testing.assert_allclose(averaged, mean, rtol=1e-6)


def test_without_checkpoints_the_exported_weights_are_read(folder):
    before = reopen(folder)[1]
    shutil.rmtree(folder / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, before, reopen(folder)[1])
    with pytest.raises(RunError, match="holds no checkpoint: no weights without averaging"):
        reopen(folder, averaged=False)
    (folder / "params.npz").unlink()
    with pytest.raises(RunError, match=r"holds neither a checkpoint nor params\.npz"):
        reopen(folder)


def test_an_unfinished_run_opens_at_its_newest_checkpoint(finished, folder):
    (folder / "summary.json").unlink()
    (folder / "params.npz").unlink()
    shutil.rmtree(folder / "checkpoints" / "4")
    first, last = (reopen(place, averaged=False)[1]["mean"] for place in (folder, finished[0]))
    np.testing.assert_array_less(0.005, np.abs(first - last))  # two of Adam's first steps


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": None}, "has no 'experiment': an older layout"),
        ({"experiment": "os.path"}, "cannot be reopened: os.path has no Config"),
        ({"experiment": "antigravity"}, "is of 'antigravity': import that module before"),
        ({"experiment": "experiments.gone"}, "is of 'experiments.gone', which is no experiment"),
        ({"width": 3}, "has the unknown 'width': an older layout"),
    ],
)
def test_a_folder_that_cannot_be_reopened_says_why(folder, change, message):
    path = folder / "config.json"
    stored = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: stored[k] for k in stored if change.get(k, 0) is not None}))
    with pytest.raises(RunError, match=message):
        reopen(folder)


def test_no_folder_and_no_json(tmp_path):
    with pytest.raises(RunError, match=r"config\.json cannot be read .*: give a run's folder"):
        reopen(tmp_path / "none")


def test_a_system_names_what_it_lacks(tmp_path):
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path / "run"))
    data = load_data(config)
    whole = stub.build(config, data)
    for system, message in [
        (whole._replace(sample=None), "system lacks sample, which training needs"),
        (whole._replace(init=None, loss=None), "system lacks init, loss"),
        (whole._replace(absorb=lambda carry, params, seen: carry), "lacks init_carry"),
        (whole._replace(optimizer=(optax.sgd(1), optax.sgd(1))), "one loss and one optimizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            _system.train(config, system, data)
    assert not (tmp_path / "run").exists()


def test_a_carry_is_trained_and_sampled(tmp_path):
    """The carry counts the steps by a running mean of the batches; sampling reads it."""
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path / "run"), steps=3)
    data = load_data(config)

    def loss(params, key, batch, carry):
        return jnp.square(batch["x"][:, 0] - params["w"]), {}, None

    system = System(
        lambda key: {"w": jnp.zeros(())},
        loss,
        optax.sgd(0.1),
        lambda params, key, n, label=None: jnp.full((n, 2), params["steps"]),
        count=10,
        init_carry=lambda key, params: {"steps": jnp.zeros(())},
        absorb=lambda carry, params, seen: {"steps": carry["steps"] + 1},
        merge_carry=lambda params, carry: {**params, **carry},
    )
    _system.train(config, system, data)
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "samples.npy"), 3.0)


def test_levels_become_numbers_in_one_place():
    points = Data({}, {}, DataSpec("moons", "points", (2,), None, None))
    images = points._replace(spec=DataSpec("digits", "images", (8, 8, 1), 17, 10))
    assert images.scaling(0.0) == Scaling(17, 0.0, 1.0)
    assert points.scaling() == Points()
    x = np.ones((3, 2))
    for same in (points.scaling().to_continuous(x), points.scaling().dequantise(None, x)):
        assert same is x
    assert points.count == 10_000
    with pytest.raises(ValueError, match="dataset must be of images, got 'moons' of points"):
        points.require("images")
    with pytest.raises(ValueError, match="dataset must have labels, which 'moons' has not"):
        points.require("points", labels=True)


def numbers(key):
    return tuple(jax.random.key_data(key).tolist())


def test_no_key_of_a_run_serves_a_second_purpose():
    """The carry's key is not that of the weights, nor one split or folded from it."""
    given = {}

    def init_carry(key, params):
        jax.debug.callback(lambda data: given.update(carry=tuple(data.tolist())),
                           jax.random.key_data(key))  # fmt: skip
        return jnp.zeros(())

    system = stub.build(CONFIG, load_data(CONFIG))
    _system.start(CONFIG, system._replace(init_carry=init_carry))
    jax.effects_barrier()
    keys = _system.keys(CONFIG.seed)
    derived = {numbers(key): name for name, key in keys._asdict().items()}
    assert len(derived) == 5
    for name, key in keys._asdict().items():
        if name != "batches":
            for i in range(8):  # what init, a loss or a sampler splits off
                derived[numbers(jax.random.fold_in(key, i))] = f"{name}, {i}"
    for use in (_keys.CARRY, _keys.PAIRS, _keys.PICTURES, 0, 1):
        folded = numbers(jax.random.fold_in(keys.batches, use))
        assert folded not in derived, derived.get(folded)
    assert given["carry"] == numbers(jax.random.fold_in(keys.batches, _keys.CARRY))
