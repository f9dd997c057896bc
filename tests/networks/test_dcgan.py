"""DCGAN: shapes at every size, labels, and no coupling of examples."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks.dcgan import DCGANCritic, DCGANGenerator, Upscale, _normalise


def test_upscale_is_a_transposed_convolution(key):
    """kernel 1 against lax.conv_transpose of size 2 and stride 2."""
    x = jax.random.normal(key, (2, 3, 3, 4))
    module = Upscale(5, kernel=1)
    params = module.init(key, x)
    kernel = params["params"]["Conv_0"]["kernel"].reshape(4, 2, 2, 5).transpose(1, 2, 0, 3)
    expected = jax.lax.conv_transpose(
        x, kernel[::-1, ::-1], (2, 2), "VALID", transpose_kernel=False
    )
    np.testing.assert_allclose(
        jnp.sort(module.apply(params, x).ravel()), jnp.sort(expected.ravel()), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("size", "base", "channels"), [(8, 2, 1), (16, 4, 3), (64, 4, 3)])
@pytest.mark.parametrize("classes", [None, 3])
def test_shapes(size, base, channels, classes, key):
    label = None if classes is None else jnp.array([0, 2])
    generator = DCGANGenerator(size, channels, width=4, base=base, classes=classes)
    critic = DCGANCritic(size, channels, width=4, base=base, classes=classes)
    z = jax.random.normal(key, (2, 6))
    images = jax.eval_shape(lambda: generator.apply(generator.init(key, z, label), z, label))
    assert images.shape == (2, size, size, channels)
    scores = jax.eval_shape(
        lambda: critic.apply(critic.init(key, jnp.zeros(images.shape), label),
                             jnp.zeros(images.shape), label)
    )  # fmt: skip
    assert scores.shape == (2,)


@pytest.mark.parametrize("condition", ["projection", "concat"])
@pytest.mark.parametrize("norm", ["none", "layer"])
def test_critic_scores_each_example_by_itself_and_reads_the_label(condition, norm, key):
    critic = DCGANCritic(8, 1, width=4, base=2, norm=norm, classes=3, condition=condition)
    x = np.float32(np.random.default_rng(0).normal(size=(4, 8, 8, 1)))
    label = np.array([0, 1, 2, 0])

    @jax.jit
    def run(x, label):
        params = critic.init(key, x, label)
        whole, other = (critic.apply(params, x, label) for label in (label, (label + 1) % 3))
        return whole, critic.apply(params, x[1:2], label[1:2]), other

    scores, alone, other = map(np.asarray, run(x, label))
    np.testing.assert_allclose(alone, scores[1:2], rtol=1e-4, atol=1e-5)
    assert np.all(np.abs(other - scores) > 1e-4)


def test_projection_adds_an_inner_product(key):
    """The score's dependence on the label is <embedding, features>: linear in the embedding."""
    critic = DCGANCritic(8, 1, width=4, base=2, classes=3)
    x, label = jax.random.normal(key, (4, 8, 8, 1)), jnp.array([0, 1, 2, 0])
    params = critic.init(key, x, label)

    def score(scale):
        table = params["params"]["Embed_0"]["embedding"]
        changed = {**params["params"], "Embed_0": {"embedding": scale * table}}
        return critic.apply({"params": changed}, x, label)

    np.testing.assert_allclose(score(2.0) - score(1.0), score(1.0) - score(0.0), atol=1e-4)


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_generator_is_bounded_and_reads_the_label(norm, key):
    generator = DCGANGenerator(8, 1, width=4, base=2, norm=norm, classes=3)
    z = np.float32(np.random.default_rng(0).normal(size=(4, 6)))
    label = np.array([0, 1, 2, 0])

    @jax.jit
    def run(z, label):
        params = generator.init(key, z, label)
        whole, other = (generator.apply(params, z, label) for label in (label, (label + 1) % 3))
        return whole, other, generator.apply(params, z[:2], label[:2])

    images, other, alone = map(np.asarray, run(z, label))
    assert np.all(np.abs(images) <= 1)
    assert not np.allclose(images, other, atol=1e-3)
    assert np.allclose(images[:2], alone, atol=1e-4) == (norm != "batch")


def test_batch_norm_standardises(key):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            return _normalise("batch", x, 0)

    x = 3 + 2 * jax.random.normal(key, (8, 4, 4, 5))
    y, params = Norm().init_with_output(key, x)
    assert set(params["params"]) == {"BatchStatistics_0"}
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, rtol=1e-4)


def test_bad_input(unchecked, key):
    z, x = jnp.zeros((2, 6)), jnp.zeros((2, 8, 8, 1))
    with pytest.raises(ValueError, match="size 12 and base 4"):
        DCGANGenerator(12).init(key, z)
    with pytest.raises(ValueError, match="classes=None and a label"):
        DCGANGenerator(8, base=2).init(key, z, jnp.zeros(2, int))
    with pytest.raises(ValueError, match="classes=3 and no label"):
        DCGANCritic(8, 1, base=2, classes=3).init(key, x)
    with pytest.raises(ValueError, match=r"x must have shape \('any', 16, 16, 1\)"):
        DCGANCritic(16, 1).init(key, x)
    with pytest.raises(ValueError, match="norm must be one of"):
        DCGANCritic(8, 1, base=2, norm="batch").init(key, x)
