"""Continuous flows: a linear field in closed form, orders of convergence, both gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads
from scipy import stats

from genjax import flows
from tests.flows.table import dense, field

KEY = jax.random.key(0)
MATRIX = np.asarray([[0.3, -0.8], [0.4, -0.6]])
SHIFT = np.asarray([0.4, -0.2])


def linear(params, x, t):
    return x @ params["A"].T + params["b"][None]


def linear_params(dtype=jnp.float32):
    return {"A": jnp.asarray(MATRIX, dtype), "b": jnp.asarray(SHIFT, dtype)}


def exact_log_prob(x):
    """x = e^A z + int_0^1 e^{sA} b ds with z ~ N(0, I)."""
    grow = scipy.linalg.expm(MATRIX)
    mean = np.linalg.solve(MATRIX, (grow - np.eye(2)) @ SHIFT)
    return stats.multivariate_normal(mean, grow @ grow.T).logpdf(x)


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_linear_field_has_its_exact_density(method, compiled):
    x = jax.random.normal(KEY, (6, 2))
    flow = flows.continuous_flow(linear, method=method)
    run = compiled(lambda p, x: flows.log_prob(flow, flows.normal((2,)), p, x))
    np.testing.assert_allclose(run(linear_params(), x), exact_log_prob(x), atol=1e-4)


def test_hutchinson_is_exact_for_rademacher_up_to_the_off_diagonal(x64):
    """e^T A e = tr A + (A_12 + A_21) e_1 e_2: exact on average over the four sign patterns."""
    x = jnp.zeros((4, 2))
    probe = jnp.asarray([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    params = linear_params(jnp.float64)
    _, log_det = flows.solve_with_log_det(linear, params, x, probe=probe)
    expected = np.trace(MATRIX) + (MATRIX[0, 1] + MATRIX[1, 0]) * np.asarray([1, -1, -1, 1])
    np.testing.assert_allclose(log_det, expected, atol=1e-12)
    np.testing.assert_allclose(jnp.mean(log_det), np.trace(MATRIX), rtol=1e-12)
    draws = flows.rademacher(KEY, jnp.zeros((1000, 2)))
    assert set(np.unique(draws)) == {-1.0, 1.0}
    assert abs(float(jnp.mean(draws))) < 0.1


ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_methods_converge_at_their_order(method, order, x64):
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), dense(KEY, (3, 8, 2)))
    x = jax.random.normal(KEY, (5, 2), jnp.float64)

    @jax.jit
    def ends():
        return [
            flows.solve_with_log_det(field, params, x, num_steps=n, method=m)
            for n, m in ((10, method), (20, method), (200, "rk4"))
        ]

    coarse, fine, exact = ends()
    for i in range(2):
        errors = [float(jnp.max(jnp.abs(e[i] - exact[i]))) for e in (coarse, fine)]
        assert abs(np.log2(errors[0] / errors[1]) - order) < 0.35
    np.testing.assert_allclose(
        flows.solve(field, params, x, num_steps=20, method=method), fine[0], rtol=1e-13
    )


@pytest.mark.parametrize(
    "hutchinson", [pytest.param(h, marks=pytest.mark.slow) for h in (False, True)]
)
def test_gradients_agree(hutchinson, x64):
    """Back-propagation equals differences; the adjoint equals it to the order of the solver."""
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), dense(KEY, (3, 6, 2)))
    x = jax.random.normal(KEY, (4, 2), jnp.float64)
    probe = flows.rademacher(KEY, x) if hutchinson else None

    def loss(params, x, gradient="backprop", method="rk4"):
        end, log_det = flows.solve_with_log_det(
            field, params, x, num_steps=16, probe=probe, gradient=gradient, method=method,
            rtol=1e-9, atol=1e-9,
        )  # fmt: skip
        return jnp.mean(jnp.sum(end**2, axis=1)) + jnp.mean(jnp.sin(log_det))

    check_grads(jax.jit(loss), (params, x), 1, modes=["rev"], atol=1e-5, rtol=1e-5)
    grads = jax.jit(jax.grad(loss, (0, 1)))(params, x)
    others = [("adjoint", "rk4")] if hutchinson else [("adjoint", "rk4"), ("backprop", "tsit5")]
    for gradient, method in others:
        other = jax.jit(jax.grad(lambda p, x, g=gradient, m=method: loss(p, x, g, m), (0, 1)))(
            params, x
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, other)


def test_exact_trace_of_many_dimensions_equals_the_jacobian():
    params = dense(KEY, (11, 16, 10))
    x, t = jax.random.normal(KEY, (3, 10)), jnp.full(3, 0.3)
    v, div = jax.jit(lambda x: flows.divergence(lambda z: field(params, z, t), x))(x)
    jacobians = jax.jit(jax.vmap(jax.jacrev(lambda z: field(params, z[None], t[:1])[0])))(x)
    np.testing.assert_allclose(div, jnp.trace(jacobians, axis1=1, axis2=2), rtol=1e-5)
    np.testing.assert_allclose(v, field(params, x, t), rtol=1e-5)


def test_bad_input_is_named(unchecked):
    x = jnp.zeros((2, 2))
    params = linear_params()
    cases = [
        ("did you mean 'rk4'", lambda: flows.solve(linear, params, x, method="rk45")),
        ("field", lambda: flows.divergence(lambda x: x[:, :1], x)),
        ("field", lambda: flows.divergence(lambda x: x[:, :1], x, x)),
        ("num_steps", lambda: flows.solve(linear, params, x, num_steps=0)),
        ("times", lambda: flows.continuous_flow(linear, times=(1.0, 1.0))),
        ("gradient", lambda: flows.solve_with_log_det(linear, params, x, gradient="reverse")),
        ("probe", lambda: flows.solve_with_log_det(linear, params, x, probe=jnp.ones((2, 3)))),
    ]
    for match, call in cases:
        with pytest.raises(ValueError, match=match):
            call()
