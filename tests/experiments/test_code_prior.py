"""The prior over grids of codes: its neighbours, its order, one code at a time as all at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import vqvae
from experiments._code_prior import CodePrior, neighbours
from experiments._codes import grid_prior

GRIDS = [(2, 2), (3, 3)]


@pytest.fixture(scope="module")
def prior():
    """Small, with parameters far from their start."""
    made = CodePrior(5, neighbours(GRIDS, 1), 3, depth=2, width=8, heads=2)
    params = made.init(jax.random.key(0), jnp.zeros((1, 13), int))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return made, jax.tree.unflatten(tree, moved)


def test_neighbours_of_two_levels():
    found = neighbours(GRIDS, 1)
    assert len(found) == 13
    assert found[0] == (-1,) * 10
    # Of the top level the last: the three others, and none above.
    assert found[3] == (2, 2, 0, 1, -1, *[-1] * 5)
    # The middle of the bottom level, whose numbers start at 4, below the top level's first.
    assert found[8] == (7, 7, 4, 5, 6, 0, -1, 1, -1, 2)
    assert all(n < i for i, row in enumerate(found) for n in row)
    staged = neighbours(GRIDS, 2)
    assert staged[2 * 3 + 1] == (6, 5, 1, 3, -1, *[-1] * 5)
    assert staged[2 * 8] == (15, 14, 8, 10, 12, 0, -1, 2, -1, 4)


@pytest.mark.slow
def test_each_code_sees_those_before_it(prior):
    made, params = prior
    tokens = jax.random.randint(jax.random.key(2), (1, 13), 0, 5)
    label = jnp.array([1])
    read = jax.jit(lambda tokens, label: made.apply(params, tokens, label))
    logits = read(tokens, label)
    for place in range(13):
        other = read(tokens.at[:, place].set((tokens[:, place] + 1) % 5), label)
        changed = np.abs(other - logits).max(axis=(0, 2)) > 1e-6
        assert not changed[: place + 1].any()
        assert changed[place + 1 :].all()
    assert (np.abs(read(tokens, jnp.array([2])) - logits).max(axis=(0, 2)) > 1e-3).all()
    none = jax.jit(lambda tokens: made.apply(params, tokens))(tokens)
    np.testing.assert_array_equal(none, read(tokens, jnp.array([3])))


def test_one_code_at_a_time_is_all_at_once(prior):
    made, params = prior
    tokens = jax.random.randint(jax.random.key(3), (2, 13), 0, 5)
    label, cache = jnp.array([0, 2]), made.empty_cache(2)
    whole = jax.jit(lambda: made.apply(params, tokens, label))()
    step = jax.jit(lambda *given: made.apply(params, *given, method="step"))
    for place in range(13):
        known = jnp.where(jnp.arange(13) < place, tokens, 4)
        logits, cache = step(cache, known, label, jnp.array(place))
        np.testing.assert_allclose(logits, whole[:, place], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
def test_draws_follow_the_guided_logits(prior, guidance):
    """The first code's frequencies against the closed form, its logits depending on nothing."""
    made, params = prior
    _, draw = grid_prior(made, 3, guidance)
    label = jnp.full(4000, 1)
    tokens = jax.jit(lambda key: draw(params, key, label, 4000))(jax.random.key(4))
    assert tokens.shape == (4000, 13)
    of = lambda label: made.apply(params, tokens[:1], label)[0, 0]  # noqa: E731
    logits = of(None) + guidance * (of(jnp.array([1])) - of(None))
    share = np.bincount(tokens[:, 0], minlength=5) / 4000
    np.testing.assert_allclose(share, jax.nn.softmax(logits), atol=0.035)


def test_guidance_needs_labels():
    config = vqvae.Config(levels=2, guidance=2.0)
    data = vqvae.load_data(config)
    with pytest.raises(ValueError, match="guidance must be 1 without --conditional"):
        vqvae.build(config, data)
    with pytest.raises(ValueError, match="guidance must be 1 with one level"):
        vqvae.build(dataclasses.replace(config, levels=1, conditional=True), data)
