"""Learnt priors, codes and hierarchies as experiments: short runs, files, refusals."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import _priors, _system, hierarchical_vae, vae, vqvae
from experiments._data import load_data
from genjax.data import DataSpec
from genjax.variational import perplexity

COMMON = {"devices": 1, "progress": False, "batch_size": 32, "steps_per_call": 1}
LEVELS = hierarchical_vae.Config(
    **COMMON, latents=(4, 2), sides=(1, 2), width=16, steps=6, test_samples=2
)
CODES = vqvae.Config(**COMMON, codes=8, channels=(8, 16), prior_width=16, prior_depth=1, steps=6)


@pytest.fixture(scope="module")
def data():
    return load_data(LEVELS)


def losses(system, data, n=3):
    """As many updates of the compiled step from the start: (state, losses)."""
    config = system[1]
    state, step, batches = _system.prepare(config, system[0], data)
    found = []
    for i in range(n):
        state, metrics = step(state, batches(i))
        found.append(float(metrics["loss"]))
    return state, found


@pytest.mark.slow
def test_hierarchy_run(tmp_path):
    folder = tmp_path / "run"
    summary = hierarchical_vae.main(dataclasses.replace(LEVELS, run_dir=str(folder)))
    assert json.loads((folder / "summary.json").read_text()) == summary
    scores = np.load(folder / "scores.npy")
    assert scores.shape == (360,)
    np.testing.assert_allclose(scores.mean(), summary["test_log_likelihood"], rtol=1e-4)
    assert len(summary["kl_of_levels"]) == 2
    for name in ("samples.png", "levels.png"):
        assert (folder / name).stat().st_size > 500
    system, params, config = _system.reopen(folder)
    again = jax.jit(lambda p, k: system.sample(p, k, 1437))(
        params, _system.keys(config.seed).sample
    )
    np.testing.assert_array_equal(again, np.load(folder / "samples.npy"))


def test_spectral_term_is_in_the_loss_and_its_vectors_move(data):
    held = dataclasses.replace(LEVELS, spectral=0.5, skip_above=10.0)
    free, system = (hierarchical_vae.build(config, data) for config in (LEVELS, held))
    state, step, batches = _system.prepare(held, system, data)
    params, (count, power) = jax.tree.map(jnp.copy, (state.params, state.carry))

    @jax.jit
    def terms(key, batch):
        losses, aux, _ = system.loss(params, key, batch, (count, power))
        return losses - free.loss(params, key, batch, count)[0], aux["spectral"]

    more, spectral = terms(jax.random.key(0), jax.tree.map(jnp.asarray, batches(0)))
    np.testing.assert_allclose(more, jnp.full(32, 0.5 * spectral), rtol=1e-3)
    found = []
    for i in range(6):
        state, metrics = step(state, batches(i))
        found.append(float(metrics["spectral"]))
    assert float(state.carry[0]) == 6
    # The vectors of random matrices turn to the first singular ones: the sum rises to LAPACK's.
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(state.params))[0]
    named = {jax.tree_util.keystr(path): w for path, w in leaves}
    exact = sum(
        np.linalg.svd(named[name].reshape(-1, named[name].shape[-1]), compute_uv=False)[0]
        for name in power
    )
    assert found[0] < found[-1] < 1.01 * exact
    assert found[-1] > 0.8 * exact


@pytest.mark.slow
def test_codes_run(tmp_path):
    folder = tmp_path / "run"
    summary = vqvae.main(dataclasses.replace(CODES, run_dir=str(folder)))
    assert len(summary["perplexity"]) == 1
    assert 1 <= summary["perplexity"][0] <= 8
    # Everything is counted: the codes alone cost what the prior says.
    assert 0 < summary["bits_per_dim_of_codes"] <= 16 * 3 / 64 + 1e-3
    assert summary["bits_per_dim"] > summary["bits_per_dim_of_codes"]
    # 4x4 places are too many for a sum over choices.
    np.testing.assert_allclose(summary["bits_per_dim_of_one"], summary["bits_per_dim"], rtol=1e-5)
    assert (folder / "reconstructions.png").stat().st_size > 500
    system, params, _ = _system.reopen(folder)
    assert len(params["carried"]) == 1
    x = system.sample(params, jax.random.key(0), 3)
    assert x.shape == (3, 8, 8, 1)
    assert x.max() <= 16


@pytest.mark.parametrize(
    "changes",
    [
        {"quantiser": "residual", "conditional": True},
        {"levels": 2, "conditional": True},
        {"quantiser": "fsq", "fsq_levels": (4, 3), "levels": 2},
        {"quantiser": "lfq"},
    ],
)
@pytest.mark.slow
def test_other_codes(changes, data):
    config = dataclasses.replace(CODES, **changes)
    system = vqvae.build(config, data)
    state, found = losses((system, config), data)
    assert np.isfinite(found).all()
    params = _system.weights(config, system, state)
    nats = system.log_prob(params, None, jnp.asarray(data.test["x"][:4], jnp.float32))
    assert nats.shape == (4,)
    label = jnp.array([1, 2]) if config.conditional else None
    x = jax.jit(lambda p, k: system.sample(p, k, 2, label))(params, jax.random.key(0))
    assert x.shape == (2, 8, 8, 1)


@pytest.mark.slow
def test_codebooks_follow_their_latents(data):
    """The carry moves by the averages, and dead codes come back: all of them are in use."""
    config = CODES
    system, model = vqvae.build(config, data), vqvae.make_model(config, data)
    start = _system.start(config, system)
    state, _ = losses((system, config), data, n=12)
    before, after = start.carry[0][0], state.carry[0][0]  # one level, one stage
    assert np.abs(after.codebook - before.codebook).max() > 1e-3
    np.testing.assert_allclose(
        after.codebook, after.sums / after.counts[:, None], rtol=1e-3, atol=1e-3
    )
    coded = model.encode(state.params, state.carry, None, jnp.asarray(data.train["x"][:400]))
    assert perplexity(coded[0].codes, 8) > 4


@pytest.mark.slow
def test_autoencoder_and_prior_learn_one_after_the_other(data):
    """Each part moves its own parameters alone, and no codebook moves under the prior."""
    config = dataclasses.replace(CODES, levels=2, autoencoder_share=0.5)
    system = vqvae.build(config, data)
    state, step, batches = _system.prepare(config, system, data)
    copied = lambda state: jax.tree.map(np.array, (state.params, state.carry))  # noqa: E731
    held, moved = [copied(state)], []  # a step takes the arrays of its state
    for i in range(6):
        state, metrics = step(state, batches(i))
        assert ("codes" in metrics) == (i >= 3) == ("reconstruction" not in metrics)
        held.append(copied(state))
    for (old, codes), (new, again) in itertools.pairwise(held):
        parts = {name: {name: old[name]} for name in old} | {"codebooks": codes}
        others = {name: {name: new[name]} for name in new} | {"codebooks": again}
        same = lambda a, b: all(map(np.array_equal, *map(jax.tree.leaves, (a, b))))  # noqa: E731
        moved.append({name for name in parts if not same(parts[name], others[name])})
    first = {"encoder", "top", "up", "bottom", "decoder", "codebooks"}
    assert moved[0] == moved[2] == first
    assert moved[4] == {"prior"}
    assert set.union(*moved[3:]) == {"prior"}


@pytest.mark.slow
def test_bound_over_several_codes_nears_the_likelihood(data):
    """Of 3 codes at 2x2 places, 81 choices are all there are: log sum_c p(x|c) P(c) is exact."""
    config = dataclasses.replace(CODES, codes=3, channels=(4, 4, 8), prior_width=8)
    model, state = vqvae.make_model(config, data), _system.start(config, vqvae.build(config, data))
    params = {**state.params, "carried": state.carry}
    x = jnp.asarray(data.test["x"][:5])

    def bound(tuples):
        system = vqvae.build(dataclasses.replace(config, tuples=tuples), data)
        return jax.jit(lambda x: system.log_prob(params, None, x))(x)

    @jax.jit
    def joint(codes):
        tokens = jnp.broadcast_to(codes[None], (5, 4))
        values = model.quantiser.values(tokens[..., None], state.carry[0]).reshape(5, 2, 2, -1)
        raw = model.decode(params, [values], None)
        return model.log_likelihood(x, raw) + model.log_codes(params, tokens, None, None)

    every = jnp.asarray(list(itertools.product(range(3), repeat=4)))
    terms = jax.lax.map(joint, every)
    np.testing.assert_allclose(bound(81), jax.nn.logsumexp(terms, axis=0), rtol=1e-5)
    chosen = vqvae.tokens_of(model.encode(params, state.carry, None, x))
    mine = (chosen[:, None] == every[None]).all(-1)
    alone = np.asarray(terms).T[np.asarray(mine)]
    np.testing.assert_allclose(bound(15), alone, rtol=1e-5)  # fewer than 2^4
    assert (bound(16) > alone).all()
    assert (bound(81) > bound(16)).all()


@pytest.mark.parametrize(
    "prior", ["mixture", *(pytest.param(p, marks=pytest.mark.slow) for p in ("vamp", "flow"))]
)
def test_priors_of_a_vae(prior, data, key):
    """A density that its samples have, with gradients in the model's loss."""
    config = vae.Config(**COMMON, latent_dim=2, width=16, depth=1, prior=prior, prior_components=4)
    model = vae.make_model(config, data.spec, data.train["x"])
    params = jax.jit(model.init)(key)
    batch = {"x": jnp.asarray(data.train["x"][:8])}
    loss_fn = vae.make_loss(config, model)

    @jax.jit
    def everything(params):
        gradient = jax.grad(lambda p: loss_fn(p, key, batch)[0].sum())(params)["prior"]
        z = model.draw_prior(params, key, 4000)
        # E_p[r(z)/p(z)] = 1 for any density r: that of N(0, .25 I), inside what p covers.
        log_r = -2 * jnp.sum(z**2, 1) - jnp.log(jnp.pi / 2)
        return gradient, jnp.exp(log_r - model.log_prior(params, None)(z))

    gradient, ratio = everything(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) > 0
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(4000) + 0.02


