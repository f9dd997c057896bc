"""Objectives against reference losses, each other, quadrature and a slow numpy MINE."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm, wasserstein_distance

from genjax.adversarial import (
    F_DIVERGENCES,
    donsker_varadhan,
    f_gan,
    gan,
    hinge,
    least_squares,
    nwj,
    wasserstein,
)
from tests.adversarial.references import NAMES, load
from tests.test_divergences import POLYNOMIAL, gaussian

MINIBATCH = load("gan_minibatch_losses")
REAL = np.array(MINIBATCH["inputs"]["V_real"])
FAKE = np.array(MINIBATCH["inputs"]["V_fake"])
ALL = {
    **{name: lambda r, f, w=None, n=name: f_gan(n, r, f, where=w) for name in F_DIVERGENCES},
    "saturating": lambda r, f, w=None: gan(r, f, where=w, saturating=True),
    "donsker_varadhan": lambda r, f, w=None: donsker_varadhan(r, f, where=w),
    "mine": lambda r, f, w=None: donsker_varadhan(r, f, where=w, log_average=jnp.array(0.1)),
    "nwj": lambda r, f, w=None: nwj(r, f, where=w),
    "wasserstein": lambda r, f, w=None: wasserstein(r, f, where=w),
    "hinge": lambda r, f, w=None: hinge(r, f, where=w),
    "least_squares": lambda r, f, w=None: least_squares(r, f, where=w),
}
every = pytest.mark.parametrize("objective", ALL.values(), ids=list(ALL))


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_f_gan_meets_the_reference(name, x64, compiled):
    expected = MINIBATCH["expected"]["fgan_objective_to_maximise"]
    entry = F_DIVERGENCES[name]

    @compiled
    def run(r, f):
        t = entry.activation(f)
        return f_gan(name, r, f), f_gan(entry, r, f, saturating=True), t, entry.conjugate(t)

    got, saturating, t, conjugate = run(jnp.asarray(REAL), jnp.asarray(FAKE))
    if name == "jensen_shannon":  # the reference has twice ours
        np.testing.assert_allclose(2 * got.bound, expected["js_unhalved"], rtol=1e-11)
    elif name != "jeffreys":
        np.testing.assert_allclose(got.bound, expected[NAMES[name]], rtol=1e-11)
    assert got.critic == -got.bound
    np.testing.assert_allclose(got.generator, -np.mean(t), rtol=1e-12)
    np.testing.assert_allclose(saturating.generator, -np.mean(conjugate), rtol=1e-9)


def test_other_losses_meet_the_reference(x64, compiled):
    expected = MINIBATCH["expected"]["other"]
    real, fake = jnp.asarray(REAL), jnp.asarray(FAKE)

    def everything(r, f):
        return gan(r, f), gan(r, f, saturating=True), wasserstein(r, f), hinge(r, f), least_squares(
            r, f
        )  # fmt: skip

    plain, saturating, w, h, ls = compiled(everything)(real, fake)
    for got, name in (
        (plain.bound, "gan_value"),
        (plain.critic, "gan_disc_bce"),
        (plain.generator, "gen_nonsaturating"),
        (saturating.generator, "gen_saturating"),
        (w.critic, "wgan_critic_loss"),
        (w.generator, "wgan_gen_loss"),
        (h.critic, "hinge_disc"),
        (h.generator, "hinge_gen"),
        (ls.critic, "lsgan_disc"),
        (ls.generator, "lsgan_gen"),
    ):
        np.testing.assert_allclose(got, expected[name], rtol=1e-11, err_msg=name)


def test_generator_gradients_saturate_or_not():
    """d/dv log(1 - sigmoid) = -sigmoid(v), d/dv -log sigmoid = -(1 - sigmoid(v))."""
    v, real = np.float32([-12.0, -1.0, 0.5, 3.0]), np.zeros(4, np.float32)

    @partial(jax.jit, static_argnums=2)
    @partial(jax.grad, argnums=1)
    def slope(real, fake, saturating):
        return gan(real, fake, saturating=saturating).generator

    np.testing.assert_allclose(slope(real, v, False), -expit(-v) / 4, rtol=1e-5)
    np.testing.assert_allclose(slope(real, v, True), -expit(v) / 4, rtol=1e-5)


def test_donsker_varadhan_and_nwj_meet_the_reference(x64):
    """Expectations by quantile midpoints, a quadrature rule with equal weights."""
    reference = load("donsker_varadhan_nwj")
    (mp, sp), (mq, sq) = reference["inputs"]["P"], reference["inputs"]["Q"]
    expected = reference["expected"]
    # A million quantile midpoints of each law are an equal-weight quadrature rule.
    u = norm.ppf((np.arange(1_000_000) + 0.5) / 1_000_000)
    log_ratio = lambda x: gaussian(mp, sp)(x) - gaussian(mq, sq)(x)  # noqa: E731
    critics = {
        "zero": lambda x: jnp.zeros_like(x),
        "linear": lambda x: 0.7 * x - 0.1,
        "quad": lambda x: 0.2 * x + 0.1 * x**2 - 0.3,
        "scaled_opt": lambda x: 0.8 * log_ratio(x),
        "opt": log_ratio,
        "opt_plus_3": lambda x: log_ratio(x) + 3,
    }

    @jax.jit
    def run(u):
        x, y = mp + sp * u, mq + sq * u
        scores = {name: (critic(x), critic(y)) for name, critic in critics.items()}
        best = nwj(1 + log_ratio(x), 1 + log_ratio(y))
        return {name: (donsker_varadhan(*s), nwj(*s)) for name, s in scores.items()}, best

    found, best = run(u)
    for name, (dv, fk) in found.items():
        np.testing.assert_allclose(dv.bound, expected["bounds"][name]["dv"], atol=2e-4)
        np.testing.assert_allclose(fk.bound, expected["bounds"][name]["fgan_kl"], atol=1e-3)
        assert fk.bound <= dv.bound + 1e-12
        assert dv.bound <= expected["kl"] + 2e-4
        np.testing.assert_allclose(dv.critic, -dv.bound)
    np.testing.assert_allclose(best.bound, expected["kl"], atol=2e-4)


def test_nwj_is_never_above_donsker_varadhan():
    """log m <= m / e, with equality at m = e: any scores, also those for which both bounds meet."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 2, 30)) * np.geomspace(1e-3, 10, 200)[:, None, None]

    @jax.jit
    @jax.vmap
    def bounds(scores):
        return donsker_varadhan(*scores).bound, nwj(*scores).bound

    for shift in (-5.0, 0.0, 1.0, 3.0):
        dv, below = jax.device_get(bounds(np.float32(scores) + np.float32(shift)))
        assert np.all(below <= dv + 1e-5 * (1 + np.abs(dv)))


