"""Learnt priors and hierarchies as experiments: short runs, files, refusals."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _priors, _system, hierarchical_vae, vae
from experiments._data import load_data
from genjax.data import DataSpec

COMMON = {"devices": 1, "progress": False, "batch_size": 32, "steps_per_call": 1}
LEVELS = hierarchical_vae.Config(
    **COMMON, latents=(4, 2), sides=(1, 2), width=16, steps=6, test_samples=2
)


@pytest.fixture(scope="module")
def data():
    return load_data(LEVELS)


def test_hierarchy_run(tmp_path):
    folder = tmp_path / "run"
    summary = hierarchical_vae.main(dataclasses.replace(LEVELS, run_dir=str(folder)))
    assert json.loads((folder / "summary.json").read_text()) == summary
    scores = np.load(folder / "scores.npy")
    assert scores.shape == (360,)
    np.testing.assert_allclose(scores.mean(), summary["test_log_likelihood"], rtol=1e-4)
    assert len(summary["kl_of_levels"]) == 2
    for name in ("samples.png", "levels.png"):
        assert (folder / name).stat().st_size > 500
    system, params, config = _system.reopen(folder)
    again = jax.jit(lambda p, k: system.sample(p, k, 1437))(
        params, _system.keys(config.seed).sample
    )
    np.testing.assert_array_equal(again, np.load(folder / "samples.npy"))


@pytest.mark.parametrize("prior", ["vamp", "mixture", "flow"])
def test_priors_of_a_vae(prior, data, key):
    """A density that its samples have, with gradients in the model's loss."""
    config = vae.Config(**COMMON, latent_dim=2, width=16, depth=1, prior=prior, prior_components=4)
    model = vae.make_model(config, data.spec, data.train["x"])
    params = jax.jit(model.init)(key)
    batch = {"x": jnp.asarray(data.train["x"][:8])}
    loss_fn = vae.make_loss(config, model)

    @jax.jit
    def everything(params):
        gradient = jax.grad(lambda p: loss_fn(p, key, batch)[0].sum())(params)["prior"]
        z = model.draw_prior(params, key, 4000)
        # E_p[r(z)/p(z)] = 1 for any density r: that of N(0, .25 I), inside what p covers.
        log_r = -2 * jnp.sum(z**2, 1) - jnp.log(jnp.pi / 2)
        return gradient, jnp.exp(log_r - model.log_prior(params, None)(z))

    gradient, ratio = everything(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) > 0
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(4000) + 0.02


def test_bad_input(data, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'vamp'"):
        _priors.make_prior("vmp", 3, 2, ())
    with pytest.raises(ValueError, match=r"at most the 10 training examples .* got 11"):
        _priors.make_prior("vamp", 11, 2, np.zeros((10, 8, 8, 1)))
    with pytest.raises(ValueError, match="temperature must be positive"):
        hierarchical_vae.build(dataclasses.replace(LEVELS, temperature=0.0), data)
    with pytest.raises(ValueError, match="latents must be at least 1, got 0"):
        hierarchical_vae.build(dataclasses.replace(LEVELS, latents=(4, 0)), data)
    config = dataclasses.replace(LEVELS, sides=(1, 3), run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="sides must be multiples of the ones above"):
        hierarchical_vae.main(config)
    assert not (tmp_path / "run").exists()


def test_28_by_28_shapes():
    spec = DataSpec("mnist_5k", "images", (28, 28, 1), 256, 10)
    data = load_data(LEVELS)._replace(spec=spec)
    config = dataclasses.replace(LEVELS, sides=(1, 7))
    params = jax.eval_shape(hierarchical_vae.make_model(config, data).init, jax.random.key(0))
    assert params["params"]["out"]["kernel"].shape == (16, 16 * 9)
