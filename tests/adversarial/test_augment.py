"""Augmentations: the identity at p = 0, the law of translations, gradients, the controller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import adversarial as ga

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 8, 8, 2))
ALL = tuple(ga.AUGMENTATIONS)


@pytest.fixture(scope="module")
def run():
    return jax.jit(lambda x, p: ga.augment(KEY, x, p=p, names=ALL))


def test_p_0_is_the_identity_and_rows_depend_on_their_index(run):
    np.testing.assert_array_equal(run(X, 0.0), X)
    changed = run(X, 1.0)
    assert (np.abs(changed - X).max((1, 2, 3)) > 0.01).all()
    other = run(X.at[1:].set(0.0), 1.0)
    np.testing.assert_array_equal(other[0], changed[0])


def test_translations_have_their_exact_law():
    """Of 8 pixels by -1, 0 or 1 either way, each of the nine with a ninth; what leaves is lost."""
    x = np.arange(1.0, 65.0, dtype=np.float32).reshape(8, 8)
    n = 4500
    images = jnp.broadcast_to(jnp.asarray(x)[None, :, :, None], (n, 8, 8, 1))
    found = np.asarray(jax.jit(lambda x: ga.augment(KEY, x, p=1.0, names=("translate",)))(images))
    padded, counts = np.pad(x, 1), []
    for i, j in np.ndindex(3, 3):
        wanted = padded[i : i + 8, j : j + 8]
        counts.append(np.sum((found[..., 0] == wanted[None]).all((1, 2))))
    assert sum(counts) == n
    np.testing.assert_allclose(counts, n / 9, atol=5 * np.sqrt(n / 9))


def test_the_share_that_is_changed_is_p():
    x = jnp.ones((4000, 2, 2, 1))
    found = jax.jit(lambda x, p: ga.augment(KEY, x, p=p, names=("brightness",)))(x, 0.3)
    assert abs(float(jnp.mean(found[:, 0, 0, 0] != 1)) - 0.3) < 0.03


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_the_images(name):
    """By finite differences along a direction: each change is smooth in the image."""
    direction = jax.random.normal(jax.random.key(2), X.shape)

    def loss(x):
        return jnp.sum(jnp.sin(ga.augment(KEY, x, p=1.0, names=(name,))))

    value, slope = jax.jit(lambda x: (loss(x + 0), jax.grad(loss)(x)))(X)
    step = jax.jit(loss)
    difference = (step(X + 1e-2 * direction) - step(X - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(jnp.sum(slope * direction), difference, rtol=0.02, atol=0.05)
    assert np.isfinite(value)


def test_a_turned_image_is_a_turned_image():
    """A linear ramp stays linear inside, with a slope turned by at most 15 degrees."""
    ramp = jnp.broadcast_to(jnp.arange(9.0)[None, :, None, None], (16, 9, 9, 1))
    found = np.asarray(ga.augment(KEY, ramp, p=1.0, names=("turn",)))[:, 3:6, 3:6, 0]
    down, right = found[:, 2, 1] - found[:, 0, 1], found[:, 1, 2] - found[:, 1, 0]
    np.testing.assert_allclose(found[:, 1, 1], 4, atol=1e-4)
    angle, size = np.arctan2(right, down), np.hypot(down, right) / 2
    assert (np.abs(angle) <= np.pi / 12 + 1e-3).all()
    assert (np.abs(np.log(size)) <= np.log(1.1) + 1e-3).all()
    assert angle.std() > 0.05


def test_the_controller_moves_towards_its_target():
    sure, unsure = jnp.ones(8), jnp.asarray([1.0, -1.0] * 4)
    moves = [float(ga.ada_update(0.5, s, images=1000)) for s in (sure, unsure)]
    np.testing.assert_allclose(moves, [0.502, 0.498], rtol=1e-5)
    assert float(ga.ada_update(0.0, unsure, images=1000)) == 0
    assert float(ga.ada_update(0.999, sure, images=1000)) == 1
    # r_t = .5 lies below the default target.
    some = jnp.asarray([1.0, 1.0, 1.0, -1.0])
    assert float(ga.ada_update(0.5, some, images=1000)) < 0.5
    assert float(ga.ada_update(0.5, some, images=1000, target=0.4)) > 0.5


def test_unknown_names_and_shares_are_refused(unchecked):
    with pytest.raises(ValueError, match="did you mean 'cutout'"):
        ga.augment(KEY, X, p=0.5, names=("cutot",))
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 1.5"):
        ga.augment(KEY, X, p=1.5)
    with pytest.raises(ValueError, match="images must have rank 4"):
        ga.augment(KEY, X[0], p=0.5)


@pytest.mark.parametrize("sure", [0.9, 0.5, 0.1, -0.1])
def test_the_controller_takes_a_known_share_too(sure):
    """As many signs give the same step as their mean."""
    scores = jnp.where(jnp.arange(20) < 10 * (1 + sure), 1.0, -1.0)
    by_scores = ga.ada_update(0.5, scores, images=512)
    np.testing.assert_array_equal(ga.ada_update(0.5, sure=sure, images=512), by_scores)
    assert (by_scores > 0.5) == (sure > 0.6)
    with pytest.raises(ValueError, match="real_scores or sure must be given"):
        ga.ada_update(0.5, images=512)
