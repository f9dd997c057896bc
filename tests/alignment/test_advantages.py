"""Generalised advantages: the reference, the double sum, masks as if dropped; whitening."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.alignment import gae, group_advantages, whiten
from tests.alignment.references import load

INPUTS, EXPECTED = load("gae")
NAMES = ("rewards", "values", "dones")


def reference_arrays():
    return [np.array(INPUTS[name]) for name in NAMES], np.array(INPUTS["bootstrap"])


def test_reference(x64, compiled):
    arrays, bootstrap = reference_arrays()
    given = [jnp.asarray(x) for x in arrays]

    def run(discount, decay):
        options = {"bootstrap": jnp.asarray(bootstrap), "discount": discount, "decay": decay}
        return compiled(lambda *x: gae(*x, **options))(*given)

    found = run(INPUTS["gamma"], INPUTS["lam"])
    for field in ("advantages", "returns"):
        np.testing.assert_allclose(getattr(found, field), EXPECTED[field], rtol=1e-11)
    whitened = whiten(found.advantages)
    np.testing.assert_allclose(whitened, EXPECTED["advantages_whitened"], rtol=1e-10)
    found = run(INPUTS["gamma"], 1.0).returns
    np.testing.assert_allclose(found, EXPECTED["lambda1_returns"], rtol=1e-11)
    found = run(INPUTS["gamma"], 0.0).advantages
    np.testing.assert_allclose(found, EXPECTED["lambda0_advantages"], rtol=1e-11)
    found = run(1.0, 0.95).advantages
    np.testing.assert_allclose(found, EXPECTED["advantages_gamma1_lam95"], rtol=1e-11)


def test_masked_steps_are_as_if_dropped(x64):
    """Padding left, right and between, NaN in it; and no gradient through either result."""
    arrays, bootstrap = reference_arrays()
    places = np.array([0, 2, 3, 5, 6, 7, 9])
    mask = jnp.zeros((3, 11), bool).at[:, places].set(True)
    wide = []
    for x in arrays:
        spread = np.full((3, 11), np.nan)
        spread[:, places] = x
        wide.append(jnp.asarray(spread))
    options = {"bootstrap": jnp.asarray(bootstrap), "discount": 0.99, "decay": 0.95}
    found = gae(*wide, **options, where=mask)
    for field in ("advantages", "returns"):
        values = np.asarray(getattr(found, field))
        np.testing.assert_allclose(values[:, places], EXPECTED[field], rtol=1e-11)
        np.testing.assert_array_equal(values[~np.asarray(mask)], 0)
    given = [jnp.asarray(x) for x in arrays]
    slope = jax.jit(jax.grad(lambda v: sum(map(jnp.sum, gae(given[0], v, given[2])))))(given[1])
    np.testing.assert_array_equal(slope, 0)


def test_float32_rows_and_the_double_sum():
    """Each advantage as the sum of discounted errors up to the end of its episode."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 4, 9))
    dones = rng.random((4, 9)) < 0.2
    expected = np.zeros((4, 9))
    for i in range(4):
        for t in range(9):
            for k in range(t, 9):
                ahead = values[i, k + 1] if k < 8 and not dones[i, k] else 0.0
                error = rewards[i, k] + 0.9 * ahead - values[i, k]
                expected[i, t] += (0.9 * 0.8) ** (k - t) * error
                if dones[i, k]:
                    break
    given = [jnp.asarray(x, jnp.float32) for x in (rewards, values)]
    run = jax.jit(lambda r, v, d: gae(r, v, d, discount=0.9, decay=0.8))
    found = run(*given, jnp.asarray(dones))
    assert found.advantages.dtype == jnp.float32
    np.testing.assert_allclose(found.advantages, expected, atol=2e-6)
    others = jnp.arange(4)[:, None] != 2
    alone = run(*(jnp.where(others, 2 * x, x) for x in given), jnp.asarray(dones))
    np.testing.assert_array_equal(alone.advantages[2], found.advantages[2])


def test_whitening():
    mask = jnp.array([[True, True, False], [True, False, False]])
    x = jnp.array([[1.0, 3.0, jnp.nan], [2.0, jnp.inf, jnp.nan]])
    masked = jax.jit(lambda x, mask: whiten(x, where=mask))
    found = masked(x, mask)
    np.testing.assert_allclose(found[mask], np.array([-1, 1, 0]) * np.sqrt(1.5), rtol=1e-6)
    np.testing.assert_array_equal(found[~mask], 0)
    # Equal entries, whose mean rounds, are 0 and not noise; so is a batch that is masked whole.
    equal = jnp.full((7, 13), 0.1)
    found, pull = jax.jit(lambda x: jax.value_and_grad(lambda x: jnp.sum(whiten(x) ** 3))(x))(equal)
    assert found == 0
    assert np.isfinite(pull).all()
    np.testing.assert_array_equal(masked(x, jnp.zeros_like(mask)), 0)


def test_bad_input_is_refused_by_name(unchecked):
    x = jnp.ones((2, 3))
    for call, message in (
        (lambda: gae(x, x[:, :2], x), "rewards.*values"),
        (lambda: gae(x, x, x[:1]), "rewards.*dones"),
        (lambda: gae(x, x, x, bootstrap=jnp.ones(3)), "bootstrap must have shape"),
        (lambda: gae(x, x, x, discount=1.5), "discount must lie in"),
        (lambda: gae(x, x, x, decay=-0.1), "decay must lie in"),
        (lambda: gae(x, x, x, where=jnp.ones((2, 2), bool)), "where must have shape"),
        (lambda: whiten(x, where=jnp.ones((2, 2), bool)), "where must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("n", [2, 3, 6, 7, 8])
def test_equal_rewards_have_no_advantage(n):
    """Their mean is off by rounding, which divided by its own deviation would be of order 1."""
    rewards = jnp.broadcast_to(jnp.arange(0.1, 40, 0.1)[:, None], (399, n))
    for scale in ("std", "none"):
        np.testing.assert_array_equal(group_advantages(rewards, scale=scale), 0)
    mixed = group_advantages(jnp.array([[0.1] * (n - 1) + [0.1001]]))
    assert mixed[0, -1] > 0.5


def test_what_lies_after_an_end_may_be_anything():
    rewards, dones = jnp.array([[1.0, 2.0]]), jnp.array([[False, True]])
    for last in (jnp.nan, jnp.inf):
        found = gae(rewards, jnp.zeros((1, 2)), dones, bootstrap=jnp.array([last]), decay=1.0)
        np.testing.assert_array_equal(found.advantages, [[3.0, 2.0]])
