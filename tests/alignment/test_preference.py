"""Preference losses: reference values and gradients, enumerated optima, extremes, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from genjax import alignment
from genjax.alignment import dpo, f_dpo, hinge, ipo, kto, kto_reference_point, orpo, simpo
from genjax.divergences import F_DIVERGENCES
from tests.alignment.references import load, poison

INPUTS, EXPECTED = load("preference_losses")
NAMES = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
MASKS = tuple(jnp.array(INPUTS[f"mask_{side}"]) for side in ("chosen", "rejected"))
BETA, SMOOTH = INPUTS["beta"], INPUTS["label_smoothing"]


def arrays(dtype=None):
    """The four [batch, time], NaN where masked."""
    masks = (*MASKS, *MASKS)
    pairs = zip(NAMES, masks, strict=True)
    return [poison(np.array(INPUTS[name], dtype), mask) for name, mask in pairs]


LOSSES = {
    "dpo": lambda *x, **w: dpo(*x, beta=BETA, **w),
    "cdpo": lambda *x, **w: dpo(*x, beta=BETA, label_smoothing=SMOOTH, **w),
    "robust_dpo": lambda *x, **w: dpo(*x, beta=BETA, label_smoothing=SMOOTH, robust=True, **w),
    "ipo_sum": lambda *x, **w: ipo(*x, beta=BETA, **w),
    "ipo_mean": lambda *x, **w: ipo(*x, beta=BETA, normalise="mean", **w),
    "hinge": lambda *x, **w: hinge(*x, beta=BETA, **w),
    "simpo": lambda *x, **w: simpo(*x[:2], beta=2.0, gamma=INPUTS["simpo_gamma"], **w),
    "orpo": lambda *x, **w: orpo(*x[:2], weight=INPUTS["orpo_lambda"], **w),
} | {
    f"f_dpo_{name}": lambda *x, name=name, **w: f_dpo(name, *x, beta=BETA, **w)
    for name in ("kl", "reverse_kl", "jensen_shannon", "squared_hellinger", "jeffreys")
}
every = pytest.mark.parametrize("name", LOSSES)


@functools.cache
def compiled(name):
    """(mean, (losses, aux)) and the gradients for the policies: one program for each type."""

    def mean(policies, references, masks):
        losses, aux = LOSSES[name](*policies, *references, where=masks)
        return jnp.mean(losses), (losses, aux)

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


def value_and_gradient(name, policies, references, masks=MASKS):
    return compiled(name)(policies, references, masks)


@every
def test_reference(name, x64):
    """Values and gradients, with NaN at every masked place."""
    x = arrays()
    (_, (losses, aux)), gradients = value_and_gradient(name, x[:2], x[2:])
    np.testing.assert_allclose(losses, EXPECTED["losses"][name], rtol=1e-9, atol=1e-12)
    expected = EXPECTED["grad_of_batch_mean"][name]
    for side, gradient in zip(("policy_chosen", "policy_rejected"), gradients, strict=True):
        np.testing.assert_allclose(gradient, expected[side], rtol=1e-9, atol=1e-12)
    if name == "dpo":
        for side in ("reward_chosen", "reward_rejected"):
            np.testing.assert_allclose(aux[side], EXPECTED[side], rtol=1e-9)
        margin = np.array(EXPECTED["reward_chosen"]) - np.array(EXPECTED["reward_rejected"])
        np.testing.assert_allclose(aux["margin"], margin, rtol=1e-9)
        np.testing.assert_array_equal(aux["accuracy"], margin > 0)


@every
def test_float32_rows_and_hidden_rows(name):
    """Close to the reference in float32; each row for itself; a row hidden whole gives 0."""
    x = arrays(np.float32)
    (_, (losses, _)), _ = value_and_gradient(name, x[:2], x[2:])
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, EXPECTED["losses"][name], rtol=2e-5)
    others = jnp.arange(4)[:, None] != 1
    changed = [jnp.where(others, 1.5 * z - 0.2, z) for z in x]
    masks = MASKS[0].at[2].set(False), MASKS[1]
    (_, (losses, _)), gradients = value_and_gradient(name, changed[:2], changed[2:], masks)
    np.testing.assert_allclose(losses[1], EXPECTED["losses"][name][1], rtol=2e-5)
    assert losses[2] == 0
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[2], 0)


def test_kto_reference(x64):
    settings = INPUTS["kto"]
    weights = settings["desirable_weight"], settings["undesirable_weight"]
    point = kto_reference_point(jnp.array(settings["mismatched_log_ratio"]))
    np.testing.assert_allclose(point, EXPECTED["kto_reference_point"], rtol=1e-12)
    assert kto_reference_point(jnp.array([-1.0, 0.5])) == 0
    kept = kto_reference_point(jnp.array([0.3, jnp.nan]), where=jnp.array([True, False]))
    np.testing.assert_allclose(kept, 0.3)
    x, desirable = arrays(), jnp.arange(8) < 4

    def mean(policies):
        ratios = []
        for policy, reference, mask in zip(policies, x[2:], MASKS, strict=True):
            sums = [alignment.sequence_log_prob(z, where=mask) for z in (policy, reference)]
            ratios.append(sums[0] - sums[1])
        losses, _ = kto(jnp.concatenate(ratios), desirable, point, beta=BETA, weights=weights)
        return jnp.sum(losses) / 4, losses  # of good and of bad responses a mean each

    (_, losses), gradients = jax.value_and_grad(mean, has_aux=True)(x[:2])
    expected = EXPECTED["losses"]["kto_desirable"] + EXPECTED["losses"]["kto_undesirable"]
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    for side, gradient in zip(("policy_chosen", "policy_rejected"), gradients, strict=True):
        expected = np.array(EXPECTED["grad_of_batch_mean"]["kto"][side])
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
    slope = jax.grad(lambda z0: kto(jnp.ones(1), jnp.ones(1, bool), z0)[0][0])(0.3)
    assert slope == 0  # the reference point is a constant


# Five strings that can be listed: their reference, their rewards.
LOG_REF = np.log([0.35, 0.25, 0.2, 0.15, 0.05])
REWARDS = np.array([0.3, -0.4, 0.9, 0.1, -0.8])
PRICE = 0.5
FIRST, SECOND = (m.ravel() for m in np.meshgrid(np.arange(5), np.arange(5), indexing="ij"))


def population(loss):
    """The loss over all pairs of the reference with Bradley-Terry preferences, minimised."""
    log_ref = jnp.asarray(LOG_REF)
    weight = jnp.exp(log_ref[FIRST] + log_ref[SECOND])
    weight = weight * jax.nn.sigmoid(jnp.asarray(REWARDS[FIRST] - REWARDS[SECOND]))

    def total(logits):
        log_p = jax.nn.log_softmax(logits)
        sides = [z[i][:, None] for z in (log_p, log_ref) for i in (FIRST, SECOND)]
        return jnp.sum(weight * loss(*sides, beta=PRICE)[0])

    return solve(total)


def solve(total):
    objective = jax.jit(jax.value_and_grad(total))
    found = minimize(
        lambda z: tuple(np.asarray(v) for v in objective(jnp.asarray(z))),
        LOG_REF,
        jac=True,
        method="BFGS",
        options={"gtol": 1e-10, "maxiter": 2000},
    )
    return np.asarray(jax.nn.softmax(jnp.asarray(found.x)))


def test_the_population_minimiser_of_dpo_is_the_optimum(x64):
    log_p, _ = alignment.optimal_policy(jnp.asarray(LOG_REF), jnp.asarray(REWARDS), beta=PRICE)
    np.testing.assert_allclose(population(dpo), np.exp(log_p), atol=1e-6)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jensen_shannon", "jeffreys"])
def test_the_population_minimiser_of_f_dpo_is_the_optimum(name, x64):
    """It maximises E r - beta D_f(pi || ref), which is minimised here without any preference."""
    log_ref, rewards = jnp.asarray(LOG_REF), jnp.asarray(REWARDS)

    def regularised(logits):
        log_p = jax.nn.log_softmax(logits)
        f = F_DIVERGENCES[name].f_of_log(log_p - log_ref)
        return PRICE * jnp.sum(jnp.exp(log_ref) * f) - jnp.sum(jnp.exp(log_p) * rewards)

    found = population(lambda *x, **beta: f_dpo(F_DIVERGENCES[name], *x, **beta))
    np.testing.assert_allclose(found, solve(regularised), atol=1e-4)
    if name == "kl":
        optimum, _ = alignment.optimal_policy(log_ref, rewards, beta=PRICE)
        np.testing.assert_allclose(found, np.exp(optimum), atol=1e-6)


def test_the_other_losses_have_other_minimisers(x64):
    """What the objectives differ in: IPO's h is half of (p - 1/2) / beta, not r / beta."""
    log_p, _ = alignment.optimal_policy(jnp.asarray(LOG_REF), jnp.asarray(REWARDS), beta=PRICE)
    assert np.abs(population(ipo) - np.exp(log_p)).max() > 0.02


