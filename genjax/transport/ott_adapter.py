"""For those who hold an ott-jax geometry: solve its problem here."""

from typing import Any

from jaxtyping import Array, Float

from genjax import checks
from genjax.transport.sinkhorn import SinkhornResult, sinkhorn, sinkhorn_from_cost


def sinkhorn_from_ott(
    geometry: Any,
    *,
    a: Float[Array, " n"] | None = None,
    b: Float[Array, " m"] | None = None,
    **options: Any,
) -> SinkhornResult:
    """Solve for an `ott.geometry.geometry.Geometry`, at the geometry's epsilon.

    A squared Euclidean point cloud keeps its points; any other geometry gives its cost matrix. The
    options are those of `sinkhorn`. Potentials differ from ott's by the weights: ott's f is
    f + epsilon log a, its g is g + epsilon log b. Raises TypeError for anything else.

    >>> from ott.geometry.pointcloud import PointCloud
    >>> x = jax.random.normal(jax.random.key(0), (16, 2))
    >>> bool(sinkhorn_from_ott(PointCloud(x, x + 1, epsilon=0.1)).converged)
    True
    """
    with checks.extra("ott", "sinkhorn_from_ott"):
        from ott.geometry import costs as ott_costs
        from ott.geometry import geometry as ott_geometry
        from ott.geometry import pointcloud

    if not isinstance(geometry, ott_geometry.Geometry):
        raise TypeError(f"geometry must be an ott Geometry, got {type(geometry).__name__}")
    if isinstance(geometry, pointcloud.PointCloud):
        scale = geometry.inv_scale_cost
        squared = type(geometry.cost_fn) is ott_costs.SqEuclidean
        if squared and isinstance(scale, int | float) and scale == 1:
            x, y = geometry.x, geometry.y
            return sinkhorn(x, y, epsilon=geometry.epsilon, a=a, b=b, **options)
    cost: Any = geometry.cost_matrix
    return sinkhorn_from_cost(cost, epsilon=geometry.epsilon, a=a, b=b, **options)
