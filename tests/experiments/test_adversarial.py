"""The adversarial experiments with a handful of steps, and what they rest on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    _data,
    _judge,
    _system,
    f_gan,
    f_gan_study,
    gan,
    mode_collapse,
    wgan,
)
from genjax.data import DENSITIES, load

SMALL = {"batch_size": 32, "width": 16, "steps_per_call": 1, "progress": False, "devices": 1}


def check_folder(tmp_path, summary, picture="samples.png"):
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text()).keys() == summary.keys()
    assert (folder / picture).stat().st_size > 1000
    assert (folder / "config.json").exists()
    assert all(np.isfinite(v) for v in summary.values() if isinstance(v, float))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", pytest.param("dcgan", marks=pytest.mark.slow)])
def test_spectral_gan_with_labels(network, tmp_path):
    summary = gan.main(
        gan.Config(
            network=network, objective="hinge", spectral=True, r1=0.1, conditional=True,
            condition="concat", steps=1, run_dir=str(tmp_path / "run"), **SMALL,
        )
    )  # fmt: skip
    folder = check_folder(tmp_path, summary)
    left = np.load(folder / "samples.npy")
    assert left.shape == (1437, 8, 8, 1)
    # Reopened, the averaged generator gives the same samples.
    system, params, config = _system.reopen(folder)
    key = _system.keys(config.seed).sample
    again = jax.jit(lambda params: system.sample(params, key, 1437, system.labels))(params)
    np.testing.assert_array_equal(again, left)
    assert {"precision", "recall", "memorised", "label_accuracy"} <= summary.keys()


@pytest.mark.slow
def test_conditional_wgan(tmp_path):
    summary = wgan.main(
        wgan.Config(
            conditional=True, n_critic=2, steps=2, log_every=1,
            run_dir=str(tmp_path / "run"), **SMALL,
        )
    )  # fmt: skip
    folder = check_folder(tmp_path, summary)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"critic/bound", "critic/penalty", "generator/loss"} <= lines[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["clip", "lipschitz"])
def test_wgan_in_the_plane(constraint, tmp_path):
    summary = wgan.main(
        wgan.Config(
            dataset="25gaussians", constraint=constraint, n_critic=2, steps=2,
            run_dir=str(tmp_path / "run"), **SMALL,
        )
    )  # fmt: skip
    check_folder(tmp_path, summary)
    assert 0 <= summary["modes"] <= 25


@pytest.mark.slow
def test_f_gan_on_digits(tmp_path):
    summary = f_gan.main(
        f_gan.Config(
            dataset="digits", divergence="squared_hellinger", steps=2,
            run_dir=str(tmp_path / "run"), **SMALL,
        )
    )  # fmt: skip
    check_folder(tmp_path, summary)


@pytest.mark.slow
def test_direct_fits_are_the_papers():
    """f-GAN's table of best fits, from which the mixture was recovered."""
    paper = {
        "pearson": (0.5737, 1.9274),
        "kl": (1.0100, 1.8308),
        "jensen_shannon": (1.3070, 1.7542),
        "jeffreys": (1.3218, 1.7034),
        "reverse_kl": (1.5782, 1.6319),
    }
    fits = {name: f_gan_study.fit_directly(name) for name in paper}
    for name, (mean, std) in paper.items():
        np.testing.assert_allclose(fits[name][:2], (mean, std), atol=5e-3)
    assert sorted(paper, key=lambda n: fits[n][0]) == list(paper)
    # KL matches moments.
    weights, means, stds = map(np.array, zip(*f_gan_study.MIXTURE, strict=True))
    mean = weights @ means
    np.testing.assert_allclose(fits["kl"][0], mean, rtol=1e-4)
    variance = weights @ (stds**2 + means**2) - mean**2
    np.testing.assert_allclose(fits["kl"][1], np.sqrt(variance), rtol=1e-4)


@pytest.mark.slow
def test_study_approaches_the_direct_fit(tmp_path):
    summary = f_gan_study.main(
        f_gan_study.Config(
            divergence="reverse_kl",
            steps=400,
            batch_size=128,
            n_critic=2,
            width=32,
            run_dir=str(tmp_path / "run"),
        )
    )
    check_folder(tmp_path, summary, "fits.png")
    assert summary["largest_error"] < 0.25  # the start is off by 1


@pytest.mark.slow
def test_study_lands_within_three_percent(tmp_path):
    summary = f_gan_study.main(f_gan_study.Config(run_dir=str(tmp_path / "run")))
    assert summary["largest_error"] < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["gan", pytest.param("wgan_gp", marks=pytest.mark.slow)])
def test_mode_collapse_counts(objective, tmp_path):
    config = mode_collapse.Config(
        objectives=(objective,), seeds=2, steps=2, width=8, depth=1, batch_size=8,
        run_dir=str(tmp_path / "run"),
    )  # fmt: skip
    summary = mode_collapse.main(config)
    check_folder(tmp_path, summary, "modes.png")
    # A seed of the vmapped runs is the run of that seed.
    density = DENSITIES["25gaussians"]
    train = jax.jit(mode_collapse.make_train(config, density, objective))
    alone = train(jax.random.split(jax.random.key(0), 2)[1])
    together = np.load(tmp_path / "run" / "samples.npz")[objective][1]
    np.testing.assert_allclose(alone["samples"], together, rtol=1e-3, atol=1e-4)
    assert int(alone["modes"]) == summary[objective]["modes_by_seed"][1]


def test_modes_of_the_mixture_itself():
    density = DENSITIES["25gaussians"]
    samples = density.sample(jax.random.key(0), 2500)
    near = (samples, jnp.asarray(density.means), density.std)
    assert mode_collapse.modes_covered(*near, least=10) == 25


def test_label_accuracy_of_real_digits():
    (train, spec), (test, _) = load("digits", "train"), load("digits", "test")
    data = _data.Data(train, test, spec)
    accuracy = _judge.label_accuracy(data, test["x"].reshape(360, 64), test["label"])
    assert accuracy == pytest.approx(0.992, abs=5e-4)


def test_bad_config(tmp_path):
    with pytest.raises(ValueError, match="divergence must be one of"):
        f_gan.main(f_gan.Config(divergence="kll", run_dir=str(tmp_path / "a")))
    with pytest.raises(ValueError, match="divergence must be one of"):
        f_gan_study.main(f_gan_study.Config(divergence="kll", run_dir=str(tmp_path / "a")))
    with pytest.raises(ValueError, match="no conditional critic"):
        wgan.main(wgan.Config(constraint="lipschitz", conditional=True))
    with pytest.raises(ValueError, match="needs labels"):
        gan.main(gan.Config(dataset="25gaussians", conditional=True))
    with pytest.raises(ValueError, match="must be mlp"):
        gan.main(gan.Config(dataset="25gaussians", network="dcgan"))
    config = mode_collapse.Config(objectives=("gam",))
    with pytest.raises(ValueError, match="did you mean 'gan'"):
        mode_collapse.main(config)
    with pytest.raises(ValueError, match=r"dataset must be one of .*25gaussians"):
        mode_collapse.main(dataclasses.replace(config, objectives=("gan",), dataset="checkerboard"))
