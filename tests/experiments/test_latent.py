"""Models in the latents of an autoencoder: scales, refusals, and short runs, whole."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import _autoencoders, _run, _system, latent, vae, vqvae
from experiments._data import load_data
from genjax.metrics import feature_extractor
from genjax.networks import GridDecoder, PatchCritic, perceptual_distance

TINY = latent.Config(
    channels=(4, 8), features=2, width=8, depth=1, steps=4, share=0.5, batch_size=8, num_steps=2,
    log_every=1, devices=1, progress=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return load_data(TINY)


def test_latents_are_scaled_by_their_moments():
    z = np.random.default_rng(0).normal(3, 0.2, (50, 2, 2, 3)).astype(np.float32)
    found = latent.scaled_by(latent.moments(jnp.asarray(z)))
    np.testing.assert_allclose(found["shift"], z.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["scale"], 1 / z.std(), rtol=1e-3)


@pytest.mark.parametrize("held", [{}, {"latents": {"shift": 0.0}}])
def test_a_scale_that_is_not_stored_is_named(held, data):
    system = latent.build(TINY, data)
    with pytest.raises(ValueError, match=r"params hold no .*scale of the latents"):
        system.sample({"model": None, **held}, jax.random.key(0), 2)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"experiment": "experiments.vae", "dataset": "mnist_5k"}, "of the data set 'mnist_5k'"),
        ({"experiment": "experiments.gan", "dataset": "digits"}, "must be a run of latent, vae"),
    ],
)
def test_runs_that_have_no_autoencoder_for_the_data(stored, message, data, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(_run.RunError, match=message):
        latent.build(dataclasses.replace(TINY, autoencoder=str(tmp_path)), data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": 2.0}, "guidance must be 1 without --conditional, got 2"),
        ({"share": 1.5}, "share must"),
        ({"features": 0}, "features must be at least 1, got 0"),
        ({"critic": -1.0}, "critic must be at least 0, got -1"),
        ({"perceptual": 1.0, "dataset": "mnist_5k"}, "dataset without --feature-network must be"),
        ({"dataset": "8gaussians"}, "dataset must be of images, got '8gaussians'"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        latent.main(dataclasses.replace(TINY, **changes))


@pytest.mark.slow
def test_the_critic_moves_the_last_layer_as_much_as_the_error_does(data):
    """A step's loss is |x - y|_1 + perceptual distance + KL + weight * score + hinge; the weight is
    the ratio of two gradients, taken here through the whole decoder."""
    config = dataclasses.replace(TINY, critic=0.5, perceptual=0.1, kl_weight=0.0, dropout=0.0)
    model, scaling = _autoencoders.own(config, data), data.scaling()
    networks = jax.jit(model.init)(jax.random.key(0))
    x, key = jnp.asarray(data.train["x"][:6]), jax.random.key(1)
    decoder, critic = GridDecoder(1, (8, 4)), PatchCritic((16, 32))
    y = scaling.to_continuous(x)
    maps = feature_extractor().maps

    def loss(networks):
        losses, terms, _, z = model.loss({"networks": networks, "codes": None}, key, x)
        return jnp.mean(losses), (terms, z)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, (terms, z)), slopes = run(networks)

    @jax.jit
    def by_hand(params, z):
        score = lambda image: critic.apply(networks["critic"], image)  # noqa: E731

        def parts(params):
            image = decoder.apply(params, z)
            error = jnp.sum(jnp.abs(image - y), (1, 2, 3))
            error = error + 6.4 * perceptual_distance(maps, image, y)
            return jnp.mean(error), -jnp.mean(score(image))

        error, fooled = (jax.grad(lambda p, i=i: parts(p)[i])(params) for i in (0, 1))
        sizes = [optax.tree.norm(g["params"]["Conv_1"]) for g in (error, fooled)]
        weight = 0.5 * sizes[0] / (sizes[1] + 1e-4)
        image = decoder.apply(params, z)
        hinge = jnp.mean(jax.nn.relu(1 - score(y))) + jnp.mean(jax.nn.relu(1 + score(image)))
        slope = jax.tree.map(lambda a, b: a + weight * b, error, fooled)
        return weight, hinge, parts(params)[0] + weight * parts(params)[1] + hinge, slope

    weight, hinge, expected, slope = by_hand(networks["decoder"], z)
    np.testing.assert_allclose(terms["critic_weight"], weight, rtol=1e-3)
    np.testing.assert_allclose(terms["critic"], hinge, rtol=1e-5)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3),
        slopes["decoder"], slope,
    )  # fmt: skip


@pytest.mark.slow
def test_a_short_run_and_one_with_its_autoencoder(data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    summary = latent.main(dataclasses.replace(TINY, run_dir=str(first)))
    assert summary["sampling_evaluations"] == 2
    assert 0 < summary["reconstruction_error"] < 1
    assert (first / "reconstructions.png").stat().st_size > 500
    system, params, config = _system.reopen(first)
    again = jax.jit(lambda p, k: system.sample(p, k, 1437))(params, _system.keys(0).sample)
    np.testing.assert_array_equal(again, np.load(first / "samples.npy"))

    config = dataclasses.replace(
        TINY, autoencoder=str(first), run_dir=str(second), conditional=True, guidance=2.0
    )
    summary = latent.main(config)
    assert summary["sampling_evaluations"] == 4
    _, taken, _ = _system.reopen(second)
    for name in ("autoencoder", "latents"):
        jax.tree.map(np.testing.assert_array_equal, taken[name], params[name])

    shutil.rmtree(first / "checkpoints")
    with np.load(first / "params.npz") as file:
        kept = {name: file[name] for name in file.files if "latents" not in name}
    np.savez(first / "params.npz", **kept)
    with pytest.raises(_run.RunError, match="latents"):
        _autoencoders.taken(str(first), data, "digits")


@pytest.mark.slow
def test_the_autoencoder_stays_after_its_share(data):
    config = dataclasses.replace(TINY, latents="vq", codes=4, steps=8, critic=0.5, perceptual=0.1)
    system = latent.build(config, data)
    state, step, batches = _system.prepare(config, system, data)
    kept = []
    for i in range(6):
        state, metrics = step(state, batches(i))
        assert np.isfinite(metrics["loss"])
        parts = state.params["autoencoder"], state.carry["codes"], state.params["model"]
        kept.append(jax.tree.map(np.array, parts))  # a copy: the next step takes the state's memory
    same = lambda a, b: all(  # noqa: E731
        np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )
    assert not same(kept[2][0], kept[3][0])
    assert not same(kept[2][1], kept[3][1])
    assert same(kept[4][:2], kept[5][:2])
    assert not same(kept[4][2], kept[5][2])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae", "vqvae"])
def test_autoencoders_of_other_experiments(kind, data, tmp_path):
    shared = {"steps": 2, "batch_size": 8, "steps_per_call": 1, "devices": 1, "progress": False}
    if kind == "vae":
        source = vae.Config(latent_dim=3, width=8, depth=1, test_samples=2, **shared)
    else:
        source = vqvae.Config(codes=4, channels=(4, 8), prior_width=8, prior_depth=1, **shared)
    module = {"vae": vae, "vqvae": vqvae}[kind]
    module.main(dataclasses.replace(source, run_dir=str(tmp_path / kind)))
    config = dataclasses.replace(TINY, autoencoder=str(tmp_path / kind), model="diffusion")
    system = latent.build(config, data)
    state, step, batches = _system.prepare(config, system, data)
    state, metrics = step(state, batches(0))
    assert np.isfinite(metrics["loss"])
    params = _system.weights(config, system, state)
    x = jax.jit(lambda p, k: system.sample(p, k, 3))(params, jax.random.key(0))
    assert x.shape == (3, 8, 8, 1)
    assert x.dtype == jnp.uint8
