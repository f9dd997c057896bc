"""Sequential, chunked and associative scans against loops in float64, gradients and masks too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import state_space as ss
from genjax.state_space.discretisation import relative_expm1
from tests.state_space import oracles

# The shortest and the longest in float64, the longest in float32; the others in test-all.
LENGTHS = [
    (1, True),
    (1000, True),
    (1000, False),
    *(pytest.param(length, True, marks=pytest.mark.slow) for length in (7, 64)),
    *(pytest.param(length, False, marks=pytest.mark.slow) for length in (1, 7, 64)),
]


def cast(inputs, double):
    return {k: jnp.asarray(v, jnp.float64 if double else jnp.float32) for k, v in inputs.items()}


def close(found, expected, double, scale=1.0):
    tolerance = (1e-10 if double else 1e-4) * scale
    for got, want in zip(found, expected, strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize(("length", "double"), LENGTHS)
def test_linear_scan_is_the_loop(length, double):
    rng = np.random.default_rng(length)
    a, b = rng.uniform(-1, 1, size=(2, 2, length, 3))
    h = h0 = rng.normal(size=(2, 3))
    states = []
    for t in range(length):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    with jax.enable_x64(double):
        x = cast({"a": a, "b": b, "h0": h0}, double)
        for method in ("sequential", "associative"):
            found = jax.jit(ss.linear_scan, static_argnames="method")(**x, method=method)
            close(found, (np.stack(states, 1), h), double)


@pytest.mark.parametrize(("length", "double"), LENGTHS)
def test_selective_scan_is_the_loop(length, double):
    """Sequential and associative, a chunk that divides no length, and the step under a scan."""
    inputs = oracles.selective(np.random.default_rng(length), length)
    expected = oracles.selective_loop(**inputs)
    with jax.enable_x64(double):
        x = cast(inputs, double)

        @jax.jit
        def run(x):
            each = (x["u"], x["dt"], x["B"], x["C"], x["z"])

            def step(h, v):
                return ss.selective_step(h, v[0], v[1], x["A"], v[2], v[3], x["D"], v[4])

            return (
                ss.selective_scan(**x, chunk=12, method="sequential"),
                ss.selective_scan(**x, chunk=48, method="associative"),
                ss.recur(step, x["h0"], each),
            )

        for found in run(x):
            close(found, expected, double)


@pytest.mark.parametrize(("length", "double"), LENGTHS)
def test_ssd_is_the_loop(length, double):
    inputs = oracles.heads(np.random.default_rng(length), length)
    expected = oracles.ssd_loop(**inputs)
    with jax.enable_x64(double):
        x = cast(inputs, double)

        @jax.jit
        def run(x):
            def step(h, v):
                return ss.ssd_step(h, v[0], v[1], x["A"], v[2], v[3], D=x["D"])

            each = (x["x"], x["dt"], x["B"], x["C"])
            return ss.ssd(**x, chunk=12), ss.recur(step, x["h0"], each)

        for found in run(x):
            close(found, expected, double)


def test_zoh_option(x64):
    inputs = oracles.selective(np.random.default_rng(0), 7)
    expected = oracles.selective_loop(**inputs, zoh=True)
    close(ss.selective_scan(**cast(inputs, True), discretisation="zoh"), expected, True)
    x = cast(inputs, True)
    now = (x[k][:, 0] for k in ("u", "dt"))
    y, _ = ss.selective_step(
        x["h0"], *now, x["A"], x["B"][:, 0], x["C"][:, 0], x["D"], x["z"][:, 0],
        discretisation="zoh",
    )  # fmt: skip
    np.testing.assert_allclose(y, expected[0][:, 0], rtol=1e-10)


def test_ssd_meets_the_reference(x64):
    reference = oracles.load("ssd_chunked_scan")
    given, expected = reference["inputs"], reference["expected"]
    x = {k: jnp.asarray(given[k]) for k in ("x", "dt", "A", "B", "C", "D")}
    h0, weight = jnp.asarray(given["initial_state"]), jnp.asarray(given["weight"])

    @jax.jit
    def run(x, h0):
        return ss.ssd(**x, h0=h0, chunk=given["chunk"])

    y, h = run(x, h0)
    np.testing.assert_allclose(y, expected["y"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(h, expected["final_state"], rtol=1e-9, atol=1e-11)
    half = {k: v if v.ndim == 1 else v[:, : given["chunk"]] for k, v in x.items()}
    middle = jnp.asarray(expected["states_at_chunk_starts"])
    np.testing.assert_allclose(run(half, h0)[1], middle[:, 1], rtol=1e-9, atol=1e-11)
    grads = jax.jit(jax.grad(lambda x, h0: jnp.sum(weight * run(x, h0)[0]), (0, 1)))(x, h0)
    for name, wanted in expected["grad_of_sum_weight_y"].items():
        found = grads[1] if name == "initial_state" else grads[0][name]
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


RUNS = {
    "sequential": (
        oracles.selective,
        lambda x: ss.selective_scan(**x, chunk=5, method="sequential"),
    ),
    "associative": (
        oracles.selective,
        lambda x: ss.selective_scan(**x, chunk=5, method="associative"),
    ),
    "ssd": (oracles.heads, lambda x: ss.ssd(**x, chunk=5)),
}


@pytest.mark.parametrize("double", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients_agree_with_differences(double):
    """Of every input; in float32 against those of float64."""
    for name, (make, run) in RUNS.items():
        inputs = make(np.random.default_rng(3), 23)

        def loss(x, run=run):
            y, h = run(x)
            return jnp.sum(jnp.sin(y)) + jnp.sum(h**2)

        with jax.enable_x64(True):
            exact = jax.jit(jax.grad(loss))(cast(inputs, True))
            value = jax.jit(loss)
            for key, x in inputs.items():
                direction = np.random.default_rng(len(key)).normal(size=x.shape)

                def changed(v, k=key, value=value, inputs=inputs):
                    return value({**cast(inputs, True), k: jnp.asarray(v)})

                slope = oracles.difference(changed, x, direction)
                np.testing.assert_allclose(np.sum(exact[key] * direction), slope, rtol=1e-6)
        if not double:
            found = jax.jit(jax.grad(loss))(cast(inputs, False))
            for key, wanted in exact.items():
                scale = np.abs(wanted).max()
                np.testing.assert_allclose(found[key], wanted, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize(("length", "double"), LENGTHS)
def test_gradients_of_all_forms_are_those_of_the_recurrence(length, double):
    """Of every input, the recurrence in float64."""

    def selective(x):
        def step(h, v):
            return ss.selective_step(h, v[0], v[1], x["A"], v[2], v[3], x["D"], v[4])

        return ss.recur(step, x["h0"], tuple(x[k] for k in ("u", "dt", "B", "C", "z")))

    def heads(x):
        def step(h, v):
            return ss.ssd_step(h, v[0], v[1], x["A"], v[2], v[3], D=x["D"])

        return ss.recur(step, x["h0"], tuple(x[k] for k in ("x", "dt", "B", "C")))

    def gradient(run, x):
        def loss(x):
            y, h = run(x)
            return jnp.sum(jnp.sin(y)) + jnp.sum(h**2)

        return jax.jit(jax.grad(loss))(x)

    for make, recurrence in ((oracles.selective, selective), (oracles.heads, heads)):
        inputs = make(np.random.default_rng(length), length)
        with jax.enable_x64(True):
            exact = gradient(recurrence, cast(inputs, True))
        for form, run in RUNS.values():
            if form is make:
                with jax.enable_x64(double):
                    found = gradient(run, cast(inputs, double))
                close(found.values(), [exact[k] for k in found], double)


@pytest.mark.parametrize("name", RUNS)
def test_masked_positions_change_nothing(x64, name):
    make, run = RUNS[name]
    rng = np.random.default_rng(4)
    inputs = make(rng, 23)
    where = rng.random((2, 23)) < 0.6
    oracle = oracles.ssd_loop if name == "ssd" else oracles.selective_loop
    expected = oracle(**inputs, where=where)
    spoilt = {
        k: np.where(where.reshape(2, 23, *(1,) * (v.ndim - 2)), v, np.nan)
        if v.shape[:2] == (2, 23)
        else v
        for k, v in inputs.items()
    }

    def masked(x):
        return run({**x, "where": jnp.asarray(where)})

    close(jax.jit(masked)(cast(spoilt, True)), expected, True)
    grads = jax.grad(lambda x: jnp.sum(masked(x)[0]) + jnp.sum(masked(x)[1]))
    grads = jax.jit(grads)(cast(spoilt, True))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    if name == "sequential":
        a = jnp.where(jnp.asarray(where)[..., None], jnp.asarray(inputs["dt"]), jnp.nan)
        h, last = ss.linear_scan(a, a, where=jnp.asarray(where))
        assert np.isfinite(h).all()
        kept = [a[0, t] for t in range(23) if where[0, t]]
        by_hand = 0
        for v in kept:
            by_hand = v * by_hand + v
        np.testing.assert_allclose(last[0], by_hand, rtol=1e-12)


def test_two_halves_are_the_whole(x64):
    inputs = cast(oracles.heads(np.random.default_rng(5), 20), True)

    def part(s):
        return {k: v[:, s] if v.shape[:2] == (2, 20) else v for k, v in inputs.items()}

    run = jax.jit(lambda x: ss.ssd(**x, chunk=8))
    y, h = run(inputs)
    first, middle = run(part(slice(0, 9)))
    second, last = run({**part(slice(9, 20)), "h0": middle})
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), y, atol=1e-12)
    np.testing.assert_allclose(last, h, atol=1e-12)


def test_steps_of_any_size_are_finite():
    """One huge step, and steps of 0: values, gradients and what is small beside the huge one."""
    inputs = oracles.heads(np.random.default_rng(6), 40)
    inputs["dt"][:, 3], inputs["dt"][:, 7] = 1e4, 0.0
    exact = oracles.ssd_loop(**inputs)
    with jax.debug_nans(True):
        x = cast(inputs, False)
        found = jax.jit(lambda x: ss.ssd(**x, chunk=40))(x)
        grads = jax.jit(jax.grad(lambda x: jnp.sum(ss.ssd(**x, chunk=40)[0][:, 8:])))(x)
    assert all(np.isfinite(g).all() for g in grads.values())
    # The outputs after the step, whose sizes are those of the huge one, to 1e-5 of themselves.
    np.testing.assert_allclose(found[0], exact[0], atol=1e-5 * np.abs(exact[0]).max())
    inputs = oracles.selective(np.random.default_rng(6), 12)
    inputs["dt"][:, 3], inputs["dt"][:, 7] = 1e4, 0.0
    with jax.debug_nans(True):
        x = cast(inputs, False)
        for option in ("delta", "zoh"):

            def run(x, o=option):
                return jnp.sum(ss.selective_scan(**x, discretisation=o)[0])

            assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(run))(x).values())


def test_types(unchecked):
    x = cast(oracles.selective(np.random.default_rng(7), 6), False)
    narrow = {k: v.astype(jnp.bfloat16) for k, v in x.items()}
    y, h = ss.selective_scan(**narrow)
    assert (y.dtype, h.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.float32(y), ss.selective_scan(**x)[0], atol=0.3)


def test_memory_of_the_backward_pass_grows_with_the_number_of_chunks():
    """From the compiled program, in states: length / chunk + chunk, and the inputs."""
    channels, states = 8, 256

    def states_of(length, chunk):
        shapes = oracles.selective(np.random.default_rng(8), length, 1, channels, states)
        x = cast({k: v for k, v in shapes.items() if k not in ("B", "C", "h0")}, False)
        small = jnp.ones((1, length, 1), jnp.float32)

        def loss(x):
            B = jnp.broadcast_to(small, (1, length, states))
            return jnp.sum(ss.selective_scan(**x, B=B, C=B, chunk=chunk, method="sequential")[0])

        compiled = jax.jit(jax.grad(loss)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * channels * states)

    for length, chunk in ((1024, 1024), (1024, 32), (1024, 2), (2048, 2), (2048, 32)):
        found = states_of(length, chunk)
        assert length / chunk + chunk < found < length / chunk + 1.5 * chunk + length / 5


def test_bad_input_is_refused_by_name(unchecked):
    x = cast(oracles.selective(np.random.default_rng(9), 6), False)
    y = cast(oracles.heads(np.random.default_rng(9), 6), False)

    def scan(**changes):
        return ss.selective_scan(**{**x, **changes})

    def two(**changes):
        return ss.ssd(**{**y, **changes})

    one = jnp.ones((2, 6, 3))
    cases = [
        (lambda: scan(A=-x["A"]), "A must be at most 0"),
        (lambda: scan(dt=-x["dt"]), "dt must be at least 0"),
        (lambda: scan(dt=x["dt"][:, :5]), "shapes must be equal"),
        (lambda: scan(B=x["B"][..., :3]), "B must have shape"),
        (lambda: scan(h0=x["h0"][:1]), "h0 must have shape"),
        (lambda: scan(chunk=0), "chunk must be at least 1"),
        (lambda: scan(method="parallel"), "method must be one of"),
        (lambda: scan(discretisation="tustin"), "discretisation must be one of"),
        (lambda: scan(where=jnp.ones((2, 5), bool)), "where must have shape"),
        (lambda: two(A=-y["A"]), "A must be at most 0"),
        (lambda: two(A=y["A"][:1]), "A must have shape"),
        (lambda: two(B=y["B"][:, :, :1].repeat(3, 2), C=y["C"][:, :, :1].repeat(3, 2)), "groups"),
        (lambda: two(h0=y["h0"][..., :2]), "h0 must have shape"),
        (lambda: ss.linear_scan(one, one[:, :5]), "shapes must be equal"),
        (lambda: ss.linear_scan(one, one, jnp.ones((2, 4))), "h0 must have shape"),
        (lambda: ss.linear_scan(one[:, :0], one[:, :0]), "at least one position"),
        (lambda: ss.ssd_step(y["h0"][:1], *(y[k][:, 0] for k in ("x", "dt")), y["A"],
                             y["B"][:, 0], y["C"][:, 0]), "state must have shape"),
        (lambda: ss.conv_step(one, one[:, 0], jnp.ones((3, 3))), "tail must have shape"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="where must be boolean"):
        scan(where=jnp.ones((2, 6)))


def test_zero_order_hold_has_its_derivatives_at_zero():
    """d/dA of (exp(dt A) - 1) / A is dt^2 / 2 at 0, and right on either side of the series."""
    slope = jax.jit(jax.grad(relative_expm1))
    for z in (0.0, -1e-7, -1e-4, -0.049, -0.051, -1.0, 0.3):
        exact = np.float64(z)
        if abs(z) < 1e-3:
            expected = 0.5 + exact / 3
        else:
            expected = (exact * np.exp(exact) - np.expm1(exact)) / exact**2
        np.testing.assert_allclose(slope(z), expected, rtol=1e-5)
    ones = jnp.ones((1, 3, 1))

    def last(rate):
        return ss.selective_scan(ones, ones / 2, rate, ones, ones, discretisation="zoh")[0][0, 0, 0]

    np.testing.assert_allclose(jax.grad(last)(jnp.zeros((1, 1))), 0.125, rtol=1e-6)


def test_types_may_differ_and_integers_are_refused(x64, unchecked):
    """Under x64 a state takes the widest type; integers would be cut down to whole outputs."""
    u, dt, B = jnp.ones((1, 4, 2), jnp.float32), jnp.full((1, 4, 2), 0.5), jnp.ones((1, 4, 3))
    y, h = ss.selective_scan(u, dt, -jnp.ones((2, 3)), B, B)
    assert (y.dtype, h.dtype) == (jnp.float32, jnp.float64)
    x, shared = jnp.ones((1, 4, 2, 3), jnp.float32), jnp.ones((1, 4, 1, 3))
    y, h = ss.ssd(x, dt, -jnp.ones(2), shared, shared)
    assert (y.dtype, h.dtype) == (jnp.float32, jnp.float64)
    with pytest.raises(TypeError, match="u must have a floating dtype"):
        ss.selective_scan(u.astype(int), dt, -jnp.ones((2, 3)), B, B)
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        ss.ssd(x.astype(int), dt, -jnp.ones(2), shared, shared)
    with pytest.raises(ValueError, match="x must have rank 4"):
        ss.ssd(x[0], dt, -jnp.ones(2), shared, shared)


def test_steps_refuse_shapes_that_would_be_broadcast(unchecked):
    u, A, B = jnp.ones((2, 3)), -jnp.ones((3, 4)), jnp.ones((2, 4))
    state = jnp.zeros((2, 3, 4))
    for given in [(u[:, :1], u, A, B, B), (u, u[:, :1], A, B, B), (u, u, A, B[:1], B)]:
        with pytest.raises(ValueError, match=r"must have|must be equal"):
            ss.selective_step(state, *given)
    x, dt, shared = jnp.ones((2, 3, 5)), jnp.ones((2, 3)), jnp.ones((2, 1, 4))
    state, A = jnp.zeros((2, 3, 5, 4)), -jnp.ones(3)
    for given in [(x, dt[:, :1], A, shared), (x, dt, A[:1], shared), (x, dt, A, shared[:1])]:
        with pytest.raises(ValueError, match=r"must have|must be equal"):
            ss.ssd_step(state, *given, shared)
