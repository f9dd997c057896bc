import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.transport import (
    cosine,
    minibatch_energy_distance,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_loss,
)
from tests.transport.reference import clouds, load, solve64, squared


def uniform(n):
    return np.full(n, 1 / n)


@pytest.mark.parametrize("relative", [pytest.param(1.0, marks=pytest.mark.slow), 0.1])
def test_divergence_against_float64(relative):
    x, y = clouds(14, 12, 2)
    epsilon = relative * squared(x, y).mean()
    result = jax.jit(lambda x, y: sinkhorn_divergence(x, y, epsilon=epsilon))(x, y)
    cross, self_x, self_y = (
        solve64(squared(u, v), uniform(len(u)), uniform(len(v)), epsilon, 1e-6)[2]
        for u, v in ((x, y), (x, x), (y, y))
    )
    np.testing.assert_allclose(result.cross, cross, rtol=1e-4)
    np.testing.assert_allclose(result.self_x, self_x, rtol=1e-4)
    np.testing.assert_allclose(result.self_y, self_y, rtol=1e-4)
    np.testing.assert_allclose(result.value, cross - (self_x + self_y) / 2, rtol=2e-4)
    assert result.converged
    assert result.marginal_error < 1e-3


def test_divergence_gradient_of_the_fixture(compiled):
    case = load("sinkhorn_gradients")
    x, y = (jnp.asarray(case["inputs"][k], jnp.float32) for k in "XY")

    def value(x):
        return sinkhorn_divergence(x, y, epsilon=case["inputs"]["eps"], tolerance=1e-5).value

    gradient = compiled(jax.grad(value))(x)
    np.testing.assert_allclose(gradient, case["expected"]["grad_sinkhorn_divergence"], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(o, marks=pytest.mark.slow)
            for o in ({"chunk_size": 7}, {"num_iterations": 20})
        ),
    ],
)
def test_divergence_of_a_cloud_from_itself(options):
    x, _ = clouds(32, 1, 2)
    scale = squared(x, x).mean()
    some = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(32)), jnp.float32).at[3].set(0)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(x, y, a, b, epsilon):
        result = sinkhorn_divergence(x, y, epsilon=epsilon, a=a, b=b, **options)
        return result.value, result.converged

    same, some = jnp.full(32, 1 / 32), some / some.sum()
    for relative in (1.0, 0.05, 0.001):
        for y, a in ((x, same), (x[::-1], same), (x, some)):
            (value, converged), gradient = run(x, y, a, a, relative * scale)
            if "num_iterations" in options:  # after L updates the two plans are not the same
                assert abs(value) < 1e-6 * scale
            else:
                assert converged
                assert abs(value) < 2e-7 * scale
                assert jnp.abs(gradient).sum() < 1e-6 * np.sqrt(scale)


@pytest.mark.parametrize("warm", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_divergence_is_not_negative(warm):
    def value(x, y, e, init=None):
        result = sinkhorn_divergence(x, y, epsilon=e, init=init)
        return result.value, result.init

    run = jax.jit(value)
    for seed in range(3):
        x, noise = clouds(64, 64, 2, seed)
        for step in (1e-4, 1e-3, 1e-2, 1.0):
            y = x + step * noise
            scale = squared(x, y).mean()
            for relative in (1.0, 0.1, 0.01):
                init = run(x, x + 0.1 * noise, relative * scale)[1] if warm else None
                assert run(x, y, relative * scale, init)[0] >= -2e-7 * scale


@pytest.mark.slow
def test_divergence_warm_start():
    x, y = clouds(24, 20, 2)
    cold = jax.jit(lambda x, y: sinkhorn_divergence(x, y, epsilon=0.1))(x, y)
    warm = jax.jit(lambda x, y, init: sinkhorn_divergence(x, y, epsilon=0.1, init=init))
    np.testing.assert_allclose(warm(x, y, cold.init).value, cold.value, rtol=1e-4)


@pytest.mark.slow
def test_divergence_fixed_iterations_and_weights():
    x, y = clouds(12, 10, 2)
    a = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(12)), jnp.float32)
    fixed = jax.jit(lambda: sinkhorn_divergence(x, y, epsilon=0.5, a=a, num_iterations=100))()
    free = jax.jit(lambda: sinkhorn_divergence(x, y, epsilon=0.5, a=a, tolerance=1e-5))()
    np.testing.assert_allclose(fixed.value, free.value, rtol=1e-5)


