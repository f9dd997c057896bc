"""Laws that every bijection obeys, over one table of constructors."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import simpson
from scipy.stats import norm

from genjax import flows
from tests.flows.table import TABLE, causal, causal_params, dense, entry, field, mlp

KEY = jax.random.key(3)


def flat(tree):
    """An event, or a list of parts of it, as one vector per example."""
    parts = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(parts, axis=1)


def everything(bijection):
    """One function that computes all that the laws compare, so that each entry compiles once."""

    def run(params, x):
        y, log_det = bijection.forward(params, x)
        back, log_det_back = bijection.inverse(params, y)

        def one(event):
            return flat(bijection.forward(params, event[None])[0])[0]

        jacobian = jax.vmap(jax.jacfwd(one))(x).reshape(x.shape[0], flat(y).shape[1], -1)
        return y, log_det, back, log_det_back, jnp.linalg.slogdet(jacobian)[1]

    return run


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TABLE)
def test_bijection_laws(name, dtype):
    bijection, *rest = entry(name)
    with jax.enable_x64(dtype == "float64"):
        params, x = jax.tree.map(lambda a: np.asarray(a, dtype), tuple(rest))
        run = jax.jit(everything(bijection))
        y, log_det, back, log_det_back, expected = run(params, x)
        tight = 2e-5 if dtype == "float32" else 1e-11
        # A continuous flow is the solution of its steps only to the order of the solver.
        solver = 2e-5 if name == "continuous" else 0
        assert log_det.shape == (4,)
        assert log_det.dtype == dtype
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(y))
        np.testing.assert_allclose(back, x, atol=max(tight, solver), rtol=tight)
        np.testing.assert_allclose(log_det, expected, atol=max(5 * tight, solver))
        np.testing.assert_allclose(log_det + log_det_back, 0, atol=max(5 * tight, solver))
        if dtype == "float32" and name != "logit":
            # Far out, +-6 sigma: the round trip holds to 1e-4 in float32.
            scale = np.linspace(0.5, 1, 4, dtype=dtype).reshape((4,) + (1,) * (x.ndim - 1))
            far = 6 * np.sign(x) * scale
            np.testing.assert_allclose(run(params, far)[2], far, atol=1e-4)


def compare_with_eager(bijection, params, x, y, log_det, back, tight):
    """The same numbers without a compiler: nothing depends on being traced."""
    eager, eager_log_det = bijection.forward(params, x)
    np.testing.assert_allclose(flat(eager), flat(y), atol=tight, rtol=tight)
    np.testing.assert_allclose(eager_log_det, log_det, atol=tight, rtol=tight)
    eager_back = bijection.inverse(params, eager)[0]
    np.testing.assert_allclose(eager_back, back, atol=5 * tight, rtol=tight)


@pytest.mark.parametrize("name", TABLE)
def test_float32_stays_float32_under_64_bits(name):
    bijection, params, x = entry(name)
    params, x = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (params, x))
    with jax.enable_x64(True):
        y, log_det = jax.eval_shape(bijection.forward, params, x)
        back = jax.eval_shape(bijection.inverse, params, y)
        assert {leaf.dtype for leaf in jax.tree.leaves((y, log_det, back))} == {np.dtype("float32")}


def test_debug_nans_raises_nowhere_at_the_centre_of_a_radial_flow():
    params = {"z0": jnp.ones(2), "alpha": jnp.ones(()), "beta": jnp.ones(())}
    with jax.debug_nans(True):
        for run in flows.radial():
            jax.jit(jax.grad(lambda x, f=run: sum(map(jnp.sum, f(params, x)))))(jnp.ones((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tight"), [("float32", 2e-5), ("float64", 1e-11)])
@pytest.mark.parametrize("name", TABLE)
def test_bijection_laws_eager(name, dtype, tight):
    with jax.enable_x64(dtype == "float64"):
        bijection, *rest = entry(name)
        params, x = jax.tree.map(lambda a: jnp.asarray(a, dtype), tuple(rest))
        y, log_det, back = jax.jit(everything(bijection))(params, x)[:3]
        compare_with_eager(bijection, params, x, y, log_det, back, tight)


def test_logit_round_trip_from_six_sigma_on_the_line():
    bijection = flows.logit()
    y = np.linspace(-6, 6, 9, dtype=np.float32)[:, None]
    run = jax.jit(lambda y: bijection.forward(None, bijection.inverse(None, y)[0])[0])
    np.testing.assert_allclose(run(y), y, atol=1e-4)


def _densities(d):
    """Flows with events [d] whose densities are integrated; data to base."""
    keys = jax.random.split(KEY, 8)
    stack = jax.vmap(lambda k: flows.planar_init(k, d, scale=1.0))(jax.random.split(keys[0], 3))
    yield "planar", flows.planar(), flows.planar_init(keys[1], d, scale=1.0)
    yield "inverted planar stack", flows.invert(flows.repeat(flows.planar())), stack
    yield "radial", flows.radial(), flows.radial_init(keys[2], d) | {"beta": jnp.asarray(2.0)}
    spline = flows.rational_quadratic(5, -3.0, 3.0)
    parts = [
        flows.masked_autoregressive(causal, spline),
        flows.permutation(range(d)[::-1]),
        flows.masked_autoregressive(causal, flows.affine(1.0)),
    ]
    trees = [causal_params(keys[3], spline.size, d), None, causal_params(keys[4], 2, d)]
    # Milder than in the table, so that the grid resolves every ridge.
    trees = jax.tree.map(lambda leaf: 0.3 * leaf, trees)
    yield "autoregressive", flows.chain(parts), trees
    yield "continuous", flows.continuous_flow(field, num_steps=12), dense(keys[5], (d + 1, 8, d))
    scale = {"shift": jnp.full(d, 0.3), "log_scale": jnp.full(d, 0.4)}
    yield "actnorm", flows.actnorm(), scale
    if d == 2:
        affine = flows.affine(1.0)
        pair = [flows.coupling(mlp, affine), flows.coupling(mlp, spline, swap=True)]
        weights = [dense(keys[6], (1, 8, 2)), dense(keys[7], (1, 8, spline.size))]
        yield "coupling", flows.chain(pair), weights


@pytest.mark.parametrize("d", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_densities_integrate_to_one(d, x64):
    for name, bijection, params in _densities(d):
        axis = np.linspace(-12, 12, 2001 if d == 1 else 241)
        grid = np.stack(np.meshgrid(*[axis] * d, indexing="ij"), -1).reshape(-1, d)
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        density = jax.jit(lambda p, x, b=bijection: flows.log_prob(b, flows.normal((d,)), p, x))
        values = np.exp(np.asarray(density(params, grid))).reshape((len(axis),) * d)
        for _ in range(d):
            values = simpson(values, x=axis)
        assert abs(values - 1) < 1e-3, f"{name} in {d} dimensions integrates to {values}"


def test_unit_interval_densities_integrate_to_one(x64):
    x = np.linspace(0, 1, 4001)[:, None]
    density = jax.jit(lambda x: flows.log_prob(flows.logit(), flows.normal((1,)), None, x))
    values = np.exp(np.asarray(density(x)))
    # The logit map stops at logit(alpha): the mass between the two ends is what is left.
    end = np.log(0.95 / 0.05)
    assert abs(simpson(values, x=x[:, 0]) - (norm.cdf(end) - norm.cdf(-end))) < 1e-6
