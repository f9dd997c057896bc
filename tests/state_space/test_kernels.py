"""Recurrence, kernel and convolution against loops in float64 and the references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import state_space as ss
from tests.state_space import oracles

# The shortest and the longest in float64, the longest in float32; the others in test-all.
LENGTHS = [
    (1, True),
    (1000, True),
    (1000, False),
    *(pytest.param(length, True, marks=pytest.mark.slow) for length in (7, 64)),
    *(pytest.param(length, False, marks=pytest.mark.slow) for length in (1, 7, 64)),
]
BILINEAR = pytest.param("bilinear", marks=pytest.mark.slow)  # beside it dplr has the same rule
RNG = np.random.default_rng(0)
CHANNELS, PAIRS, BATCH = 3, 4, 2


def complex_normal(*shape):
    return RNG.normal(size=shape) + 1j * RNG.normal(size=shape)


MODEL = {
    "eigenvalues": -0.5 * np.exp(RNG.normal(size=(CHANNELS, PAIRS)))
    + 1j * np.pi * np.arange(PAIRS),
    "b": complex_normal(CHANNELS, PAIRS),
    "c": complex_normal(CHANNELS, PAIRS),
    "dt": np.array([0.01, 0.1, 0.3]),
}
P = complex_normal(CHANNELS, PAIRS) / 2
D = np.array([0.3, -1.0, 2.0])
H0 = complex_normal(BATCH, CHANNELS, PAIRS)
S4D = ("eigenvalues", "b", "c", "dt")


def arrays(double, model=S4D):
    real, imaginary = (jnp.float64, jnp.complex128) if double else (jnp.float32, jnp.complex64)

    def cast(x):
        return jnp.asarray(x, imaginary if np.iscomplexobj(x) else real)

    everything = {**MODEL, "p": P}
    return tuple(cast(everything[name]) for name in model), cast(H0), cast(D)


def loop(u, kind, where=None, h0=H0):
    """All channels and rows by `lti_loop`; dplr as a dense model of twice the size."""
    ys, last = np.zeros(u.shape), np.zeros(h0.shape, complex)
    for row in range(len(u)):
        for ch in range(CHANNELS):
            a, b, c = (MODEL[name][ch] for name in ("eigenvalues", "b", "c"))
            dt, seen = MODEL["dt"][ch], None if where is None else where[row]

            def both(v):
                return np.concatenate([v, np.conj(v)])

            if kind == "dplr":
                dense = np.diag(both(a)) - np.outer(both(P[ch]), both(P[ch]).conj())
            else:
                dense = np.diag(both(a))
            if kind == "zoh":
                step = np.diag(np.exp(dt * both(a)))
                drive = (np.exp(dt * both(a)) - 1) / both(a) * both(b)
            else:
                eye = np.eye(2 * PAIRS)
                step = np.linalg.solve(eye - dt / 2 * dense, eye + dt / 2 * dense)
                drive = np.linalg.solve(eye - dt / 2 * dense, dt * both(b))
            run = oracles.lti_loop(
                u[row, :, ch], lambda h, m=step: m @ h, drive,
                lambda h, c=c: 2 * (c @ h[:PAIRS]).real, D[ch], both(h0[row, ch]), seen,
            )  # fmt: skip
            ys[row, :, ch], last[row, ch] = run[0], run[1][:PAIRS]
    return ys, last


def forms(kind, double):
    """(whole sequence, one step) of a kind, with its parameters inside; and h0."""
    model, h0, d = arrays(double, ("eigenvalues", "p", "b", "c", "dt") if kind == "dplr" else S4D)
    if kind == "dplr":

        def whole(u, **o):
            return ss.dplr_convolution(u, *model, d=d, **o)

        return whole, lambda h, u: ss.dplr_step(h, u, *model, d=d), h0
    options = {"d": d, "discretisation": kind}

    def whole(u, **o):
        return ss.s4d_convolution(u, *model, **options, **o)

    return whole, lambda h, u: ss.s4d_step(h, u, *model, **options), h0


@pytest.mark.parametrize("kind", ["zoh", "dplr", BILINEAR])
@pytest.mark.parametrize(("length", "double"), LENGTHS)
def test_convolution_and_recurrence_are_the_loop(kind, length, double):
    u = np.random.default_rng(length).normal(size=(BATCH, length, CHANNELS))
    expected = loop(u, kind)
    with jax.enable_x64(double):
        whole, step, h0 = forms(kind, double)
        x = jnp.asarray(u, jnp.float64 if double else jnp.float32)
        outcomes = jax.jit(lambda x: (whole(x, h0=h0), ss.recur(step, h0, x)))(x)
    tolerance = 1e-10 if double else 1e-4
    for found in outcomes:
        for got, want in zip(found, expected, strict=True):
            assert np.isfinite(got).all()
            np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("kind", ["zoh", "dplr"])
@pytest.mark.parametrize(
    "length", [64, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7, 1000))]
)
def test_gradients_of_both_forms_agree_with_differences(x64, kind, length):
    u = np.random.default_rng(1).normal(size=(BATCH, length, CHANNELS))
    names = ("eigenvalues", "p", "b", "c", "dt") if kind == "dplr" else S4D
    model, h0, _ = arrays(True, names)
    inputs = (jnp.asarray(u), h0, *model)
    whole, step = (
        (ss.dplr_convolution, ss.dplr_step) if kind == "dplr" else (ss.s4d_convolution, ss.s4d_step)
    )

    def loss(form, u, h0, *model):
        if form == "convolution":
            y, h = whole(u, *model, h0=h0)
        else:
            y, h = ss.recur(lambda h, u: step(h, u, *model), h0, u)
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.abs(h) ** 2)

    grads = {
        form: jax.jit(jax.grad(lambda *x, f=form: loss(f, *x), tuple(range(len(inputs)))))(*inputs)
        for form in ("convolution", "recurrence")
    }
    value = jax.jit(lambda *x: loss("recurrence", *x))
    for i, x in enumerate(inputs):
        scale = np.abs(grads["recurrence"][i]).max()
        np.testing.assert_allclose(
            grads["convolution"][i], grads["recurrence"][i], atol=1e-10 * scale
        )
        direction = np.random.default_rng(i).normal(size=x.shape)
        direction = direction * (1 + 1j) if np.iscomplexobj(x) else direction

        def changed(v, i=i):
            return value(*inputs[:i], v, *inputs[i + 1 :])

        slope = oracles.difference(changed, x, direction)
        # The gradient of a real function of complex x is taken with conj(x).
        found = np.sum(np.real(np.asarray(grads["convolution"][i]) * direction))
        np.testing.assert_allclose(found, slope, rtol=1e-6)


@pytest.mark.parametrize("kind", ["zoh", "dplr", BILINEAR])
@pytest.mark.parametrize(
    "length", [1000, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7, 64))]
)
def test_gradients_of_both_forms_in_float32(kind, length):
    """Of every input, for random weights of the outputs, beside the recurrence in float64."""
    names = ("eigenvalues", "p", "b", "c", "dt") if kind == "dplr" else S4D
    u, weights = np.random.default_rng(8).normal(size=(2, BATCH, length, CHANNELS))

    def gradients(convolved, double):
        def loss(u, h0, d, *model):
            if kind == "dplr":
                whole, step, options = ss.dplr_convolution, ss.dplr_step, {"d": d}
            else:
                whole, step = ss.s4d_convolution, ss.s4d_step
                options = {"d": d, "discretisation": kind}
            if convolved:
                y, h = whole(u, *model, h0=h0, **options)
            else:
                y, h = ss.recur(lambda h, u: step(h, u, *model, **options), h0, u)
            return jnp.sum(y * jnp.asarray(weights, y.dtype)) + jnp.sum(jnp.abs(h) ** 2)

        with jax.enable_x64(double):
            model, h0, d = arrays(double, names)
            given = (jnp.asarray(u, jnp.float64 if double else jnp.float32), h0, d, *model)
            return jax.jit(jax.grad(loss, tuple(range(len(given)))))(*given)

    exact = gradients(False, True)
    for convolved in (True, False):
        found = gradients(convolved, False)
        for name, got, want in zip(("u", "h0", "d", *names), found, exact, strict=True):
            assert got.dtype in (jnp.float32, jnp.complex64)
            np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize("kind", ["zoh", "dplr"])
def test_masked_positions_change_nothing(x64, kind):
    rng = np.random.default_rng(2)
    where = rng.random((BATCH, 40)) < 0.6
    u = np.where(where[..., None], rng.normal(size=(BATCH, 40, CHANNELS)), np.nan)
    whole, _, h0 = forms(kind, True)
    run = jax.jit(lambda u: whole(u, h0=h0, where=jnp.asarray(where)))
    y, h = run(jnp.asarray(u))
    expected = loop(np.nan_to_num(u), kind, where)
    np.testing.assert_allclose(y, expected[0], atol=1e-11)
    np.testing.assert_allclose(h, expected[1], atol=1e-11)
    gradient = jax.grad(lambda u: jnp.sum(run(u)[0]))(jnp.asarray(u))
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient)[~where].any()


def test_s4d_meets_the_reference(x64):
    reference = oracles.load("s4d_kernel")
    inputs = reference["inputs"]
    b, c = (jnp.asarray(oracles.number(inputs[name])) for name in "BC")
    for expected in reference["expected"].values():
        a = jnp.asarray(oracles.number(expected["A"]))
        for kind in ("zoh", "bilinear"):
            wanted = expected[kind]
            found = getattr(ss, kind)(a, b, inputs["dt"])
            for got, name in zip(found, ("A_bar", "B_bar"), strict=True):
                np.testing.assert_allclose(got, oracles.number(wanted[name]), rtol=1e-10)
            kernel = ss.s4d_kernel(a, b, c, inputs["dt"], 20, discretisation=kind)
            np.testing.assert_allclose(kernel, wanted["kernel"], rtol=1e-10, atol=1e-12)
            u = jnp.asarray(inputs["u"])[None, :, None]
            y = ss.causal_convolution(u, kernel[None])[0, :, 0]
            np.testing.assert_allclose(y, wanted["y"], rtol=1e-10, atol=1e-12)


def test_s4_meets_the_reference(x64):
    reference = oracles.load("s4_recurrent_step")
    inputs, expected = reference["inputs"], reference["expected"]
    start = ss.dplr(inputs["N"], jnp.complex128)
    c = jnp.asarray(inputs["C"]) @ start.basis
    model = (*start[:3], c, inputs["dt"])
    kernel = ss.dplr_kernel(*model, inputs["L"])
    np.testing.assert_allclose(kernel, expected["kernel"], rtol=1e-8, atol=1e-10)
    state, u = jnp.zeros((1, inputs["N"] // 2), jnp.complex128), jnp.asarray(inputs["u"])
    for t in range(inputs["L"]):
        y, state = ss.dplr_step(state, u[t, None], *model, d=inputs["D"])
        np.testing.assert_allclose(y[0], expected["y"][t], rtol=1e-8, atol=1e-10)
        dense = 2 * np.real(np.asarray(start.basis) @ np.asarray(state[0]))
        np.testing.assert_allclose(dense, expected["states"][t], rtol=1e-8, atol=1e-10)


def generating_function_kernel(c, dt, length):
    """Algorithm 1 of Gu, Goel, Re 2022, in float64, with the dense resolvent: C~ at roots of unity.

    The kernel's z-transform, truncated at L: C (I - A_bar^L) (I - A_bar z)^-1 B_bar.
    """
    a, b, _ = oracles.legs(64)
    eye = np.eye(64)
    step = np.linalg.solve(eye - dt / 2 * a, eye + dt / 2 * a)
    drive = np.linalg.solve(eye - dt / 2 * a, dt * b)
    c_tilde = c @ (eye - np.linalg.matrix_power(step, length))
    roots = np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length)
    spectrum = [c_tilde @ np.linalg.solve(eye - step * z, drive) for z in roots]
    return np.fft.irfft(np.array(spectrum), length)


@pytest.mark.parametrize("dt", [1e-3, 1e-2, 1e-1])
def test_s4_kernel_in_float32_at_4096(dt):
    c = np.random.default_rng(3).normal(size=64)
    dense = oracles.dense_kernel(*oracles.legs(64)[:2], c, dt, 4096)
    # An independent way to the same numbers, where only rounding in float64 differs.
    np.testing.assert_allclose(
        generating_function_kernel(c, dt, 4096), dense, atol=1e-8 * np.abs(dense).max()
    )
    start = ss.dplr(64)
    c = jnp.asarray(c @ np.asarray(ss.dplr(64).basis), jnp.complex64)
    kernel = jax.jit(ss.dplr_kernel, static_argnums=5)(*start[:3], c, dt, 4096)
    assert np.abs(kernel - dense).max() < 1e-4 * np.abs(dense).max()


@pytest.mark.parametrize("name", ["s4d_lin", "s4d_inv"])
def test_s4d_kernel_in_float32_at_16384(name):
    rng = np.random.default_rng(4)
    dt = np.array([1e-3, 1e-2, 1e-1])
    c = rng.normal(size=(3, 32)) + 1j * rng.normal(size=(3, 32))
    single = (getattr(ss, name)(64), jnp.ones(32), jnp.asarray(c, jnp.complex64), jnp.float32(dt))
    kernel = jax.jit(ss.s4d_kernel, static_argnums=4)(*single, 16384)
    a, b, c, dt = (np.asarray(x, np.complex128) for x in single)
    weights = 2 * c * (np.exp(dt[:, None] * a) - 1) / a * b
    powers = np.exp(np.arange(16384)[:, None, None] * (dt[:, None] * a)[None])
    exact = np.einsum("cn,lcn->cl", weights, powers).real
    assert (np.abs(kernel - exact).max(1) < 1e-5 * np.abs(exact).max(1)).all()


def test_causal_convolution_and_bfloat16():
    rng = np.random.default_rng(5)
    u, kernel = rng.normal(size=(2, 50, 3)), rng.normal(size=(3, 70))
    exact = np.stack([[np.convolve(r[:, c], kernel[c])[:50] for c in range(3)] for r in u])
    wide = ss.causal_convolution(jnp.float32(u), jnp.float32(kernel))
    np.testing.assert_allclose(wide, exact.swapaxes(1, 2), atol=1e-5)
    narrow = ss.causal_convolution(jnp.bfloat16(u), jnp.float32(kernel))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(narrow), exact.swapaxes(1, 2), atol=0.2)
    gradient = jax.grad(lambda k: jnp.sum(ss.causal_convolution(jnp.float32(u), k)[:, -1]))
    np.testing.assert_allclose(
        gradient(jnp.float32(kernel))[:, :50], u[:, ::-1].sum(0).T, atol=1e-5
    )


def test_short_convolution_with_masks_and_tail(x64):
    rng = np.random.default_rng(6)
    x, weight, bias = rng.normal(size=(2, 9, 3)), rng.normal(size=(4, 3)), rng.normal(size=3)
    tail, where = rng.normal(size=(2, 3, 3)), rng.random((2, 9)) < 0.6
    expected, last = np.zeros_like(x), np.zeros_like(tail)
    for row in range(2):
        seen = list(tail[row])
        for t in range(9):
            if where[row, t]:
                seen.append(x[row, t])
                expected[row, t] = bias + sum(weight[k] * seen[k - 4] for k in range(4))
        last[row] = seen[-3:]
    spoilt = jnp.asarray(np.where(where[..., None], x, np.nan))
    given = {"tail": jnp.asarray(tail), "where": jnp.asarray(where)}
    weight, bias = jnp.asarray(weight), jnp.asarray(bias)
    y, end = ss.short_convolution(spoilt, weight, bias, **given)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(end, last, atol=1e-12)

    def step(h, x):
        return ss.conv_step(h, x, weight, bias)

    y, end = ss.recur(step, given["tail"], spoilt, given["where"])
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(end, last, atol=1e-12)
    gradient = jax.grad(lambda x: jnp.sum(ss.short_convolution(x, weight, bias, **given)[0]))
    assert np.isfinite(gradient(spoilt)).all()


def test_long_steps_and_vanishing_rates(x64):
    a = jnp.asarray([0.0, -1e6, -2.0 + 0j])
    for kind in ("zoh", "bilinear"):  # A = 0 integrates; dt A = -2 has A_bar = 0
        kernel = ss.s4d_kernel(
            a, jnp.ones(3), jnp.asarray([1.0, 0, 0]), 1.0, 5, discretisation=kind
        )
        np.testing.assert_allclose(kernel, 2.0, rtol=1e-12)
    third = ss.s4d_kernel(
        a, jnp.ones(3), jnp.asarray([0.0, 0, 1]), 1.0, 4, discretisation="bilinear"
    )
    np.testing.assert_allclose(third, [1.0, 0, 0, 0], atol=1e-12)
    with jax.debug_nans(True):
        grads = jax.grad(
            lambda a: jnp.sum(ss.s4d_kernel(a, jnp.ones(3), jnp.ones(3), 1.0, 4)), holomorphic=False
        )(a)
    assert np.isfinite(grads).all()


def test_bad_input_is_refused_by_name(unchecked):
    a, one = ss.s4d_lin(8), jnp.ones(4)
    u = jnp.ones((2, 5, 3))

    def kernel(*x, length=5, **o):
        return ss.s4d_kernel(*x, length, **o)

    cases = [
        (lambda: kernel(a + 1, one, one, 0.1), "eigenvalues must have real parts of at most 0"),
        (lambda: kernel(a, one, one, 0.0), "dt must be positive"),
        (lambda: kernel(a, one, one, -0.1), "dt must be positive"),
        (lambda: kernel(a, jnp.ones(3), one, 0.1), "b must have 4 pairs"),
        (lambda: kernel(a, jnp.ones((2, 4)), jnp.ones((3, 4)), 0.1), "channels must agree"),
        (lambda: kernel(a, one, one, 0.1, length=0), "length must be at least 1"),
        (lambda: kernel(a, one, one, 0.1, length=10**6), "length must be at most 65536"),
        (lambda: ss.dplr_kernel(a, one, one, one, 0.1, 10**6), "length must be at most 65536"),
        (lambda: kernel(a, one, one, 0.1, discretisation="zho"), "did you mean 'zoh'"),
        (lambda: ss.s4d_convolution(u, a, one, one, 0.1, h0=jnp.ones((2, 3, 5))), "h0 must have"),
        (lambda: ss.s4d_convolution(u, a, one, one, jnp.ones(2)), "u must have the channels"),
        (lambda: ss.s4d_convolution(u[:, :0], a, one, one, 0.1), "at least one position"),
        (lambda: ss.s4d_convolution(u, a, one, one, 0.1, where=jnp.ones((2, 4), bool)), "where"),
        (lambda: ss.s4d_step(jnp.ones((2, 3)), u[:, 0], a, one, one, 0.1), "state must have"),
        (lambda: ss.causal_convolution(u, jnp.ones((2, 5))), "kernel must have shape"),
        (lambda: ss.short_convolution(u, jnp.ones((4, 2))), "weight must have shape"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="eigenvalues must be complex"):
        ss.s4d_kernel(one, one, one, 0.1, 5)


def test_a_mask_under_x64_and_integers(x64, unchecked):
    """Inputs in double precision with parameters in single: the state is of the wider type."""
    u, where = jnp.ones((1, 4, 2)), jnp.ones((1, 4), bool)
    eigenvalues = ss.s4d_lin(4).astype(jnp.complex64)
    given = eigenvalues, jnp.ones(2), jnp.ones((2, 2)), jnp.full(2, 0.1)
    masked = ss.s4d_convolution(u, *given, where=where)
    np.testing.assert_allclose(masked[0], ss.s4d_convolution(u, *given)[0], rtol=1e-5)
    assert masked[1].dtype == jnp.complex128
    for call in (
        lambda u: ss.s4d_convolution(u, *given),
        lambda u: ss.causal_convolution(u, jnp.ones((2, 3))),
        lambda u: ss.short_convolution(u, jnp.ones((3, 2))),
    ):
        with pytest.raises(TypeError, match="must have a floating dtype"):
            call(u.astype(int))