def test_loss_is_the_cost_of_the_plan_after_l_iterations(compiled):
    x, y = clouds(10, 8, 3)
    result = compiled(lambda x, y: sinkhorn_loss(x, y, epsilon=0.5, num_iterations=3))(x, y)
    kernel = np.exp(-squared(x, y) / 0.5)
    v = np.ones(8)
    for _ in range(3):
        u = uniform(10) / (kernel @ v)
        v = uniform(8) / (kernel.T @ u)
    plan = u[:, None] * kernel * v[None, :]
    # The start differs (g = 0 is v = b), by a constant that the first update takes out.
    np.testing.assert_allclose(result.value, (plan * squared(x, y)).sum(), rtol=1e-5)


@pytest.mark.parametrize("sizes", [pytest.param((12, 12), marks=pytest.mark.slow), (12, 9)])
def test_minibatch_energy_is_six_transports(sizes):
    (x, y), (x2, y2) = (clouds(*sizes, 6, seed) for seed in (0, 1))
    epsilon = 0.05
    result = jax.jit(lambda *z: minibatch_energy_distance(*z, epsilon=epsilon))(x, x2, y, y2)

    def w(u, v):
        cost = np.asarray(cosine(u, v), np.float64)
        return solve64(cost, uniform(len(u)), uniform(len(v)), epsilon, 1e-6)[3]

    between = w(x, y) + w(x, y2) + w(x2, y) + w(x2, y2)
    np.testing.assert_allclose(result.between, between, rtol=1e-3)
    expected = between - 2 * w(x, x2) - 2 * w(y, y2)
    np.testing.assert_allclose(result.value, expected, rtol=5e-3)


@pytest.mark.slow
def test_minibatch_energy_with_the_plan_cut_or_kept(x64):
    (x, y), (x2, y2) = (
        tuple(z.astype(jnp.float64) for z in clouds(6, 6, 3, seed)) for seed in (0, 1)
    )

    def value(x, **options):
        return minibatch_energy_distance(x, x2, y, y2, epsilon=0.2, **options).value

    kept = jax.jit(jax.grad(lambda x: value(x, gradient="unroll", num_iterations=200)))(x)
    step = 1e-5
    evaluate = jax.jit(lambda x: value(x, num_iterations=200))
    shift = jnp.zeros_like(x).at[2, 1].set(step)
    difference = (evaluate(x + shift) - evaluate(x - shift)) / (2 * step)
    np.testing.assert_allclose(kept[2, 1], difference, rtol=1e-6)
    cut = jax.jit(jax.grad(lambda x: value(x, tolerance=1e-10)))(x)

    def by_hand(x):
        plans = [
            jax.lax.stop_gradient(
                sinkhorn(u, v, epsilon=0.2, cost_fn=cosine, tolerance=1e-10).plan()
            )
            for u, v in ((x, y), (x, y2), (x, x2))
        ]
        terms = [jnp.sum(p * cosine(x, v)) for p, v in zip(plans, (y, y2, x2), strict=True)]
        return terms[0] + terms[1] - 2 * terms[2]

    np.testing.assert_allclose(cut, jax.jit(jax.grad(by_hand))(x), atol=1e-8)
    assert np.abs(cut - kept).max() > 1e-3
    with pytest.raises(ValueError, match="needs num_iterations"):
        value(x, gradient="unroll")


def test_bad_input(unchecked):
    x, y = clouds(4, 3, 2)
    with pytest.raises(ValueError, match="shapes must be equal, got x"):
        minibatch_energy_distance(x, y, y, y, epsilon=1.0)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        sinkhorn_divergence(x, y, epsilon=-1.0)
    with pytest.raises(TypeError, match="num_iterations must be an integer"):
        sinkhorn_loss(x, y, epsilon=1.0, num_iterations=2.5)
