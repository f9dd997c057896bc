"""Options that reach the machine: precision, parts, layout, data from disk, traces, the cache."""

import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import genjax
from experiments import _data, _machine, _run, _system, diffusion, vae
from experiments._data import load_data
from genjax.networks import MLP, TarFlow, TimeMLP, UNet, computing_in
from tests.training import tiny
from tests.training.problem import make_params

BASE = {"steps": 6, "steps_per_call": 2, "batch_size": 32, "num_samples": 64, "progress": False}
BASE |= {"width": 16, "depth": 1, "likelihood_steps": 0, "num_steps": 2, "save_every": 2}


def config(tmp_path, name="run", **changes):
    return diffusion.Config(run_dir=str(tmp_path / name), **{**BASE, "devices": 1, **changes})


def params_of(folder):
    with np.load(folder / "params.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.slow
def test_shards_on_eight_devices_and_data_from_disk_train_the_same(tmp_path):
    one = diffusion.main(config(tmp_path, "one"))
    other = {"devices": 8, "sharding": "fsdp", "in_memory": False, "prefetch": 0}
    eight = diffusion.main(config(tmp_path, "eight", **other))
    assert one["parameters"] == eight["parameters"]
    assert one["data_wait_seconds"] >= 0
    a, b = params_of(tmp_path / "one"), params_of(tmp_path / "eight")
    # Adam's first steps magnify rounding where a gradient is nearly 0.
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-4)
    x, y = (np.load(tmp_path / run / "samples.npy") for run in ("one", "eight"))
    assert np.mean(np.abs(x.astype(int) - y.astype(int))) < 0.05


@pytest.mark.slow
def test_bfloat16_is_near_and_stays_out_of_the_state(tmp_path):
    data = load_data(config(tmp_path))
    trained = {}
    for dtype in ("float32", "bfloat16"):
        given = config(tmp_path, compute_dtype=dtype)
        state, step, batches = _system.prepare(given, diffusion.build(given, data), data)
        batch = jax.tree.map(lambda *x: np.stack(x), batches(0), batches(1))
        text = step.compiled.lower(state, batch).as_text()
        assert ("bf16" in text) == (dtype == "bfloat16")
        state, metrics = step(state, batch)
        trained[dtype] = (state, metrics)
        assert {x.dtype for x in jax.tree.leaves((state.params, state.ema))} == {jnp.float32.dtype}
    a, b = (trained[dtype][1]["loss"] for dtype in ("float32", "bfloat16"))
    np.testing.assert_allclose(a, b, rtol=0.02)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (MLP((8, 3)), (4,)),
        (TimeMLP(16, 1, "layer"), (4,)),
        pytest.param(UNet((8,), num_blocks=1), (4, 4, 1), marks=pytest.mark.slow),
    ],
)
def test_products_are_in_half_precision_and_results_are_not(network, shape):
    time = () if isinstance(network, MLP) else (jnp.full(2, 0.3),)
    x = jax.random.normal(jax.random.key(0), (2, *shape))
    params = network.init(jax.random.key(1), x, *time)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def apply(x):
        with computing_in(jnp.bfloat16):
            return network.apply(half, x, *time)

    assert apply(x).dtype == jnp.float32
    np.testing.assert_allclose(apply(x), network.apply(params, x, *time), atol=0.05)
    products = [
        eqn for eqn in jax.make_jaxpr(apply)(x).jaxpr.eqns if eqn.primitive.name == "dot_general"
    ]
    assert products
    assert {v.aval.dtype for eqn in products for v in eqn.invars} == {jnp.bfloat16.dtype}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scanned_blocks_in_half_precision(dtype):
    net, x = TarFlow(2, 2, 2, 16, 2, remat=True), jnp.zeros((2, 4, 4, 1), dtype)
    params = jax.eval_shape(net.init, jax.random.key(0), x.astype(jnp.float32))
    half = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)

    def loss(params):
        with computing_in(jnp.bfloat16):
            z, log_det = net.apply(params, x)
        assert (z.dtype, log_det.dtype) == (jnp.float32, jnp.float32)
        return jnp.sum(z) + jnp.sum(log_det)

    jax.eval_shape(jax.grad(loss), half)


