"""Point clouds whose cost matrix is never formed, forward or backward."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.transport import blocks, sinkhorn, sinkhorn_divergence, squared_euclidean
from tests.transport.reference import clouds

MEASURE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from genjax.transport import sinkhorn
n, chunk, tolerance = int(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
rng = np.random.default_rng(0)
x = jnp.asarray(rng.standard_normal((n, 2)), jnp.float32)
y = jnp.asarray(0.8 * rng.standard_normal((n, 2)) + 0.5, jnp.float32)

def value(x):
    result = sinkhorn(x, y, epsilon=0.1, tolerance=tolerance, chunk_size=chunk)
    return result.value, result.marginal_error

# Of this process alone: what getrusage reports is inherited from the parent.
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20

step = jax.jit(jax.value_and_grad(value, has_aux=True)).lower(x).compile()
before = peak()
(v, error), gradient = jax.block_until_ready(step(x))
print(json.dumps([before, peak(), float(v), float(error), float(jnp.linalg.norm(gradient))]))
"""


def test_chunks_give_the_same_answer():
    x, y = clouds(40, 33, 2)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.dirichlet(np.ones(k)), jnp.float32) for k in (40, 33))
    a = a.at[4].set(0) / (1 - a[4])
    b = b.at[7].set(0) / (1 - b[7])

    def run(x, y, a, b, epsilon, **options):
        result = sinkhorn(x, y, epsilon=epsilon, a=a, b=b, tolerance=1e-4, **options)
        return result.value, result

    grad = jax.value_and_grad(run, argnums=(0, 1, 2, 3, 4), has_aux=True)
    dense, chunks = jax.jit(grad), jax.jit(lambda *z: grad(*z, chunk_size=7))
    for epsilon in (0.5, 0.02):
        args = (x, y, a, b, jnp.asarray(epsilon))
        (value, whole), expected = dense(*args)
        (chunked_value, result), mine = chunks(*args)
        assert result.converged
        np.testing.assert_allclose(chunked_value, value, rtol=1e-5)
        np.testing.assert_allclose(result.cost, whole.cost, rtol=1e-3)
        for one, other in zip(mine, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-3 * float(jnp.abs(other).max()))


@pytest.mark.slow
def test_chunks_of_a_learned_cost(x64):
    x, y = (z.astype(jnp.float64) for z in clouds(10, 8, 3))
    theta = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)))

    def value(theta, x, **options):
        def cost_fn(x, y):
            return squared_euclidean(jnp.tanh(x @ theta), jnp.tanh(y @ theta))

        return sinkhorn(x, y, epsilon=0.3, cost_fn=cost_fn, tolerance=1e-9, **options).value

    expected = jax.jit(jax.grad(value, argnums=(0, 1)))(theta, x)
    mine = jax.jit(jax.grad(lambda *z: value(*z, chunk_size=3), argnums=(0, 1)))(theta, x)
    for one, other in zip(mine, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"num_iterations": 20}], ids=str)
def test_chunks_of_a_cost_that_knows_its_shape(options):
    """A cost written with broadcasting has the number of rows in its program."""
    x, y = clouds(33, 20, 2)

    def cost_fn(x, y):
        return jnp.sum(jnp.abs(x[:, None, :] - y[None, :, :]), axis=-1)

    whole, chunks = (
        jax.jit(
            lambda x, k=k: sinkhorn(x, y, epsilon=0.3, cost_fn=cost_fn, chunk_size=k, **options)
        )(x)
        for k in (None, 7)
    )
    np.testing.assert_allclose(chunks.value, whole.value, rtol=1e-5)


def test_chunks_of_a_fixed_number_of_iterations():
    x, y = clouds(20, 15, 2)
    one, other = (
        jax.jit(lambda x, y, k=k: sinkhorn(x, y, epsilon=0.3, num_iterations=7, chunk_size=k))(x, y)
        for k in (None, 6)
    )
    np.testing.assert_allclose(one.f, other.f, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.g, other.g, rtol=1e-4, atol=1e-5)
    assert other.num_iterations == 7


@pytest.mark.slow
def test_divergence_in_chunks():
    x, y = clouds(20, 15, 2)
    one, other = (
        jax.jit(lambda x, y, k=k: sinkhorn_divergence(x, y, epsilon=0.3, chunk_size=k).value)(x, y)
        for k in (None, 6)
    )
    np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.slow
