"""R3GAN's pair: its convolutions against loops, its start, derivatives of derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.adversarial import r1_penalty
from genjax.networks import R3GANCritic, R3GANGenerator, grouped_convolve, resample

KEY = jax.random.key(0)
SIZES = {"size": 8, "base": 4, "groups": 2}
RNG = np.random.default_rng(0)


def test_grouped_convolution_equals_loops(x64):
    x, kernel, probe = (RNG.normal(size=s) for s in ((2, 3, 4, 4), (3, 3, 2, 4), (2, 3, 4, 4)))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected, by_kernel = np.zeros(x.shape), np.zeros(kernel.shape)
    for i, j, o, c in np.ndindex(3, 3, 4, 2):
        part = padded[:, i : i + 3, j : j + 4, 2 * (o // 2) + c]
        expected[..., o] += kernel[i, j, c, o] * part
        by_kernel[i, j, c, o] = np.sum(part * probe[..., o])

    @jax.jit
    def run(x, kernel):
        y, pull = jax.vjp(grouped_convolve, x, kernel)
        return y, pull(jnp.asarray(probe))[1]

    found = run(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(found[0], expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found[1], by_kernel, rtol=1e-12, atol=1e-12)


def test_resampling_is_the_filter_with_gain_4_and_its_adjoint(x64):
    x = RNG.normal(size=(1, 3, 4, 1))
    taps = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    wide = np.zeros((6 + 3, 8 + 3))
    wide[2:-1:2, 2:-1:2] = x[0, :, :, 0]
    expected = np.zeros((6, 8))
    for i, j in np.ndindex(4, 4):
        expected += 4 * taps[i, j] * wide[i : i + 6, j : j + 8]
    np.testing.assert_allclose(resample(jnp.asarray(x), 2)[0, :, :, 0], expected, atol=1e-12)
    y = jnp.asarray(RNG.normal(size=(1, 6, 8, 1)))
    pulled = jax.vjp(lambda x: resample(x, 2), jnp.asarray(x))[1](y)[0]
    np.testing.assert_allclose(resample(y, -2), pulled / 4, atol=1e-12)


@pytest.mark.slow
def test_branches_start_at_zero_and_labels_are_heard():
    """The first image is the basis times the noise, resampled and mapped: as if without blocks."""
    generator = R3GANGenerator(widths=(8, 4), classes=3, channels=2, **SIZES)
    z = jax.random.normal(KEY, (3, 5))
    label = jnp.asarray([0, 1, 2])

    @jax.jit
    def run(z):
        params = generator.init(KEY, z, label)
        return params, *(generator.apply(params, z, k) for k in (label, (label + 1) % 3, None))

    params, images, others, _ = run(z)
    p = params["params"]
    joined = jnp.concatenate([z, p["Embed_0"]["embedding"][label]], axis=1)
    h = (joined @ p["latent"]["kernel"])[:, None, None] * p["basis"][None]
    h = resample(h, 2) @ p["change_1"]["kernel"] @ p["out"]["kernel"]
    np.testing.assert_allclose(images, h, rtol=1e-4, atol=1e-5)
    assert np.abs(images - others).max() > 1e-3
    critic = R3GANCritic(widths=(4, 8), classes=3, channels=2, **SIZES)
    scores = jax.jit(lambda x: critic.apply(critic.init(KEY, x), x))(images)
    assert scores.shape == (3,)


@pytest.mark.parametrize("narrow", [pytest.param(False, marks=pytest.mark.slow), True])
def test_penalties_reach_the_parameters(narrow, x64):
    """Second derivatives by finite differences in float64; finite in bfloat16."""
    critic = R3GANCritic(widths=(4, 8), dtype=jnp.bfloat16 if narrow else None, **SIZES)
    wide = jnp.float32 if narrow else jnp.float64
    x = jax.random.normal(KEY, (2, 8, 8, 1), wide)
    shapes = jax.eval_shape(critic.init, KEY, x)
    params = jax.tree.map(lambda p: wide(0.3 * RNG.normal(size=p.shape)), shapes)
    direction = jax.tree.map(lambda p: wide(RNG.normal(size=p.shape)), params)

    @jax.jit
    def run(params, size):
        moved = jax.tree.map(lambda p, d: p + (size * d).astype(p.dtype), params, direction)
        penalty = lambda p: jnp.mean(r1_penalty(lambda x: critic.apply(p, x), x))  # noqa: E731
        return jax.value_and_grad(penalty)(moved)

    _, slope = run(params, 0.0)
    leaves = jax.tree.leaves(slope)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    if not narrow:
        ahead, behind = (run(params, s)[0] for s in (1e-7, -1e-7))
        along = sum(map(jnp.vdot, leaves, jax.tree.leaves(direction)))
        np.testing.assert_allclose(along, (ahead - behind) / 2e-7, rtol=1e-4)


def test_sizes_that_do_not_fit_are_refused_by_name(unchecked):
    z = jnp.zeros((1, 4))
    with pytest.raises(ValueError, match=r"size must be base \* 2\^k with base = 4, got 12"):
        R3GANGenerator(size=12).init(KEY, z)
    with pytest.raises(ValueError, match="one entry for each of the 2 sizes"):
        R3GANGenerator(size=8, widths=(8,)).init(KEY, z)
    with pytest.raises(ValueError, match="groups must divide 10 channels, got 4"):
        R3GANGenerator(size=4, widths=(5,), groups=4).init(KEY, z)
    with pytest.raises(ValueError, match="even sides to be halved"):
        resample(jnp.zeros((1, 3, 3, 1)), -2)
