"""Levels of latents against closed forms of linear Gaussian chains, and against `elbo`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from genjax.variational import (
    Level,
    elbo,
    free_nats_kl,
    gaussian_kl_between,
    gaussian_log_likelihood,
    hierarchical_elbo,
    hierarchical_iwae,
    hierarchical_latents,
    hierarchical_sample,
    iwae,
    kl_balance,
)
from tests.variational.references import reference
from tests.variational.test_elbo import X, decode, loose_encode

INPUTS, EXPECTED = reference("hierarchical_linear_gaussian")
KL = reference("free_bits_kl_balance")


def chain(shifts=None):
    """The reference's chain as levels with the exact posterior, moved by constants on request.

    Latents are turned so that the exact conditionals, which are not diagonal, become so; the law of
    x and every divergence stay as they are.
    """
    maps, scales = [None, *INPUTS["A"]], INPUTS["s"]
    w, noise = INPUTS["W"], INPUTS["sx"] ** 2 * np.eye(4)
    parts = []
    for a, s in reversed(list(zip(maps, scales, strict=True))):
        gain = w.T @ np.linalg.inv(noise)  # of x given this level alone
        values, turn = np.linalg.eigh(gain @ w)
        parts.insert(0, {"w": w, "gain": gain, "turn": turn, "a": a, "s": s, "precision": values})
        if a is not None:
            noise, w = noise + s**2 * w @ w.T, w @ a
    levels = []
    for i, part in enumerate(parts):
        turn, s = part["turn"], part["s"]
        before = parts[i - 1]["turn"] if i else None
        forward = None if before is None else turn.T @ part["a"] @ before
        variance = 1 / (1 / s**2 + part["precision"])
        move = 0 if shifts is None else turn.T @ shifts[i]

        def prior(h, forward=forward, s=s):
            mean = h @ forward.T
            return mean, jnp.full_like(mean, 2 * np.log(s))

        def posterior(h, x, i=i, prior=prior, part=part, variance=variance, move=move, s=s):
            mean = prior(h)[0] if i else jnp.zeros((len(x), 2))
            turned = part["w"] @ part["turn"]
            residual = x - mean @ turned.T
            gain = variance[:, None] * (part["turn"].T @ part["gain"])
            dm = (residual @ gain.T + jnp.reshape(move, (1, -1))) / s
            return dm, jnp.broadcast_to(0.5 * np.log(variance)[None] - np.log(s), dm.shape)

        levels.append(Level(prior if i else None, posterior, lambda h, z: z))
    weights = INPUTS["W"] @ parts[-1]["turn"]
    likelihood = lambda x, h: gaussian_log_likelihood(  # noqa: E731
        x, h @ weights.T, 2 * np.log(INPUTS["sx"])
    )
    return (lambda x: [x, x, x]), levels, likelihood


def test_exact_posterior_gives_the_likelihood_whatever_the_sample(x64, key):
    x = jnp.asarray(INPUTS["x"])
    for n in (1, 5):
        losses, aux = jax.jit(lambda k, n=n: hierarchical_iwae(*chain(), k, x, num_samples=n))(key)
        np.testing.assert_allclose(-losses, EXPECTED["log_p"], rtol=1e-10)
        np.testing.assert_allclose(aux["effective_samples"], n, rtol=1e-8)


@pytest.mark.parametrize("shifted", [False, True])
def test_every_term_in_expectation(shifted, x64, monkeypatch):
    """All terms are quadratic in the noise, so 2 n points in n dimensions average them exactly."""
    points = np.sqrt(7) * np.concatenate([np.eye(7), -np.eye(7)])
    noise = np.repeat(points, 3, axis=0)
    parts = iter(np.split(noise, [2, 4], axis=1))
    monkeypatch.setattr(
        "genjax.variational.hierarchical.jax.random.normal", lambda *_: jnp.asarray(next(parts))
    )
    x = jnp.asarray(np.tile(INPUTS["x"], (14, 1)))
    model = chain(INPUTS["mean_shifts"] if shifted else None)
    losses, aux = hierarchical_elbo(*model, jax.random.key(0), x)
    mean = lambda v: np.asarray(v).reshape(14, 3, *v.shape[1:]).mean(0)  # noqa: E731
    name = "shifted" if shifted else "exact"
    np.testing.assert_allclose(mean(aux["kl"]), EXPECTED[f"{name}_kls"], rtol=1e-8)
    reconstruction = EXPECTED[f"{name}_reconstruction"]
    np.testing.assert_allclose(mean(aux["reconstruction"]), reconstruction, rtol=1e-9)
    gap = EXPECTED["log_p"] + mean(losses)
    np.testing.assert_allclose(gap, EXPECTED["gap"] if shifted else 0, rtol=1e-8, atol=1e-9)


def one_level():
    """The flat model of the tests of `elbo`, as a hierarchy."""
    posterior = lambda h, q: (q[0], 0.5 * q[1])  # noqa: E731
    return (
        (lambda x: [loose_encode(x)]),
        [Level(None, posterior, lambda h, z: z)],
        decode,
    )


def test_one_level_is_the_flat_bound(key):
    flat = jax.jit(lambda k: elbo(loose_encode, decode, k, X, beta=0.7))(key)
    levels = jax.jit(lambda k: hierarchical_elbo(*one_level(), k, X, beta=0.7))(key)
    np.testing.assert_array_equal(levels[0], flat[0])
    np.testing.assert_array_equal(levels[1]["kl"][:, 0], flat[1]["kl"])
    flat = jax.jit(lambda k: iwae(loose_encode, decode, k, X, num_samples=6))(key)
    levels = jax.jit(lambda k: hierarchical_iwae(*one_level(), k, X, num_samples=6))(key)
    np.testing.assert_allclose(levels[0], flat[0], rtol=1e-5)
    for name in ("reconstruction", "effective_samples"):
        np.testing.assert_allclose(levels[1][name], flat[1][name], rtol=1e-4)


def network(params):
    """Two levels with everything learnt, of x [batch, 3] and latents of 2 and 4."""

    def two(name, h, dim):
        return jnp.split(jnp.tanh(h @ params[name]), [dim], axis=1)

    top = Level(None, lambda h, f: two("q0", f, 2), lambda h, z: z @ params["up"])
    low = Level(
        lambda h: two("p1", h, 4),
        lambda h, f: two("q1", jnp.concatenate([h, f], 1), 4),
        lambda h, z: jnp.concatenate([h, z], 1),
    )
    likelihood = lambda x, h: gaussian_log_likelihood(x, h @ params["out"])  # noqa: E731
    return (lambda x: [x @ params["in"], x]), [top, low], likelihood


SHAPES = {"in": (3, 5), "q0": (5, 4), "up": (2, 6), "p1": (6, 8), "q1": (9, 8), "out": (10, 3)}
PARAMS = {
    name: 0.5 * jax.random.normal(jax.random.key(i), shape)
    for i, (name, shape) in enumerate(SHAPES.items())
}


@pytest.mark.slow
def test_gradients_by_finite_differences(x64, key):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), PARAMS)
    x = jax.random.normal(key, (4, 3), jnp.float64)
    bounds = {
        "elbo": lambda p: hierarchical_elbo(*network(p), key, x, beta=0.5)[0].sum(),
        "iwae": lambda p: hierarchical_iwae(*network(p), key, x, num_samples=3)[0].sum(),
    }
    for bound in bounds.values():
        check_grads(jax.jit(bound), (params,), order=1, modes=["rev"], rtol=1e-5, eps=1e-5)
        gradient = jax.jit(jax.grad(bound))(params)
        assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_divergence_is_that_of_the_two_gaussians(key):
    """dm and dlog_s are in units of the prior: NVAE's eq. (2) is the general divergence."""
    inputs, expected = KL
    mean, std, dm, ds = (
        jnp.asarray(inputs[k], jnp.float32)[None] for k in ("prior_mean", "prior_std", "dm", "ds")
    )
    general = gaussian_kl_between(mean + std * dm, 2 * jnp.log(std * ds), mean, 2 * jnp.log(std))
    np.testing.assert_allclose(general, expected["residual_kl"].sum(), rtol=1e-5)
    top = Level(None, lambda h, f: (f, 0 * f), lambda h, z: z)
    low = Level(lambda h: (mean, 2 * jnp.log(std)), lambda h, f: (dm, jnp.log(ds)), lambda h, z: z)
    flat = lambda x, h: jnp.zeros(len(x))  # noqa: E731
    aux = hierarchical_elbo(lambda x: [x, x], [top, low], flat, key, jnp.zeros((1, 2)))[1]
    np.testing.assert_allclose(aux["kl"][0], [0, expected["residual_kl"].sum()], rtol=1e-5)


