"""Flow matching: paths and pairs against closed forms, the minimiser, straightness."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from genjax import flows
from genjax.transport import sinkhorn_from_cost

REF = json.loads((Path(__file__).parents[1] / "references" / "flow_matching.json").read_text())
KEY = jax.random.key(0)


def assignment(cost):
    return jnp.asarray(linear_sum_assignment(np.asarray(cost).T)[1])


def permutation_plan(cost):
    plan = np.zeros(cost.shape, np.float32)
    plan[np.asarray(assignment(cost)), np.arange(len(cost))] = 1 / len(cost)
    return jnp.asarray(plan)


def test_ot_path_equals_the_reference(compiled, x64):
    inputs = REF["inputs"]
    path = flows.ot_path(inputs["sigma_min"])
    x0, x1 = jnp.asarray(inputs["x0"]), jnp.asarray(inputs["x1"])
    t = jnp.asarray(inputs["t"])[:, 0]
    x_t, velocity = compiled(lambda x0, x1, t: flows.interpolate(path, x0, x1, t))(x0, x1, t)
    expected = REF["expected"]
    np.testing.assert_allclose(x_t, expected["psi_t"], rtol=1e-8)
    np.testing.assert_allclose(velocity, expected["cond_target"], rtol=1e-8)


def test_vp_path_preserves_variance_and_its_velocity_is_the_derivative(x64):
    path = flows.vp_path()
    t = jnp.linspace(0, 0.98, 8)
    np.testing.assert_allclose(path.data(t) ** 2 + path.noise(t) ** 2, 1, rtol=1e-12)
    # B(1) = 0.1 + 19.9 / 2: the noise end of Song et al. (2021).
    np.testing.assert_allclose(path.data(jnp.zeros(())), np.exp(-0.5 * 10.05), rtol=1e-12)
    x0, x1 = jax.random.normal(KEY, (2, 8, 3))
    h = 1e-6
    ahead, behind = (flows.interpolate(path, x0, x1, t + s)[0] for s in (h, -h))
    velocity = flows.interpolate(path, x0, x1, t)[1]
    np.testing.assert_allclose(velocity, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-6)
    # Past 1 - 1e-5 the velocity stays what it is there.
    late = [flows.interpolate(path, x0, x1, jnp.full(8, end))[1] for end in (1 - 1.0001e-5, 1.0)]
    np.testing.assert_allclose(*late, rtol=1e-4)
    for end in (0.0, 1.0):
        out = flows.interpolate(path, x0, x1, jnp.full(8, end))
        assert all(np.all(np.isfinite(part)) for part in out)


@pytest.mark.parametrize("path", [flows.ot_path(), flows.ot_path(0.1), flows.vp_path()])
def test_the_best_linear_field_is_the_velocity_of_white_data(path, x64):
    # Cov(v, x_t) / Var(x_t) and what is left of Var(v), from the joint law of (v, x_t).
    s, t = 0.6, jnp.array([0.0, 0.3, 0.9, 1.0])
    zero = jnp.zeros((4, 1))
    from_noise = flows.interpolate(path, zero + 1, zero, t)  # (x_t, v) of a unit normal in x0
    from_data = flows.interpolate(path, zero, zero + s, t)  # and of one in x1
    x_v = np.array([from_noise, from_data])[..., 0]
    covariance = np.einsum("eit,ejt->tij", x_v[:, ::-1], x_v[:, ::-1])
    linear = covariance[:, 0, 1] / covariance[:, 1, 1]
    left = covariance[:, 0, 0] - linear * covariance[:, 0, 1]
    field = flows.preconditioned(lambda x, t: 0 * x, path=path, sigma_data=s)
    np.testing.assert_allclose(field(jnp.ones((4, 1)), t)[:, 0], linear, rtol=1e-10, atol=1e-12)
    # A network that gives back its input: the residual's deviation times x over that of x_t.
    field = flows.preconditioned(lambda x, t: x, path=path, sigma_data=s)
    more = np.sqrt(left / covariance[:, 1, 1])
    np.testing.assert_allclose(field(jnp.ones((4, 1)), t)[:, 0], linear + more, rtol=1e-6)


def test_a_preconditioned_field_is_finite_and_refuses_a_spread_of_0():
    x, t = jnp.zeros((2, 3), jnp.bfloat16), jnp.array([0.0, 1.0])
    field = flows.preconditioned(lambda x, t: x, path=flows.vp_path())
    assert field(x, t).dtype == jnp.float32
    gradient = jax.grad(lambda x: jnp.sum(field(x, t)))(jnp.zeros((2, 3)))
    assert np.all(np.isfinite(gradient))
    with pytest.raises(ValueError, match="sigma_data"):
        flows.preconditioned(lambda x, t: x, sigma_data=0.0)


def exact_velocity(x, t):
    """E[x1 | x_t] of the reference's Gaussian mixture gives v = (E[x1 | x_t] - x) / (1 - t)."""
    inputs = REF["inputs"]
    weights, means, covs = (
        jnp.asarray(inputs[k]) for k in ("gmm_weights", "gmm_means", "gmm_covs")
    )
    t = t[0]
    spread = t**2 * covs + (1 - t) ** 2 * jnp.eye(2)[None]
    gap = x[:, None] - t * means[None]
    solved = jnp.einsum("kij,bkj->bki", jnp.linalg.inv(spread), gap)
    log_mass = jnp.log(weights)[None] - 0.5 * (
        jnp.sum(gap * solved, -1) + jnp.linalg.slogdet(spread)[1][None]
    )
    posterior = means[None] + t * jnp.einsum("kij,bkj->bki", covs, solved)
    mean = jnp.einsum("bk,bki->bi", jax.nn.softmax(log_mass, axis=1), posterior)
    return (mean - x) / (1 - t)


