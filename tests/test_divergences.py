"""The table against reference numbers, numerical suprema and quadrature in float64."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.divergences import F_DIVERGENCES, f_divergence
from tests.adversarial.references import NAMES, load

REFERENCE = load("fdiv_generators_conjugates")["expected"]
POLYNOMIAL = ["gan", "jensen_shannon", "total_variation", "pearson"]
names = pytest.mark.parametrize("name", F_DIVERGENCES)


def test_the_keys():
    assert list(F_DIVERGENCES) == list(NAMES)


@names
def test_generator_conjugate_and_activation_meet_the_reference(name, x64, compiled):
    entry, expected = F_DIVERGENCES[name], REFERENCE[NAMES[name]]
    functions = (
        (entry.f, "u", "f"),
        (entry.conjugate, "t", "fstar_t"),
        (entry.activation, "v", "act_v"),
        (entry.conjugate_activation, "v", "fstar_act_v"),
        (lambda v: entry.conjugate(entry.activation(v)), "v", "fstar_act_v"),
    )

    @compiled
    def run(at):
        values = [function(at[of]) for function, of, _ in functions]
        return values, entry.f_of_log(jnp.log(at["u"])), entry.f(jnp.ones(()))

    at = {of: np.array(expected[of], np.float64) for of in "utv"}
    values, of_log, at_one = run(jax.device_put(at))
    for got, (_, _, of) in zip(values, functions, strict=True):
        np.testing.assert_allclose(got, expected[of], rtol=1e-9, atol=1e-9, err_msg=of)
    upper = expected["dom_fstar_sup"]
    assert entry.domain[1] == pytest.approx(math.inf if upper == "inf" else upper)
    np.testing.assert_allclose(of_log, expected["f"], rtol=1e-9, atol=1e-12)
    # f(1) = 0, and -log 4 for gan.
    np.testing.assert_allclose(at_one, -math.log(4) if name == "gan" else 0, atol=1e-15)


@names
def test_the_conjugate_is_the_supremum(name, x64):
    entry = F_DIVERGENCES[name]
    u = np.concatenate([[0.0], np.geomspace(1e-9, 1e9, 400_001)])
    t = np.linspace(-6, min(entry.domain[1] - 0.02, 3), 23)
    run = jax.jit(lambda u, t, out: (entry.f(u), entry.conjugate(t), entry.conjugate(out)))
    values, got, beyond = map(np.asarray, run(u, t, np.float64(entry.domain[1] + 0.01)))
    supremum = np.max(t[:, None] * u[None] - values[None], axis=1)
    np.testing.assert_allclose(got, supremum, rtol=1e-7, atol=1e-7)
    # Above the domain the supremum is infinite.
    if math.isfinite(entry.domain[1]):
        assert np.isposinf(beyond)


@names
def test_fenchel_young(name, x64):
    """f*(f'(u)) = u f'(u) - f(u), f*'(f'(u)) = u, and f(u) + f*(t) >= u t for every pair."""
    entry = F_DIVERGENCES[name]
    u = np.array([0.01, 0.2, 0.7, 0.99, 1.3, 4.0, 60.0])

    @jax.jit
    def run(u):
        slope = jax.vmap(jax.grad(entry.f))(u)
        t = entry.activation(jnp.linspace(-3, 3, 25))
        gap = entry.f(u)[:, None] + entry.conjugate(t)[None, :] - u[:, None] * t[None, :]
        back = jax.vmap(jax.grad(entry.conjugate))(slope)
        right = u * slope - entry.f(u)
        return entry.conjugate(slope), right, back, gap.min(), entry.f(jnp.array(-0.1))

    left, right, back, gap, outside = run(u)
    np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9)
    if name != "total_variation":  # every u < 1 shares one slope there
        np.testing.assert_allclose(back, u, rtol=1e-7)
    assert gap > -1e-9
    assert outside == np.inf


@names
def test_activation_increases_onto_the_domain_and_inverts_the_slope(name, x64):
    entry = F_DIVERGENCES[name]
    ratio = np.array([0.02, 0.5, 1.0, 3.0, 40.0])

    @jax.jit
    def run(v, ratio):
        t = entry.activation(v)
        slope = jax.vmap(jax.grad(entry.f))(ratio)
        return t, entry.conjugate(t), slope, entry.activation(entry.optimal_critic(ratio))

    v = np.append(np.linspace(-12, 12, 401), [35.0, -1e4])
    t, conjugate, slope, best = (np.asarray(z) for z in run(v, ratio))
    assert np.all(np.diff(t[:-2]) > 0)
    assert t[:-2].max() < entry.domain[1]
    assert np.all(np.isfinite(conjugate[:-2]))
    if math.isfinite(entry.domain[1]):
        assert t[-2] == pytest.approx(entry.domain[1], abs=1e-12)
    low = -0.5 if name == "total_variation" else entry.domain[0]
    assert t[-1] == low or t[-1] <= -4999
    np.testing.assert_allclose(best, slope, rtol=1e-9, atol=1e-12)


@names
def test_large_scores_stay_finite(name, compiled):
    entry = F_DIVERGENCES[name]
    size = 1e4 if name in POLYNOMIAL else 80.0
    v = np.array([-size, -size / 2, -1e-30, 0.0, 1e-30, size / 2, size]).astype(jnp.bfloat16)

    @compiled
    def run(v):
        functions = (entry.activation, entry.conjugate_activation)
        slope = [jax.grad(lambda v, f=f: f(v.astype(jnp.float32)).sum())(v) for f in functions]
        return [f(v.astype(jnp.float32)) for f in functions], slope

    for found in jax.tree.leaves(run(jax.device_put(v))):
        assert np.all(np.isfinite(np.float32(found)))


@names
def test_stable_form_has_the_right_gradient_far_out(name, x64):
    """The float32 gradient of the composite against the float64 one of f*(g(v))."""
    entry = F_DIVERGENCES[name]
    v = np.array([-14.0, -5.0, -1.0, 0.3, 2.0, 9.0, 14.0])
    composite = jax.grad(lambda v: entry.conjugate(entry.activation(v)))
    exact = jax.jit(jax.vmap(composite))(v)
    stable = jax.jit(jax.vmap(jax.grad(entry.conjugate_activation)))(v.astype(np.float32))
    assert stable.dtype == jnp.float32
    # jax differentiates expm1 as expm1 + 1, to a rounding of 1, in the squared Hellinger distance.
    np.testing.assert_allclose(stable, exact, rtol=2e-5, atol=1e-7 if "hellinger" in name else 0)


def test_jeffreys_conjugate_has_second_derivatives(x64):
    # f*'(t) = u(t) with log u + 1 - 1/u = t, so f*''(t) = 1 / (1/u + 1/u^2).
    u = np.array([0.05, 0.5, 1.0, 2.0, 30.0])
    t = np.log(u) + 1 - 1 / u
    second = jax.jit(jax.vmap(jax.grad(jax.grad(F_DIVERGENCES["jeffreys"].conjugate))))(t)
    np.testing.assert_allclose(second, 1 / (1 / u + 1 / u**2), rtol=1e-9)


# --- divergences between known densities -------------------------------------------------------


def gaussian(mean, std):
    return lambda x: -0.5 * jnp.square((x - mean) / std) - jnp.log(std) - 0.5 * jnp.log(2 * jnp.pi)


def mixture(x):
    return jnp.logaddexp(
        math.log(0.3) + gaussian(-2.0, 0.6)(x), math.log(0.7) + gaussian(1, 1.0)(x)
    )


def grid(low, high, nodes):
    x = jnp.linspace(low, high, nodes)
    return x, lambda x: jnp.full(x.shape, -math.log(nodes * float(high - low) / (nodes - 1)))


@names
def test_gaussian_pairs_meet_the_reference(name, x64, compiled):
    reference = load("fdiv_gaussian_pairs")
    pairs = zip(reference["inputs"]["P_mean_std"], reference["inputs"]["Q_mean_std"], strict=True)

    @compiled
    def run(p, q):
        x, log_proposal = grid(-60, 60, 100_001)
        return f_divergence(name, gaussian(*p), gaussian(*q), x, log_proposal=log_proposal)

    for (p, q), expected in zip(pairs, reference["expected"]["values"], strict=True):
        expected = expected[NAMES[name]]
        if expected == "inf":
            continue
        value = run(jax.device_put(np.array(p)), jax.device_put(np.array(q)))
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-9)


@names
def test_discrete_laws_meet_the_reference(name, x64):
    """Sums over a finite set, disjoint supports and one-sided zeros included."""
    reference = load("fdiv_discrete")
    pairs = zip(reference["inputs"]["P"], reference["inputs"]["Q"], strict=True)

    @jax.jit
    def run(p, q):
        return f_divergence(
            name,
            lambda x: jnp.log(p)[x.astype(int)],
            lambda x: jnp.log(q)[x.astype(int)],
            jnp.arange(4.0),
            log_proposal=lambda x: jnp.full(x.shape, -math.log(4)),
        )

    for (p, q), values in zip(pairs, reference["expected"]["values"], strict=True):
        values["gan"] = 2 * values["js"] - math.log(4)
        expected = float(values[NAMES[name]])
        value = run(np.array(p, np.float64), np.array(q, np.float64))
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-14)


@names
def test_samples_of_q_and_of_the_midpoint_agree_with_the_closed_form(name, key):
    p, q = (0.3, 2.0), (0.1, 1.8)
    index = load("fdiv_gaussian_pairs")["inputs"]["P_mean_std"].index([0.3, 2.0])
    expected = load("fdiv_gaussian_pairs")["expected"]["values"][index][NAMES[name]]

    def midpoint(x):
        return jnp.logaddexp(gaussian(*p)(x), gaussian(*q)(x)) - math.log(2)

    @jax.jit
    def run(key):
        noise = jax.random.normal(key, (200_000,))
        half = jnp.where(jnp.arange(noise.size) % 2 == 0, p[0] + p[1] * noise, q[0] + q[1] * noise)
        from_q = f_divergence(name, gaussian(*p), gaussian(*q), q[0] + q[1] * noise)
        return from_q, f_divergence(name, gaussian(*p), gaussian(*q), half, log_proposal=midpoint)

    from_q, value = run(key)
    np.testing.assert_allclose(from_q, expected, atol=4e-3)
    np.testing.assert_allclose(value, expected, atol=2e-3)


def test_far_densities_do_not_underflow():
    """Reverse KL from Q's samples is finite in float32 where p/q underflows."""
    x = np.float32(20 + np.random.default_rng(0).normal(size=4096))
    divergence = partial(f_divergence, "reverse_kl", gaussian(0.0, 1.0), gaussian(20.0, 1.0))
    value = jax.jit(divergence)(x)
    np.testing.assert_allclose(value, 200, rtol=0.02)


