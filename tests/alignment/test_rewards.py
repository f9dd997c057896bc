"""Reward models and KL rewards: references, enumeration, closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.alignment import (
    adapt_beta,
    bradley_terry,
    kl_rewards,
    optimal_policy,
    plackett_luce,
    ranked_bradley_terry,
)
from tests.alignment.references import load, poison


def test_bradley_terry_reference(x64):
    inputs, expected = load("reward_model_bradley_terry")
    chosen, rejected = (jnp.asarray(inputs[name]) for name in ("r_chosen", "r_rejected"))

    def mean(chosen):
        losses, aux = bradley_terry(chosen, rejected)
        return jnp.mean(losses), (losses, aux)

    gradient, (losses, aux) = jax.jit(jax.grad(mean, has_aux=True))(chosen)
    np.testing.assert_allclose(losses, expected["loss_per_pair"], rtol=1e-11)
    np.testing.assert_allclose(gradient, expected["grad_r_chosen"], rtol=1e-11)
    np.testing.assert_allclose(np.mean(aux["accuracy"]), expected["accuracy"], rtol=1e-11)
    chance = jax.nn.sigmoid(aux["difference"])
    np.testing.assert_allclose(chance, expected["p_chosen"], rtol=1e-11)
    losses, _ = bradley_terry(chosen, rejected, margin=jnp.asarray(inputs["margin"]))
    np.testing.assert_allclose(np.mean(losses), expected["margin_loss"], rtol=1e-11)
    rewards, ranking = jnp.asarray(inputs["r_K"]), jnp.asarray(inputs["ranking_best_to_worst"])
    found = plackett_luce(rewards, ranking)
    np.testing.assert_allclose(found, expected["plackett_luce_nll"], rtol=1e-11)
    found = ranked_bradley_terry(rewards, ranking)
    np.testing.assert_allclose(found, expected["kwise_pairwise_loss"], rtol=1e-11)


def test_rankings_have_probabilities_that_sum_to_one(x64):
    """All 24 orders of four; of two, Plackett-Luce is Bradley-Terry."""
    orders = jnp.array(list(itertools.permutations(range(4))))
    rewards = jnp.broadcast_to(jnp.array([[0.3, -1.2, 2.0, 0.1]]), orders.shape)
    loss = jax.jit(lambda r: plackett_luce(r, orders))
    np.testing.assert_allclose(np.exp(-loss(rewards)).sum(), 1, rtol=1e-12)
    gradient = jax.jit(jax.grad(lambda r: plackett_luce(r, orders).sum()))(rewards)
    step = np.zeros(rewards.shape)
    step[5, 2] = 1e-6
    above, below = (loss(rewards + s * step)[5] for s in (1, -1))
    slope = (above - below) / 2e-6
    np.testing.assert_allclose(gradient[5, 2], slope, rtol=1e-6)
    pair = rewards[:1, :2]
    expected, _ = bradley_terry(pair[:, 1], pair[:, 0])
    for loss in (plackett_luce, ranked_bradley_terry):
        np.testing.assert_allclose(loss(pair, jnp.array([[1, 0]])), expected, rtol=1e-12)


def test_kl_rewards_reference(x64):
    inputs, expected = load("rlhf_kl_reward_and_optimum")
    mask = jnp.array(inputs["mask"], bool)
    log_p, log_ref = (poison(np.array(inputs[n]), mask) for n in ("logp_policy", "logp_ref"))
    options = {"beta": inputs["beta"], "where": mask}
    found = jax.jit(lambda p, q, s: kl_rewards(p, q, s, **options))(
        log_p, log_ref, jnp.asarray(inputs["score"])
    )
    np.testing.assert_allclose(found, expected["token_rewards"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.sum(1), expected["sequence_total"], rtol=1e-10)
    assert not np.any(jax.grad(lambda p: kl_rewards(p, p, p[:, 0], **options).sum())(log_p))


def test_optimum_reference(x64):
    inputs, expected = load("rlhf_kl_reward_and_optimum")
    log_ref, rewards = jnp.log(jnp.asarray(inputs["pi_ref"])), jnp.asarray(inputs["r"])
    log_p, value = optimal_policy(log_ref, rewards, beta=inputs["beta2"])
    np.testing.assert_allclose(np.exp(log_p), expected["pi_star"], rtol=1e-10)
    np.testing.assert_allclose(value, expected["optimal_value"], rtol=1e-10)
    reached = jnp.sum(jnp.exp(log_p) * (rewards - inputs["beta2"] * (log_p - log_ref)))
    np.testing.assert_allclose(reached, value, rtol=1e-10)
    # A reference without some string; a reward of the size that exp alone overflows at.
    log_p, value = optimal_policy(
        jnp.log(jnp.array([0.0, 0.5, 0.5])), 1e4 * jnp.arange(3.0), beta=1
    )
    np.testing.assert_allclose(np.exp(log_p), [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(value, 2e4 - np.log(2), rtol=1e-12)


def test_adapt_beta():
    for kl, expected in ((0.1, 0.5), (1.0, 1.0), (1.4, 1.0), (1.6, 2.0), (0.7, 1.0)):
        np.testing.assert_allclose(
            jax.jit(lambda kl: adapt_beta(1.0, kl, target=1.0))(kl), expected
        )


def test_bad_input_is_refused_by_name(unchecked):
    p, r = -jnp.ones((2, 3)), jnp.ones(3)
    for call, message in (
        (lambda: bradley_terry(r, r[:2]), "chosen.*rejected"),
        (lambda: bradley_terry(p, p), "chosen must have rank 1"),
        (lambda: bradley_terry(r, r, margin=r[:2]), "margin must have shape"),
        (lambda: plackett_luce(p, jnp.array([[0, 1, 1], [0, 1, 2]])), "permutation of 0 .. 2"),
        (lambda: plackett_luce(p, jnp.ones((2, 2), int)), "rewards.*ranking"),
        (lambda: kl_rewards(p, p, r[:2], beta=0.0), "beta must be positive"),
        (lambda: kl_rewards(-p, p, r[:2], beta=0.1), "log_p must hold log-probabilities"),
        (lambda: kl_rewards(p, p, r, beta=0.1), "score must have shape"),
        (lambda: optimal_policy(r, r[:2], beta=1), "log_ref.*rewards"),
        (lambda: optimal_policy(r, r, beta=-1), "beta must be positive"),
        (lambda: adapt_beta(1.0, 1.0, target=0.0), "target must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