@pytest.mark.parametrize("name", [n for n, e in F_DIVERGENCES.items() if e.slope_of_log])
def test_f_dpo_far_from_the_reference(name):
    """Log-ratios of +-200 give finite losses and gradients, and are counted."""
    far = jnp.array([[-0.1], [-200.1], [-5.0]])

    def mean(policy):
        near = -jnp.ones_like(policy)
        losses, aux = f_dpo(name, policy, near, near, far)
        return jnp.mean(losses), (losses, aux)

    gradient, (losses, aux) = jax.jit(jax.grad(mean, has_aux=True))(far)
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(aux["saturated"], [0, 2, 0])


def test_f_dpo_of_kl_is_dpo_at_any_distance(x64):
    far = -jnp.array([[1.0], [50.0], [300.0]])
    near = -jnp.ones_like(far)
    expected, _ = dpo(far, near, near, far)
    np.testing.assert_allclose(f_dpo("kl", far, near, near, far)[0], expected, rtol=1e-12)


def test_orpo_at_certainty():
    """Odds are infinite at probability 1: the loss and its gradient stay finite."""
    sure, unsure = jnp.zeros((1, 3)), jnp.full((1, 3), -1e3)
    for pair in ((sure, sure), (sure, unsure), (unsure, sure)):
        losses, gradient = jax.value_and_grad(lambda c, r: orpo(c, r)[0][0])(*pair)
        assert np.isfinite(losses)
        assert np.isfinite(gradient).all()


