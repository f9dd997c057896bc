"""Relativistic pairs: a recorded R3GAN step, and the best critic by quadrature."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.adversarial import r1_penalty, r2_penalty, relativistic

REF = json.loads((Path(__file__).parents[1] / "references" / "relativistic_r3gan.json").read_text())
GIVEN, EXPECTED = REF["inputs"], REF["expected"]


def test_the_critics_and_the_generators_step_meet_the_reference(compiled, x64):
    """Both penalties in the critic's loss; gradients for its first layer and for the fakes."""
    real, fake, w1, b1, w2 = (jnp.asarray(GIVEN[k]) for k in ("real", "fake", "W1", "b1", "w2"))

    def critic_loss(w1):
        score = lambda x: jnp.tanh(x @ w1 + b1[None]) @ w2  # noqa: E731
        penalties = r1_penalty(score, real), r2_penalty(score, fake)
        losses = relativistic(score(real), score(fake))
        total = losses.critic + GIVEN["gamma"] / 2 * sum(jnp.mean(p) for p in penalties)
        return total, (penalties, losses)

    def generator_loss(fake):
        score = lambda x: jnp.tanh(x @ w1 + b1[None]) @ w2  # noqa: E731
        return relativistic(score(real), score(fake)).generator

    run = compiled(jax.value_and_grad(critic_loss, has_aux=True))
    (total, ((r1, r2), losses)), by_w1 = run(w1)
    generator, by_fake = compiled(jax.value_and_grad(generator_loss))(fake)
    found = {
        "r1": r1, "r2": r2, "critic_total": total, "grad_W1_critic_total": by_w1,
        "generator_loss": generator, "grad_fake_generator": by_fake,
    }  # fmt: skip
    for name, value in found.items():
        np.testing.assert_allclose(value, EXPECTED[name], rtol=1e-9, atol=1e-11, err_msg=name)
    np.testing.assert_allclose(losses.critic, np.mean(EXPECTED["critic_pairs"]), rtol=1e-9)
    np.testing.assert_allclose(losses.bound, np.log(2) - losses.critic, rtol=1e-12)


def test_the_log_ratio_is_the_best_critic(x64):
    """p = N(0, 1), q = N(m, 1): D(x) - D(y) = m (y - x), with y - x ~ N(m, 2), by quadrature."""
    m = 1.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x, y = (jnp.asarray(z.ravel()) for z in np.meshgrid(nodes, m + nodes))
    mass = np.outer(weights, weights).ravel() / (2 * np.pi)

    def loss(scale, bend):
        score = lambda x: scale * (m**2 / 2 - m * x) + bend * x**2  # noqa: E731
        pairs = jax.vmap(lambda x, y: relativistic(score(x)[None], score(y)[None]).critic)(x, y)
        return jnp.sum(mass * pairs)

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, slopes = run(1.0, 0.0)
    gap = m * (m + np.sqrt(2) * nodes)
    np.testing.assert_allclose(value, weights @ np.logaddexp(0, -gap) / np.sqrt(2 * np.pi), 1e-7)
    np.testing.assert_allclose(slopes, 0, atol=1e-7)
    for other in ((0.8, 0.0), (1.2, 0.0), (1.0, 0.1)):
        assert run(*other)[0] > value


def test_pairs_have_one_length(unchecked):
    with pytest.raises(ValueError, match=r"shapes must be equal, got real_scores \(2,\)"):
        relativistic(jnp.zeros(2), jnp.zeros(3))


def test_sure_critics_have_finite_losses():
    far = jnp.asarray([1e4, -1e4])
    slope = jax.grad(lambda s: relativistic(s, -s).critic)(far)
    np.testing.assert_allclose(slope, [0, -1], atol=1e-6)
    np.testing.assert_allclose(relativistic(far, -far).generator, 1e4)
