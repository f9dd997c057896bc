"""Short runs of the PixelCNN experiment: what they write, and that scores are exact."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _system, pixelcnn
from experiments._data import Data
from genjax.data import DataSpec

DIGITS = DataSpec("digits", "images", (8, 8, 1), 17, 10)
QUICK = {"devices": 1, "progress": False, "features": 8, "layers": 2, "first_kernel": 3,
         "batch_size": 32, "steps": 20, "steps_per_call": 10, "dropout": 0.0}  # fmt: skip


def some(num, spec=DIGITS):
    rng = np.random.default_rng(0)
    x = rng.integers(0, spec.levels, (num, *spec.shape)).astype(np.uint8)
    return {"x": x, "label": rng.integers(0, 10, num).astype(np.int32)}


@pytest.mark.slow
def test_a_conditional_run_leaves_its_files(tmp_path):
    folder = tmp_path / "run"
    config = pixelcnn.Config(run_dir=str(folder), conditional=True, **QUICK)
    summary = pixelcnn.main(config)
    assert json.loads((folder / "summary.json").read_text()) == summary
    uniform = np.log2(17)  # 4.09 bits, which a few steps already beat
    assert summary["bits_per_dim"] < uniform - 0.05
    np.testing.assert_allclose(
        summary["bits_per_dim"], -summary["test_log_likelihood"] / (64 * np.log(2)), rtol=1e-5
    )
    assert 0 < summary["bits_per_dim_given_label"] < uniform - 0.05
    assert "label_accuracy" in summary
    for name in ("samples.png", "pixel_bits.png", "params.npz"):
        assert (folder / name).stat().st_size > 500
    system, params, _ = _system.reopen(folder)
    drawn = system.sample(params, _system.keys(0).sample, 10, system.labels[:10])
    np.testing.assert_array_equal(drawn, np.load(folder / "samples.npy")[:10])


@pytest.mark.parametrize("colours", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.slow
def test_drawing_is_that_of_recomputation(colours):
    """Levels of images drawn with the cache, bit for bit, of a small mixture too."""
    spec = DIGITS._replace(shape=(4, 3, colours), levels=5)
    config = pixelcnn.Config(components=2 if colours == 3 else None, **QUICK)
    system = pixelcnn.build(config, Data(some(8, spec), some(8, spec), spec))
    params = system.init(jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + jnp.float32(0.3 * rng.normal(size=p.shape)), params)
    key = jax.random.key(2)
    drawn = np.asarray(jax.jit(lambda p: system.sample(p, key, 6))(params))
    assert drawn.shape == (6, 4, 3, colours)
    assert drawn.max() < 5
    again = recomputed(config, spec, params, key)
    np.testing.assert_array_equal(drawn, again)
    one = jax.jit(lambda p: system.sample(p, key, 1))(params)
    np.testing.assert_array_equal(one, drawn[:1])


def recomputed(config, spec, params, key):
    from functools import partial

    from genjax.autoregressive import draw_colours, recomputing_pixel_step, sample_pixels
    from genjax.networks import GatedPixelCNN

    colours = spec.shape[-1]
    net = GatedPixelCNN(5, colours, config.components or None, features=8, layers=2, first_kernel=3)

    def draw(key, raw):
        if colours == 3:
            return draw_colours(key, raw, colours=3, levels=5)
        return jax.random.categorical(key, raw, mode="high")[None]

    step = recomputing_pixel_step(partial(net.apply, params))
    cache = jnp.full((6, *spec.shape), 4, jnp.int32)  # of any values at the start
    run = jax.jit(lambda: sample_pixels(step, cache, key, (6, *spec.shape), draw=draw))
    return np.asarray(run())


@pytest.mark.slow
def test_the_likelihood_with_labels_is_the_mean_over_them():
    config = pixelcnn.Config(conditional=True, **QUICK)
    system, pixel_nats = pixelcnn.make(config, Data(some(40), some(8), DIGITS))
    params = system.init(jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + jnp.float32(0.2 * rng.normal(size=p.shape)), params)
    x = jnp.asarray(some(5)["x"])
    each = [pixel_nats(params, x, jnp.full(5, k)).sum((1, 2)) for k in range(10)]
    expected = np.log(np.mean(np.exp(np.asarray(each, np.float64)), axis=0))
    np.testing.assert_allclose(system.log_prob(params, None, x.astype(float)), expected, rtol=1e-4)


def test_bad_options():
    data = Data(some(4), some(4), DIGITS)
    colour = Data(some(4), some(4), DIGITS._replace(shape=(8, 8, 3)))
    unlabelled = Data(some(4), some(4), DIGITS._replace(classes=None))
    config = pixelcnn.Config()
    for changes, given, match in (
        ({"conditional": True}, unlabelled, "dataset must have labels"),
        ({"components": 0}, colour, "components must be at least 1 for 3 colours"),
        ({"network": "masked", "conditional": True}, data, "neither labels nor components"),
        ({"network": "plus", "components": 0}, data, "network plus needs components"),
        ({"dropout": 1.0}, data, "dropout must lie in"),
    ):
        with pytest.raises(ValueError, match=match):
            pixelcnn.build(dataclasses.replace(config, **changes), given)
