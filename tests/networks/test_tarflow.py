"""TarFlow: causal, invertible, cached sampling equal to the plain one, guidance by its formula."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax import flows
from genjax.networks.tarflow import TarFlow
from tests.networks.test_coupling import shaken

REFERENCES = Path(__file__).parents[1] / "references"
KEY = jax.random.key(0)
IMAGE = (4, 4, 1)
SIZES = {"patch": 2, "layers": 2, "width": 8, "heads": 2}
X = jax.random.normal(KEY, (3, *IMAGE))


@functools.cache
def _params(module):
    return shaken(jax.jit(module.init)(KEY, X), 0.3)


@functools.partial(jax.jit, static_argnums=0)
def run(module, params, x, key=None):
    return module.apply(params, x, dropout_key=key)


def made(blocks=2, classes=None, **options):
    module = TarFlow(blocks=blocks, classes=classes, **SIZES, **options)
    return module, _params(module)


def test_forward_inverse_and_determinant():
    module, params = made()

    @jax.jit
    def everything(params):
        z, log_det = module.apply(params, X)
        back, log_det_back = module.apply(params, z, IMAGE, method="inverse")
        jacobian = jax.vmap(jax.jacfwd(lambda e: module.apply(params, e[None])[0].reshape(-1)))(X)
        exact = jnp.linalg.slogdet(jacobian.reshape(3, 16, 16))[1]
        return z, log_det, back, log_det_back, exact

    z, log_det, back, log_det_back, exact = everything(params)
    assert z.shape == (3, 4, 4)
    np.testing.assert_allclose(back, X, atol=2e-5)
    np.testing.assert_allclose(log_det, exact, atol=1e-4)
    np.testing.assert_allclose(log_det, -log_det_back, atol=1e-4)


def test_outputs_of_parameters_kept_before_the_shared_block(x64):
    """Recorded in float64 when attention was written out here, in a tree of other names."""
    with np.load(REFERENCES / "tarflow.npz") as file:
        old = {name: jnp.asarray(file[name], jnp.float64) for name in file.files}
    p = {name.removeprefix("params/"): leaf for name, leaf in old.items() if "/" in name}
    layers = {name: {"kernel": p[name]} for name in ("qkv", "out", "up", "down")}
    layers["norm_attention"] = {"scale": 1 + p["norm_a"]}
    layers["norm_mlp"] = {"scale": 1 + p["norm_b"]}
    blocks = {
        "in": {"kernel": p["in"]},
        "position": p["position"],
        "label": {"embedding": p["label"]},
        "layers": layers,
        "last_norm": {"scale": 1 + p["last_norm"]},
        "last": {"kernel": p["last"]},
    }
    params = {"params": {"blocks": blocks}}
    module = TarFlow(patch=2, blocks=2, layers=2, width=4, heads=2, classes=2)
    shapes = jax.eval_shape(module.init, KEY, X)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)

    @jax.jit
    def run(x, base):
        z, log_det = module.apply(params, x, label=jnp.array([0, 2]))
        options = {"guidance": 0.7, "anneal": True, "temperature": 1.5, "method": "inverse"}
        guided = module.apply(params, base, IMAGE, label=jnp.array([0, 1]), **options)
        return z, log_det, *guided

    found = run(old["x"], old["base"])
    for name, out in zip(("z", "log_det", "guided", "guided_log_det"), found, strict=True):
        np.testing.assert_allclose(out, old[name], rtol=1e-6, atol=1e-7)


def test_starts_as_the_identity():
    module = TarFlow(blocks=2, **SIZES)
    (z, log_det), _ = jax.jit(module.init_with_output)(KEY, X)
    patches = X.reshape(3, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(3, 4, 4)
    np.testing.assert_array_equal(z, patches)
    np.testing.assert_array_equal(log_det, 0)


@pytest.mark.slow
def test_a_block_is_causal_and_keeps_its_first_patch():
    module, params = made(blocks=1)
    jacobian = jax.jit(jax.jacfwd(lambda x: module.apply(params, x[None])[0][0]))(X[0])
    # From pixels to patches: [to position, ., from position, .].
    jacobian = jacobian.reshape(4, 4, 2, 2, 2, 2).transpose(0, 1, 2, 4, 3, 5).reshape(4, 4, 4, 4)
    reach = np.abs(jacobian).sum((1, 3))
    # A block hands its sequence on reversed: position 3 - t depends on 0..t.
    assert np.array_equal(reach[::-1] > 0, np.tril(np.ones((4, 4))) > 0)
    z = run(module, params, X)[0]
    np.testing.assert_array_equal(z[:, -1], X[:, :2, :2].reshape(3, 4))
    # Within a patch the map is affine with one scale per number.
    np.testing.assert_allclose(jacobian[3, :, 0], np.eye(4), atol=1e-6)


def test_cached_sampling_equals_the_plain_inverse():
    """The scan with keys and values kept gives what re-reading the whole sequence gives."""
    module, params = made(blocks=1)
    z = jax.random.normal(jax.random.key(1), (3, 4, 4))
    cached, log_det = jax.jit(lambda z: module.apply(params, z, IMAGE, method="inverse"))(z)
    tree = jax.tree.map(lambda leaf: leaf[0], params["params"]["blocks"])
    net, _ = module.bind(params)._conditioner(z)

    def conditioner(tree, x):
        shifted = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        return net.apply({"params": tree}, shifted)[0]

    plain = flows.masked_autoregressive(conditioner, flows.standardise(module.bound))
    x, expected = jax.jit(plain.inverse)(tree, z[:, ::-1])
    x = x.reshape(3, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(3, *IMAGE)
    np.testing.assert_allclose(cached, x, atol=1e-5)
    np.testing.assert_allclose(log_det, expected, atol=1e-5)


def test_guidance_moves_both_numbers_away_from_the_unlabelled_ones():
    """At the second position the inputs agree, so the formula can be followed by hand."""
    module, params = made(blocks=1, classes=2)
    z = jax.random.normal(jax.random.key(1), (3, 4, 4))
    label = jnp.asarray([0, 1, 0])

    @jax.jit
    def invert(z, label, guidance, anneal=False):
        return module.apply(params, z, IMAGE, label=label, guidance=guidance, method="inverse")[0]

    def second(x):
        return x[:, :2, 2:].reshape(3, 4)

    # From two values of z, the affine map x = z e^alpha + mu of each branch.
    zs = [z.at[:, 2].set(v) for v in (0.0, 1.0)]
    none = jnp.full(3, 2)
    ends = {
        name: [second(invert(v, given, w)) for v in zs]
        for name, given, w in (("c", label, 0.0), ("u", none, 0.0), ("g", label, 0.7))
    }
    mu = {k: np.asarray(v[0]) for k, v in ends.items()}
    alpha = {k: np.log(v[1] - v[0]) for k, v in ends.items()}
    np.testing.assert_allclose(mu["g"], mu["c"] + 0.7 * (mu["c"] - mu["u"]), atol=1e-4)
    guided = alpha["c"] + 0.7 * (alpha["c"] - alpha["u"])
    np.testing.assert_allclose(alpha["g"], np.clip(guided, -3, 3), atol=1e-3)
    assert np.abs(mu["c"] - mu["u"]).max() > 1e-2


def test_annealing_and_temperature_change_later_positions_only_as_they_should():
    module, params = made(blocks=1, classes=2)
    z, label = jax.random.normal(KEY, (3, 4, 4)), jnp.zeros(3, jnp.int32)

    @jax.jit
    def invert():
        def one(**options):
            return module.apply(params, z, IMAGE, label=label, method="inverse", **options)[0]

        return [one()] + [
            one(guidance=1.0, **options) for options in ({}, {"anneal": True}, {"temperature": 3.0})
        ]

    plain, full, annealed, hot = invert()
    first = (slice(None), slice(0, 2), slice(0, 2))
    for other in (full, annealed, hot):
        np.testing.assert_allclose(other[first], plain[first], atol=1e-6)
        assert np.abs(other - plain).max() > 1e-3
    assert np.abs(full - annealed).max() > 1e-3
    assert np.abs(full - hot).max() > 1e-4


def test_dropout_needs_a_key_and_log_scales_are_bounded():
    module, params = made(dropout=0.5)
    noisy = [run(module, params, X, jax.random.key(i))[0] for i in range(2)]
    assert not np.allclose(noisy[0], noisy[1])
    wild = jax.tree.map(lambda p: 1e3 * p, params)
    z, log_det = run(module, wild, X)
    assert np.all(np.isfinite(z))
    assert np.all(np.abs(log_det) <= 2 * 16 * module.bound)


def test_bad_input_is_named(unchecked):
    module, params = made(blocks=1)
    label = jnp.zeros(3, jnp.int32)
    cases = [
        ("patch", lambda: module.apply(params, jnp.zeros((3, 5, 4, 1)))),
        ("classes=None", lambda: module.apply(params, X, label=label)),
        (
            r"tokens of images \(8, 4, 1\)",
            lambda: module.apply(params, jnp.zeros((3, 4, 4)), (8, 4, 1), method="inverse"),
        ),
        ("multiple of heads", lambda: TarFlow(width=18, heads=4).init(jax.random.key(0), X)),
        (
            "guidance needs",
            lambda: module.apply(
                params, jnp.zeros((3, 4, 4)), IMAGE, guidance=1.0, method="inverse"
            ),
        ),
    ]
    for match, call in cases:
        with pytest.raises(ValueError, match=match):
            call()
