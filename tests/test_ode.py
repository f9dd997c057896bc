"""Solvers against closed forms, both gradients, traces against Jacobians."""

import builtins

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax.test_util import check_grads

from genjax import ode

MATRIX = np.asarray([[0.3, -0.8], [0.4, -0.6]])
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}


def linear(args, y, t):
    """A tree of two: position, and the integral of t |x|."""
    return {"x": y["x"] @ args.T, "area": t * jnp.sum(y["x"], axis=1)}


def start(dtype=jnp.float32):
    return {"x": jnp.asarray([[1.0, 2.0], [-0.5, 0.3]], dtype), "area": jnp.zeros(2, dtype)}


def exact(start):
    """x(t) = e^{tA} x; int_0^1 t 1.x(t) dt by a fine Gauss-Legendre rule."""
    nodes, weights = np.polynomial.legendre.leggauss(20)
    nodes, weights = (nodes + 1) / 2, weights / 2
    x = np.asarray(start["x"], np.float64)
    path = [x @ scipy.linalg.expm(t * MATRIX).T for t in nodes]
    area = sum(w * t * p.sum(1) for w, t, p in zip(weights, nodes, path, strict=True))
    return {"x": x @ scipy.linalg.expm(MATRIX).T, "area": area}


def test_a_tree_meets_its_closed_form(compiled):
    for options in ({}, {"gradient": "adjoint"}, {"recompute": True}, {"method": "tsit5"}):
        run = compiled(lambda y, o=options: ode.solve(linear, jnp.asarray(MATRIX), y, (0, 1), **o))
        got, want = run(start()), exact(start())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), got, want)
        assert got["x"].dtype == jnp.float32


@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_methods_converge_at_their_order_and_run_backwards(method, order, x64):
    def ends(num_steps):
        y = start(jnp.float64)
        options = {"num_steps": num_steps, "method": method}
        there = ode.solve(linear, jnp.asarray(MATRIX), y, (0.0, 1.0), **options)
        back = ode.solve(linear, jnp.asarray(MATRIX), there, (1.0, 0.0), **options)
        return there, back

    errors = []
    for num_steps in (10, 20):
        there, back = jax.jit(ends, static_argnums=0)(num_steps)
        pairs = [(there, exact(start())), (back, start(jnp.float64))]
        errors.append([max(float(jnp.max(jnp.abs(a[k] - b[k]))) for k in a) for a, b in pairs])
    assert np.log2(errors[0][0] / errors[1][0]) == pytest.approx(order, abs=0.35)
    assert errors[1][1] < errors[0][1]


def test_gradients_with_respect_to_arguments_start_and_what_is_closed_over(x64):
    """Backpropagation meets differences; the adjoint meets it to the solver's order."""

    def loss(args, y, bend, options):
        def field(args, y, t):
            rates = linear(args, y, t)
            return {**rates, "x": rates["x"] - bend * y["x"] ** 3}

        end = ode.solve(field, args, y, (0.0, 0.7), num_steps=16, **options)
        return jnp.sum(jnp.sin(end["x"])) + jnp.sum(end["area"] ** 2)

    given = (jnp.asarray(MATRIX), start(jnp.float64), jnp.asarray(0.2))
    check_grads(jax.jit(lambda *g: loss(*g, {})), given, 1, modes=["rev"], atol=1e-6, rtol=1e-6)
    want = jax.jit(jax.grad(lambda *g: loss(*g, {}), (0, 1, 2)))(*given)
    for options in ({"gradient": "adjoint"}, {"recompute": True}):
        got = jax.jit(jax.grad(lambda *g, o=options: loss(*g, o), (0, 1, 2)))(*given)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize("method", ["rk4", pytest.param("dopri5", marks=pytest.mark.slow)])
def test_the_adjoint_of_a_field_over_labels_keys_and_traced_context(method):
    """Integers among the arguments and in what is closed over; jit in grad, and grad in jit."""
    key, y = jax.random.key(3), jnp.asarray([[0.4, -0.2], [1.0, 0.3], [0.1, 0.9]])

    def loss(args, bend, label, gradient):
        def field(args, y, t):
            noise = jax.random.normal(args["key"], y.shape)
            rate = args["table"][label] * args["power"] - jax.nn.relu(y) * bend
            return jnp.tanh(rate * y) + 0.1 * t * noise

        return jnp.sum(jnp.sin(ode.solve(field, args, y, (0, 1), method=method, gradient=gradient)))

    def both(table, bend, label, gradient):
        args = lambda table: {"key": key, "power": jnp.asarray(2), "table": table}  # noqa: E731
        return jax.grad(lambda v, b: loss(args(v), b, label, gradient), (0, 1))(table, bend)

    given = jnp.asarray([[0.3, -0.5], [0.8, 0.1]]), jnp.asarray(0.7), jnp.asarray([1, 0, 1])
    run = jax.jit(both, static_argnums=3)
    want = run(*given, "backprop")
    outer = jax.jit(
        lambda v, b, label: loss({"key": key, "power": 2, "table": v}, b, label, "adjoint")
    )
    for got in (run(*given, "adjoint"), jax.grad(outer, (0, 1))(*given)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), got, want)


