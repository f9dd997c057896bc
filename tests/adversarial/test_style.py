"""Path lengths against a recorded Jacobian and a linear generator; mixing and lazy terms."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import adversarial as ga

FILE = Path(__file__).parents[1] / "references" / "path_length_penalty.json"
REF = json.loads(FILE.read_text())
KEY = jax.random.key(0)


def test_penalties_and_their_gradient_meet_the_reference(compiled, x64):
    w, w1, w2, y = (jnp.asarray(REF["inputs"][k]) for k in ("w", "W1", "W2", "y"))

    def loss(w2):
        make = lambda w: (jnp.tanh(w @ w1) @ w2).reshape(y.shape)  # noqa: E731
        options = {"mean": REF["inputs"]["running_mean"], "decay": REF["inputs"]["decay"]}
        found = ga.path_length_penalty(make, w, y, **options)
        return jnp.mean(found.penalties), found

    (mean, found), gradient = compiled(jax.value_and_grad(loss, has_aux=True))(w2)
    expected = REF["expected"]
    np.testing.assert_allclose(found.penalties, expected["penalties"], rtol=1e-9)
    np.testing.assert_allclose(found.mean, expected["new_running_mean"], rtol=1e-9)
    np.testing.assert_allclose(mean, expected["mean_penalty"], rtol=1e-9)
    np.testing.assert_allclose(gradient, expected["grad_W2"], rtol=1e-9, atol=1e-11)


def test_a_linear_generator_has_lengths_in_closed_form(x64):
    """|A^T y| / sqrt(h w); of many layers the root of the mean over them."""
    a = jax.random.normal(KEY, (3, 4, 2 * 5 * 2))
    y = jax.random.normal(jax.random.key(1), (6, 2, 5, 2))
    w = jnp.ones((6, 3, 4))
    make = lambda w: jnp.einsum("bli,lio->bo", w, a).reshape(y.shape)  # noqa: E731
    penalties, mean = jax.jit(lambda w: ga.path_length_penalty(make, w, y, mean=0.0, decay=1.0))(w)
    slopes = np.einsum("lio,bo->bli", a, np.asarray(y).reshape(6, -1)) / np.sqrt(10)
    lengths = np.sqrt((slopes**2).sum(-1).mean(-1))
    np.testing.assert_allclose(mean, lengths.mean(), rtol=1e-12)
    np.testing.assert_allclose(penalties, (lengths - lengths.mean()) ** 2, rtol=1e-9)


def test_a_generator_without_slope_has_a_finite_gradient():
    y = jnp.ones((2, 4, 4, 1))
    make = lambda a: lambda w: jnp.sum(a * w, axis=1)[:, None, None, None] * y  # noqa: E731
    loss = lambda a: jnp.sum(  # noqa: E731
        ga.path_length_penalty(make(a), jnp.ones((2, 3)), y, mean=1.0).penalties
    )
    assert np.isfinite(jax.grad(loss)(0.0))


def test_styles_cross_once_at_every_layer_alike():
    first, second = jnp.zeros((9000, 2)), jnp.ones((9000, 2))
    mixed = np.asarray(ga.mix_styles(KEY, first, second, layers=4))[:, :, 0]
    assert (np.diff(mixed, axis=1) >= 0).all()
    assert (mixed[:, 0] == 0).all()
    share = [np.mean(mixed.sum(1) == k) for k in range(4)]
    np.testing.assert_allclose(share, [0.1, 0.3, 0.3, 0.3], atol=0.02)


def test_truncation_and_the_mean_style():
    w, mean = jax.random.normal(KEY, (5, 3)), jnp.asarray([1.0, 2.0, 3.0])
    np.testing.assert_allclose(ga.truncate(w, mean, 1.0), w, rtol=1e-6)
    np.testing.assert_allclose(ga.truncate(w[:, None], mean, 0.0)[:, 0], mean[None] + 0 * w)
    moved = ga.mean_style(mean, w, decay=0.9)
    np.testing.assert_allclose(moved, 0.9 * mean + 0.1 * w.mean(0), rtol=1e-6)


def test_a_lazy_term_has_the_same_mean_and_gradient():
    run = jax.jit(
        jax.value_and_grad(lambda a, step: ga.every_nth(step, 4, lambda: a**2), argnums=0)
    )
    values, slopes = zip(*(run(3.0, step) for step in range(8)), strict=True)
    np.testing.assert_allclose(values, [36, 0, 0, 0] * 2)
    np.testing.assert_allclose(slopes, [24, 0, 0, 0] * 2)


def test_what_does_not_fit_is_refused_by_name(unchecked):
    make = lambda w: jnp.zeros((2, 4, 4, 1))  # noqa: E731
    with pytest.raises(ValueError, match="noise must have shape"):
        ga.path_length_penalty(make, jnp.zeros((2, 3)), jnp.zeros((2, 4, 4)), mean=0.0)
    with pytest.raises(ValueError, match="w must have rank 2 or 3"):
        ga.path_length_penalty(make, jnp.zeros(2), jnp.zeros((2, 4, 4, 1)), mean=0.0)
    with pytest.raises(ValueError, match="layers must be at least 2"):
        ga.mix_styles(KEY, jnp.zeros((2, 3)), jnp.zeros((2, 3)), layers=1)
    with pytest.raises(ValueError, match="every must be at least 1"):
        ga.every_nth(0, 0, lambda: jnp.zeros(()))
