"""The parts of an autoencoder's losses, and the scale of its latents against a recorded one."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import PatchCritic, adaptive_weight, latent_scale, perceptual_distance

FILE = Path(__file__).parents[1] / "references" / "latent_scaling.json"
REF = json.loads(FILE.read_text())
KEY = jax.random.key(0)


def test_the_scale_meets_the_reference(compiled, x64):
    z = jnp.asarray(REF["inputs"]["z"])
    scale = compiled(latent_scale)(z)
    np.testing.assert_allclose(scale, REF["expected"]["scale"], rtol=1e-12)
    np.testing.assert_allclose(1 / scale, REF["expected"]["sigma_hat"], rtol=1e-12)
    np.testing.assert_allclose(scale * z, REF["expected"]["z_scaled"], rtol=1e-12)


def test_perceptual_distance_by_hand_and_blind_to_contrast():
    x, y = jax.random.normal(KEY, (2, 3, 4, 4, 2))
    layers = lambda x: [x, jnp.concatenate([x, x**2], axis=-1)[:, ::2]]  # noqa: E731
    expected = np.zeros(3)
    for a, b in zip(layers(x), layers(y), strict=True):
        a, b = (np.asarray(z) / np.linalg.norm(z, axis=-1, keepdims=True) for z in (a, b))
        expected += ((a - b) ** 2).sum(-1).mean((1, 2))
    found = jax.jit(lambda x, y: perceptual_distance(layers, x, y))(x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    same = perceptual_distance(lambda x: [x], x, 3 * x)
    np.testing.assert_allclose(same, 0, atol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(perceptual_distance(lambda x: [x], x, y)))(0 * x)
    assert np.isfinite(slope).all()


def test_the_weight_is_the_ratio_of_the_norms():
    first, second = {"a": jnp.asarray([3.0, 4.0])}, {"a": jnp.asarray([0.6, 0.8])}
    np.testing.assert_allclose(adaptive_weight(first, second), 5 / (1 + 1e-4), rtol=1e-6)
    nothing = {"a": jnp.zeros(2)}
    assert float(adaptive_weight(first, nothing)) == 1e4
    assert float(adaptive_weight(nothing, second)) == 0
    slope = jax.grad(lambda a: adaptive_weight({"a": a}, second))(first["a"])
    np.testing.assert_array_equal(slope, 0)


def test_a_patch_is_scored_by_what_it_sees():
    x = jax.random.normal(KEY, (2, 16, 16, 1))
    critic = PatchCritic((4, 8))
    params = jax.jit(critic.init)(KEY, x)
    run = jax.jit(critic.apply)
    scores = run(params, x)
    assert scores.shape == (2, 4, 4)
    moved = run(params, x.at[0, 0, 0].add(1.0))
    np.testing.assert_array_equal(moved[1], scores[1])
    assert moved[0, 0, 0] != scores[0, 0, 0]
    np.testing.assert_allclose(moved[0, 3], scores[0, 3], rtol=1e-5)


def test_latents_without_a_spread_are_refused(unchecked):
    with pytest.raises(ValueError, match="standard deviation of the latents must be positive"):
        latent_scale(jnp.ones((2, 3)))


@pytest.mark.parametrize("value", [0.0, 0.1, 33.3, 1000.1])
def test_equal_latents_have_no_scale(value):
    with pytest.raises(ValueError, match="standard deviation of the latents must be positive"):
        latent_scale(jnp.full((1000, 4), value))
