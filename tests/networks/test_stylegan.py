"""StyleGAN2's networks: modulated convolutions and group deviations against recorded loops."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.adversarial import path_length_penalty, r1_penalty
from genjax.networks import StyleCritic, StyleGenerator, minibatch_stddev, modulated_convolve

REFERENCES = Path(__file__).parents[1] / "references"
KEY = jax.random.key(0)
SMALL = StyleGenerator(size=8, widths=(4, 3), latent=5, depth=2, classes=3)


def load(name):
    reference = json.loads((REFERENCES / f"{name}.json").read_text())
    inputs = {k: np.asarray(v) for k, v in reference["inputs"].items()}
    return inputs, reference["expected"]


def test_modulated_convolution_meets_the_reference(compiled, x64):
    inputs, expected = load("modulated_convolution")

    def run(x, w, style):
        y, pull = jax.vjp(modulated_convolve, x, w, style)
        return y, *pull(jnp.asarray(inputs["cotangent"]))

    found = compiled(run)(*(jnp.asarray(inputs[k]) for k in ("x", "w", "style")))
    for name, value in zip(("y", "grad_x", "grad_w", "grad_style"), found, strict=True):
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, atol=1e-11, err_msg=name)


def test_modulated_convolution_equals_weights_of_each_example(x64):
    """Loops over examples, taps and channels; without demodulation the weights are s w."""
    inputs, expected = load("modulated_convolution")
    x, w, style = (inputs[k] for k in ("x", "w", "style"))
    weights = w[None] * style[:, None, None, :, None]
    norm = np.sqrt((weights**2).sum((1, 2, 3), keepdims=True) + 1e-8)
    np.testing.assert_allclose(weights / norm, expected["weights_per_example"], rtol=1e-9)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    plain = np.zeros(expected_shape := np.shape(expected["y"]))
    for n, i, j in np.ndindex(len(x), *expected_shape[1:3]):
        plain[n, i, j] = np.einsum("klc,klco->o", padded[n, i : i + 3, j : j + 3], weights[n])
    given = [jnp.asarray(a) for a in (x, w, style)]
    found = modulated_convolve(*given, demodulate=False)
    np.testing.assert_allclose(found, plain, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(modulated_convolve(*given), plain / norm[:, :, :, 0], rtol=1e-9)


def test_the_size_of_a_style_is_demodulated_away_in_narrow_types():
    inputs, _ = load("modulated_convolution")
    x, w, style = (jnp.asarray(inputs[k], jnp.bfloat16) for k in ("x", "w", "style"))
    run = jax.jit(modulated_convolve)
    np.testing.assert_array_equal(run(x, w, 2**20 * style), run(x, w, 2**10 * style))


def test_group_deviations_meet_the_reference(compiled, x64):
    inputs, expected = load("minibatch_stddev")
    options = {"group": int(inputs["group"]), "features": int(inputs["features"])}

    def run(x):
        y, pull = jax.vjp(lambda x: minibatch_stddev(x, **options), x)
        return y, pull(jnp.asarray(inputs["cotangent"]))[0]

    y, gradient = compiled(run)(jnp.asarray(inputs["x"]))
    np.testing.assert_allclose(y, expected["y"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(gradient, expected["grad_x"], rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def filled():
    z = jnp.zeros((2, 5))
    shapes = jax.eval_shape(lambda: SMALL.init(KEY, z, jnp.zeros(2, int), SMALL.draw_noise(KEY, 2)))
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), shapes)
    for name in ("maps_0", "maps_1"):  # learnt at a hundredth of the rate, and as much larger
        tree["params"][name]["kernel"] *= 100
    return tree


def test_the_generator_reads_every_style_its_noise_and_its_label(filled):
    z = jax.random.normal(KEY, (2, 5))
    label = jnp.asarray([0, 2])

    @jax.jit
    def run(z, label, noise):
        w = SMALL.apply(filled, z, label, method="mapping")
        styles = jnp.repeat(w[:, None], SMALL.num_layers, axis=1)
        synthesis = lambda w, noise: SMALL.apply(filled, w, noise, method="synthesis")  # noqa: E731
        by_style = jax.jacrev(lambda w: jnp.sum(jnp.abs(synthesis(w, noise))))(styles)
        by_noise = jax.grad(lambda n: jnp.sum(jnp.square(synthesis(styles, n))))(noise)
        return SMALL.apply(filled, z, label, noise), synthesis(styles, noise), by_style, by_noise

    noise = SMALL.draw_noise(KEY, 2)
    assert [plane.shape for plane in noise] == [(2, 4, 4), (2, 8, 8), (2, 8, 8)]
    image, same, by_style, by_noise = run(z, label, noise)
    np.testing.assert_allclose(image, same, rtol=1e-5)
    assert image.shape == (2, 8, 8, 1)
    assert (np.abs(by_style).max(-1) > 0).all()
    assert all((np.abs(g).max((1, 2)) > 0).all() for g in by_noise)
    # The mapping does not hear the size of z, and images hear the label.
    np.testing.assert_allclose(run(3 * z, label, noise)[0], image, rtol=1e-3, atol=1e-4)
    assert (np.abs(run(z, 2 - label, noise)[0] - image).max((1, 2, 3)) > 1e-4).all()


def test_at_the_start_noise_has_no_strength_and_weights_are_standard_normal():
    network = StyleGenerator(size=4, widths=(64,), latent=64, depth=1)
    z = jax.random.normal(KEY, (2, 64))
    params = jax.jit(network.init)(KEY, z)
    noise = network.draw_noise(KEY, 2)
    run = jax.jit(lambda p: (network.apply(p, z, None, noise), network.apply(p, z)))
    images = run(params)
    np.testing.assert_allclose(*images, rtol=1e-5, atol=1e-6)
    p = params["params"]
    stds = [float(jnp.std(p["layers_0"]["kernel"])), float(jnp.std(p["maps_0"]["kernel"])) * 0.01]
    np.testing.assert_allclose(stds, 1, rtol=0.05)
    np.testing.assert_allclose(p["layers_0"]["style"]["bias"], 1)


@pytest.mark.parametrize("dtype", [None, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_second_derivatives_are_finite(dtype, filled):
    """The critic's penalty and the generator's path lengths, for their parameters."""
    critic = StyleCritic(size=8, widths=(4, 4), group=2, dtype=dtype)
    x = jax.random.normal(KEY, (4, 8, 8, 1))
    shapes = jax.eval_shape(critic.init, KEY, x)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), shapes)
    network = SMALL.clone(dtype=dtype)
    w = jax.random.normal(KEY, (4, SMALL.num_layers, 5))

    @jax.jit
    def run(params, filled):
        penalty = lambda p: jnp.mean(r1_penalty(lambda x: critic.apply(p, x), x))  # noqa: E731

        def lengths(p):
            make = lambda w: network.apply(p, w, method="synthesis")  # noqa: E731
            return jnp.mean(path_length_penalty(make, w, x, mean=0.3).penalties)

        return jax.grad(penalty)(params), jax.grad(lengths)(filled)

    leaves = jax.tree.leaves(run(params, filled))
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert sum(float(jnp.abs(leaf).max()) > 0 for leaf in leaves) > 12


def test_sizes_that_do_not_fit_are_refused_by_name(unchecked):
    x = jnp.zeros((3, 8, 8, 1))
    with pytest.raises(ValueError, match="group must divide the batch"):
        minibatch_stddev(x, group=2)
    with pytest.raises(ValueError, match="size must be base"):
        StyleCritic(size=12).init(KEY, jnp.zeros((4, 12, 12, 1)))
    with pytest.raises(ValueError, match="one entry for each of the 2 sizes"):
        StyleCritic(size=8, widths=(4,)).init(KEY, x)
    with pytest.raises(ValueError, match=r"w must have shape \('any', 4, 5\), got \(2, 3, 5\)"):
        SMALL.init(KEY, jnp.zeros((2, 3, 5)), method="synthesis")
    with pytest.raises(ValueError, match="noise must be 3 planes, got 1"):
        SMALL.init(KEY, jnp.zeros((2, 4, 5)), [jnp.zeros((2, 4, 4))], method="synthesis")
