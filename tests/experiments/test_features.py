"""The classifier whose features the metrics take: a short run."""

import numpy as np
import pytest
from matplotlib import colormaps, image

from experiments import features
from genjax.metrics import feature_extractor


@pytest.mark.slow
def test_short_run(tmp_path):
    config = features.Config(
        run_dir=str(tmp_path / "run"), steps=40, batch_size=64, channels=(4, 8), width=8,
        dropout=0.0, ema=0.5, learning_rate=1e-2, devices=1,
    )  # fmt: skip
    summary = features.main(config)
    assert summary["test_accuracy"] > 0.3  # one in ten by chance
    pixels = image.imread(tmp_path / "run" / "features.png")[..., :3]
    for colour in colormaps["tab10"].colors:  # the points of a digit, and its mark in the legend
        assert (np.abs(pixels - colour).max(-1) < 0.01).sum() > 200
    net = feature_extractor("short", path=tmp_path / "run" / "features.npz")
    assert net.sha256 == summary["sha256"]
    assert net.extract(np.zeros((3, 8, 8, 1), np.uint8)).shape == (3, 8)


def test_points_have_no_features():
    with pytest.raises(ValueError, match="images, got 'moons' of points"):
        features.main(features.Config(dataset="moons"))
