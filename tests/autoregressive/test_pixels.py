"""Masks beside recorded ones; the colour mixture beside float64 bins, and its draws in law."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, logsumexp

from genjax.autoregressive import (
    colour_logistic_mixture,
    draw_colours,
    num_colour_params,
    pixel_mask,
    recomputing_pixel_step,
    sample_pixels,
)

MASKS = json.loads((Path(__file__).parents[1] / "references" / "pixelcnn_masks.json").read_text())
KEY = jax.random.key(0)
LEVELS = 4


def test_masks_meet_the_reference():
    for name, expected in MASKS["expected"]["masks"].items():
        kind, kernel, inputs, outputs, groups = name.split("_")
        num = int(groups[1:])
        dealt = [
            [i * num // int(x.lstrip("inout")) for i in range(int(x.lstrip("inout")))]
            for x in (inputs, outputs)
        ]
        np.testing.assert_array_equal(pixel_mask(int(kernel[0]), *dealt, kind), expected)


def by_bins(x, params, levels):
    """Log probability of one pixel, in float64, by differences of the logistic's distribution."""
    colours = len(x)
    p = np.asarray(params, np.float64).reshape(num_colour_params(colours, 1), -1)
    logits, means, scales = p[0], p[1 : 1 + colours], np.exp(p[1 + colours : 1 + 2 * colours])
    follow, half = np.tanh(p[1 + 2 * colours :]), 1 / (levels - 1)
    values = 2 * half * np.asarray(x) - 1
    total = logits - logsumexp(logits)
    for c in range(colours):
        mean = means[c] + sum(follow[c * (c - 1) // 2 + b] * values[b] for b in range(c))
        above = 1 if x[c] == levels - 1 else expit((values[c] + half - mean) / scales[c])
        below = 0 if x[c] == 0 else expit((values[c] - half - mean) / scales[c])
        total = total + np.log(above - below)
    return logsumexp(total)


@pytest.mark.parametrize("colours", [1, 3])
def test_the_mixture_is_a_law_of_bins(colours, x64):
    """Value beside bins, gradient beside differences; the probabilities of all levels sum to 1."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(1, 2, 1, num_colour_params(colours, 2))))
    grids = np.meshgrid(*[np.arange(LEVELS)] * colours, indexing="ij")
    every = np.stack(grids, -1).reshape(-1, 1, 1, colours)
    run = jax.jit(partial(colour_logistic_mixture, levels=LEVELS))
    each = run(
        jnp.asarray(every), jnp.broadcast_to(params[:, :1], (len(every), 1, 1, params.shape[-1]))
    )
    expected = [by_bins(x[0, 0], params[0, 0, 0], LEVELS) for x in every]
    np.testing.assert_allclose(each, expected, rtol=1e-9)
    np.testing.assert_allclose(np.exp(each).sum(), 1, rtol=1e-12)
    # Two pixels add, and the gradient is that of the bins.
    x = jnp.asarray(rng.integers(0, LEVELS, (1, 2, 1, colours)))
    both = sum(by_bins(x[0, i, 0], params[0, i, 0], LEVELS) for i in range(2))
    np.testing.assert_allclose(run(x, params)[0], both, rtol=1e-9)
    slope = jax.jit(jax.grad(lambda p: run(x, p)[0]))(params)[0, 0, 0]
    for i in range(params.shape[-1]):
        ends = []
        for sign in (1, -1):
            moved = np.array(params[0, 0, 0])
            moved[i] += sign * 1e-6
            ends.append(by_bins(x[0, 0, 0], moved, LEVELS))
        np.testing.assert_allclose(slope[i], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def test_float32_is_finite_in_the_tails():
    x = jnp.asarray([[[[0, 255, 128]]], [[[255, 0, 1]]]])
    run = jax.jit(jax.value_and_grad(lambda p: colour_logistic_mixture(x, p, levels=256).sum()))
    for scale in (0.0, 30.0, -30.0):
        value, gradient = run(jnp.full((2, 1, 1, 20), scale))
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


def test_colours_are_drawn_in_law():
    """16,384 draws of three colours beside the probabilities of all 64."""
    params = jax.random.normal(jax.random.key(3), (num_colour_params(3, 2),))
    draw = partial(draw_colours, params=params, colours=3, levels=LEVELS)
    drawn = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 16_384)))
    counts = np.bincount(drawn @ [16, 4, 1], minlength=64)
    every = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(64, 3)
    expected = 16_384 * np.exp([by_bins(x, params, LEVELS) for x in every])
    kept = expected > 3
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < kept.sum() + 5 * np.sqrt(2 * kept.sum())
    np.testing.assert_allclose(counts[~kept].sum(), expected[~kept].sum(), atol=20)


def test_an_image_is_the_same_in_any_batch():
    """Each pixel is drawn from its position and from the one before it, by the key of its row."""

    def params_fn(x):
        before = jnp.pad(x.reshape(len(x), -1), ((0, 0), (1, 0)))[:, :-1]
        return jax.nn.one_hot((before + jnp.arange(6)[None]) % 3, 3).reshape(len(x), 2, 3, 3)

    @partial(jax.jit, static_argnums=(0,))
    def run(batch, first):
        cache = jnp.zeros((batch, 2, 3, 1), jnp.int32)
        draw = lambda key, p: jax.random.categorical(key, p)[None]  # noqa: E731
        step = recomputing_pixel_step(params_fn)
        return sample_pixels(step, cache, KEY, (batch, 2, 3, 1), draw=draw, first_index=first)

    whole = run(3, 0)
    np.testing.assert_array_equal(run(1, 2), whole[2:])
    assert len(np.unique(whole)) == 3


def test_bad_input(unchecked):
    x, params = jnp.zeros((2, 3, 3, 3), jnp.int32), jnp.zeros((2, 3, 3, 20))
    run = partial(colour_logistic_mixture, levels=4)
    for call, match in (
        (lambda: pixel_mask(3, (0,), (0,), "C"), "kind must be one of"),
        (lambda: pixel_mask(4, (0,), (0,), "A"), "kernel must be odd"),
        (lambda: run(x[0], params), "x must have rank 4"),
        (lambda: run(x[:1], params), "shapes must be equal"),
        (lambda: run(x, params[..., :19]), "params must be a multiple of 10 numbers for 3 colours"),
        (lambda: run(x + 4, params), r"x must lie in \[0, 3\]"),
        (lambda: num_colour_params(0, 1), "colours must be at least 1"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="x must hold whole numbers"):
        run(x.astype(jnp.float32), params)