def test_large_clouds_in_the_default_blocks():
    """Enough points for several blocks with a padded last one, and for the coarse start."""
    x, y = clouds(1503, 1500, 2)

    def run(x, **options):
        result = sinkhorn(x, y, epsilon=0.05, **options)
        return result.value, result

    (value, result), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(x)
    (chunked, _), other = jax.jit(
        jax.value_and_grad(lambda x: run(x, chunk_size=200), has_aux=True)
    )(x)
    assert result.converged
    assert result.marginal_error < 1e-3
    np.testing.assert_allclose(value, chunked, rtol=1e-5)
    np.testing.assert_allclose(gradient, other, atol=1e-3 * float(jnp.abs(gradient).max()))
    plan = result.plan()
    expected = 2 * (jnp.sum(plan, 1)[:, None] * x - plan @ y)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param("sorted", marks=pytest.mark.slow),
        pytest.param("weighted", marks=pytest.mark.slow),
        pytest.param("no weight in the sample", marks=pytest.mark.slow),
    ],
)
def test_large_clouds_are_annealed_on_a_sample_of_blocks(case):
    x, y = clouds(2100, 300, 2)
    epsilon, k = 0.02, 200
    x = x[jnp.argsort(x[:, 0])]  # a sample of neighbours would be far off
    a = None
    if case == "weighted":
        a = jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(2100)), jnp.float32)
    elif case != "sorted":
        size = blocks.rows(2100, 300, k)
        a = (np.arange(2100) // size % 2).astype(np.float32)
        a = jnp.asarray(a / a.sum())
    value, result = jax.jit(lambda x: _both(sinkhorn(x, y, epsilon=epsilon, a=a, chunk_size=k)))(x)
    dense = jax.jit(lambda x: sinkhorn(x, y, epsilon=epsilon, a=a, tolerance=1e-4))(x)
    assert result.converged
    assert result.num_iterations < 100
    np.testing.assert_allclose(value, dense.value, rtol=1e-4)
    np.testing.assert_allclose(jnp.sum(result.plan(), axis=1), result.a, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_a_sample_of_each_side_where_one_is_much_larger():
    x, y = clouds(10_400, 520, 2)
    one, other = (
        jax.jit(lambda x, k=k: sinkhorn(x, y, epsilon=0.05, chunk_size=k))(x) for k in (None, 512)
    )
    assert one.converged
    assert other.converged
    np.testing.assert_allclose(one.value, other.value, rtol=1e-5)


def _both(result):
    return result.value, result


@pytest.mark.slow
def test_chunks_that_run_out_of_sweeps_have_exact_rows():
    x, y = clouds(2100, 300, 2)
    for sweeps in (1, 3, 12):
        result = jax.jit(
            lambda x, k=sweeps: sinkhorn(x, y, epsilon=0.01, max_iterations=k, chunk_size=200)
        )(x)
        assert not result.converged
        assert result.num_iterations == sweeps
        np.testing.assert_allclose(jnp.sum(result.plan(), axis=1), result.a, rtol=1e-3)


def test_bad_input(unchecked):
    x, y = clouds(4, 3, 2)
    with pytest.raises(ValueError, match="chunk_size needs gradient 'envelope', got 'unroll'"):
        sinkhorn(x, y, epsilon=1.0, chunk_size=2, gradient="unroll", num_iterations=3)
    with pytest.raises(ValueError, match="chunk_size needs gradient 'envelope', got 'implicit'"):
        sinkhorn(x, y, epsilon=1.0, chunk_size=2, gradient="implicit")
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        sinkhorn(x, y, epsilon=1.0, chunk_size=0)


def measure(n, chunk_size, tolerance):
    """Peak resident GiB of a process that takes value and gradient, before the call (jax, and the
    compilation) and in all, and what it found."""
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, str(n), json.dumps(chunk_size), str(tolerance)],
        env={**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_at_16384_points():
    start, dense, value, error, norm = measure(16384, None, 1e-3)
    chunked_start, peak, chunked_value, chunked_error, chunked_norm = measure(16384, 256, 1e-3)
    # jax takes 0.2 GiB, and compilation 0.15 whatever the size: these aside it is a hundredth.
    assert peak - chunked_start < (dense - start) / 25
    assert peak < 0.27 * dense
    assert max(error, chunked_error) < 1e-3
    np.testing.assert_allclose(chunked_value, value, rtol=1e-4)
    np.testing.assert_allclose(chunked_norm, norm, rtol=1e-3)


@pytest.mark.slow
def test_memory_at_65536_points():
    _, peak, value, error, _ = measure(65536, 256, 1e-2)
    assert peak < 2
    assert error < 1e-2
    assert np.isfinite(value)
