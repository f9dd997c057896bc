"""Entropic barycentres against POT, closed forms and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest

from genjax.transport import barycentre

EPSILON = 0.02


def problem():
    """Three measures on 12 points of the line, zeros among them, with a cost that is not square."""
    rng = np.random.default_rng(0)
    x, z = np.linspace(0, 1, 12), np.linspace(-0.1, 1.1, 10)
    measures = rng.dirichlet(np.ones(12), 3)
    measures[1, 4:] = 0
    measures /= measures.sum(1, keepdims=True)
    return np.square(x[:, None] - z[None]), measures, np.array([0.5, 0.2, 0.3])


@functools.cache
def solver():
    coefficients = np.random.default_rng(1).normal(size=10)

    def run(cost, measures, weights, epsilon):
        found = barycentre(cost, measures, weights=weights, epsilon=epsilon, tolerance=1e-11)
        return jnp.sum(coefficients * found.measure), found

    return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2, 3), has_aux=True))


def test_the_measure_is_that_of_pot(x64):
    x = np.linspace(0, 1, 12)
    _, measures, weights = problem()
    cost = np.square(x[:, None] - x[None])  # POT has one support for all
    options = {"weights": jnp.asarray(weights), "epsilon": EPSILON, "tolerance": 1e-10}
    found = jax.jit(functools.partial(barycentre, **options))(cost, measures)
    # Its method "sinkhorn" starts from a mean without the weights, and ends elsewhere.
    peer = {"method": "sinkhorn_log", "stopThr": 1e-13, "numItermax": 5000}
    expected = ot.bregman.barycenter(measures.T, cost, EPSILON, weights, **peer)
    assert found.converged
    np.testing.assert_allclose(found.measure, expected, atol=1e-9)
    np.testing.assert_allclose(np.sum(found.measure), 1, rtol=1e-12)


@pytest.mark.slow
def test_gradients_against_finite_differences(x64):
    cost, measures, weights = problem()
    args = [cost, measures, weights, EPSILON]
    (_, found), gradients = solver()(*args)
    assert found.converged
    rng = np.random.default_rng(2)
    for k, gradient in enumerate(gradients):
        along = rng.normal(size=np.shape(args[k]))
        if k in (1, 2):  # weights keep their sums, and those of 0 stay
            along = along * (args[k] > 0)
            along -= args[k] * along.sum(-1, keepdims=True)
        ends = []
        for sign in (1, -1):
            moved = list(args)
            moved[k] = args[k] + sign * 1e-6 * along
            ends.append(solver()(*moved)[0][0])
        slope = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * along), slope, rtol=1e-5, err_msg=str(k))


def test_gaussians_meet_the_closed_form():
    """Of N(m_k, s^2) it is N(mean m, s^2 + epsilon / 2): the blur that the docstring names."""
    z = np.linspace(-4, 4, 161, dtype=np.float32)
    measures = np.exp(-np.square(z[None] - np.array([[-1.0], [0.5]])) / (2 * 0.3))
    measures = (measures / measures.sum(1, keepdims=True)).astype(np.float32)
    cost = np.square(z[:, None] - z[None])
    options = {"weights": jnp.array([0.25, 0.75]), "epsilon": 0.1}

    def run(cost, measures):
        found = barycentre(cost, measures, **options)
        return jnp.vdot(z, found.measure), found

    (_, found), slope = jax.jit(jax.value_and_grad(run, argnums=1, has_aux=True))(cost, measures)
    assert found.converged
    # Mass moved within measure k moves the mean by weight k, in float32 as well.
    for k, weight in enumerate((0.25, 0.75)):
        moved = np.gradient(measures[k], z)
        np.testing.assert_allclose(-np.sum(slope[k] * moved), weight, rtol=1e-2)
    mean = np.sum(found.measure * z)
    variance = np.sum(found.measure * np.square(z - mean))
    np.testing.assert_allclose(mean, 0.125, atol=1e-3)
    np.testing.assert_allclose(variance, 0.3 + 0.1 / 2, rtol=1e-2)


def test_what_does_not_converge_says_so():
    cost, measures, _ = (jnp.asarray(z, jnp.float32) for z in problem())
    found = jax.jit(functools.partial(barycentre, epsilon=1e-3, max_iterations=2))(cost, measures)
    assert not found.converged
    assert found.num_iterations == 2
    assert found.marginal_error > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": jnp.ones((2, 3)) / 3}, "measures must have shape"),
        ({"measures": jnp.ones((2, 4))}, r"the sum of measures\[0\] must lie in"),
        ({"weights": jnp.ones(3) / 3}, "weights must have shape"),
        ({"epsilon": -1.0}, "epsilon must be positive"),
        ({"cost": jnp.ones(4)}, "cost must have rank 2"),
    ],
    ids=str,
)
def test_errors(unchecked, options, message):
    given = {"cost": jnp.ones((4, 5)), "measures": jnp.ones((2, 4)) / 4, "epsilon": 0.1}
    with pytest.raises(ValueError, match=message):
        barycentre(**(given | options))
