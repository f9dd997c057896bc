"""Gaussians against closed forms in float64, torch-checked references and finite differences."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import stats

from genjax.variational import (
    gaussian_kl,
    gaussian_kl_between,
    gaussian_log_prob,
    gaussian_sample,
    standard_normal_log_prob,
)

REFERENCE = json.loads(
    (pathlib.Path(__file__).parents[1] / "references/kl_gaussian.json").read_text()
)
INPUTS = {name: np.array(value) for name, value in REFERENCE["inputs"].items()}
M0, V0, M1, V1 = (INPUTS[n] for n in ("diag_mu", "diag_logvar", "diag_mu2", "diag_logvar2"))


def test_kl_reference(compiled, x64):
    kl = compiled(gaussian_kl)(jnp.array(M0), jnp.array(V0))
    np.testing.assert_allclose(kl, REFERENCE["expected"]["diag_vs_standard"], rtol=1e-12)


def test_kl_between_reference(compiled, x64):
    kl = compiled(gaussian_kl_between)(*map(jnp.array, (M0, V0, M1, V1)))
    np.testing.assert_allclose(kl, REFERENCE["expected"]["diag_vs_diag"], rtol=1e-12)


def test_kl_sign_of_the_log_determinant():
    # With the log entering by a plus, as the notes print it, this would be -0.597.
    kl = gaussian_kl(jnp.zeros((1, 1)), jnp.full((1, 1), np.log(0.5)))
    np.testing.assert_allclose(kl[0], REFERENCE["expected"]["true_at_mu0_var_half_d1"], rtol=1e-6)


def test_kl_between_is_kl_to_the_standard_normal(compiled):
    m, v = jnp.array(M0, jnp.float32), jnp.array(V0, jnp.float32)
    zero = jnp.zeros_like(m)
    between = compiled(gaussian_kl_between)(m, v, zero, zero)
    np.testing.assert_allclose(between, gaussian_kl(m, v), rtol=1e-6)


def test_kl_gradients(x64):
    check = functools.partial(check_grads, order=2, modes=["rev"], rtol=1e-6)
    check(jax.jit(gaussian_kl), (jnp.array(M0), jnp.array(V0)))
    check(jax.jit(gaussian_kl_between), tuple(map(jnp.array, (M0, V0, M1, V1))))


def test_kl_near_zero_keeps_its_digits():
    # 1/2 (e^v - 1 - v) = v^2 / 4 + ...: float32 without expm1 would be off by a quarter.
    log_var = jnp.full((1, 1), 1e-3)
    np.testing.assert_allclose(gaussian_kl(jnp.zeros((1, 1)), log_var), 2.50083354e-7, rtol=1e-3)


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e-5, 1e-3])
def test_kl_of_close_laws_is_never_negative(size):
    """Log variances near 0, where exp(l) - 1 - l loses its sign with its digits: l^2 / 4."""
    log_var = size * jax.random.normal(jax.random.key(0), (500, 1))
    exact = np.asarray(log_var, np.float64)[:, 0] ** 2 / 4
    zero = jnp.zeros_like(log_var)
    for kl in (gaussian_kl(zero, log_var), gaussian_kl_between(zero, log_var, zero, zero)):
        assert jnp.all(kl >= 0)
        np.testing.assert_allclose(kl, exact, rtol=3e-3 if size == 1e-3 else 1e-4)


def test_kl_sums_over_every_event_axis():
    m, v = jnp.array(M0, jnp.float32), jnp.array(V0, jnp.float32)
    np.testing.assert_allclose(
        gaussian_kl(m.reshape(3, 2, 2), v.reshape(3, 2, 2)), gaussian_kl(m, v), rtol=1e-6
    )


@pytest.mark.parametrize("log_var", [-80.0, 80.0])
def test_kl_extremes_are_finite_in_value_and_gradient(compiled, log_var):
    m, v = jnp.full((1, 2), 1e4), jnp.full((1, 2), log_var)
    one = compiled(jax.value_and_grad(lambda m, v: gaussian_kl(m, v).sum(), argnums=(0, 1)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one(m, v)))
    two = jax.value_and_grad(lambda *a: gaussian_kl_between(*a).sum(), argnums=(0, 1, 2, 3))
    # Equal Gaussians of any width: distance 0, not 0 times infinity.
    value, gradient = compiled(two)(m, 2 * v, m, 2 * v)
    np.testing.assert_allclose(value, 0)
    assert all(np.isfinite(leaf).all() for leaf in gradient)


def test_log_prob_is_scipys(compiled):
    rng = np.random.default_rng(0)
    x, m, v = rng.normal(size=(3, 5, 2, 3))
    expected = stats.norm.logpdf(x, m, np.exp(v / 2)).sum(axis=(1, 2))
    value = compiled(gaussian_log_prob)(*(jnp.array(a, jnp.float32) for a in (x, m, v)))
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    expected = stats.norm.logpdf(x).sum(axis=(1, 2))
    value = compiled(standard_normal_log_prob)(jnp.array(x, jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=2e-6)


def test_log_prob_gradients(x64):
    args = tuple(jnp.array(a) for a in np.random.default_rng(1).normal(size=(3, 2, 3)))
    check_grads(jax.jit(gaussian_log_prob), args, order=2, rtol=1e-6)


def test_sample_law_and_derivatives(compiled, key):
    count = 200_000
    mean, log_var = jnp.full((count, 1), 1.5), jnp.full((count, 1), np.log(0.25))
    z = np.asarray(compiled(gaussian_sample)(key, mean, log_var))
    assert abs(z.mean() - 1.5) < 5 * 0.5 / np.sqrt(count)
    assert abs(z.var() - 0.25) < 5 * 0.25 * np.sqrt(2 / count)
    # dz/dmean = 1 and dz/dlog_var = (z - mean) / 2: the sample is reparameterised.
    d_mean, d_log_var = jax.grad(lambda m, v: gaussian_sample(key, m, v).sum(), argnums=(0, 1))(
        mean[:9], log_var[:9]
    )
    z = gaussian_sample(key, mean[:9], log_var[:9])
    np.testing.assert_allclose(d_mean, 1.0)
    np.testing.assert_allclose(d_log_var, (z - mean[:9]) / 2, rtol=1e-5, atol=1e-6)


def test_bfloat16_in_float32_out(key):
    m, v = jnp.array(M0, jnp.bfloat16), jnp.array(V0, jnp.bfloat16)
    exact = gaussian_kl(m.astype(jnp.float32), v.astype(jnp.float32))
    for value in (gaussian_kl(m, v), gaussian_kl_between(m, v, v, m), gaussian_log_prob(m, m, v)):
        assert value.dtype == jnp.float32
    np.testing.assert_array_equal(gaussian_kl(m, v), exact)
    assert gaussian_sample(key, m, v).dtype == jnp.float32


def test_shapes_must_agree(unchecked):
    a, b = jnp.zeros((2, 3)), jnp.zeros((2, 1))
    for call in (
        lambda: gaussian_kl(a, b),
        lambda: gaussian_kl_between(a, a, a, b),
        lambda: gaussian_log_prob(a, a, b),
        lambda: gaussian_sample(jax.random.key(0), a, b),
    ):
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)"):
            call()