def test_free_nats_and_balance(x64, key):
    inputs, expected = KL
    kl, sizes = jnp.asarray(inputs["kl"]), [int(n) for n in inputs["level_sizes"]]
    free = inputs["free_nats"]
    found = jax.jit(lambda kl: free_nats_kl(kl, free))(kl)
    np.testing.assert_allclose(found.mean(0), expected["minibatch_form"], rtol=1e-11)
    gradient = jax.grad(lambda kl: free_nats_kl(kl, free).sum(1).mean())
    np.testing.assert_allclose(gradient(kl), expected["grad_minibatch_total"], rtol=1e-11)
    below = kl.at[:, 1].multiply(0.5)  # its mean is .48: no gradient
    np.testing.assert_array_equal(gradient(below)[:, 1], 0)
    np.testing.assert_array_equal(free_nats_kl(kl, 0.0), kl)
    balance = kl_balance(kl, sizes)
    np.testing.assert_allclose(balance, expected["balance"], rtol=1e-11)
    np.testing.assert_allclose((kl * balance[None]).sum(1), expected["balanced_total"], rtol=1e-11)
    np.testing.assert_array_equal(jax.grad(lambda k: kl_balance(k, sizes).sum())(kl), 0)
    np.testing.assert_array_equal(kl_balance(0 * kl, sizes), 1)
    # Over devices the means are of the whole batch.
    split = jnp.reshape(kl, (6, 1, 3))
    whole = jax.vmap(
        lambda k: (free_nats_kl(k, free, axis_name="i"), kl_balance(k, sizes, axis_name="i")),
        axis_name="i",
    )(split)
    np.testing.assert_allclose(whole[0][:, 0], found, rtol=1e-12)
    np.testing.assert_allclose(whole[1][0], balance, rtol=1e-12)


