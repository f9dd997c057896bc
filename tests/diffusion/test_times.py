"""The times at which a loss is taken: their laws, and how spread ones lower the variance."""

import jax
import numpy as np

from genjax import diffusion as gd

VP = gd.VariancePreserving()


def test_logit_normal_times(key):
    """log(t / (1 - t)) is normal; for the straight path these are EDM's times."""
    process = gd.RectifiedFlow(t_min=1e-6, t_max=1 - 1e-6)
    narrow = gd.logit_normal_times(gd.RectifiedFlow(t_min=0.3, t_max=0.6), std=5.0)

    @jax.jit
    def draw(key):
        options = [{"mean": 0.4, "std": 0.8, "spread": spread} for spread in (True, False)]
        logit = [gd.logit_normal_times(process, **o)(key, 20_000) for o in options]
        return logit, [gd.edm_times(process, **o)(key, 20_000) for o in options], narrow(key, 100)

    logit_normal, edm, narrow = jax.device_get(draw(key))
    for spread, t, of_edm in zip((True, False), logit_normal, edm, strict=True):
        logit = np.log(t) - np.log1p(-t)
        atol = 1e-3 if spread else 0.02
        found = np.quantile(logit, [0.16, 0.5, 0.84])
        np.testing.assert_allclose(found, 0.4 + 0.8 * np.array([-0.9945, 0, 0.9945]), atol=atol)
        np.testing.assert_allclose(t, of_edm, rtol=2e-5)
    assert narrow.min() >= np.float32(0.3)
    assert narrow.max() <= np.float32(0.6)


def test_times(key):

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, 4000)
        first = jax.vmap(lambda k: gd.low_discrepancy(k, 4)[1])(keys)
        times = gd.uniform_times(gd.EDM())(key, 50), gd.discrete_times(8)(key, 8)
        return gd.low_discrepancy(key, 10), first, *times

    u, first, t, steps = jax.device_get(draw(key))
    np.testing.assert_allclose(np.diff(np.sort(u)), 0.1, atol=1e-6)
    assert u.min() >= 0
    assert u.max() < 1
    np.testing.assert_allclose(np.quantile(first, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)
    assert t.min() >= 0.002
    assert t.max() <= 80
    np.testing.assert_allclose(t.mean(), 40, rtol=0.03)
    np.testing.assert_allclose(np.sort(steps), np.arange(1, 9) / 8, atol=1e-6)


def test_spread_times_lower_the_variance(key):
    """Mean of 32 uniform times: standard deviation 1 / (32 sqrt 12) against 1 / sqrt(32 * 12)."""

    @jax.jit
    def deviations(key):
        keys = jax.random.split(key, 2000)
        return [
            jax.vmap(lambda k, f=f: f(k, 32).mean())(keys).std()
            for f in (gd.uniform_times(VP), gd.uniform_times(VP, spread=False))
        ]

    spread, free = deviations(key)
    np.testing.assert_allclose(spread, 1 / (32 * np.sqrt(12)), rtol=0.05)
    np.testing.assert_allclose(free, 1 / np.sqrt(12 * 32), rtol=0.05)