def test_bad_input(data, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'vamp'"):
        _priors.make_prior("vmp", 3, 2, ())
    with pytest.raises(ValueError, match=r"at most the 10 training examples .* got 11"):
        _priors.make_prior("vamp", 11, 2, np.zeros((10, 8, 8, 1)))
    with pytest.raises(ValueError, match="temperature must be positive"):
        hierarchical_vae.build(dataclasses.replace(LEVELS, temperature=0.0), data)
    with pytest.raises(ValueError, match="latents must be at least 1, got 0"):
        hierarchical_vae.build(dataclasses.replace(LEVELS, latents=(4, 0)), data)
    with pytest.raises(ValueError, match="skip_above must be 0 or over 1, got 1"):
        hierarchical_vae.build(dataclasses.replace(LEVELS, skip_above=1.0), data)
    with pytest.raises(ValueError, match="spectral must be at least 0"):
        hierarchical_vae.build(dataclasses.replace(LEVELS, spectral=-1.0), data)
    config = dataclasses.replace(LEVELS, sides=(1, 3), run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="sides must be multiples of the ones above"):
        hierarchical_vae.main(config)
    with pytest.raises(ValueError, match="halve the image 4 times, which 8x8 does not allow"):
        vqvae.build(dataclasses.replace(CODES, channels=(8, 8, 8, 8), levels=2), data)
    with pytest.raises(ValueError, match=r"autoencoder_share must .* got 1"):
        vqvae.build(dataclasses.replace(CODES, autoencoder_share=1.0), data)
    with pytest.raises(ValueError, match="codes must be a power of two for lfq, got 6"):
        vqvae.build(dataclasses.replace(CODES, quantiser="lfq", codes=6), data)
    config = dataclasses.replace(CODES, quantiser="fsq", fsq_levels=(2, 5))
    with pytest.raises(ValueError, match="levels must be at least 3, got 2"):
        losses((vqvae.build(config, data), config), data)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_28_by_28_shapes():
    spec = DataSpec("mnist_5k", "images", (28, 28, 1), 256, 10)
    data = load_data(LEVELS)._replace(spec=spec)
    row = vqvae.ROWS[1].images  # VQ-VAE-2: for either size
    odd = {**row, "channels": (4, 8, 8)}  # half of 7 is rounded up
    shapes = (data, row, 7 * 7 + 14 * 14), (data, odd, 4 * 4 + 7 * 7)
    for data_set, options, codes in (*shapes, (load_data(LEVELS), row, 2 * 2 + 4 * 4)):
        config = dataclasses.replace(CODES, conditional=True, **options)
        model = vqvae.make_model(config, data_set)
        params = jax.eval_shape(model.init, jax.random.key(0))
        assert params["prior"]["params"]["places"].shape == (codes, 16)
        x = jax.ShapeDtypeStruct((9, *data_set.spec.shape), int)
        carried = jax.eval_shape(model.start, jax.random.key(0), params, x)
        label = jax.ShapeDtypeStruct((3,), int)
        sample = functools.partial(model.sample, n=3)
        drawn = jax.eval_shape(sample, params, carried, jax.random.key(0), label)
        assert drawn.shape == (3, *data_set.spec.shape)
    config = dataclasses.replace(LEVELS, sides=(1, 7))
    params = jax.eval_shape(hierarchical_vae.make_model(config, data).init, jax.random.key(0))
    assert params["params"]["out"]["kernel"].shape == (16, 16 * 9)