@pytest.mark.slow
def test_a_folder_of_few_images_with_a_broken_one_trains(tmp_path, caplog):
    """Fewer to test on than the pictures show and than neighbours need."""
    rng = np.random.default_rng(0)
    for i in range(36):
        place = tmp_path / "images" / ("cat", "dog", "owl")[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (*rng.integers(9, 30, 2), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.{('png', 'jpg')[i % 2]}")
    broken = tmp_path / "images" / "owl" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    given = {"dataset": f"folder:{tmp_path / 'images'}", "data_dir": str(tmp_path / "data")}
    given |= {"image_size": 8, "unreadable": "skip", "steps": 4, "batch_size": 8}
    given |= {"run_dir": str(tmp_path / "run"), "devices": 1, "progress": False}
    summary = vae.main(vae.Config(**given, width=16, depth=1, test_samples=2))
    assert f"skipped 1 images that cannot be read: {broken}" in caplog.text
    assert np.isfinite(summary["bits_per_dim"])
    assert (tmp_path / "run" / "reconstructions.png").exists()


def test_a_split_on_disk_is_judged_by_a_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(_data, "IN_PART", 100)
    given = dataclasses.replace(config(tmp_path), in_memory=False)
    data, whole = load_data(given), load_data(config(tmp_path))
    assert (len(data.trained_on), len(data.train["x"]), len(data.test["x"])) == (1437, 100, 100)
    batches = [_run.batches(given, d.trained_on)(7) for d in (data, whole)]
    jax.tree.map(np.testing.assert_array_equal, *batches)


def test_training_images_are_moved(tmp_path):
    plain, moved = (config(tmp_path, shift=s) for s in (0, 1))
    data = load_data(plain)
    before, after = (_run.batches(c, data.train)(7) for c in (plain, moved))
    np.testing.assert_array_equal(before["label"], after["label"])
    assert (before["x"] != after["x"]).any()
    with pytest.raises(ValueError, match="shift and flip are for images, got 'digits'"):
        _run.batches(moved, {"x": np.zeros((200, 2))})(0)


@pytest.mark.slow
def test_a_trace_is_written(tmp_path, capsys):
    diffusion.main(config(tmp_path, profile=2))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert f"trace in {tmp_path / 'run' / 'profile'}" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (stored["profile"], stored["compute_dtype"]) == (2, "float32")


def test_compiled_programs_are_kept_where_the_user_has_a_cache(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        _run.keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "genjax" / "jax")
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        _run.keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_run_says_where_it_is_made_and_with_what(tmp_path, capsys):
    given = tiny.Config(run_dir=str(tmp_path / "run"), steps=2, devices=1, progress=False)
    summary = tiny.main(given)
    said = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "run" / "machine.json").read_text())
    assert summary["machine"] == found
    assert (found["devices"], found["of_devices"], found["platform"]) == (1, 8, "cpu")
    assert (found["jax"], found["genjax"]) == (jax.__version__, genjax.__version__)
    line = f"on 1 of 8 cpu devices, jax {jax.__version__}, genjax {genjax.__version__}"
    assert said[1].startswith(line)
    sizes = sum(x.size for x in jax.tree.leaves(make_params()))
    assert said[2] == f"{sizes} parameters, 2 steps to go; compiling"
    assert said[3].startswith("the first call took ")
    assert summary["parameters"] == sizes
    one = {**found, "devices": 1, "of_devices": 1, "device": "Some GPU", "processes": 2}
    text = _machine.start_line({**one, "commit": "abc"})
    assert text.startswith("on 1 cpu device (Some GPU), 2 processes, jax ")
    assert text.endswith(", commit abc")


def test_the_commit_is_that_of_the_checkout(tmp_path):
    def git(*args):
        own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        line = ["git", "-C", str(tmp_path), *own, *args]
        return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()

    assert _machine.commit(tmp_path) is None
    _machine.commit.cache_clear()
    git("init", "-q")
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-qm", "a")
    assert _machine.commit(tmp_path) == git("rev-parse", "HEAD")[:12]
    _machine.commit.cache_clear()
    (tmp_path / "a").write_text("b")
    assert _machine.commit(tmp_path) == git("rev-parse", "HEAD")[:12] + "-dirty"
    _machine.commit.cache_clear()


@pytest.mark.usefixtures("unchecked")
def test_bad_options_are_refused_before_a_file_is_written(tmp_path):
    for changes, message in [
        ({"remat": True}, "remat is for transformers and U-Nets"),
        ({"accumulate": 3}, r"positive multiple of 3 \(devices 1 x accumulate 3\), got 32"),
        ({"devices": 8, "batch_size": 12}, r"multiple of 8 .*got 12"),
        ({"sharding": "fdsp"}, "did you mean 'fsdp'"),
    ]:
        with pytest.raises(ValueError, match=message):
            diffusion.main(config(tmp_path, **changes))
    assert not (tmp_path / "run").exists()
