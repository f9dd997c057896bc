"""The two stacks beside recorded numbers; what a pixel reads, by Jacobians: the blind spot."""

import itertools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import GatedPixelCNN, PixelCNN
from genjax.networks.pixelcnn import GatedLayer, MaskedConv, gate
from genjax.networks.pixelcnn_plus import concat_elu

REFERENCES = Path(__file__).parents[1] / "references"
KEY = jax.random.key(0)


def load(name):
    return json.loads((REFERENCES / f"{name}.json").read_text())


def filled(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(0.5 * rng.normal(size=p.shape), p.dtype), shapes)


def test_the_gate_meets_the_reference(x64):
    reference = load("gated_activation")
    f, g = (jnp.asarray(reference["inputs"][name]) for name in "fg")
    found = jax.jit(gate)(jnp.concatenate([f, g], axis=-1))
    np.testing.assert_allclose(found, reference["expected"]["y"], rtol=1e-12, atol=1e-12)


def test_the_stacks_meet_the_reference(x64):
    """Value of both stacks, and what the horizontal one reads, from its Jacobian."""
    reference = load("gated_pixelcnn_stacks")
    x = jnp.asarray(reference["inputs"]["x"])
    layers = []
    for i, p in enumerate(reference["inputs"]["layers"]):
        p = {name: np.asarray(value) for name, value in p.items()}
        params = {
            "vertical": p["vertical"].reshape(-1, 4),
            "horizontal": p["horizontal"].reshape(-1, 4),
            "link": p["vertical_to_horizontal"],
            "out": p["horizontal_out"],
            "vertical_bias": p["bias_v"],
            "horizontal_bias": p["bias_h"],
        }
        layers.append((GatedLayer(1 if i == 0 else 2, 2, first=i == 0), {"params": params}))

    def stacks(x):
        v = h = x
        for layer, params in layers:
            v, h = layer.apply(params, v, h)
        return v, h

    @jax.jit
    def run(x):
        one = lambda y: stacks(y.reshape(1, 6, 6, 1))[1].reshape(36, 2)  # noqa: E731
        return *stacks(x), jnp.abs(jax.jacfwd(one)(x[0].reshape(36))).sum(1)

    v, h, reach = run(x)
    expected = reference["expected"]
    np.testing.assert_allclose(v, expected["vertical"], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(h, expected["horizontal"], rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(reach > 0, expected["depends_on"])
    assert not np.any(expected["blind_spot_at_centre"])


def test_masked_layers_have_the_blind_spot_of_the_reference():
    """A 3x3 then twice B 3x3, at pixel (3, 3) of 7 x 7."""
    expected = load("pixelcnn_masks")["expected"]
    layers = [MaskedConv((0,), (0,), 3, kind) for kind in "ABB"]

    @jax.jit
    def reach(x):
        def run(x):
            y = x.reshape(1, 7, 7, 1)
            for i, layer in enumerate(layers):
                shapes = {"params": {"kernel": jnp.zeros((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
                y = layer.apply(filled(shapes, i), y)
            return y[0, 3, 3, 0]

        return jax.grad(run)(x)

    seen = np.asarray(reach(jnp.ones((7, 7)))) != 0
    np.testing.assert_array_equal(seen, expected["receptive_field_3_3"])


@pytest.mark.parametrize("net", ["masked", "gated"])
def test_a_pixel_depends_on_those_before_it(net):
    """By flipping one pixel after another; the gated stacks have no blind spot in their reach."""
    if net == "masked":
        model = PixelCNN(4, features=8, layers=2, first_kernel=3)
    else:
        model = GatedPixelCNN(4, features=4, layers=3, first_kernel=3)
    x = jax.random.randint(KEY, (1, 5, 5, 1), 0, 4)
    params = filled(jax.eval_shape(model.init, KEY, x))
    flips = (jnp.tile(x, (25, 1, 1, 1)).reshape(25, 25) + 2 * jnp.eye(25, dtype=int)) % 4
    run = jax.jit(lambda x: model.apply(params, x))
    plain, flipped = run(x), run(flips.reshape(25, 5, 5, 1))
    changes = np.abs(flipped - plain).reshape(25, 25, -1).max(-1).T > 1e-6
    assert not np.triu(changes).any()
    row, column = np.divmod(np.arange(25), 5)
    near = (row[:, None] - row <= 3) & (np.abs(column[:, None] - column) <= 3)
    before = np.tril(np.ones((25, 25), bool), -1)
    if net == "gated":
        # Three layers reach three pixels: all of them, to the right above too.
        corner = (row[:, None] - row == 1) & (column - column[:, None] == 2)
        assert changes[corner & before & near].all()
        assert changes[
            before & (np.abs(row[:, None] - row) + np.abs(column[:, None] - column) <= 1)
        ].all()


def test_colours_of_a_pixel_see_the_earlier_ones():
    """Logits of red, green and blue of one pixel, by changing one after another."""
    model = PixelCNN(4, colours=3, features=12, layers=1, first_kernel=3)
    x = jax.random.randint(KEY, (1, 3, 3, 3), 0, 4)
    params = filled(jax.eval_shape(model.init, KEY, x))
    run = jax.jit(lambda x: model.apply(params, x))
    plain = run(x)
    for c in range(3):
        other = run(x.at[0, 1, 1, c].set((x[0, 1, 1, c] + 1) % 4))
        changed = np.abs(other - plain)[0, 1, 1].max(-1) > 1e-6
        np.testing.assert_array_equal(changed, np.arange(3) > c)
        assert np.abs(other - plain)[0, 0].max() < 1e-6


def test_labels_reach_every_gate_and_none_has_its_own_row():
    model = GatedPixelCNN(4, features=4, layers=2, first_kernel=3, classes=2, dropout=0.5)
    x = jax.random.randint(KEY, (2, 3, 3, 1), 0, 4)
    params = filled(jax.eval_shape(model.init, KEY, x))
    run = jax.jit(lambda label, key=None: model.apply(params, x, label=label, dropout_key=key))
    none = jax.jit(lambda: model.apply(params, x))()
    found = [run(jnp.full(2, k)) for k in range(3)]
    np.testing.assert_allclose(found[2], none, rtol=1e-4, atol=1e-5)
    assert min(np.abs(a - b).min(axis=-1).max() for a, b in itertools.pairwise(found)) > 0
    assert np.abs(run(jnp.zeros(2, int), KEY) - found[0]).max() > 1e-3


def test_bad_input(unchecked):
    x = jnp.zeros((1, 3, 3, 1), jnp.int32)
    for make, match in (
        (lambda: GatedPixelCNN(4).init(KEY, x + 4), r"x must lie in \[0, 3\]"),
        (lambda: GatedPixelCNN(4).init(KEY, x[..., 0]), "x must have shape"),
        (lambda: GatedPixelCNN(4, colours=3).init(KEY, x), "3 colours need components"),
        (lambda: GatedPixelCNN(4, kernel=2).init(KEY, x), "kernel must be odd and at least 3"),
        (lambda: GatedPixelCNN(4, layers=1).init(KEY, x), "layers must be at least 2"),
        (lambda: GatedPixelCNN(4).init(KEY, x, label=jnp.zeros(1, int)), "classes=None"),
        (lambda: PixelCNN(4, kernel=4).init(KEY, x), "kernel must be odd"),
        (lambda: PixelCNN(1).init(KEY, x), "levels must be at least 2"),
    ):
        with pytest.raises(ValueError, match=match):
            make()


def test_concat_elu_is_elu_of_both_signs_with_its_gradient_at_zero():
    x = jnp.array([-30.0, -1.5, -1e-6, 0.0, 1e-6, 0.7, 30.0])[:, None]
    both = lambda x: nn.elu(jnp.concatenate([x, -x], axis=-1))  # noqa: E731
    value, pull = jax.vjp(concat_elu, x)
    expected, pull_expected = jax.vjp(both, x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    upstream = jnp.linspace(1, 2, 14).reshape(7, 2)
    np.testing.assert_allclose(pull(upstream)[0], pull_expected(upstream)[0], rtol=1e-6)
