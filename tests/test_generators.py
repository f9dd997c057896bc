"""Generators of f-divergences in float32, near 1 and far out, against float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from genjax.divergences import F_DIVERGENCES


@pytest.mark.parametrize("name", ["gan", "jensen_shannon"])
def test_generators_keep_their_digits_in_float32(name):
    """Near 1, where Jensen-Shannon's is 0, and for ratios of any size."""
    divergence = F_DIVERGENCES[name]
    for u in (0.0, 1e-6, 0.5, 1.001, 3.0, 1e6, 1e8, 1e30):
        x = np.float64(np.float32(u))
        exact = -x * np.log1p(1 / x) - np.log1p(x) if x else 0.0
        if name == "jensen_shannon":
            exact = (exact + (1 + x) * math.log(2)) / 2
            if u == 1.001:  # its series, (u - 1)^2 / 8 (1 - (u - 1) / 2)
                exact = (x - 1) ** 2 / 8 * (1 - (x - 1) / 2)
        np.testing.assert_allclose(divergence.f(jnp.float32(u)), exact, rtol=2e-5)
        if u:
            of_log = divergence.f_of_log(jnp.log(jnp.float32(u)))
            np.testing.assert_allclose(of_log, exact, rtol=1e-4)