@names
def test_gradient_by_the_densities_parameters(name, x64):
    """d/dm D(N(m, 1) || N(0, 1.5^2)) by autodiff against central differences of the value."""

    def divergence(m):
        x, log_proposal = grid(-25, 25, 20_001)
        return f_divergence(
            name, gaussian(m, 1.0), gaussian(0.0, 1.2), x, log_proposal=log_proposal
        )

    m, h = 0.4, 1e-4
    run = jax.jit(jax.value_and_grad(divergence))
    numerical = (float(run(m + h)[0]) - float(run(m - h)[0])) / (2 * h)
    np.testing.assert_allclose(run(m)[1], numerical, rtol=1e-4)


@names
def test_bound_at_the_optimal_critic_is_the_divergence(name, x64):
    """Tight at V*, below for others; between Gaussians, and a mixture and a Gaussian."""
    entry = F_DIVERGENCES[name]
    x, step = np.linspace(-12, 12, 24_001), 24 / 24_000
    cases = [(gaussian(0.0, 1.0), gaussian(1.0, 1.1)), (mixture, gaussian(0.2, 1.7))]
    for log_p, log_q in cases:
        if name in ("neyman", "reverse_kl", "jeffreys"):  # these need P wider than Q
            log_p, log_q = log_q, log_p

        @jax.jit
        def run(x, log_p=log_p, log_q=log_q):
            p, q = jnp.exp(log_p(x)), jnp.exp(log_q(x))
            best = entry.optimal_critic(p / q)
            finite = jnp.clip(best, -8, 8)
            others = (0 * x, 0.5 * finite, finite + 0.5, finite + jnp.sin(3 * x), -finite)
            # One by one and summed in numpy: XLA on CPU (jaxlib 0.10.2) takes expm1 for odd where
            # expm1(v) and expm1(-v) meet in one sum.
            terms = [(p * entry.activation(v), q * entry.conjugate_activation(v))
                     for v in (best, *others)]  # fmt: skip
            return q * entry.f(p / q), terms

        exact, terms = run(x)
        exact = step * np.sum(exact)
        bound, *others = (step * (np.sum(of_p) - np.sum(of_q)) for of_p, of_q in terms)
        np.testing.assert_allclose(bound, exact, rtol=1e-5, atol=1e-5)
        assert all(other < exact for other in others)


