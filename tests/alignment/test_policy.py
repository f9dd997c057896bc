"""Policy losses: reference values and gradients, PPO by a loop, expected gradients, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.alignment import group_advantages, kl_estimate, leave_one_out, policy_loss, value_loss
from tests.alignment.references import load, poison

INPUTS, EXPECTED = load("group_policy_losses")
MASK = jnp.array(INPUTS["mask"])
TOKENS = int(MASK.sum())
CLIP = INPUTS["clip_low"], INPUTS["clip_high"]
DIVISORS = {
    "sequence_mean": "length",
    "token_mean": TOKENS / len(MASK),
    "constant": INPUTS["max_length"],
}


def arrays():
    names = ("log_probs", "old_log_probs", "ref_log_probs")
    return [poison(np.array(INPUTS[name]), MASK) for name in names]


def grpo(log_p, old, ref, divisor):
    advantages = group_advantages(jnp.asarray(INPUTS["rewards"])).ravel()
    options = {"clip": CLIP, "ref": ref, "beta": INPUTS["beta"], "divisor": divisor}
    return policy_loss(log_p, old, advantages, where=MASK, **options)


@pytest.mark.parametrize("name", DIVISORS)
def test_token_level_reference(name, x64):
    log_p, old, ref = arrays()

    def mean(log_p):
        losses, aux = grpo(log_p, old, ref, DIVISORS[name])
        return jnp.mean(losses), (losses, aux)

    gradient, (losses, aux) = jax.jit(jax.grad(mean, has_aux=True))(log_p)
    np.testing.assert_allclose(losses, EXPECTED["losses"][name], rtol=1e-9, atol=1e-12)
    expected = EXPECTED["grad_of_batch_mean"][name]
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)
    lengths = MASK.sum(1)
    binding = np.sum(aux["clip_fraction"] * lengths) / TOKENS
    np.testing.assert_allclose(binding, EXPECTED["clip_fraction"], rtol=1e-9)
    k3 = np.where(MASK, np.array(EXPECTED["k3"]), 0).sum(1) / lengths
    np.testing.assert_allclose(aux["kl"], k3, rtol=1e-9)
    ratios = np.where(MASK, np.array(EXPECTED["token_ratio"]), 0).sum(1) / lengths
    np.testing.assert_allclose(aux["ratio"], ratios, rtol=1e-9)


def test_sequence_level_reference(x64):
    log_p, old, _ = arrays()
    advantages = group_advantages(jnp.asarray(INPUTS["rewards"])).ravel()
    clip = INPUTS["sequence_clip_low"], INPUTS["sequence_clip_high"]

    def mean(log_p):
        options = {"where": MASK, "clip": clip, "level": "sequence"}
        losses, aux = policy_loss(log_p, old, advantages, **options)
        return jnp.mean(losses), (losses, aux)

    gradient, (losses, aux) = jax.jit(jax.grad(mean, has_aux=True))(log_p)
    expected = EXPECTED["gspo"]
    np.testing.assert_allclose(aux["ratio"], expected["ratio"], rtol=1e-9)
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-9)
    np.testing.assert_allclose(gradient, expected["grad_of_batch_mean"], rtol=1e-9, atol=1e-12)


def test_advantages_reference(x64):
    rewards = jnp.asarray(INPUTS["rewards"])
    for name, found in (
        ("grpo", group_advantages(rewards)),
        ("dr_grpo", group_advantages(rewards, scale="none")),
        ("rloo", leave_one_out(rewards)),
    ):
        np.testing.assert_allclose(found.ravel(), EXPECTED["advantages"][name], rtol=1e-9)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimates(kind, x64):
    """Reference values, and the expected gradient of each as a loss on the policy's own samples."""
    log_p, ref = (np.asarray(INPUTS[name]) for name in ("log_probs", "ref_log_probs"))
    found = jax.jit(kl_estimate, static_argnums=2)(log_p, ref, kind)
    np.testing.assert_allclose(found, EXPECTED[kind], rtol=1e-9, atol=1e-14)
    categorical = INPUTS["categorical"]
    logits, log_ref = np.array(categorical["logits"]), np.log(categorical["reference"])
    p = np.exp(logits) / np.exp(logits).sum()

    def expected_loss(logits):
        estimate = kl_estimate(jax.nn.log_softmax(logits)[None], jnp.asarray(log_ref)[None], kind)
        return jnp.sum(p * estimate[0])

    gradient = jax.jit(jax.grad(expected_loss))(logits)
    expected = EXPECTED["kl_gradients"][f"expected_grad_{kind}"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)