def test_training_options_leave_the_bounds_parts_alone(key):
    """Free nats and balancing change the loss; aux is the raw bound's."""
    x = jax.random.normal(key, (6, 3))
    bound = jax.jit(
        lambda **options: hierarchical_elbo(*network(PARAMS), key, x, **options),
        static_argnames=("free_nats", "balance"),
    )
    plain, free, balanced = bound(), bound(free_nats=3.0), bound(balance=True)
    for other in (free, balanced):
        np.testing.assert_allclose(other[1]["kl"], plain[1]["kl"], rtol=1e-6)
    kl, reconstruction = plain[1]["kl"], plain[1]["reconstruction"]
    expected = np.maximum(kl.mean(0), 3.0).sum() - reconstruction.mean()
    np.testing.assert_allclose(free[0].mean(), expected, rtol=1e-5)
    weights = kl_balance(kl, [2, 4])
    np.testing.assert_allclose(balanced[0], (kl * weights[None]).sum(1) - reconstruction, rtol=1e-5)


def test_samples_in_law_and_by_index(key):
    """The chain's x has the covariance of its closed form; row i is the same in any batch."""
    _, levels, _ = chain()
    to_float32 = lambda f: jax.tree.map(lambda x: x.astype(jnp.float32), f)  # noqa: E731
    levels = [
        level
        if level.prior is None
        else level._replace(prior=lambda h, p=level.prior: to_float32(p(h)))
        for level in levels
    ]
    draw = jax.jit(
        lambda k, t, n: hierarchical_sample(k, levels, (n, 2), temperature=t), static_argnums=2
    )
    h, latents = draw(key, 1.0, 40_000)
    np.testing.assert_array_equal(h, latents[-1])
    a, s = INPUTS["A"], INPUTS["s"]
    covariance = s[0] ** 2 * np.eye(2)
    covariance = a[0] @ covariance @ a[0].T + s[1] ** 2 * np.eye(2)
    covariance = a[1] @ covariance @ a[1].T + s[2] ** 2 * np.eye(3)
    # Turned latents have the same determinant and trace.
    found = np.cov(np.asarray(h).T)
    np.testing.assert_allclose(np.trace(found), np.trace(covariance), rtol=0.03)
    np.testing.assert_allclose(np.linalg.det(found), np.linalg.det(covariance), rtol=0.06)
    few = draw(key, 1.0, 3)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:3], rtol=1e-5), few, latents)
    # A linear chain: half the temperature halves everything.
    half = draw(key, 0.5, 3)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.5 * b, rtol=1e-5), half, few)


