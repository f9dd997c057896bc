"""The diffusion transformer: what it starts as, the order of its tokens, its conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.networks import DiT, patch_positions
from genjax.networks.layers import patchify, unpatchify

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 4, 4, 3))
T = jnp.asarray([0.2, 0.7])
SMALL = {"width": 8, "depth": 3, "heads": 2}


def filled(network, *inputs, **options):
    """Parameters away from the start, without running `init`."""
    shapes = jax.eval_shape(lambda: network.init(KEY, *inputs, **options))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.float32(0.4 * rng.normal(size=p.shape)), shapes)


def test_it_starts_as_the_identity_between_its_embedding_and_its_output():
    network = DiT(**SMALL)
    params = jax.jit(network.init)(KEY, X, T)["params"]
    np.testing.assert_array_equal(network.apply({"params": params}, X, T), 0)
    kernel = jax.random.normal(KEY, params["out"]["kernel"].shape)
    opened = {**params, "out": {**params["out"], "kernel": kernel}}
    found = jax.jit(network.apply)({"params": opened}, X, T)
    # Norm of (embedding + positions), mapped: as if the blocks were not there.
    h = np.asarray(patchify(X, 2) @ params["embed"]["kernel"] + patch_positions(2, 2, 8)[None])
    h = h - h.mean(-1, keepdims=True)
    h = h / np.sqrt(np.mean(h**2, -1, keepdims=True) + 1e-6)
    expected = unpatchify(jnp.asarray(h @ np.asarray(kernel)), 2, (4, 4, 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"conditioning": "tokens", "long_skips": True}, marks=pytest.mark.slow)],
    ids=["adaln", "uvit"],
)
def test_without_positions_patches_have_no_order_and_every_condition_is_read(options):
    network = DiT(**SMALL, **options, classes=3, positions=False)
    label, end = jnp.asarray([0, 2]), jnp.asarray([0.9, 1.0])
    params = filled(network, X, T, label, end=end)
    order = jnp.asarray([2, 0, 3, 1])
    placed = network.clone(positions=True)

    def shuffle(x):
        return unpatchify(patchify(x, 2)[:, order], 2, x.shape[1:])

    @jax.jit
    def run(x):
        apply = lambda x, t, label, end: network.apply(params, x, t, label, end=end)  # noqa: E731
        others = apply(x, T + 0.1, label, end + 0.1), apply(x, T, label - 1, end)
        others = *others, apply(x, T, label, end + 0.1)
        null = apply(x, T, jnp.asarray([3, 3]), end), apply(x, T, None, end)
        ordered = placed.apply(params, shuffle(x), T, label, end=end)
        return apply(x, T, label, end), apply(shuffle(x), T, label, end), others, null, ordered

    found, shuffled, others, null, ordered = run(X)
    np.testing.assert_allclose(shuffled, shuffle(found), rtol=1e-4, atol=1e-4)
    assert np.abs(ordered - shuffled).max() > 0.01
    for other in others:
        assert (np.abs(other - found).max((1, 2, 3)) > 1e-3).all()
    np.testing.assert_array_equal(*null)


@pytest.mark.slow
def test_long_skips_join_the_first_half_to_the_second():
    """Joints of (0, I) pass the skip alone: the last block then reads what the first one wrote."""
    network = DiT(**SMALL, long_skips=True)
    params = filled(network, X, T)["params"]
    joint = np.zeros((1, 16, 8), np.float32)
    joint[0, 8:] = np.eye(8)
    params = {**params, "joints": {"kernel": joint, "bias": np.zeros((1, 8), np.float32)}}
    middle = jax.tree.map(lambda leaf: 5 * leaf, params["middle"])
    run = jax.jit(
        lambda p, remat: network.clone(remat=remat).apply({"params": p}, X, T), static_argnums=1
    )
    found = run(params, False)
    np.testing.assert_allclose(run({**params, "middle": middle}, False), found)
    np.testing.assert_allclose(run(params, True), found, rtol=1e-5)
    two = DiT(width=8, depth=2, heads=2)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), params["first"], params["second"])
    rest = {k: v for k, v in params.items() if k not in ("first", "middle", "second", "joints")}
    plain = jax.jit(two.apply)({"params": {**rest, "blocks": both}}, X, T)
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-4)


def test_positions_are_the_sines_and_cosines_of_row_and_column():
    found = np.asarray(patch_positions(2, 3, 8)).reshape(2, 3, 2, 4)
    for row, column in np.ndindex(2, 3):
        for place, part in zip((row, column), found[row, column], strict=True):
            angle = place * np.asarray([1, 0.01])
            np.testing.assert_allclose(
                part, np.concatenate([np.sin(angle), np.cos(angle)]), atol=1e-6
            )


@pytest.mark.slow
def test_narrow_types_have_finite_derivatives_along_time():
    network = DiT(**SMALL, dtype=jnp.bfloat16)
    params = filled(network, X, T)

    def along(params):
        run = lambda x, t: network.apply(params, x, t)  # noqa: E731
        return jnp.sum(jax.jvp(run, (X, T), (X, jnp.ones(2)))[1].astype(jnp.float32))

    value, slope = jax.jit(jax.value_and_grad(along))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, slope)))


def test_what_does_not_fit_is_refused_by_name(unchecked):
    with pytest.raises(ValueError, match="multiples of the patch 2"):
        DiT(**SMALL).init(KEY, X[:, :3], T)
    with pytest.raises(ValueError, match="depth must be odd with long skips, got 4"):
        DiT(width=8, depth=4, heads=2, long_skips=True).init(KEY, X, T)
    with pytest.raises(ValueError, match="multiple of 4 for rows and columns, got 6"):
        DiT(width=6, depth=1, heads=2).init(KEY, X, T)
    with pytest.raises(ValueError, match="conditioning must be one of"):
        DiT(**SMALL, conditioning="adalm").init(KEY, X, T)
    with pytest.raises(ValueError, match="width must be a multiple of heads = 3"):
        DiT(width=8, depth=1, heads=3).init(KEY, X, T)