def test_k3_near_zero_and_far_away():
    """exp(-l) - 1 + l cancels: l^2 / 2 at l = 1e-4 in float32. Far away nothing overflows."""
    small = np.float32([[1e-4, -1e-4, 0.0]])
    estimate = jax.jit(kl_estimate)
    found = estimate(small, np.zeros_like(small))
    np.testing.assert_allclose(found, small**2 / 2, rtol=1e-4)
    close = np.float32(1e-8 * np.random.default_rng(0).normal(size=(1, 500)))
    assert np.all(np.asarray(estimate(close, np.zeros_like(close))) >= 0)  # never negative
    far = np.float32([[-1e3, 1e3, -np.inf]])
    reference = np.float32([[0.0, 0.0, -np.inf]])
    run = jax.jit(jax.value_and_grad(lambda x: jnp.sum(kl_estimate(x, jnp.asarray(reference)))))
    value, gradient = run(far)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_ppo_by_a_loop(x64):
    """Per-token advantages, against the sum of eq. (7) written out token by token."""
    rng = np.random.default_rng(0)
    log_p, old = -rng.exponential(size=(2, 3, 5))
    advantages = rng.normal(size=(3, 5))
    mask = jnp.asarray(rng.random((3, 5)) < 0.7)
    expected = np.zeros(3)
    for i, t in np.argwhere(mask):
        ratio = np.exp(log_p[i, t] - old[i, t])
        held = min(max(ratio, 0.8), 1.2)
        expected[i] -= min(ratio * advantages[i, t], held * advantages[i, t])
    given = [poison(x, mask) for x in (log_p, old, advantages)]
    losses, aux = policy_loss(*given, where=mask)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    assert aux["saturated"].sum() == 0
    alone, _ = policy_loss(*(x[1:2] for x in given), where=mask[1:2])
    np.testing.assert_allclose(alone[0], losses[1], rtol=1e-12)


def test_the_mean_policy_gradient_is_the_exact_gradient(x64):
    """On the policy, leave-one-out advantages of all pairs of samples give grad E r exactly."""
    logits, rewards = jnp.array([0.3, -0.2, 0.8, 0.1]), jnp.array([1.0, -0.5, 0.2, 2.0])
    first, second = (m.ravel() for m in jnp.meshgrid(jnp.arange(4), jnp.arange(4)))
    pairs = jnp.stack([first, second], 1)
    p = jax.nn.softmax(logits)
    weights = p[first] * p[second]
    advantages = leave_one_out(rewards[pairs])
    old = jnp.log(p)[pairs].reshape(-1, 1)

    def surrogate(logits):
        log_p = jax.nn.log_softmax(logits)[pairs].reshape(-1, 1)
        losses, _ = policy_loss(log_p, old, advantages.ravel())
        return -jnp.sum(weights * jnp.mean(losses.reshape(-1, 2), axis=1))

    exact = jax.grad(lambda logits: jnp.sum(jax.nn.softmax(logits) * rewards))(logits)
    np.testing.assert_allclose(jax.jit(jax.grad(surrogate))(logits), exact, rtol=1e-10)