def test_masked_samples_may_be_nan():
    x = np.array([0.5, np.nan, -0.3], np.float32)
    divergence = jax.jit(partial(f_divergence, "kl", gaussian(0.0, 1.0), gaussian(0.5, 1.0)))
    value = divergence(x, where=np.array([True, False, True]))
    np.testing.assert_allclose(value, divergence(x[[0, 2]]), rtol=1e-6)
    assert divergence(x, where=np.zeros(3, bool)) == 0


@names
def test_samples_of_q_are_never_below_the_least_value(name):
    """Close laws, float32, from Q's own samples: D = f''(1) / 2 chi^2 to second order."""
    delta = 1e-3
    x = jnp.asarray(np.random.default_rng(1).normal(size=20_000), jnp.float32)
    entry, floor = F_DIVERGENCES[name], -math.log(4) if name == "gan" else 0.0

    @jax.jit
    def estimate(delta, scale):
        p = lambda x: -0.5 * jnp.square(x - delta)  # noqa: E731
        return f_divergence(name, p, lambda x: -0.5 * jnp.square(x) * scale, x)

    with jax.enable_x64(True):
        curvature = float(jax.jit(jax.grad(jax.grad(entry.f)))(1.0))
    value = float(estimate(delta, 1.0))
    if name == "total_variation":
        expected = 2 * (0.5 * (1 + math.erf(delta / 2 / math.sqrt(2)))) - 1
    else:
        expected = curvature / 2 * delta**2
    np.testing.assert_allclose(value - floor, expected, rtol=0.05, atol=2e-7 if floor else 0)
    for tiny in (0.0, 1e-8, 1e-7, -3e-7, 1e-5):
        assert estimate(tiny, 1.0) >= floor - 1e-6 * bool(floor)
        assert estimate(tiny, 1 + tiny) >= floor - 1e-6 * bool(floor)