def test_bad_input_is_refused_by_name(unchecked):
    p = -jnp.ones((2, 3))
    for call, message in (
        (lambda: dpo(p, p[:1], p, p), "policy_chosen.*policy_rejected"),
        (lambda: dpo(p, p, p[:, :2], p), "policy_chosen.*reference_chosen"),
        (lambda: dpo(p, p, p, -p), "reference_rejected must hold log-probabilities, at most 0"),
        (lambda: simpo(p, 0.5 + 0 * p), "policy_rejected must hold log-probabilities"),
        (lambda: dpo(p, p, p, p, beta=0.0), "beta must be positive"),
        (lambda: ipo(p, p, p, p, beta=-1.0), "beta must be positive"),
        (lambda: dpo(p, p, p, p, label_smoothing=0.7), "label_smoothing must lie in"),
        (lambda: dpo(p, p, p, p, label_smoothing=0.5, robust=True), "below 0.5 with robust"),
        (lambda: dpo(p, p, p, p, where=jnp.ones((2, 2), bool)), "where must have shape"),
        (lambda: ipo(p, p, p, p, normalise="means"), "did you mean 'mean'"),
        (lambda: f_dpo("total_variation", p, p, p, p), "total_variation has not"),
        (lambda: f_dpo("jensen", p, p, p, p), "jensen_shannon"),
        (lambda: orpo(p, p, weight=0.0), "weight must be positive"),
        (lambda: kto(p[:, 0], jnp.ones(3, bool), 0.0), "log_ratio.*desirable"),
        (lambda: kto(p[:, 0], jnp.ones(2, bool), 0.0, beta=0), "beta must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    # What is masked may hold anything, a positive number too.
    mask = jnp.arange(3)[None] < jnp.array([[2], [3]])
    dpo(p.at[0, 2].set(5.0), p, p, p, where=mask)
