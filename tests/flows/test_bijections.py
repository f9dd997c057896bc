"""Bijections against closed forms, the references and a float64 numpy flow; gradients; errors."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from genjax import flows
from tests.flows.table import dense, mlp

REFERENCES = Path(__file__).parents[1] / "references"
KEY = jax.random.key(0)


def load(name):
    return json.loads((REFERENCES / f"{name}.json").read_text())


def test_planar_equals_the_reference(compiled, x64):
    ref = load("planar_flow")
    inputs = ref["inputs"]
    for row in ref["expected"]["rows"]:
        params = {"w": jnp.asarray(inputs["w"]), "u": jnp.asarray(row["u"])}
        params["b"] = jnp.asarray(inputs["b"])
        y, log_det = compiled(flows.planar().forward)(params, jnp.asarray(inputs["z"]))
        np.testing.assert_allclose(y, row["f"], rtol=1e-9)
        np.testing.assert_allclose(log_det, row["logdet"], rtol=1e-9)


def test_radial_equals_the_reference(compiled, x64):
    ref = load("radial_flow")
    inputs = ref["inputs"]
    params = {
        "z0": jnp.asarray(inputs["z0"]),
        "alpha": jnp.asarray(inputs["alpha_raw"]),
        "beta": jnp.asarray(inputs["beta_raw"]),
    }
    y, log_det = compiled(flows.radial().forward)(params, jnp.asarray(inputs["z"]))
    np.testing.assert_allclose(y, ref["expected"]["f"], rtol=1e-9)
    np.testing.assert_allclose(log_det, ref["expected"]["logdet"], rtol=1e-9)


def test_logit_equals_the_reference(x64):
    ref = load("bits_per_dim")
    inputs = ref["inputs"]
    x = (jnp.asarray(inputs["x_int"]) + jnp.asarray(inputs["u"])) / 256
    y, log_det = flows.logit(inputs["alpha"]).forward(None, x)
    np.testing.assert_allclose(y, ref["expected"]["logit_x"], rtol=1e-11)
    np.testing.assert_allclose(log_det, ref["expected"]["logit_logdet"], rtol=1e-11)
    chained = flows.chain([flows.rescale(0, 256), flows.logit(inputs["alpha"])])
    _, both = chained.forward([None, None], 256 * x)
    np.testing.assert_allclose(both, log_det - 6 * np.log(256), rtol=1e-11)


@pytest.mark.parametrize("name", ["planar", "radial"])
def test_gradient_of_the_inverse_equals_differences(name, x64):
    """The inverse is a root: its gradient comes from the implicit function, not the search."""
    bijection = getattr(flows, name)()
    params = getattr(flows, f"{name}_init")(KEY, 3)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64) + 0.7, params)
    y = jax.random.normal(jax.random.key(1), (5, 3), jnp.float64)

    def value(params, y):
        x, log_det = bijection.inverse(params, y)
        return jnp.sum(jnp.sin(x)) + jnp.sum(log_det**2)

    check_grads(jax.jit(value), (params, y), order=1, atol=1e-6, rtol=1e-6)


def test_planar_and_radial_are_finite_at_extremes():
    def total(p, x, way):
        y, log_det = getattr(flows.planar(), way)(p, x)
        return jnp.sum(y) + jnp.sum(log_det)

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1)), static_argnums=2)
    for w, u in [(0.0, 1.0), (30.0, -30.0), (1e-3, -5.0)]:
        params = {"w": jnp.full(3, w), "u": jnp.full(3, u), "b": jnp.zeros(())}
        x = jnp.asarray([[0.0, 0, 0], [1e3, -1e3, 5], [1e-4, 0, 0]])
        for way in ("forward", "inverse"):
            value, grads = run(params, x, way)
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, grads)))
    # The centre of a radial flow, where the radius has no derivative.
    params = {"z0": jnp.ones(3), "alpha": jnp.asarray(-40.0), "beta": jnp.asarray(-40.0)}
    for way in ("forward", "inverse"):
        run = getattr(flows.radial(), way)
        grads = jax.jit(jax.grad(lambda p, x, f=run: sum(map(jnp.sum, f(p, x))), (0, 1)))(
            params, jnp.ones((2, 3))
        )
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_spline_is_the_identity_outside_and_at_zero_with_finite_gradients():
    spline = flows.rational_quadratic(6, -2.0, 2.0)
    x = jnp.asarray([-1e6, -2.0, -1.3, 0.0, 1.9, 2.0, 50.0])
    y, log_slope = spline.forward(jnp.zeros((spline.size, 7)), x)
    np.testing.assert_allclose(y, x, atol=1e-6)
    np.testing.assert_allclose(log_slope, 0, atol=1e-6)
    raw = 30 * jax.random.normal(KEY, (spline.size, 7))
    for run in (spline.forward, spline.inverse):
        out, slope = run(raw, x)
        np.testing.assert_array_equal(out[np.abs(x) >= 2], x[np.abs(x) >= 2])
        np.testing.assert_array_equal(slope[np.abs(x) >= 2], 0)
        grads = jax.jit(jax.grad(lambda r, x, f=run: sum(map(jnp.sum, f(r, x))), (0, 1)))(raw, x)
        assert all(np.all(np.isfinite(g)) for g in grads)
        np.testing.assert_array_equal(grads[1][np.abs(x) > 2], 1)


def test_a_spline_on_a_closed_interval_never_leaves_it():
    """The last float32 numbers within [0, 1], 400 splines: a uniform base has them all."""
    spline = flows.rational_quadratic(8, 0.0, 1.0)
    raw = 2 * jax.random.normal(KEY, (400, spline.size, 8))
    last = [1 - i * 2.0**-24 for i in range(4)] + [i * 2.0**-30 for i in range(4)]
    x = jnp.broadcast_to(jnp.asarray(last, jnp.float32), (400, 8))
    for run in (spline.forward, spline.inverse):
        y, log_slope = jax.jit(run)(raw, x)
        assert np.all(np.isfinite(flows.uniform((8,)).log_prob(y)))
        assert np.all(np.isfinite(log_slope))


def test_a_rescaled_interval_never_leaves_the_new_one():
    rng = np.random.default_rng(0)
    for low, width in zip(rng.normal(size=40), rng.uniform(0.1, 9, size=40), strict=True):
        ends = jnp.asarray([[low], [low + width]], jnp.float32)
        bijection = flows.rescale(float(ends[0, 0]), float(ends[1, 0]))
        y, _ = bijection.forward(None, ends)
        assert 0 <= y[0, 0] < 1e-6 < 1 - 1e-6 < y[1, 0] <= 1
        back, _ = bijection.inverse(None, jnp.asarray([[0.0], [1.0]]))
        assert ends[0, 0] <= back[0, 0] < back[1, 0] <= ends[1, 0]
    np.testing.assert_allclose(flows.rescale(0, 4).forward(None, jnp.asarray([[9.0]]))[0], 2.25)


def test_a_spline_has_its_slope_at_its_knots():
    """At a knot, where the place in the bin is 0, the derivative is the slope, not half of it."""
    spline = flows.rational_quadratic(4, -2.0, 2.0)
    raw = jnp.zeros((spline.size, 5)).at[8:].set(jnp.asarray([-1.0, 0.5, 2.0])[:, None])
    x = jnp.asarray([-2.0, -1.0, 0.0, 1.0, 2.0])
    for run in (spline.forward, spline.inverse):
        _, log_slope = run(raw, x)
        slope = jax.grad(lambda x, f=run: jnp.sum(f(raw, x)[0]))(x)
        np.testing.assert_allclose(slope, np.exp(log_slope), rtol=1e-5)


def test_scales_are_kept_or_refused():
    """Up to e^10 either way they are exact; beyond, an error, or NaN where traced."""
    weight = np.diag([2e-4, 1, 2.1e4]) @ flows.random_rotation(0, 3)
    order, params = flows.plu_init(weight)
    got = flows.plu(order).forward(params, jnp.eye(3))[0].T
    np.testing.assert_allclose(got, weight, rtol=2e-4, atol=1e-8)
    for scale in (1e-5, -3e4):
        with pytest.raises(ValueError, match="pivots of weight must lie in"):
            flows.plu_init(np.diag([1, scale, 1]))
    x = jax.random.normal(KEY, (500, 3)) * jnp.asarray([1e-4, 1.0, 2e4])[None]
    y, _ = flows.actnorm().forward(flows.actnorm_init(x), x)
    np.testing.assert_allclose(jnp.std(y, axis=0), 1, rtol=1e-4)
    for scale in (1e-6, 1e6):
        with pytest.raises(ValueError, match="standard deviations of x must lie in"):
            flows.actnorm_init(scale * x[:, 1:2])
        traced = jax.jit(flows.actnorm_init)(scale * x[:, 1:2])
        assert np.isnan(traced["log_scale"][0])
    single = flows.actnorm_init(jnp.ones((1, 3)))
    np.testing.assert_array_equal(single["log_scale"], 0)
    with pytest.raises(ValueError, match="at least one example"):
        flows.actnorm_init(jnp.ones((0, 3)))


def numpy_spline(raw, x, bins, low, high, least=1e-3):
    """Durkan et al. (2019), eqs (4) and (5), written out for one number in float64."""
    span = high - low

    def ends(v):
        e = np.exp(v - v.max())
        return low + span * np.concatenate(
            [[0], np.cumsum(least + (1 - least * bins) * e / e.sum())]
        )

    xs, ys = ends(raw[:bins]), ends(raw[bins : 2 * bins])
    shift = np.log(np.expm1(1 - least))
    slopes = np.concatenate([[1], least + np.log1p(np.exp(raw[2 * bins :] + shift)), [1]])
    k = int(np.searchsorted(xs, x) - 1)
    s = (ys[k + 1] - ys[k]) / (xs[k + 1] - xs[k])
    z = (x - xs[k]) / (xs[k + 1] - xs[k])
    below = s + (slopes[k + 1] + slopes[k] - 2 * s) * z * (1 - z)
    y = ys[k] + (ys[k + 1] - ys[k]) * (s * z**2 + slopes[k] * z * (1 - z)) / below
    top = slopes[k + 1] * z**2 + 2 * s * z * (1 - z) + slopes[k] * (1 - z) ** 2
    return y, np.log(s**2 * top / below**2)


def test_spline_equals_the_formula(compiled, x64):
    spline = flows.rational_quadratic(5, -3.0, 3.0)
    rng = np.random.default_rng(0)
    raw, x = rng.normal(size=(spline.size, 9)), rng.uniform(-3, 3, size=9)
    expected = [numpy_spline(raw[:, i], x[i], 5, -3.0, 3.0) for i in range(9)]
    y, log_slope = compiled(spline.forward)(jnp.asarray(raw), jnp.asarray(x))
    np.testing.assert_allclose(y, [e[0] for e in expected], rtol=1e-10)
    np.testing.assert_allclose(log_slope, [e[1] for e in expected], atol=1e-10)


def test_actnorm_initialisation_whitens_each_channel_and_survives_a_constant_one():
    x = 3 * jax.random.normal(KEY, (64, 4, 4, 3)) + 5
    x = x.at[..., 2].set(7.0)
    params = flows.actnorm_init(x)
    y, log_det = flows.actnorm().forward(params, x)
    np.testing.assert_allclose(jnp.mean(y, axis=(0, 1, 2)), 0, atol=1e-2)
    np.testing.assert_allclose(jnp.std(y, axis=(0, 1, 2))[:2], 1, atol=1e-3)
    assert np.all(np.isfinite(log_det))
    # Scales stay bounded whatever the optimiser does to the raw numbers.
    wild = params | {"log_scale": jnp.full(3, 1e4)}
    assert np.all(np.isfinite(flows.actnorm().forward(wild, x)[0]))


def test_plu_starts_as_the_matrix_and_its_signs_stay_fixed():
    weight = flows.random_rotation(0, 5)
    order, params = flows.plu_init(weight)
    x = jax.random.normal(KEY, (2, 3, 3, 5))
    y, log_det = flows.plu(order).forward(params, x)
    np.testing.assert_allclose(y, x @ jnp.asarray(weight.T, jnp.float32), atol=1e-5)
    np.testing.assert_allclose(log_det, 0, atol=1e-4)
    run = flows.plu(order).forward
    grads = jax.jit(jax.grad(lambda p: jnp.sum(run(p, x)[0] ** 2)))(params)
    np.testing.assert_array_equal(grads["sign"], 0)
    assert np.all(np.triu(grads["lower"]) == 0)


def test_squeeze_keeps_each_patch_together():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    y, _ = flows.squeeze().forward(None, x)
    np.testing.assert_array_equal(y[0, 0, 0], [0, 1, 4, 5])
    np.testing.assert_array_equal(y[0, 1, 1], [10, 11, 14, 15])


def test_bad_input_is_named(unchecked):
    x = jnp.zeros((2, 3))
    wide, tall = jnp.zeros((1, 2, 2, 6)), jnp.zeros((1, 3, 4, 1))
    two, planar = [flows.planar()] * 2, flows.planar_init(KEY, 3)
    cases = [
        (ValueError, "even last axis", lambda: flows.coupling(mlp, flows.affine()).forward({}, x)),
        (
            ValueError,
            "even last axis",
            lambda: flows.alternating_couplings([mlp], flows.affine()).forward([{}], x),
        ),
        (
            TypeError,
            "sequence of 1 parameter trees, got 2",
            lambda: flows.alternating_couplings([mlp], flows.affine()).forward([{}, {}], x),
        ),
        (ValueError, "even last axis", lambda: flows.split().forward(None, x)),
        (
            ValueError,
            "multiples of 2",
            lambda: flows.squeeze().forward(None, tall),
        ),
        (ValueError, "multiples of 2", lambda: flows.squeeze().forward(None, x)),
        (
            ValueError,
            "multiple of 4",
            lambda: flows.squeeze().inverse(None, wide),
        ),
        (TypeError, "keys", lambda: flows.planar().forward({"w": x[0]}, x)),
        (TypeError, "keys", lambda: flows.radial().forward([x], x)),
        (ValueError, "params\\['w'\\]", lambda: flows.planar().forward(planar, jnp.zeros((2, 4)))),
        (ValueError, "no inverse", lambda: flows.planar(constrained=False).inverse(planar, x)),
        (ValueError, "singular", lambda: flows.plu_init(np.zeros((2, 2)))),
        (ValueError, "square", lambda: flows.plu_init(np.zeros((2, 3)))),
        (ValueError, "once", lambda: flows.permutation([0, 0, 1])),
        (ValueError, "2 long", lambda: flows.permutation([1, 0]).forward(None, x)),
        (
            TypeError,
            "2 parameter trees",
            lambda: flows.chain(two).forward([{}], x),
        ),
        (
            TypeError,
            "2 arrays",
            lambda: flows.multi_scale(two).inverse([{}, {}], x),
        ),
        (ValueError, "leading axis", lambda: flows.repeat(flows.planar()).forward(planar, x)),
        (ValueError, "alpha", lambda: flows.logit(0.5)),
        (ValueError, "high - low", lambda: flows.rational_quadratic(4, 1.0, 1.0)),
        (ValueError, "min_bin", lambda: flows.rational_quadratic(4, min_bin=0.25)),
        (ValueError, "keep some", lambda: flows.masked_coupling(mlp, flows.affine(), np.ones(2))),
        (
            ValueError,
            "rank",
            lambda: flows.masked_autoregressive(mlp, flows.affine()).inverse({}, x[0]),
        ),
        (
            ValueError,
            "must return shape",
            lambda: flows.coupling(lambda _, a: a[:, :1], flows.affine()).forward(None, x[:, :2]),
        ),
    ]
    for error, match, call in cases:
        with pytest.raises(error, match=match):
            call()
    # The same errors come while tracing, before anything runs.
    with pytest.raises(ValueError, match="even last axis"):
        jax.eval_shape(lambda x: flows.split().forward(None, x), x)


def numpy_realnvp(weights, x):
    """log p(x) of affine couplings that alternate halves: Dinh et al. (2017), eqs (4) to (8)."""
    log_det = np.zeros(len(x))
    half = x.shape[1] // 2
    for i, layers in enumerate(weights):
        a, b = (x[:, half:], x[:, :half]) if i % 2 else (x[:, :half], x[:, half:])
        h = a
        for j, (w, c) in enumerate(layers):
            h = h @ w + c
            h = np.tanh(h) if j < len(layers) - 1 else h
        s, t = 2 * np.tanh(h[:, :half] / 2), h[:, half:]
        b = b * np.exp(s) + t
        log_det += s.sum(1)
        x = np.concatenate([b, a] if i % 2 else [a, b], axis=1)
    return log_det - 0.5 * (x**2).sum(1) - x.shape[1] / 2 * np.log(2 * np.pi)


@pytest.mark.parametrize("chained", [True, False])
def test_realnvp_log_prob_equals_float64_numpy(compiled, chained):
    keys = jax.random.split(KEY, 9)
    weights = [dense(k, (3, 16, 6)) for k in keys[:8]]
    parts = [flows.coupling(mlp, flows.affine(), swap=bool(i % 2)) for i in range(8)]
    x = jax.random.normal(keys[8], (20, 6))
    whole = (
        flows.chain(parts) if chained else flows.alternating_couplings([mlp] * 8, flows.affine())
    )
    run = compiled(lambda w, x: flows.log_prob(whole, flows.normal((6,)), w, x))
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (weights, x))
    np.testing.assert_allclose(run(weights, x), numpy_realnvp(*exact), rtol=1e-5)
