"""Short runs of the image GANs, whole: what they write."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _system, stylegan

QUICK = stylegan.Config(
    width=8, groups=2, steps=4, steps_per_call=2, batch_size=8, log_every=2, devices=1,
    progress=False, conditional=True,
)  # fmt: skip


@pytest.mark.slow
def test_a_short_run_leaves_its_files(tmp_path):
    folder = tmp_path / "run"
    summary = stylegan.main(dataclasses.replace(QUICK, run_dir=str(folder)))
    assert np.isfinite(summary["precision"])
    assert np.load(folder / "samples.npy").shape[1:] == (8, 8, 1)
    assert _system.reopen(folder)[2].network == "r3gan"


def test_smallest_feature_maps():
    assert [stylegan.smallest(n) for n in (8, 28, 32, 64, 12)] == [4, 7, 4, 4, 6]


def test_styles_need_a_mapping():
    config = stylegan.Config(network="stylegan2", mapping_depth=0)
    with pytest.raises(ValueError, match="mapping_depth must be at least 1, got 0"):
        stylegan.build(config, stylegan.load_data(config))


def test_points_need_perceptrons():
    with pytest.raises(ValueError, match="dataset must be of images, got '25gaussians'"):
        stylegan.main(stylegan.Config(dataset="25gaussians"))


@pytest.mark.slow
def test_stylegan2_carries_its_means(tmp_path):
    folder = tmp_path / "run"
    config = dataclasses.replace(
        QUICK, network="stylegan2", augment=True, steps=18, latent_dim=8, run_dir=str(folder)
    )
    summary = stylegan.main(config)
    assert np.isfinite(summary["precision"])
    system, params, _ = _system.reopen(folder, truncation=0.5)
    assert np.abs(params["mean"]).max() > 0
    samples = system.sample(params, _system.keys(0).sample, 3, jnp.arange(3))
    assert samples.shape == (3, 8, 8, 1)


@pytest.mark.parametrize(("sure", "rises"), [(0.9, True), (0.3, False)])
def test_the_controller_of_a_run_aims_at_0_6(sure, rises):
    config = stylegan.Config(network="stylegan2", augment=True)
    carry = {**stylegan.remembered(config), "p": jnp.float32(0.5)}
    after = stylegan.after_critic(config, carry, None, {"sure": jnp.float32(sure)})
    assert (after["p"] > 0.5) == rises
