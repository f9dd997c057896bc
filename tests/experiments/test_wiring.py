"""Every costly experiment traced with small networks: what fits together without compiling it.

The short runs that train, sample and write files are slow tests in the experiments' own files.
"""

import importlib

import jax
import jax.numpy as jnp
import pytest

from experiments import _system

SHARED = {"devices": 1, "progress": False, "batch_size": 8, "steps_per_call": 1}
TRANSFORMER = {"width": 8, "depth": 1, "heads": 2}
SMALL = {
    "bridge": {"pairs": "fitting", "width": 8, "depth": 1},
    "diffusion": {**TRANSFORMER, "network": "dit", "likelihood_steps": 0, "num_steps": 2},
    "f_gan": {},
    "few_step": {"width": 8, "depth": 1, "conditional": True},
    "flow_matching": {
        **TRANSFORMER, "dataset": "digits", "network": "dit", "methods": ("flow",),
        "sample_steps": 2,
    },
    "gan, spectral": {"spectral": True},
    "gan, dcgan": {"network": "dcgan", "width": 8, "conditional": True},
    "hierarchical_vae": {"latents": (3, 2), "sides": (1, 2), "width": 8},
    "hierarchical_vae, held": {
        "latents": (3, 2), "sides": (1, 2), "width": 8, "spectral": 0.1, "skip_above": 10.0,
    },
    "language_model, s4": {"network": "s4", "width": 8, "depth": 1},
    "latent": {"channels": (4, 8), "width": 8, "depth": 1},
    "latent, codes": {
        "channels": (4, 8), "width": 8, "depth": 1, "heads": 2, "latents": "vq", "codes": 4,
        "model": "diffusion", "network": "dit", "conditional": True, "guidance": 2.0,
    },
    "long_range, s4": {"network": "s4", "width": 8, "depth": 2},
    "long_range, s4d": {"task": "digits", "network": "s4d", "width": 8, "depth": 2},
    "masked_diffusion": {**TRANSFORMER, "num_steps": 4},
    "rlhf": {**TRANSFORMER, "imitation": 2, "steps": 4},
    "sinkhorn_gan": {},
    "stylegan": {"width": 8, "groups": 2, "conditional": True},
    "vqvae": {"codes": 4, "channels": (4, 8), "prior_width": 8, "prior_depth": 1},
    "vqvae, two levels": {
        "codes": 4, "channels": (4, 8), "prior_width": 8, "prior_depth": 1, "levels": 2,
        "quantiser": "residual", "conditional": True,
    },
}  # fmt: skip


# A second way of the same experiment is a slow test.
NAMES = [pytest.param(n, marks=[pytest.mark.slow] if "," in n else []) for n in SMALL]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_and_a_sample_have_their_shapes(name, dtype):
    module = importlib.import_module(f"experiments.{name.split(',')[0]}")
    config = module.Config(**SHARED, **SMALL[name], compute_dtype=dtype)
    data = module.load_data(config)
    system = module.build(config, data)
    _, _, whole = _system.initial(config, system)
    state = jax.eval_shape(whole, jax.random.key(0))
    step = _system.make_step(config, system, _system.data_mesh(1))
    batch = system.batches(_system._run.batches(config, data.trained_on))(0)
    if not callable(system.loss):
        batches = system.step_options.get("n_critic", 1)
        batch = jax.tree.map(lambda x: jnp.stack([x] * batches), batch)
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(x.shape == () for x in jax.tree.leaves(metrics))
    if system.sample is None:
        return
    params = jax.eval_shape(lambda s: _system.weights(config, system, s), state)
    label = jnp.zeros(2, jnp.int32) if system.labels is not None else None
    x = jax.eval_shape(lambda p, k: system.sample(p, k, 2, label), params, jax.random.key(0))
    assert x.shape[0] == 2
    if data.spec.kind == "images":
        assert x.shape[1:] == data.spec.shape
