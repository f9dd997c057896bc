"""The networks of a hierarchy: shapes, what depends on what, and where priors start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import ImageHierarchy, soft_clip

NET = ImageHierarchy((8, 8, 6), latents=(5, 3, 2), sides=(1, 2, 4), width=12, dropout=0.5)
X = jax.random.normal(jax.random.key(1), (3, 8, 8, 2))


@pytest.fixture(scope="module")
def params():
    params = jax.jit(NET.init)(jax.random.key(0), X)
    # The priors' last maps start at 0; moved, so that what they read can be seen.
    return jax.tree.map(
        lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )


def path(params, x, z, key=None):
    """Everything on the way up and down with given latents."""
    apply = lambda name, *a: NET.apply(params, *a, dropout_key=key, method=name)  # noqa: E731
    features, h, found = apply("features", x), None, []
    for i in range(3):
        prior = apply("prior", i, h) if i else None
        found.append((prior, apply("posterior", i, h, features[i])))
        h = apply("merge", i, h, z[i])
    return found, NET.apply(params, h, method="decode")


run = jax.jit(path)
Z = [
    jax.random.normal(jax.random.key(i), (3, side, side, n))
    for i, (side, n) in enumerate(((1, 5), (2, 3), (4, 2)))
]


@pytest.mark.slow
def test_shapes_and_what_depends_on_what(params):
    found, out = run(params, X, Z)
    assert out.shape == (3, 8, 8, 6)
    for (prior, posterior), z in zip(found, Z, strict=True):
        assert all(part.shape == z.shape for part in posterior)
        assert prior is None or all(part.shape == z.shape for part in prior)
        assert posterior[1].min() > -6
        assert posterior[1].max() < 3.01
    # Another top latent changes all below it; the image changes no prior; another last one changes
    # the output alone.
    other, moved = run(params, X, [Z[0] + 1, *Z[1:]])
    assert np.abs(other[1][0][0] - found[1][0][0]).max() > 1e-3
    assert np.abs(moved - out).max() > 1e-3
    image, _ = run(params, X + 1, Z)
    np.testing.assert_allclose(image[2][0][0], found[2][0][0], rtol=1e-5)
    assert np.abs(image[2][1][0] - found[2][1][0]).max() > 1e-3
    last, moved = run(params, X, [*Z[:2], Z[2] + 1])
    np.testing.assert_array_equal(last[2][1][0], found[2][1][0])
    assert np.abs(moved - out).max() > 1e-3
    # Examples do not see each other.
    alone, _ = run(params, X.at[0].set(9.0), Z)
    np.testing.assert_allclose(alone[1][1][0][1:], found[1][1][0][1:], rtol=1e-5, atol=1e-6)


def test_priors_start_at_the_standard_normal_and_dropout_needs_a_key():
    fresh = jax.jit(NET.init)(jax.random.key(0), X)
    found, out = run(fresh, X, Z)
    for mean, log_var in (found[1][0], found[2][0]):
        np.testing.assert_array_equal(mean, 0)
        np.testing.assert_allclose(log_var, 0, atol=0.1)
    _, dropped = run(fresh, X, Z, jax.random.key(2))
    assert np.abs(dropped - out).max() > 1e-3


def test_fully_connected_form():
    flat = ImageHierarchy((8, 8, 6), latents=(5, 3), sides=(1, 1), width=12)
    params = jax.eval_shape(flat.init, jax.random.key(0), X)["params"]
    assert params["stem"]["kernel"].shape == (128, 12)
    assert params["rising_0_0"]["Conv_0"]["kernel"].shape == (1, 1, 12, 12)
    assert params["out"]["kernel"].shape == (12, 8 * 8 * 6)


def test_soft_clip():
    x = jnp.linspace(-40, 40, 81)
    y = soft_clip(x, -6.0, 3.0)
    assert y.min() >= -6
    assert y.max() <= 3.0001
    np.testing.assert_allclose(soft_clip(jnp.array(-1.5), -6.0, 3.0), -1.5, atol=1e-6)
    assert (np.diff(y) >= -8e-6).all()  # two roundings of numbers near 40
    assert (jax.grad(lambda x: soft_clip(x, -6.0, 3.0).sum())(jnp.linspace(-9, 7, 33)) > 0.01).all()


@pytest.mark.parametrize(
    "fields",
    [{"sides": (2, 1)}, {"sides": (1, 3)}, {"sides": (1,)}, {"shape": (8, 4, 1)}],
)
def test_sides_that_do_not_fit(fields):
    net = ImageHierarchy(**{"shape": (8, 8, 1), "latents": (2, 2), "sides": (1, 2), **fields})
    with pytest.raises(ValueError, match="sides"):
        jax.eval_shape(net.init, jax.random.key(0), X)


def test_soft_clip_of_large_numbers():
    x = jnp.array([-jnp.inf, -1e9, -1e6, 1e6, 3e7, 1e9, jnp.inf])
    np.testing.assert_array_equal(soft_clip(x, -6.0, 3.0), [-6, -6, -6, 3, 3, 3, 3])
