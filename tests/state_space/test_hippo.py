"""HiPPO against its definition, its low rank form against the dense matrix, S4D's formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from genjax import state_space
from tests.state_space import oracles

FIXTURE = oracles.load("s4_recurrent_step")["expected"]


def test_legs_meets_the_reference_and_its_definition(x64):
    a, b = state_space.hippo_legs(6, jnp.float64)
    np.testing.assert_allclose(a, FIXTURE["A"], rtol=1e-12)
    np.testing.assert_allclose(b, FIXTURE["B"], rtol=1e-12)
    a, b = state_space.hippo_legs(17, jnp.float64)
    np.testing.assert_allclose(a, oracles.legs(17)[0], rtol=1e-12)
    np.testing.assert_allclose(b, oracles.legs(17)[1], rtol=1e-12)


def test_legs_holds_the_legendre_coefficients_of_the_past(x64):
    """x' = (A x + B u) / t: for a cubic the coefficients at t are those of quadrature."""
    a, b = (np.asarray(v) for v in state_space.hippo_legs(4, jnp.float64))

    def signal(s):
        return 1 - 2 * s + 3 * s**2 - s**3

    nodes, weights = np.polynomial.legendre.leggauss(20)

    def coefficients(t):
        s = t * (nodes + 1) / 2
        basis = [
            np.sqrt(2 * n + 1) * np.polynomial.legendre.Legendre.basis(n)(nodes) for n in range(4)
        ]
        return np.array([np.sum(weights * signal(s) * p) / 2 for p in basis])

    t, eps = 1.3, 1e-5
    slope = (coefficients(t + eps) - coefficients(t - eps)) / (2 * eps)
    np.testing.assert_allclose(slope, (a @ coefficients(t) + b * signal(t)) / t, rtol=1e-8)


@pytest.mark.parametrize("num_states", [2, 6, 64])
def test_dplr_is_legs(x64, num_states):
    found = state_space.dplr(num_states, jnp.complex128)
    eigenvalues, p, b, basis = (np.asarray(v) for v in found)
    dense_a, dense_b, dense_p = oracles.legs(num_states)

    def both(v):
        return np.concatenate([v, np.conj(v)], axis=-1)

    full = both(basis)
    np.testing.assert_allclose(full.conj().T @ full, np.eye(num_states), atol=1e-12)
    core = np.diag(both(eigenvalues)) - np.outer(both(p), both(p).conj())
    scale = np.abs(dense_a).max()
    np.testing.assert_allclose(full @ core @ full.conj().T, dense_a, atol=1e-12 * scale)
    np.testing.assert_allclose(full @ both(b), dense_b, atol=1e-11)
    np.testing.assert_allclose(full @ both(p), dense_p, atol=1e-11)
    np.testing.assert_allclose(eigenvalues.real, -0.5, atol=1e-12)
    assert (eigenvalues.imag > 0).all()


def test_s4d_meets_the_reference(x64):
    reference = oracles.load("s4d_kernel")
    for kind, expected in reference["expected"].items():
        found = getattr(state_space, f"s4d_{kind}")(8, jnp.complex128)
        np.testing.assert_allclose(found, oracles.number(expected["A"]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["dplr", "s4d_lin", "s4d_inv", "s4d_real"])
def test_odd_sizes_are_refused(name):
    start = getattr(state_space, name)
    for wrong, error in ((5, ValueError), (0, ValueError), (4.0, TypeError)):
        with pytest.raises(error, match="num_states"):
            start(wrong)
    with pytest.raises(ValueError, match="num_states"):
        state_space.hippo_legs(0)