def test_donsker_varadhan_ignores_a_constant_even_a_large_one():
    bound = jax.jit(lambda r, f, c: donsker_varadhan(r + c, f + c).bound)
    real, fake = np.float32(REAL), np.float32(FAKE)
    plain = bound(real, fake, 0.0)
    for shift in (-1e4, 1e4):
        moved = bound(real, fake, shift)
        np.testing.assert_allclose(moved, plain, atol=4e-3)  # 1e4 has a spacing of 1e-3


def test_mine_gradient_against_numpy(x64, compiled):
    """Three steps of the moving average, in numpy, in the linear domain."""
    decay, real = 0.9, jnp.asarray(REAL)
    state, average = jnp.array(-jnp.inf), None
    step = compiled(
        jax.value_and_grad(
            lambda f, state: (
                (out := donsker_varadhan(real, f, log_average=state, decay=decay)).critic,
                out,
            ),
            has_aux=True,
        )
    )
    for scale in (1.0, 0.4, 2.0):
        fake = scale * FAKE
        mean = np.mean(np.exp(fake))
        average = mean if average is None else decay * average + (1 - decay) * mean
        (critic, out), slope = step(jnp.asarray(fake), state)
        np.testing.assert_allclose(slope, np.exp(fake) / fake.size / average, rtol=1e-12)
        np.testing.assert_allclose(critic, np.log(mean) - np.mean(REAL), rtol=1e-12)
        np.testing.assert_allclose(critic, -out.bound, rtol=1e-12)
        np.testing.assert_allclose(out.log_average, np.log(average), rtol=1e-12)
        state = out.log_average
    # Without an average: the gradient of the batch's own log mean.
    slope = compiled(jax.grad(lambda f: donsker_varadhan(real, f).critic))(jnp.asarray(FAKE))
    np.testing.assert_allclose(slope, np.exp(FAKE) / np.exp(FAKE).sum(), rtol=1e-12)


