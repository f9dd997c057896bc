"""A short run of masked diffusion, whole."""

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments import _system, masked_diffusion

SHORT = masked_diffusion.Config(
    steps=6,
    batch_size=16,
    width=16,
    depth=1,
    heads=2,
    num_steps=4,
    num_samples=32,
    test_draws=1,
    devices=1,
    progress=False,
)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked") / "run"
    return folder, masked_diffusion.main(dataclasses.replace(SHORT, run_dir=str(folder)))


@pytest.mark.slow
def test_summary(short):
    folder, summary = short
    assert json.loads((folder / "summary.json").read_text()) == summary
    bits = -summary["test_log_likelihood"] / (64 * math.log(2))
    np.testing.assert_allclose(summary["bits_per_dim"], bits, rtol=1e-5)
    assert summary["bits_per_dim"] < math.log2(17)
    assert summary["sampling_evaluations"] == 4
    samples = np.load(folder / "samples.npy")
    assert samples.shape == (32, 8, 8, 1)
    assert samples.max() <= 16


@pytest.mark.slow
def test_reopened(short):
    folder, _ = short
    system, params, config = _system.reopen(folder)
    samples = system.sample(params, _system.keys(config.seed).sample, 32)
    np.testing.assert_array_equal(samples, np.load(folder / "samples.npy"))


def test_data_without_levels_are_refused():
    config = dataclasses.replace(SHORT, dataset="8gaussians")
    with pytest.raises(ValueError, match="dataset must be of levels or tokens, got '8gaussians'"):
        masked_diffusion.build(config, masked_diffusion.load_data(config))
