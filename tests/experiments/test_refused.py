"""Options that make no run are refused when the system is built: by name, and untrained."""

import importlib

import numpy as np
import pytest

from experiments import _config, _system, flow_matching

DIGITS = {"dataset": "digits"}
REFUSED = [
    ("vae", {"network": "conv", "width": 4}, "width of the convolutions must be at least 8"),
    ("vae", {"estimator": "dreg"}, "estimator must be plain without objective iwae"),
    ("vae", {"prior": "vamp", "prior_components": 0}, "prior_components must be at least 1"),
    ("vqvae", {"likelihood": "mixture", "components": 0}, "components must be at least 1"),
    ("vqvae", {"channels": ()}, "channels must hold at least one number"),
    ("vqvae", {"quantiser": "fsq", "fsq_levels": ()}, "fsq_levels must hold at least one"),
    ("latent", {"channels": (8, 0)}, "channels must be at least 1, got 0"),
    ("pixelcnn", {"network": "masked", "features": 1}, "features must be at least 2, got 1"),
    ("rlhf", {"batch_size": 24, "group": 8, "accumulate": 2}, "batch_size / accumulate must be"),
    ("rlhf", {"steps": 20}, "steps must be above those of imitation, 3000, got 20"),
    ("language_model", {"top_p": 2.0}, r"top_p must lie in \[0, 1\], got 2.0"),
    ("language_model", {"min_p": 2.0}, r"min_p must lie in \[0, 1\]"),
    ("flow", {**DIGITS, "temperature": 0.5}, "temperature must be 1 with splines on images"),
    ("flow", {"model": "realnvp", "guidance": 3.0}, "guidance must be 0 without --conditional"),
    (
        "diffusion",
        {"sampler": "unipc", "num_steps": 1},
        "times must hold at least 3 values",
    ),
    ("diffusion", {"dataset": "moons", "guidance": 2.0}, "guidance must be 1 for data without"),
    ("stylegan", {"conditional": True, "condition": "concat"}, "condition must be projection"),
    ("sinkhorn_gan", {"epsilon": 0.0}, "epsilon must be positive"),
    ("sinkhorn_gan", {"variant": "otgan", "batch_size": 1}, "batch_size must be at least 2"),
    ("mutual_information", {"shift": 1}, "shift and flip are for images"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_what_makes_no_run_is_refused_untrained(name, options, message):
    module = importlib.import_module(f"experiments.{name}")
    config = module.Config(**options)
    with pytest.raises(ValueError, match=message):
        module.build(config, module.load_data(config))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flow_matching", {"methods": ("flow", "flow")}, "methods must differ"),
        ("gradient_flow", {"epsilon": 0.0}, "epsilon must be positive"),
        ("gradient_flow", {"num_particles": 1}, "num_particles must be at least 2, got 1"),
    ],
)
def test_what_main_refuses(name, options, message, tmp_path):
    module = importlib.import_module(f"experiments.{name}")
    with pytest.raises(ValueError, match=message):
        module.main(module.Config(run_dir=str(tmp_path / "run"), **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flow_matching", {"sample_steps": 0}, "sample_steps must be at least 1, got 0"),
        ("diffusion", {"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ("diffusion", {"heads": 0}, "heads must be at least 1, got 0"),
        ("stylegan", {"groups": 0}, "groups must be at least 1, got 0"),
        ("latent", {"channels": (16, 0)}, "channels must be at least 1, got 0"),
        ("language_model", {"samples": 0}, "samples must be at least 1, got 0"),
    ],
)
def test_numbers_that_no_run_has(name, options, message):
    config = importlib.import_module(f"experiments.{name}").Config(**options)
    with pytest.raises(ValueError, match=message):
        _config.check_numbers(config)


def test_pairs_of_any_number(monkeypatch):
    """Parts of one size, of which the last is filled up: every pair once, in order."""
    config = flow_matching.Config(reflow_pairs=4097, sample_steps=1, width=4, depth=1)
    data = flow_matching.load_data(config)
    system = flow_matching.build(config, data)
    params = _system.weights(config, system, _system.start(config, system))
    pairs = flow_matching.pairs_of(config, data, params)
    assert pairs["x0"].shape == pairs["x1"].shape == (4097, 2)
    assert len(np.unique(pairs["x0"], axis=0)) == 4097
    alone = flow_matching.pairs_of(config, data, params)
    np.testing.assert_array_equal(alone["x0"], pairs["x0"])