def test_a_batch_without_fakes_leaves_the_running_average(key):
    scores, nothing = np.float32([0.3, -0.2]), np.zeros(2, bool)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def step(real, fake, average):
        out = donsker_varadhan(real, fake, log_average=average, where=(None, jnp.asarray(nothing)))
        return out.critic, out

    for average in np.float32([5.0, -np.inf]):
        (critic, out), slopes = step(scores, scores, average)
        assert out.log_average == average
        np.testing.assert_allclose(critic, -np.mean(scores), rtol=1e-6)
        np.testing.assert_allclose(slopes, [[-0.5, -0.5], [0, 0]])
    # The last decay below 1 takes a jump.
    jump = jax.jit(lambda r, f, a: donsker_varadhan(r, f, log_average=a, decay=1 - 1e-7))
    assert np.isfinite(jump(scores, scores + 200, np.float32(0)).log_average)


def test_hinge_and_least_squares_bound_their_divergences(x64):
    """Tight at sign(p - q) and p / (p + q); samples weighted by repetition of a discrete law."""
    counts_p, counts_q = np.array([1, 2, 3, 4, 0]), np.array([4, 3, 1, 1, 1])
    p, q = counts_p / 10, counts_q / 10
    x, y = np.repeat(np.arange(5), counts_p), np.repeat(np.arange(5), counts_q)
    total_variation = 0.5 * np.abs(p - q).sum()
    triangular = 0.5 * np.sum((p - q) ** 2 / (p + q))
    for loss, best, distance in (
        (hinge, np.sign(p - q), total_variation),
        (least_squares, p / (p + q), triangular),
    ):
        bound = jax.jit(lambda r, f, loss=loss: loss(r, f).bound)
        tight = bound(best[x], best[y])
        np.testing.assert_allclose(tight, distance, rtol=1e-12)
        other = best + 0.1 * np.cos(np.arange(5))
        assert bound(other[x], other[y]) < distance


def test_wasserstein_bound_at_the_optimal_potential(x64):
    """|F_P - F_Q| integrates to W1; f' = sign(F_Q - F_P) attains it."""
    x, y = np.array([0.0, 1.0, 3.0]), np.array([-1.0, 2.0, 5.0])
    grid = np.sort(np.concatenate([x, y]))
    gap = (y[:, None] <= grid[:-1]).mean(0) - (x[:, None] <= grid[:-1]).mean(0)
    potential = np.concatenate([[0], np.cumsum(np.sign(gap) * np.diff(grid))])
    real, fake = (np.interp(v, grid, potential) for v in (x, y))
    got = jax.jit(wasserstein)(real, fake)
    np.testing.assert_allclose(got.bound, wasserstein_distance(x, y), rtol=1e-12)
    np.testing.assert_allclose(got.generator, -fake.mean(), rtol=1e-15)