def test_euler_steps_along_the_exact_velocity_equal_the_reference(compiled, x64):
    expected = REF["expected"]
    for row in expected["exact_velocity"]:
        if row["t"] < 1:
            v = exact_velocity(jnp.asarray(row["x"]), jnp.full(3, row["t"]))
            np.testing.assert_allclose(v, row["v"], rtol=1e-7)
    z = jnp.asarray(REF["inputs"]["z"])
    coarse = compiled(lambda z: flows.integrate(exact_velocity, z, num_steps=10))(z)
    np.testing.assert_allclose(coarse, expected["euler10_endpoint"], rtol=1e-8)
    # Midpoint steps never ask for the velocity at t = 1, where it is 0 / 0.
    fine = compiled(lambda z: flows.integrate(exact_velocity, z, num_steps=400, method="midpoint"))(
        z
    )
    np.testing.assert_allclose(fine, expected["ode_endpoint"], atol=1e-4)


def test_loss_is_zero_at_the_target_and_its_gradient_is_the_residual(compiled):
    x0, x1 = jax.random.normal(KEY, (2, 6, 3))
    t = jnp.linspace(0.1, 0.9, 6)

    def run(offset):
        return flows.flow_matching_loss(lambda x, t: x1 - x0 + offset, KEY, x0, x1, t=t)

    losses, aux = compiled(run)(jnp.zeros((6, 3)))
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_allclose(aux["speed"], np.sum((x1 - x0) ** 2, axis=1), rtol=1e-6)
    offset = jax.random.normal(jax.random.key(1), (6, 3))
    np.testing.assert_allclose(compiled(run)(offset)[0], np.sum(offset**2, 1), rtol=1e-5)
    slope = jax.grad(lambda o: jnp.sum(run(o)[0]))(offset)
    np.testing.assert_allclose(slope, 2 * offset, rtol=1e-5)


def test_drawn_times_are_uniform_and_bfloat16_losses_are_float32():
    x = jnp.zeros((2000, 1), jnp.bfloat16)
    losses, aux = flows.flow_matching_loss(lambda x, t: x, KEY, x, x)
    assert losses.dtype == jnp.float32
    assert abs(float(jnp.mean(aux["t"])) - 0.5) < 0.02
    assert abs(float(jnp.var(aux["t"])) - 1 / 12) < 0.005


def test_bytes_are_data_and_narrow_points_belong_to_the_time_that_is_heard(unchecked):
    x1 = jnp.asarray([[0, 255], [17, 3]], jnp.uint8)
    pairs = flows.sample_pairs(KEY, x1)
    losses, _ = flows.flow_matching_loss(lambda x, t: 0 * x, KEY, *pairs)
    np.testing.assert_allclose(losses, np.sum((np.float32(x1) - pairs.x0) ** 2, 1), rtol=1e-6)
    # t is 0.75 in bfloat16, which would put the point at 0.25 of its noise end: 256, not 255.
    t, end = jnp.full(1, 0.7511), jnp.full((1, 1), 1024, jnp.bfloat16)
    heard = []
    flows.flow_matching_loss(lambda x, t: heard.append((x, t)) or x, KEY, end, 0 * end, t=t)
    assert heard[0][0].dtype == jnp.bfloat16
    assert (float(heard[0][0][0, 0]), heard[0][1]) == (255, t)


