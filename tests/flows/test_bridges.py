"""Bridges between Gaussians, where the drift, the pairs and what they converge to are known."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import flows

FILE = Path(__file__).parents[1] / "references" / "schroedinger_bridge_gaussian.json"
REF = json.loads(FILE.read_text())
SIGMA, M0, S0, M1, S1 = (REF["inputs"][k] for k in ("sigma", "m0", "s0", "m1", "s1"))
CROSS = REF["expected"]["cross_covariance"]
KEY = jax.random.key(0)


def moments(t, cross, sigma):
    """Mean, variance and slope of the drift of bridges between Gaussian pairs of covariance cross:
    b(x, t) = m1 - m0 + slope (x - mean)."""
    mean, gap = (1 - t) * M0 + t * M1, M1 - M0
    variance = ((1 - t) * S0) ** 2 + (t * S1) ** 2 + 2 * t * (1 - t) * cross
    variance = variance + sigma**2 * t * (1 - t)
    # Cov(x1 - x_t, x_t) / (1 - t)
    slope = (1 - t) * cross + t * S1**2 - variance
    return mean, variance, gap, slope / ((1 - t) * variance)


def drift(cross, sigma=SIGMA):
    def apply(x, t):
        mean, _, gap, slope = moments(t, cross, sigma)
        return gap + slope[:, None] * (x - mean[:, None])

    return apply


def test_closed_forms_meet_the_reference(x64):
    np.testing.assert_allclose(
        (np.sqrt(4 * S0**2 * S1**2 + SIGMA**4) - SIGMA**2) / 2, CROSS, rtol=1e-9
    )
    t = np.asarray(REF["inputs"]["t"])
    np.testing.assert_allclose(moments(t[:4], CROSS, SIGMA)[0], REF["expected"]["mean_t"][:4])
    np.testing.assert_allclose(moments(t[:4], CROSS, SIGMA)[1], REF["expected"]["variance_t"][:4])
    found = drift(CROSS)(jnp.asarray(REF["inputs"]["x"])[:, None], jnp.asarray(t[:4]))
    np.testing.assert_allclose(found[:, 0], REF["expected"]["drift"], rtol=1e-7)


def test_the_minimiser_is_the_drift_of_the_mixture(x64):
    """E [(target - b(x_t, t)) (1, x_t)] = 0 by quadrature over both ends and the noise."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    a, b, z = (g.ravel() for g in np.meshgrid(nodes, nodes, nodes))
    mass = np.einsum("i,j,k->ijk", weights, weights, weights).ravel() / (2 * np.pi) ** 1.5
    x0 = M0 + S0 * a
    x1 = M1 + CROSS / S0 * a + np.sqrt(S1**2 - (CROSS / S0) ** 2) * b
    columns = [jnp.asarray(v)[:, None] for v in (x0, x1, z)]
    for time in (0.0, 0.3, 0.9):
        t = jnp.full(len(x0), time)
        x_t, target = flows.brownian_bridge(*columns[:2], t, columns[2], sigma=SIGMA)
        np.testing.assert_allclose(target, (columns[1] - x_t) / (1 - time), atol=1e-9)
        error = np.asarray(target - drift(CROSS)(x_t, t))[:, 0]
        for moment in (1, np.asarray(x_t)[:, 0]):
            np.testing.assert_allclose(np.sum(mass * error * moment), 0, atol=1e-9)


def test_loss_is_the_residual_and_without_noise_flow_matching():
    x0, x1 = jax.random.normal(KEY, (2, 6, 3))
    t = jnp.linspace(0, 0.9, 6)
    fn = lambda x, t: jnp.sin(x + t[:, None])  # noqa: E731
    found, _ = flows.bridge_matching_loss(fn, KEY, x0, x1, sigma=0.0, t=t)
    expected, _ = flows.flow_matching_loss(fn, KEY, x0, x1, t=t)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # One pair, any noise: the drift to the known end has no loss, and its offset is its square.
    to_end = lambda x, t: (x1 - x) / (1 - t[:, None]) + 0.5  # noqa: E731
    losses, aux = flows.bridge_matching_loss(to_end, KEY, x0, x1, sigma=0.7)
    np.testing.assert_allclose(losses, 3 * 0.25, rtol=1e-2)
    assert float(aux["t"].max()) <= 0.999
    slope = jax.grad(
        lambda a: jnp.sum(flows.bridge_matching_loss(lambda x, t: a * x, KEY, x0, x1, sigma=0.7)[0])
    )(0.0)
    assert np.isfinite(slope)


@pytest.mark.slow
def test_iterated_fitting_converges_to_schroedingers_bridge():
    """From pairs of opposite sign, by the exact drift of the pairs before, both ways in turn."""
    n = 20_000

    @jax.jit
    def forward(key, cross):
        x0 = M0 + S0 * jax.random.normal(key, (n, 1))
        return flows.bridge_pairs(drift(cross), key, x0, sigma=SIGMA, num_steps=64)

    def reversed_drift(cross):
        """The same pairs from the other end: x1 at time 0."""

        def apply(x, t):
            s = 1 - t
            mean, variance, gap, slope = moments(s, cross, SIGMA)
            # b_backward = -b + sigma^2 grad log p_s.
            back = -gap - slope[:, None] * (x - mean[:, None])
            return back - SIGMA**2 * (x - mean[:, None]) / variance[:, None]

        return apply

    @jax.jit
    def backward(key, cross):
        x1 = M1 + S1 * jax.random.normal(key, (n, 1))
        # The forward slope has no value at s = 1, where the backward path starts.
        fn = reversed_drift(cross)
        inside = lambda x, t: fn(x, jnp.maximum(t, 1e-3))  # noqa: E731
        return flows.bridge_pairs(inside, key, x1, sigma=SIGMA, num_steps=64, backward=True)

    def next_cross(cross):
        """Cov(x0, x1) = s0^2 exp(integral of the slope)."""
        t = (np.arange(2000) + 0.5) / 2000
        return S0**2 * np.exp(np.mean(moments(t, cross, SIGMA)[3]))

    cross, gaps = -0.5, []
    for i in range(4):
        run = (forward, backward)[i % 2]
        pairs = run(jax.random.key(i), cross)
        table = np.cov(np.asarray(pairs.x0)[:, 0], np.asarray(pairs.x1)[:, 0])
        np.testing.assert_allclose(np.sqrt(np.diag(table)), [S0, S1], rtol=0.04)
        np.testing.assert_allclose(table[0, 1], next_cross(cross), atol=0.04)
        cross = float(table[0, 1])
        gaps.append(abs(cross - CROSS))
    assert gaps[0] > 0.1
    assert gaps[-1] < 0.04


def test_samples_depend_on_their_index_alone():
    x0 = jax.random.normal(KEY, (4, 2))
    run = jax.jit(
        lambda x, first: flows.bridge_sample(
            lambda x, t: -x, KEY, x, sigma=0.5, num_steps=3, first_index=first
        )
    )
    np.testing.assert_allclose(run(x0[2:], 2), run(x0, 0)[2:], rtol=1e-6)


def test_what_does_not_fit_is_refused_by_name(unchecked):
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="t must lie in"):
        flows.brownian_bridge(x, x, jnp.ones(2), x, sigma=1.0)
    with pytest.raises(ValueError, match="sigma must be at least 0"):
        flows.bridge_sample(lambda x, t: x, KEY, x, sigma=-1.0)
    with pytest.raises(ValueError, match="shapes must be equal"):
        flows.bridge_matching_loss(lambda x, t: x, KEY, x, x[:1], sigma=1.0)
