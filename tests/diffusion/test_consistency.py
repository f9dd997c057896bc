"""Consistency models: recorded losses, and the exact map of Gaussian data in both clocks."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import diffusion as gd

FILE = Path(__file__).parents[1] / "references" / "consistency_training.json"
REF = json.loads(FILE.read_text())
GIVEN, EXPECTED = REF["inputs"], REF["expected"]
GRID = {name: GIVEN[name] for name in ("sigma_min", "sigma_max", "rho")}
KEY = jax.random.key(0)
MEAN, STD = 0.3, 0.7  # Gaussian data
DATA = 0.5  # TrigFlow's sigma_data


def test_losses_and_gradients_meet_the_reference(compiled, x64):
    x, z, w1, b, w2 = (jnp.asarray(GIVEN[k]) for k in ("x", "z", "W1", "b", "W2"))

    def f(w2):
        def network(x, noise):
            return jnp.tanh(jnp.concatenate([x, noise[:, None]], axis=1) @ w1 + b[None]) @ w2

        options = {"sigma_data": GIVEN["sigma_data"], "sigma_min": GIVEN["sigma_min"]}
        return gd.consistency_function(network, **options)

    def loss(w2):
        losses, aux = gd.consistency_loss(
            f(w2), KEY, x, num_levels=GIVEN["levels"], index=jnp.asarray(GIVEN["index"]),
            noise=z, **GRID,
        )  # fmt: skip
        return jnp.mean(losses), (losses, aux["sigma"])

    gradient, (losses, sigma) = compiled(jax.grad(loss, has_aux=True))(w2)
    np.testing.assert_allclose(losses, EXPECTED["losses"], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(gradient, EXPECTED["grad_W2"], rtol=1e-8, atol=1e-10)
    sigmas = gd.consistency_levels(jnp.arange(GIVEN["levels"]), GIVEN["levels"], **GRID)
    np.testing.assert_allclose(sigmas, EXPECTED["sigmas"], rtol=1e-10)
    np.testing.assert_allclose(sigma, sigmas[jnp.asarray(GIVEN["index"]) + 1], rtol=1e-10)
    student = f(w2)(x + sigma[:, None] * z, sigma)
    np.testing.assert_allclose(student, EXPECTED["student"], rtol=1e-8)
    np.testing.assert_allclose(f(w2)(x, jnp.full(len(x), GIVEN["sigma_min"])), x, rtol=1e-12)
    shares = gd.level_probabilities(sigmas)
    np.testing.assert_allclose(shares, EXPECTED["level_probabilities"], rtol=1e-8)


def exact(x, sigma):
    """x_min = m + (x - m) sqrt((s_d^2 + s_min^2) / (s_d^2 + s^2)) for data N(m, s_d^2)."""
    ratio = jnp.sqrt((STD**2 + 0.002**2) / (STD**2 + sigma**2))
    return MEAN + ratio[:, None] * (x - MEAN)


def posterior_mean(x, sigma):
    weight = STD**2 / (STD**2 + sigma**2)
    return MEAN + weight[:, None] * (x - MEAN)


def test_distillation_at_the_exact_map_is_the_error_of_a_heun_step(x64):
    """Third order in the level: a step half as long has an eighth of the distance."""
    x = MEAN + STD * jax.random.normal(KEY, (8, 2))

    @jax.jit
    def run(num, index):
        options = {"index": jnp.full(8, index), "denoiser": posterior_mean}
        return gd.consistency_loss(exact, KEY, x, num_levels=num, **options)[1]

    coarse, fine = (run(40 * n + 1, 30 * n) for n in (1, 2))
    root = [np.sqrt(aux["distance_squared"].mean()) for aux in (coarse, fine)]
    assert 5 < root[0] / root[1] < 14
    assert root[0] < 0.01


def test_samples_of_the_exact_map_are_the_data(x64):
    for sigmas in ((80.0,), (80.0, 2.0, 0.5)):
        run = jax.jit(lambda k, s=sigmas: gd.consistency_sample(exact, k, (20_000, 1), sigmas=s))
        x = np.asarray(run(KEY))
        np.testing.assert_allclose([x.mean(), x.std()], [MEAN, STD], atol=0.02)


def test_the_drawn_levels_have_their_shares():
    """Also where their number is traced; and the curriculum of numbers by hand."""
    x = jnp.zeros((20_000, 1))

    @jax.jit
    def run(num):
        return gd.consistency_loss(lambda x, s: x, KEY, x, num_levels=num)[1]["sigma"]

    sigmas = np.asarray(gd.consistency_levels(jnp.arange(11), 11))
    share = [np.mean(np.isclose(run(jnp.asarray(11)), s, rtol=1e-4)) for s in sigmas[1:]]
    np.testing.assert_allclose(share, gd.level_probabilities(jnp.asarray(sigmas)), atol=0.015)
    np.testing.assert_allclose(share, EXPECTED["level_probabilities"], atol=0.015)
    numbers = [int(gd.num_levels_at(k, 800)) for k in (0, 99, 100, 350, 700, 799, 5000)]
    assert numbers == [11, 11, 21, 81, 1281, 1281, 1281]
    # 200 / 10 is no power of two: K' = floor(1000 / (log2 20 + 1)) = 187, and the end is reached.
    numbers = [int(gd.num_levels_at(k, 1000, last=200)) for k in (0, 186, 187, 600, 935, 999)]
    assert numbers == [11, 11, 21, 81, 201, 201]


def spread(t):
    return jnp.sqrt(jnp.cos(t) ** 2 * STD**2 + jnp.sin(t) ** 2 * DATA**2)


def trig_exact(x, t):
    """F of the exact map: f = m + (s / a_t) (x - cos(t) m), F = (cos(t) x - f) / (sin(t) s_d)."""
    x, t = DATA * x, t[:, None]
    end = MEAN + STD / spread(t) * (x - jnp.cos(t) * MEAN)
    return (jnp.cos(t) * x - end) / (jnp.sin(t) * DATA)


def trig_velocity(x, t):
    t = t[:, None]
    slope = jnp.cos(t) * jnp.sin(t) * (DATA**2 - STD**2) / spread(t) ** 2
    return -jnp.sin(t) * MEAN + slope * (x - jnp.cos(t) * MEAN)


def test_the_tangent_vanishes_at_the_exact_map(x64):
    x = MEAN + STD * jax.random.normal(KEY, (16, 2))

    @jax.jit
    def run(scale):
        network = lambda x, t: scale * trig_exact(x, t)  # noqa: E731
        options = {"sigma_data": DATA, "velocity_fn": trig_velocity}
        return gd.trig_consistency_loss(network, KEY, x, **options)

    losses, aux = run(1.0)
    np.testing.assert_allclose(losses, 0, atol=1e-18)
    np.testing.assert_allclose(aux["tangent_norm"], 0, atol=1e-9)
    assert (run(1.2)[1]["tangent_norm"] > 1e-3).all()
    levels = jnp.log(DATA * jnp.tan(aux["t"]))
    assert abs(float(levels.mean()) + 1) < 1.5
    end = gd.trig_function(trig_exact, sigma_data=DATA)(DATA * x, jnp.full(16, np.pi / 2))
    np.testing.assert_allclose(end, MEAN + STD * x, rtol=1e-9)


def test_the_trained_gradient_is_minus_twice_the_tangent_along_the_network(x64):
    """With the derivative along the path by finite differences."""
    x = jax.random.normal(KEY, (3, 2))
    t, h = jnp.asarray([0.3, 0.8, 1.4]), 1e-5
    network = lambda a: lambda x, t: a * jnp.sin(x + t[:, None])  # noqa: E731

    def loss(a, warmup=0.7):
        return gd.trig_consistency_loss(
            network(a), KEY, x, sigma_data=DATA, t=t, warmup=warmup, velocity_fn=trig_velocity
        )[0]

    z = DATA * jax.random.normal(jax.random.split(KEY)[1], x.shape, x.dtype)
    cos, sin = jnp.cos(t)[:, None], jnp.sin(t)[:, None]
    x_t = cos * x + sin * z
    v = trig_velocity(x_t, t)
    ahead, behind = (network(1.0)((x_t + s * v) / DATA, t + s) for s in (h, -h))
    tangent = -(cos**2) * (DATA * network(1.0)(x_t / DATA, t) - v)
    tangent = tangent - 0.7 * cos * sin * (x_t + DATA * (ahead - behind) / (2 * h))
    g = tangent / (np.linalg.norm(tangent, axis=1, keepdims=True) + 0.1)
    np.testing.assert_allclose(loss(1.0), np.sum(g**2, 1), rtol=1e-7)
    expected = -2 * np.sum(g * network(1.0)(x_t / DATA, t), 1)
    np.testing.assert_allclose(jax.jacrev(loss)(1.0), expected, rtol=1e-7)


def test_what_does_not_fit_is_refused_by_name(unchecked):
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="num_levels must be at least 2"):
        gd.consistency_loss(exact, KEY, x, num_levels=1)
    with pytest.raises(ValueError, match="index must lie in"):
        gd.consistency_loss(exact, KEY, x, num_levels=3, index=jnp.asarray([0, 2]))
    with pytest.raises(ValueError, match=r"sigmas must fall and stay above 0\.002"):
        gd.consistency_sample(exact, KEY, (2, 3), sigmas=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"network returns must have shape \(2, 3\)"):
        gd.consistency_function(lambda x, s: x[:, :1])(x, jnp.ones(2))