def test_narrow_samples_move_and_integers_are_refused(unchecked):
    x0 = jnp.full((2, 1), 256, jnp.bfloat16)
    pairs = flows.reflow_pairs(lambda x, t: jnp.ones_like(x), x0)
    np.testing.assert_allclose(pairs.x1, 257, rtol=1e-5)
    bent = flows.curvature(lambda x, t: jnp.ones_like(x), x0)
    np.testing.assert_allclose(bent, 0, atol=1e-5)
    for run in (flows.integrate, flows.curvature, flows.reflow_pairs):
        with pytest.raises(TypeError, match="floating dtype, got int32"):
            run(lambda x, t: x, jnp.ones((2, 1), jnp.int32))


@pytest.mark.parametrize("coupling", [assignment, permutation_plan])
def test_coupling_sorts_in_one_dimension(coupling):
    """On the line the optimal pairs are in order; data keep their own order."""
    x1 = jax.random.normal(KEY, (12, 1))
    pairs = flows.sample_pairs(jax.random.key(1), x1, coupling=coupling)
    np.testing.assert_array_equal(pairs.x1, x1)
    order = np.argsort(x1[:, 0])
    assert np.all(np.diff(np.asarray(pairs.x0)[order, 0]) > 0)
    independent = flows.sample_pairs(jax.random.key(1), x1)
    np.testing.assert_allclose(np.sort(independent.x0[:, 0]), np.sort(pairs.x0[:, 0]))


def test_a_plan_is_sampled_by_its_columns():
    plan = jnp.asarray([[0.25, 0.0], [0.25, 0.5]])
    x1, x0 = jnp.zeros((2, 1)), jnp.asarray([[0.0], [1.0]])

    def drawn(key):
        return flows.sample_pairs(key, x1, x0=x0, coupling=lambda _: plan).x0[:, 0]

    share = np.mean(jax.vmap(drawn)(jax.random.split(KEY, 2000)), axis=0)
    np.testing.assert_allclose(share, [0.5, 1.0], atol=0.04)


@pytest.mark.parametrize("coupling", [assignment, permutation_plan])
def test_labelled_pairs_stay_within_the_class(coupling):
    label = jnp.arange(12) % 3
    x1 = jax.random.normal(KEY, (12, 2))
    x0 = jax.random.normal(jax.random.key(1), (12, 2)) + 5 * label[:, None]
    pairs = flows.sample_pairs(KEY, x1, x0=x0, coupling=coupling, label=label)
    for row, kind in zip(pairs.x0, label, strict=True):
        assert int(label[np.argmin(np.sum((x0 - row[None]) ** 2, axis=1))]) == int(kind)
    for kind in range(3):
        mine = np.asarray(label) == kind
        cost = np.sum((np.asarray(x0)[mine][:, None] - np.asarray(x1)[mine][None]) ** 2, -1)
        best = cost[linear_sum_assignment(cost)].sum()
        got = np.sum((np.asarray(pairs.x0) - np.asarray(x1))[mine] ** 2)
        np.testing.assert_allclose(got, best, rtol=1e-5)


@jax.jit
def relative(cost):
    """The entropic plan at a twentieth of the mean cost, as the experiment takes it."""
    return sinkhorn_from_cost(cost, epsilon=0.05 * jnp.mean(cost)).plan()


@pytest.mark.slow
def test_a_conditional_coupling_is_the_class_by_class_one():
    """Its plan, expected cost and all; labels that are traced give it too, by one shifted cost."""
    label = np.arange(60) % 5 // 2  # classes of 24, 24 and 12
    x1, x0 = np.float32(np.random.default_rng(0).normal(size=(2, 60, 2)))
    x1, x0 = jax.device_put((3 + x1, x0))
    seen = []

    def spy(cost):
        seen.append((cost, relative(cost)))
        return seen[-1][1]

    flows.sample_pairs(KEY, x1, x0=x0, coupling=spy, label=jnp.asarray(label))
    assert [cost.shape for cost, _ in seen] == [(24, 24), (24, 24), (12, 12)]
    for kind, (cost, _) in enumerate(seen):
        mine = label == kind
        gaps = np.asarray(x0)[mine][:, None] - np.asarray(x1)[mine][None]
        np.testing.assert_allclose(cost, np.sum(gaps**2, -1), rtol=1e-5)
    seen = [(np.float64(c), np.float64(p)) for c, p in seen]
    apart = sum(float(np.mean(np.sum(c * p, 0) / np.sum(p, 0))) * len(c) for c, p in seen) / 60

    @jax.jit
    def mean_cost(keys, label):
        pairs = lambda key: flows.sample_pairs(key, x1, x0=x0, coupling=relative, label=label)  # noqa: E731
        drawn = jax.lax.map(pairs, keys)
        return jnp.mean(jnp.sum((drawn.x0 - drawn.x1) ** 2, -1))

    # 40 draws of 60 pairs; independent pairs within the classes cost 22.6 where this costs 19.6.
    mean = mean_cost(jax.random.split(KEY, 40), label)
    np.testing.assert_allclose(mean, apart, rtol=0.01)


