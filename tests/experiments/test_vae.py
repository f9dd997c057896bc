"""A short run of the variational autoencoder and of its baseline, whole, and their parts."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from experiments import _run, _system, ppca, vae
from genjax.data import DataSpec
from genjax.variational import PPCA

SHORT = vae.Config(
    steps=40,
    steps_per_call=20,
    batch_size=64,
    width=32,
    depth=1,
    dropout=0.0,
    latent_dim=3,
    learning_rate=1e-2,
    test_samples=32,
    devices=1,
    progress=False,
)
SPEC = DataSpec("digits", "images", (8, 8, 1), 17, 10)
X = jnp.array(np.random.default_rng(0).integers(17, size=(4, 8, 8, 1)), jnp.int32)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "run"
    return folder, vae.main(dataclasses.replace(SHORT, run_dir=str(folder)))


def test_summary(short_run):
    folder, summary = short_run
    assert json.loads((folder / "summary.json").read_text()) == summary
    bits = -summary["test_log_likelihood"] / (64 * math.log(2))
    np.testing.assert_allclose(summary["bits_per_dim"], bits, rtol=1e-5)
    assert summary["test_bound"] < summary["test_log_likelihood"]
    # Forty updates already beat the linear model by far.
    assert summary["bits_per_dim"] < 3.0 < summary["bits_per_dim_ppca"]
    np.testing.assert_allclose(summary["bits_per_dim_ppca"], 3.285, atol=0.005)
    assert summary["seconds"] > summary["training_seconds"] > 0
    assert summary["peak_memory_mb"] > 100


def test_reopened(short_run):
    """The weights are the exported ones, and sample what the run left."""
    folder, _ = short_run
    system, params, config = _system.reopen(folder)
    samples = jax.jit(lambda params, key: system.sample(params, key, 1437))(
        params, _system.keys(config.seed).sample
    )
    np.testing.assert_array_equal(samples, np.load(folder / "samples.npy"))
    _, raw, _ = _system.reopen(folder, averaged=False)
    assert not np.array_equal(*(jax.tree.leaves(p)[-1] for p in (params, raw)))


def test_files(short_run):
    folder, _ = short_run
    for name in ("samples", "reconstructions", "interpolation", "latent_map"):
        assert (folder / f"{name}.png").stat().st_size > 1000
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "reconstruction", "kl", "grad_norm"} <= rows[-1].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]
    with np.load(folder / "params.npz") as file:
        assert sum(file[name].size for name in file.files) > 10_000


@pytest.mark.parametrize("likelihood", ["mixture", "categorical"])
def test_levels_of_a_pixel_sum_to_one(likelihood):
    model = vae.make_model(dataclasses.replace(SHORT, likelihood=likelihood), SPEC)
    numbers = 17 if likelihood == "categorical" else 9
    raw = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, numbers)), (17, numbers))
    log_probs = model.log_likelihood(jnp.arange(17), raw)
    np.testing.assert_allclose(jax.nn.logsumexp(log_probs), 0, atol=1e-5)
    # Samples have that law: counts of 4,000 of them, by chi-square.
    drawn = model.law.sample(jax.random.key(1), jnp.broadcast_to(raw[:1], (4000, numbers)))
    assert drawn.dtype == jnp.uint8
    expected = 4000 * np.exp(np.asarray(log_probs, np.float64))
    few = expected < 5
    found = np.bincount(drawn, minlength=17)
    merge = lambda n: np.append(n[~few], n[few].sum())  # noqa: E731
    found, expected = merge(found), merge(expected)
    statistic = np.sum((found - expected) ** 2 / np.maximum(expected, 1e-9))
    assert statistic < scipy.stats.chi2.ppf(0.9999, len(found) - 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "iwae", "num_samples": 2, "estimator": "dreg", "likelihood": "categorical"},
        {"components": 1, "beta": 4.0, "dropout": 0.2},
    ],
)
def test_variants_have_a_loss_per_example_and_a_gradient(changes, key):
    config = dataclasses.replace(SHORT, **changes)
    model = vae.make_model(config, SPEC)
    params = jax.jit(model.init)(key)
    loss_fn = vae.make_loss(config, model)

    @jax.jit
    def both(params):
        def total(params):
            losses, aux = loss_fn(params, key, {"x": X})
            return losses.sum(), (losses, aux)

        return jax.grad(total, has_aux=True)(params)

    gradient, (losses, aux) = both(params)
    assert losses.shape == (4,)
    assert losses.dtype == jnp.float32
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    if config.objective == "elbo":
        expected = config.beta * aux["kl"] - aux["reconstruction"]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_mnist_shapes(network, key):
    config = dataclasses.replace(SHORT, network=network)
    model = vae.make_model(config, DataSpec("mnist", "images", (28, 28, 1), 256, 10))
    batch = {"x": jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.uint8)}
    params = jax.eval_shape(model.init, key)
    losses, _ = jax.eval_shape(vae.make_loss(config, model), params, key, batch)
    assert losses.shape == (5,)


def test_bad_input(tmp_path):
    def run(**changes):
        vae.main(dataclasses.replace(SHORT, run_dir=str(tmp_path / "run"), **changes))

    with pytest.raises(ValueError, match="beta must be 1 with objective iwae, got 4"):
        run(objective="iwae", beta=4.0)
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        run(dataset="digit")
    with pytest.raises(ValueError, match="dataset must be of images"):
        run(dataset="moons")
    with pytest.raises(ValueError, match="batch_size must be at most the split's 1437 examples"):
        run(batch_size=2000)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        run(num_samples=0)
    with pytest.raises(ValueError, match="batch size must be a positive multiple of 8"):
        run(batch_size=12, devices=8)
    assert not (tmp_path / "run").exists()


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vae", "--help"])
    with pytest.raises(SystemExit) as end:
        _run.launch(vae.main, vae.Config)
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in ("--objective", "--beta", "--latent-dim", "Weight of the divergence"):
        assert word in text


def test_ppca_run(tmp_path):
    summary = ppca.main(ppca.Config(run_dir=str(tmp_path / "run"), draws=1))
    np.testing.assert_allclose(summary["bits_per_dim"], 3.285, atol=0.005)
    assert (tmp_path / "run" / "samples.png").exists()


def test_ppca_samples_have_the_models_covariance(key):
    weights = jnp.array([[2.0, 0.0], [1.0, 1.0], [0.0, -1.0]])
    x = ppca.sample(PPCA(jnp.array([1.0, 2.0, 3.0]), weights, jnp.float32(0.5)), key, 100_000)
    np.testing.assert_allclose(x.mean(0), [1, 2, 3], atol=0.03)
    np.testing.assert_allclose(np.cov(x.T), weights @ weights.T + 0.5 * np.eye(3), atol=0.08)


@pytest.mark.slow
def test_default_run_beats_the_mixture_baseline(tmp_path):
    """Gaussian mixtures reach 2.654 bits per dimension on this split."""
    summary = vae.main(vae.Config(run_dir=str(tmp_path / "run"), progress=False))
    assert summary["bits_per_dim"] < 1.95
