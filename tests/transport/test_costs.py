import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.spatial.distance import cdist

from genjax.transport import cosine, euclidean, squared_euclidean
from tests.transport.reference import clouds

COSTS = [(squared_euclidean, "sqeuclidean"), (euclidean, "euclidean"), (cosine, "cosine")]


@pytest.mark.parametrize(("cost", "metric"), COSTS)
@pytest.mark.parametrize("d", [2, 33])  # coordinate by coordinate, and as a matrix product
def test_cost_meets_scipy(compiled, cost, metric, d):
    x, y = clouds(7, 5, d)
    expected = cdist(np.asarray(x, np.float64), np.asarray(y, np.float64), metric)
    np.testing.assert_allclose(compiled(cost)(x, y), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("cost", "metric"), COSTS)
@pytest.mark.parametrize("d", [2, 33])
def test_cost_gradient(x64, cost, metric, d):
    x, y = (np.asarray(z, np.float64) for z in clouds(4, 3, d))
    check_grads(jax.jit(cost), (x, y), order=1, modes=["fwd", "rev"], eps=1e-5)


@pytest.mark.parametrize(("cost", "metric"), COSTS)
@pytest.mark.parametrize("d", [2, 33])
def test_gradient_is_finite_where_points_coincide(cost, metric, d):
    x = np.concatenate([np.zeros((1, d)), np.ones((3, d))]).astype(np.float32)
    value, grads = jax.jit(jax.value_and_grad(lambda x, y: jnp.sum(cost(x, y)), (0, 1)))(x, x)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_distances_far_from_the_origin_keep_their_digits():
    x, y = map(np.asarray, clouds(6, 6, 20))
    run = jax.jit(squared_euclidean)
    np.testing.assert_allclose(run(x + 1000, y + 1000), run(x, y), rtol=1e-3)
    assert (np.asarray(run(x, x)) >= 0).all()


def test_narrow_inputs_accumulate_in_float32():
    x, y = (np.asarray(z, jnp.bfloat16) for z in clouds(6, 4, 200))
    cost = jax.jit(squared_euclidean)(x, y)
    assert cost.dtype == jnp.float32
    expected = cdist(np.asarray(x, np.float64), np.asarray(y, np.float64), "sqeuclidean")
    np.testing.assert_allclose(cost, expected, rtol=1e-5)


def test_bad_shapes(unchecked):
    with pytest.raises(ValueError, match="events"):
        squared_euclidean(jnp.zeros((3, 2)), jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="rank 2"):
        cosine(jnp.zeros(3), jnp.zeros((3, 4)))


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1.0, 1e20])
def test_cosine_does_not_depend_on_lengths(scale):
    x = scale * jnp.array([[1.0, 2.0], [3.0, -1.0]])
    y = jnp.array([[2.0, 4.0], [-1.0, 0.5]])
    np.testing.assert_allclose(cosine(x, y), cosine(x / scale, y), atol=1e-6)
    gradient = jax.grad(lambda x: cosine(x, y).sum())(x)
    slopes = jax.grad(lambda x: cosine(x, y).sum())(x / scale)
    np.testing.assert_allclose(scale * gradient, slopes, atol=1e-5)