def test_a_coupling_without_mass_is_an_error_and_traced_nan():
    x = jax.random.normal(KEY, (4, 2))
    whole = jnp.eye(4)
    none = [whole.at[2, 2].set(bad) for bad in (0.0, jnp.nan, jnp.inf, -1.0)]
    for bad in [*none, jnp.asarray([0, 1, 4, 3]), jnp.asarray([0, 1, -1, 3])]:
        with pytest.raises(ValueError, match="1 of 4 neither"):
            flows.sample_pairs(KEY, x, coupling=lambda _, bad=bad: bad)
        traced = jax.jit(lambda p: flows.sample_pairs(KEY, x, x0=x, coupling=lambda _: p).x0)(bad)
        np.testing.assert_array_equal(traced, np.where(np.arange(4)[:, None] == 2, np.nan, x))
    empty = flows.sample_pairs(KEY, x[:0], coupling=relative, label=jnp.arange(0))
    assert empty.x0.shape == (0, 2)


def test_straight_paths_have_no_curvature_and_reflow_keeps_the_ends(compiled):
    x0 = jax.random.normal(KEY, (5, 2))
    straight = compiled(lambda x: flows.curvature(lambda x, t: jnp.ones_like(x), x))(x0)
    np.testing.assert_allclose(straight, 0, atol=1e-9)

    def turning(x, t):
        return jnp.stack([-x[:, 1], x[:, 0]], axis=1)

    # x(t) rotates: |x1 - x0 - v|^2 averages to |x0|^2 (1 - |x1 - x0|^2 / |x0|^2).
    bent = compiled(lambda x: flows.curvature(turning, x, num_steps=2000))(x0)
    square = np.sum(np.asarray(x0) ** 2, 1)
    np.testing.assert_allclose(bent, square * (1 - (2 - 2 * np.cos(1))), rtol=2e-3)
    pairs = flows.reflow_pairs(turning, x0, num_steps=20, method="rk4")
    np.testing.assert_array_equal(pairs.x0, x0)
    turn = np.asarray([[np.cos(1), np.sin(1)], [-np.sin(1), np.cos(1)]])
    np.testing.assert_allclose(pairs.x1, x0 @ turn, atol=1e-5)
    grads = jax.grad(lambda s: jnp.sum(flows.reflow_pairs(lambda x, t: s * x, x0)[1]))(1.0)
    assert grads == 0


def test_bad_input_is_named(unchecked):
    x = jnp.zeros((4, 2))
    narrow = lambda x, t: x[:, :1]  # noqa: E731
    cases = [
        ("shapes must be equal", lambda: flows.sample_pairs(KEY, x, x0=x[:3])),
        ("plan", lambda: flows.sample_pairs(KEY, x, coupling=lambda c: c[:2])),
        ("indices", lambda: flows.sample_pairs(KEY, x, coupling=lambda c: jnp.arange(3))),
        (
            "label",
            lambda: flows.sample_pairs(KEY, x, coupling=lambda c: c, label=jnp.zeros(3, int)),
        ),
        ("shapes must be equal", lambda: flows.interpolate(flows.ot_path(), x, x[:, :1], x[:, 0])),
        (
            "shapes must be equal",
            lambda: flows.flow_matching_loss(lambda x, t: x[:, :1] - 0 * x, KEY, x[:, :1], x),
        ),
        # One number for each example would broadcast in silence.
        (
            r"velocity_fn .* \(4, 2\), got \(4, 1\)",
            lambda: flows.flow_matching_loss(narrow, KEY, x, x),
        ),
        (r"velocity_fn .* \(4, 2\), got \(4, 1\)", lambda: flows.curvature(narrow, x)),
        (r"field .* \(4, 2\), got \(4, 1\)", lambda: flows.integrate(narrow, x)),
        ("t must have shape", lambda: flows.interpolate(flows.ot_path(), x, x, x[:1, 0])),
        ("sigma_min", lambda: flows.ot_path(-0.1)),
        ("beta_min", lambda: flows.vp_path(0.0)),
        ("num_steps", lambda: flows.curvature(lambda x, t: x, x, num_steps=0)),
    ]
    for match, call in cases:
        with pytest.raises(ValueError, match=match):
            call()


def test_numpy_noise_may_be_closed_over_in_jit(unchecked):
    x0, x1 = np.random.default_rng(0).normal(size=(2, 8, 2)).astype(np.float32)
    even = lambda cost: jnp.ones_like(cost)  # noqa: E731
    pairs = jax.jit(lambda key: flows.sample_pairs(key, x1, x0=x0, coupling=even))
    assert np.isin(pairs(jax.random.key(0)).x0, x0).all()
