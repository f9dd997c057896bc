"""The feature network that comes with the package, and others of its kind."""

import hashlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.data import Scaling, load
from genjax.metrics import (
    extractors,
    feature_extractor,
    hash_of,
    measure,
)
from genjax.networks import FeatureNetwork
from genjax.training import export_npz

SHIPPED = Path(extractors.__file__).with_name("digits_features.npz")


def embed(network, parameters, y):
    weights = {"params": parameters["params"]}
    return network.apply(weights, y, method="embed") / parameters["scale"]


def test_features_are_those_of_the_network(compiled):
    net = feature_extractor()
    x = load("digits", "test")[0]["x"][:5]
    found = compiled(net.extract)(x)
    expected = embed(FeatureNetwork(), net.parameters, Scaling(17).to_continuous(x))
    assert found.shape == (5, 64)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_classifier_reads_the_test_split_as_its_docstring_says():
    net, (test, _) = feature_extractor(), load("digits", "test")
    weights = {"params": net.parameters["params"]}
    logits = FeatureNetwork().apply(weights, Scaling(17).to_continuous(test["x"]))
    accuracy = float(np.mean(np.argmax(logits, axis=1) == test["label"]))
    assert f"{accuracy:.1%}" in (feature_extractor.__doc__ or "")


def test_the_mean_square_over_the_training_split_is_one():
    features = feature_extractor().extract(load("digits", "train")[0]["x"])
    np.testing.assert_allclose(np.mean(np.square(features)), 1, rtol=1e-4)


def test_the_weights_are_those_that_were_stored(tmp_path):
    net = feature_extractor()
    assert net.sha256 == hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
    changed = tmp_path / "changed.npz"
    shutil.copy(SHIPPED, changed)
    with open(changed, "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"changed\.npz has the SHA-256 .* its weights differ"):
        feature_extractor("digits", path=changed, sha256=net.sha256)


def test_a_changed_shipped_file_is_refused(monkeypatch):
    file, _ = extractors.SHIPPED["digits"]
    monkeypatch.setitem(extractors.SHIPPED, "digits", (file, "0" * 64))
    with pytest.raises(ValueError, match=f"has the SHA-256 .* expected {'0' * 64}"):
        feature_extractor()


def width(features):
    return features.shape[1]


def test_weights_of_ones_own(tmp_path):
    network = FeatureNetwork(classes=3, width=5, channels=(2, 4))
    params = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    facts = {"levels": 4, "shape": np.array([4, 4, 1]), "scale": np.float32(2)}
    export_npz(tmp_path / "f.npz", {**facts, **params})
    net = feature_extractor("mine", path=tmp_path / "f.npz")
    x = np.random.default_rng(0).integers(4, size=(6, 4, 4, 1), dtype=np.uint8)
    expected = embed(network, {**params, "scale": 2}, Scaling(4).to_continuous(x))
    np.testing.assert_allclose(net.extract(x), expected, atol=1e-6)
    y = Scaling(4).to_continuous(x)
    last = network.apply(params, y, method="maps")[-1]
    np.testing.assert_allclose(net.maps(y)[-1], last, atol=1e-6)
    with pytest.raises(ValueError, match="y must have shape"):
        net.maps(y[:, :2])
    record = measure(width, x, extractor=net)
    assert record[1:5] == ("width", "mine", hash_of(net.parameters), (6,))
    assert record.value == 5


def test_bad_input(tmp_path, unchecked):
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        feature_extractor("digit")
    with pytest.raises(ValueError, match="x must have shape"):
        feature_extractor().extract(np.zeros((2, 28, 28, 1), np.uint8))
    with pytest.raises(TypeError, match="integer levels"):
        feature_extractor().extract(np.zeros((2, 8, 8, 1), np.float32))
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    np.savez(tmp_path / "b.npz", x=np.zeros(2))
    for name in ("a", "b"):
        with pytest.raises(ValueError, match="holds no feature network"):
            feature_extractor("mine", path=tmp_path / f"{name}.npz")