def test_latents_given_take_the_place_of_draws(key):
    bottom_up, levels, _ = network(PARAMS)
    x = jax.random.normal(key, (4, 3))
    latents = hierarchical_latents(bottom_up, levels, key, x)
    assert [z.shape for z in latents] == [(4, 2), (4, 4)]
    h, whole = hierarchical_sample(key, levels, (4, 2), latents=latents)
    jax.tree.map(np.testing.assert_array_equal, whole, latents)
    _, upper = hierarchical_sample(key, levels, (4, 2), latents=latents[:1])
    np.testing.assert_array_equal(upper[0], latents[0])
    assert np.abs(upper[1] - latents[1]).min() > 0
    assert h.shape == (4, 10)


def test_bad_input(key, unchecked):
    bottom_up, levels, likelihood = network(PARAMS)
    x = jnp.zeros((4, 3))

    def bound(levels=levels, bottom_up=bottom_up, likelihood=likelihood, x=x, **options):
        return hierarchical_elbo(bottom_up, levels, likelihood, key, x, **options)

    with pytest.raises(ValueError, match="levels must be at least one"):
        bound(levels=[])
    with pytest.raises(ValueError, match=r"levels\[0\].prior must be None"):
        bound(levels=levels[1:])
    with pytest.raises(ValueError, match="one feature for each of 2 levels, got 1"):
        bound(bottom_up=lambda x: [x])
    wide = levels[1]._replace(prior=lambda h: (h[:, :3], h[:, :3]))
    with pytest.raises(ValueError, match=r"levels\[1\].prior\(h\)\[0\] \(4, 3\)"):
        bound(levels=[levels[0], wide])
    odd = levels[1]._replace(posterior=lambda h, f: (h[:, :4], h[:, :2]))
    with pytest.raises(ValueError, match=r"levels\[1\].posterior\(h, feature\)\[1\] \(4, 2\)"):
        bound(levels=[levels[0], odd])
    with pytest.raises(ValueError, match=r"log_likelihood\(x, h\) must have shape \(4,\)"):
        bound(likelihood=lambda x, h: h)
    with pytest.raises(ValueError, match="x must be finite"):
        bound(x=x * jnp.nan)
    for name in ("beta", "free_nats"):
        with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
            bound(**{name: -1.0})
    for temperature in (0.0, -1.0):
        with pytest.raises(ValueError, match="temperature must be positive and finite"):
            hierarchical_sample(key, levels, (4, 2), temperature=temperature)
    with pytest.raises(ValueError, match=r"latents\[0\] must have shape \(4, 2\), got \(4, 3\)"):
        hierarchical_sample(key, levels, (4, 2), latents=[x])
    with pytest.raises(ValueError, match="latents must be at most 2 levels', got 3"):
        hierarchical_sample(key, levels, (4, 2), latents=[x] * 3)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        hierarchical_iwae(bottom_up, levels, likelihood, key, x, num_samples=0)
    with pytest.raises(ValueError, match="sizes must have shape"):
        kl_balance(jnp.ones((2, 3)), [1, 2])


def test_what_is_not_said_is_seen():
    """NaN is no free divergence; a lower level without a prior has no shape to draw."""
    assert np.isnan(free_nats_kl(jnp.array([[jnp.nan, 2.0]]), 1.0)[0, 0])
    top = Level(None, lambda h, f: (f, 0 * f), lambda h, z: z)
    with pytest.raises(ValueError, match=r"levels\[1\].prior must be a function"):
        hierarchical_sample(jax.random.key(0), [top, top], (4, 2))


def test_balance_may_end_in_a_compiled_step():
    """As a number of the step: outside the warm-up the loss is the bound again."""
    x = jnp.asarray(np.array(INPUTS["x"]), jnp.float32)

    def loss(**options):
        return hierarchical_elbo(*chain(), jax.random.key(0), x, **options)[0]

    run = jax.jit(lambda now: loss(balance=now))
    np.testing.assert_allclose(run(True), loss(balance=True), rtol=1e-5)
    np.testing.assert_allclose(run(False), loss(), rtol=1e-5)
    assert not np.allclose(run(True), run(False))