@every
def test_masks_drop_examples_and_their_nan(objective, compiled):
    real, fake = np.float32(REAL[:5]), np.float32(FAKE)
    keep = np.array([True, True, False, True, False])
    broken = np.where(keep, real, np.float32(np.nan)), np.where(keep, fake, np.float32(np.nan))

    @compiled
    def run(real, fake, broken, keep):
        masked = [objective(*broken, where) for where in (keep, (keep, keep))]
        slope = jax.grad(lambda r, f: objective(r, f, keep).critic, (0, 1))(*broken)
        one_side = objective(real, broken[1], (None, keep))
        return masked, slope, one_side, objective(real, fake, jnp.zeros(5, bool))

    masked, slope, one_side, none = run(*jax.tree.map(jnp.asarray, (real, fake, broken, keep)))
    kept = compiled(objective)(jnp.asarray(real[keep]), jnp.asarray(fake[keep]))
    for got in masked:
        for name in ("critic", "generator", "bound"):
            np.testing.assert_allclose(getattr(got, name), getattr(kept, name), rtol=1e-5)
    assert np.all(np.isfinite(slope))
    assert np.all(np.where(keep, 0, slope[0]) == 0)
    np.testing.assert_allclose(one_side.generator, kept.generator, rtol=1e-5)
    assert np.all(np.isfinite([none.critic, none.generator, none.bound]))


@every
def test_losses_are_float32_under_bfloat16(objective):
    real, fake = REAL.astype(jnp.bfloat16), FAKE.astype(jnp.bfloat16)
    wide = [a.astype(np.float32) for a in (real, fake)]
    run = jax.jit(lambda narrow, wide: (objective(*narrow), objective(*wide)))
    got, exact = run((real, fake), wide)
    assert got.critic.dtype == got.bound.dtype == jnp.float32
    np.testing.assert_allclose(got.critic, exact.critic, rtol=1e-6)


@pytest.mark.parametrize(("name", "objective"), ALL.items(), ids=list(ALL))
def test_extreme_scores(name, objective):
    exponential = (name in F_DIVERGENCES and name not in POLYNOMIAL) or name in ("nwj", "mine")
    size = 80.0 if exponential else 1e4

    @jax.jit
    def run(real, fake):
        return [
            jax.value_and_grad(lambda r, f, loss=loss: getattr(objective(r, f), loss), (0, 1))(
                real, fake
            )
            for loss in ("critic", "generator")
        ]

    for real_sign, fake_sign in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        found = run(
            np.full(4, np.float32(real_sign * size)), np.full(4, np.float32(fake_sign * size))
        )
        for value, slope in found:
            assert np.isfinite(value)
            assert np.all(np.isfinite(slope))


def test_bad_input(unchecked):
    scores = jnp.zeros(4)
    with pytest.raises(ValueError, match=r"'jensen_shannon'.*did you mean 'pearson'"):
        f_gan("person", scores, scores)
    for loss in (gan, wasserstein, hinge, least_squares, nwj, donsker_varadhan):
        with pytest.raises(ValueError, match=r"real_scores must be one score.*\(4, 1\)"):
            loss(scores[:, None], scores)
        with pytest.raises(ValueError, match=r"fake_scores must be one score.*\(\)"):
            loss(scores, jnp.zeros(()))
        with pytest.raises(ValueError, match="fake_scores must hold at least one"):
            loss(scores, scores[:0])
        with pytest.raises(TypeError, match="floating"):
            loss(scores.astype(int), scores)
        with pytest.raises(ValueError, match="where for fake_scores"):
            loss(scores, jnp.zeros(3), where=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="decay"):
        donsker_varadhan(scores, scores, decay=1.5)
    with pytest.raises(ValueError, match="decay must be below 1"):
        donsker_varadhan(scores, scores, decay=1.0)
    with pytest.raises(ValueError, match="did you mean 'total_variation'"):
        f_gan("tv", scores, scores)
    assert math.isclose(gan(scores, scores).critic, 2 * math.log(2), rel_tol=1e-6)


def test_a_decay_next_to_1_is_refused(unchecked):
    """In float32 it is 1, where the average would be of nothing."""
    scores, average = jnp.ones(4), jnp.zeros(())
    with pytest.raises(ValueError, match="decay must be below 1"):
        donsker_varadhan(scores, scores, log_average=average, decay=1 - 1e-8)
    found = donsker_varadhan(scores, scores, log_average=average, decay=1 - 1e-6)
    assert np.isfinite(found.log_average)