def test_narrow_states_move_and_integers_are_refused(unchecked):
    """dy/dt = 1 from 256 in 100 steps: each is a thousandth of what bfloat16 can tell there."""
    one = lambda _, y, t: jnp.ones_like(y)  # noqa: E731
    for method in ("euler", "dopri5"):
        end = ode.solve(
            one, None, jnp.full(2, 256, jnp.bfloat16), (0, 1), num_steps=100, method=method
        )
        assert end.dtype == jnp.float32
        np.testing.assert_allclose(end, 257, rtol=1e-5)
    # The integral of the adjoint, too: 100 steps of 1/100 each around 256.
    scale = jax.grad(
        lambda s: ode.solve(lambda s, y, t: 256 * s * jnp.ones_like(y), s, jnp.zeros(()), (0, 1),
                            num_steps=1000, gradient="adjoint")
    )(jnp.ones((), jnp.bfloat16))  # fmt: skip
    assert scale == 256
    with pytest.raises(TypeError, match="floating dtype, got int32"):
        ode.solve(one, None, jnp.arange(3), (0, 1))


@pytest.mark.parametrize("method", ["heun", pytest.param("dopri5", marks=pytest.mark.slow)])
def test_float32_states_keep_their_dtype_under_64_bits(method, x64):
    """Times and tolerances of float64 change no carry; the field sees one dtype."""

    def field(rate, y, t):
        assert (y.dtype, t.dtype) == (jnp.float32, jnp.float32)
        return -rate * y

    times = (np.float64(0), jnp.asarray(1.0))
    options = {"method": method, "rtol": np.float64(1e-5)}
    for gradient in ("backprop", "adjoint") if method == "heun" else ("backprop",):
        run = lambda y, r, g=gradient: ode.solve(field, r, y, times, gradient=g, **options)  # noqa: E731
        end, pull = jax.vjp(run, jnp.ones(3, jnp.float32), jnp.float32(0.5))
        assert end.dtype == jnp.float32
        np.testing.assert_allclose(end, np.exp(-0.5), rtol=5e-4)
        y_bar, rate_bar = pull(jnp.ones_like(end))
        np.testing.assert_allclose(y_bar, np.exp(-0.5), rtol=5e-4)
        np.testing.assert_allclose(rate_bar, -3 * np.exp(-0.5), rtol=5e-4)


@pytest.mark.parametrize("dim", [3, 12])  # unrolled, and in blocks of eight
def test_traces_against_the_jacobian(dim, key, compiled):
    a, b = (jax.random.normal(k, (dim, dim)) / dim**0.5 for k in jax.random.split(key))
    x = jax.random.normal(key, (4, dim))
    field = lambda x: jnp.tanh(x @ a) @ b  # noqa: E731
    jacobians = jax.jit(jax.vmap(jax.jacrev(lambda row: field(row[None])[0])))(x)
    trace = jnp.trace(jacobians, axis1=1, axis2=2)
    value, div = compiled(lambda x: ode.divergence(field, x))(x)
    np.testing.assert_allclose(value, field(x), rtol=1e-5)
    np.testing.assert_allclose(div, trace, rtol=1e-4, atol=1e-5)
    # All axes as probes, scaled so that E[e e^T] = I, give the trace without error.
    axes = jnp.broadcast_to(dim**0.5 * jnp.eye(dim)[:, None], (dim, 4, dim))
    probed = compiled(lambda x, e: ode.divergence(field, x, e))
    np.testing.assert_allclose(probed(x, axes)[1], trace, rtol=1e-4, atol=1e-5)
    for i in range(2):  # one probe is e^T J e
        want = dim * jacobians[:, i, i]
        np.testing.assert_allclose(probed(x, axes[i])[1], want, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named(unchecked, monkeypatch):
    y, args = start(), jnp.asarray(MATRIX)
    cases = [
        ("did you mean 'rk4'", {"method": "rk45"}),
        ("num_steps must be at least 1", {"num_steps": 0}),
        ("gradient", {"gradient": "forward"}),
        ("rtol must be positive", {"method": "dopri5", "rtol": 0.0}),
    ]
    for match, options in cases:
        with pytest.raises(ValueError, match=match):
            ode.solve(linear, args, y, (0.0, 1.0), **options)
    with pytest.raises(ValueError, match=r"times must be two different numbers .*\(1.0, 1.0\)"):
        ode.solve(linear, args, y, (1.0, 1.0))
    with pytest.raises(ValueError, match=r"field returns must have shape \(2, 2\), got \(2, 1\)"):
        ode.solve(lambda _, y, t: y[:, :1], None, y["x"], (0.0, 1.0))
    with pytest.raises(ValueError, match="shapes must be equal, got probe"):
        ode.divergence(lambda x: x, y["x"], jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="probe must have shape"):
        ode.divergence(lambda x: x, y["x"], jnp.ones((5, 2, 3)))

    real = builtins.__import__

    def absent(name, *rest, **named):
        if name == "diffrax":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="install the extra `ode`"):
        ode.solve(linear, args, y, (0.0, 1.0), method="dopri5")