def test_extreme_ratios_are_held_and_counted():
    log_p, old = jnp.array([[-0.1, -90.0], [-1.0, -1.0]]), jnp.array([[-90.0, -0.1], [-1.0, -1.0]])

    def mean(log_p):
        losses, aux = policy_loss(log_p, old, jnp.array([-1.0, 1.0]))
        return jnp.mean(losses), (losses, aux)

    gradient, (losses, aux) = jax.jit(jax.grad(mean, has_aux=True))(log_p)
    assert np.isfinite(losses).all()
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(aux["saturated"], [2, 0])
    # No gradient flows to what drew the tokens, nor to the advantages.
    slope = jax.jit(jax.grad(lambda old: policy_loss(log_p, old, old[:, 0])[0].sum()))(old)
    assert not np.any(slope)


def test_rows_without_tokens_and_groups_without_spread():
    losses, aux = policy_loss(*3 * [jnp.full((2, 3), jnp.nan)], where=jnp.zeros((2, 3), bool))
    np.testing.assert_array_equal(losses, 0)
    assert all(np.isfinite(x).all() for x in aux.values())
    sequence = {"where": jnp.zeros((2, 3), bool), "level": "sequence", "divisor": "length"}
    losses, _ = policy_loss(*2 * [jnp.full((2, 3), jnp.nan)], jnp.ones(2), **sequence)
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_array_equal(group_advantages(jnp.full((1, 4), 0.5)), 0)


def test_value_loss(x64):
    rng = np.random.default_rng(1)
    values, returns, old = rng.normal(size=(3, 2, 4))
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 1, 1]], bool)
    given = [poison(x, mask) for x in (values, returns)]
    plain, _ = value_loss(*given, where=mask)
    expected = np.where(mask, (values - returns) ** 2, 0)
    np.testing.assert_allclose(plain, expected.sum(1), rtol=1e-12)
    held = old + np.clip(values - old, -0.2, 0.2)
    clipped = np.where(mask, np.maximum((values - returns) ** 2, (held - returns) ** 2), 0)
    options = {"old": poison(old, mask), "clip": 0.2, "where": mask, "divisor": "length"}
    losses, aux = value_loss(*given, **options)
    np.testing.assert_allclose(losses, clipped.sum(1) / 3, rtol=1e-12)
    np.testing.assert_allclose(aux["clip_fraction"], (clipped > expected).sum(1) / 3)
    gradient = jax.grad(lambda v: value_loss(v, given[1], where=mask)[0].sum())(given[0])
    np.testing.assert_allclose(gradient, np.where(mask, 2 * (values - returns), 0), rtol=1e-12)


def test_bad_input_is_refused_by_name(unchecked):
    p, a = -jnp.ones((2, 3)), jnp.ones(2)
    for call, message in (
        (lambda: policy_loss(p, p[:1], a), "log_p.*old"),
        (lambda: policy_loss(p, p, jnp.ones(3)), "advantages must have shape"),
        (lambda: policy_loss(p, p, p, level="sequence"), "advantages must have shape"),
        (lambda: policy_loss(p, p, a, level="tokens"), "did you mean 'token'"),
        (lambda: policy_loss(p, p, a, beta=0.1), "needs ref"),
        (lambda: policy_loss(p, p, a, ref=p, beta=-0.1), "beta must be at least 0"),
        (lambda: policy_loss(p, p, a, ref=p, beta=0.1, kl="k4"), "kind must be one of"),
        (lambda: policy_loss(p, p, a, divisor=0.0), "divisor must be positive"),
        (lambda: policy_loss(p, p, a, divisor="row"), "divisor must be one of"),
        (lambda: group_advantages(jnp.ones((4, 1))), "at least 2 responses"),
        (lambda: leave_one_out(jnp.ones((4, 1))), "at least 2 responses"),
        (lambda: group_advantages(jnp.ones((4, 2)), scale="mean"), "scale must be one of"),
        (lambda: value_loss(p, p, clip=0.2), "needs old"),
        (lambda: kl_estimate(p, p[:1]), "log_p.*log_ref"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
