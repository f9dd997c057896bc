"""The Sinkhorn generator and the gradient flow: they learn, and leave what a run leaves."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import gradient_flow, sinkhorn_gan

SMALL = {"steps": 4, "steps_per_call": 2, "batch_size": 32, "width": 16, "depth": 1,
         "num_samples": 100, "devices": 1, "log_every": 1}  # fmt: skip


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_images(tmp_path):
    run = tmp_path / "run"
    config = sinkhorn_gan.Config(variant="learned", run_dir=str(run), **SMALL)
    summary = sinkhorn_gan.main(config)
    assert json.loads((run / "summary.json").read_text()) == summary
    assert {"precision", "recall", "memorised"} <= summary.keys()
    samples = np.load(run / "samples.npy")
    assert samples.shape == (1437, 8, 8, 1)
    assert samples.dtype == np.uint8
    assert samples.max() <= 16
    assert (run / "samples.png").exists()
    assert len(metrics(run)) == 4


@pytest.mark.slow
def test_the_plane(tmp_path):
    run = tmp_path / "run"
    options = {**SMALL, "steps": 100, "steps_per_call": 50, "batch_size": 64, "width": 64}
    config = sinkhorn_gan.Config(
        variant="fixed", dataset="8gaussians", run_dir=str(run), learning_rate=1e-2, **options
    )
    summary = sinkhorn_gan.main(config)
    assert 0 <= summary["modes"] <= 8
    assert 0 <= summary["high_quality_share"] <= 1
    losses = [line["loss"] for line in metrics(run)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize("variant", ["learned", pytest.param("otgan", marks=pytest.mark.slow)])
def test_losses_are_blind_to_scale_and_pull_samples_to_the_data(variant, key):
    config = sinkhorn_gan.Config(variant=variant)
    x, y = jax.random.normal(key, (2, 16, 3)) + jnp.array([[[2.0, 0, 0]], [[0, 2.0, 0]]])

    @jax.jit
    def loss(x, y):
        return sinkhorn_gan.LOSSES[variant](x, y, 0.1, config)[0]

    value, gradient = jax.value_and_grad(loss)(x, y)
    assert value > 0
    assert loss(x - 0.01 * gradient, y) < value
    # epsilon is in parts of the mean cost: the plan is that of the scaled clouds.
    order = {"learned": 2, "otgan": 0}[variant]
    np.testing.assert_allclose(loss(10 * x, 10 * y), 10.0**order * value, rtol=1e-3)


def test_features_go_up_once_in_several_steps():
    config = sinkhorn_gan.Config(generator_updates=3, learning_rate=0.1, critic_learning_rate=0.1)
    optimizer = sinkhorn_gan.two_players(sinkhorn_gan.settled(config, "images"))
    params = {"generator": jnp.ones(2), "critic": jnp.ones(2)}
    state = optimizer.init(params)
    path = [params]
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        path.append(optax.apply_updates(path[-1], updates))
    generator, critic = ([float(p[name][0]) for p in path] for name in ("generator", "critic"))
    np.testing.assert_allclose(generator, [1.0, 0.9, 0.8, 0.7], atol=1e-3)
    np.testing.assert_allclose(critic, [1.0, 1.0, 1.0, 1.1], atol=1e-3)


@pytest.mark.slow
def test_one_particle_moves_as_computed():
    # S of two points is |x - y|^2, so a step keeps 1 - 2 step_size of the way.
    config = gradient_flow.Config(steps=5, step_size=0.1)
    x, y = jnp.array([[2.0, -1.0]]), jnp.array([[0.5, 1.0]])
    path, _, _ = gradient_flow.flow(x, y, config, scale=1.0)
    expected = y[None] + 0.8 ** jnp.arange(6)[:, None, None] * (x - y)[None]
    np.testing.assert_allclose(path, expected, rtol=1e-5)


@pytest.mark.slow
def test_particles_reach_the_modes(tmp_path):
    run = tmp_path / "run"
    config = gradient_flow.Config(
        dataset="8gaussians", num_particles=160, steps=40, run_dir=str(run)
    )
    summary = gradient_flow.main(config)
    assert json.loads((run / "summary.json").read_text()) == summary
    assert summary["divergence_end"] < 0.01 * summary["divergence_start"]
    assert summary["high_quality_share"] > 0.95
    assert np.load(run / "samples.npy").shape == (160, 2)
    assert (run / "flow.png").exists()
    assert len(metrics(run)) == 40