@names
def test_the_centred_forms_have_all_derivatives(name, x64):
    """Across the switch to the series: values and two derivatives of f(u) - f'(1) (u - 1)."""
    entry = F_DIVERGENCES[name]
    slope = {"kl": 1.0, "reverse_kl": -1.0, "gan": -math.log(2)}.get(name, 0.0)

    def ours(log_ratio):  # one atom of Q-mass 1
        p, q = (lambda x: x), (lambda x: 0 * x)
        return f_divergence(name, p, q, log_ratio[None])

    def definition(log_ratio):
        u = jnp.exp(log_ratio)
        return entry.f(u) - slope * (u - 1)

    @partial(jax.jit, static_argnums=0)
    def orders(f, at):
        def first(x):
            value, slope = jax.value_and_grad(f)(x)
            return slope, value

        (slope, value), second = jax.vmap(jax.value_and_grad(first, has_aux=True))(at)
        return value, slope, second

    at = np.array([-3.0, -0.51, -0.49, -0.251, -0.249, -0.1, 0.2, 0.3, 0.6, 2.0])
    pairs = zip(orders(ours, at), orders(definition, at), strict=True)
    for order, (found, expected) in enumerate(pairs):
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-12, err_msg=str(order))


def test_fisher_information_is_the_hessian_at_equal_laws():
    """d^2/dm^2 KL(N(m, 1) || N(0, 1)) at 0 from Q's samples: the mean of the squared score."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=4000), jnp.float32)
    for name, curvature in (("kl", 1), ("reverse_kl", 1), ("jensen_shannon", 0.25)):
        value = lambda m, n=name: f_divergence(n, gaussian(m, 1.0), gaussian(0.0, 1.0), x)  # noqa: E731
        hessian = jax.jit(jax.grad(jax.grad(value)))(0.0)
        np.testing.assert_allclose(hessian, curvature * np.mean(np.square(x)), rtol=1e-4)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("js", "jensen_shannon"),
        ("hellinger", "squared_hellinger"),
        ("tv", "total_variation"),
        ("chi2", "pearson"),
    ],
)
def test_the_field_s_other_names_are_answered_by_ours(alias, name):
    normal = gaussian(0.0, 1.0)
    with pytest.raises(ValueError, match=f"got '{alias}'; did you mean '{name}'"):
        f_divergence(alias, normal, normal, jnp.zeros(3))


def test_bad_input(unchecked):
    x = jnp.zeros(3)
    normal = gaussian(0.0, 1.0)
    with pytest.raises(ValueError, match=r"kl.*reverse_kl.*did you mean 'jensen_shannon'"):
        f_divergence("jensen_shanon", normal, normal, x)
    with pytest.raises(ValueError, match=r"log_q\(samples\) must have shape \(3,\)"):
        f_divergence("kl", normal, lambda x: normal(x)[:, None], x)
    with pytest.raises(ValueError, match="at least one"):
        f_divergence("kl", normal, normal, x[:0])


@names
def test_slope_of_log(name, x64):
    """f'(e^l) = g(V*(e^l)), and the derivative of f at e^l; total variation has none."""
    entry, log = F_DIVERGENCES[name], np.linspace(-6, 6, 25)
    if name == "total_variation":
        assert entry.slope_of_log is None
        return

    @jax.jit
    def run(log):
        u = jnp.exp(log)
        expected = entry.activation(entry.optimal_critic(u))
        return entry.slope_of_log(log), expected, jax.vmap(jax.grad(entry.f))(u)

    found, expected, derivative = run(log)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found, derivative, rtol=1e-8, atol=1e-9)
    # In float32 too, where e^l is 1 up to rounding, and where it overflows.
    large = 80.0 if name != "pearson" else 40.0
    found = jax.jit(entry.slope_of_log)(np.array([1e-6, 0.0, large], np.float32))
    curvature = jax.jit(jax.grad(jax.grad(entry.f)))(1.0)
    np.testing.assert_allclose(found[0] - found[1], curvature * 1e-6, rtol=0.2)
    assert np.isfinite(found[2])
