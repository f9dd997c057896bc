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
    x, y = (jnp.asarray(z, jnp.float64) for z in clouds(4, 3, d))

    def wrapped(*z):
        return cost(*map(jnp.asarray, z))  # check_grads passes numpy arrays

    check_grads(wrapped, (x, y), order=1, modes=["fwd", "rev"], eps=1e-5)


@pytest.mark.parametrize(("cost", "metric"), COSTS)
@pytest.mark.parametrize("d", [2, 33])
def test_gradient_is_finite_where_points_coincide(cost, metric, d):
    x = jnp.concatenate([jnp.zeros((1, d)), jnp.ones((3, d))])
    value, grads = jax.value_and_grad(lambda x, y: jnp.sum(cost(x, y)), (0, 1))(x, x)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in grads)


def test_distances_far_from_the_origin_keep_their_digits():
    x, y = clouds(6, 6, 20)
    near = squared_euclidean(x, y)
    np.testing.assert_allclose(squared_euclidean(x + 1000, y + 1000), near, rtol=1e-3)
    assert (squared_euclidean(x, x) >= 0).all()


def test_narrow_inputs_accumulate_in_float32():
    x, y = (jnp.asarray(z, jnp.bfloat16) for z in clouds(6, 4, 200))
    cost = squared_euclidean(x, y)
    assert cost.dtype == jnp.float32
    expected = cdist(np.asarray(x, np.float64), np.asarray(y, np.float64), "sqeuclidean")
    np.testing.assert_allclose(cost, expected, rtol=1e-5)


def test_bad_shapes(unchecked):
    with pytest.raises(ValueError, match="events"):
        squared_euclidean(jnp.zeros((3, 2)), jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="rank 2"):
        cosine(jnp.zeros(3), jnp.zeros((3, 4)))
