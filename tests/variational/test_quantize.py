"""Vector quantisation against references and loops; averages, dead codes, k-means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster.vq import kmeans2

from genjax.variational import (
    code_totals,
    codebook_state,
    ema_absorb,
    ema_update,
    kmeans,
    perplexity,
    reset_dead_codes,
    residual_quantise,
    vector_quantise,
)
from tests.variational.references import reference

RNG = np.random.default_rng(0)
CODES = RNG.normal(size=(7, 3))
Z = RNG.normal(size=(4, 2, 3, 3))  # 24 latents on grids of 2x3
CODEBOOK, LATENTS = jnp.asarray(CODES, jnp.float32), jnp.asarray(Z, jnp.float32)
STATE = codebook_state(CODEBOOK, count=2.0)
update = jax.jit(ema_update)
quantise = jax.jit(vector_quantise)


def nearest(z, codes):
    return np.square(z[..., None, :] - codes).sum(-1).argmin(-1)


@pytest.mark.parametrize("dim", [3, 20])
def test_nearest_codes_and_losses_by_loops(dim, x64):
    """Below and above the dimension from which distances are a product of matrices."""
    rng = np.random.default_rng(1)
    codes, z = rng.normal(size=(9, dim)) + 50, rng.normal(size=(4, 5, dim)) + 50
    found = quantise(jnp.asarray(z), jnp.asarray(codes))
    index = nearest(z, codes)
    np.testing.assert_array_equal(found.index, index)
    np.testing.assert_array_equal(found.values, codes[index])
    square = np.square(z - codes[index]).sum((1, 2))
    np.testing.assert_allclose(found.commitment, square, rtol=1e-12)
    np.testing.assert_allclose(found.codebook, square, rtol=1e-12)
    narrow = quantise(jnp.asarray(z, jnp.float32), jnp.asarray(codes, jnp.float32))
    np.testing.assert_array_equal(narrow.index, index)


def test_gradients_go_where_they_should():
    cotangent = jnp.asarray(RNG.normal(size=Z.shape), jnp.float32)

    def loss(z, codebook):
        found = vector_quantise(z, codebook)
        of_values = (found.values * cotangent).sum()
        return of_values + (0.25 * found.commitment + found.codebook).sum()

    of_z, of_codes = jax.jit(jax.grad(loss, argnums=(0, 1)))(LATENTS, CODEBOOK)
    index = nearest(Z, CODES)
    error = Z - CODES[index]
    np.testing.assert_allclose(of_z, cotangent + 0.5 * error, rtol=1e-4, atol=1e-5)
    expected = np.zeros_like(CODES)
    np.add.at(expected, index, -2 * error)
    np.testing.assert_allclose(of_codes, expected, rtol=1e-4, atol=1e-5)


def test_residual_reference(x64):
    inputs, expected = reference("residual_vq")
    z, codebooks = jnp.asarray(inputs["z"]), [jnp.asarray(c) for c in inputs["codebooks"]]

    def loss(z, codebooks):
        found = residual_quantise(z, codebooks)
        of_values = (found.values * inputs["cotangent"]).sum()
        return of_values + (inputs["beta"] * found.commitment + found.codebook).sum(), found

    (of_z, of_codes), found = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(z, codebooks)
    np.testing.assert_array_equal(found.index, expected["indices"])
    np.testing.assert_allclose(found.values, expected["quantised"], rtol=1e-10)
    np.testing.assert_allclose(z - found.values, expected["residual"], rtol=1e-9, atol=1e-12)
    by_stage = expected["commitment_by_stage"]
    np.testing.assert_allclose(found.commitment, by_stage.sum(1), rtol=1e-10)
    np.testing.assert_allclose(of_z, expected["grad_z"], rtol=1e-10, atol=1e-12)
    for i, codes in enumerate(of_codes):
        np.testing.assert_allclose(codes, expected["grad_codebooks"][i], rtol=1e-10, atol=1e-12)
        used = perplexity(found.index[:, i], len(codes))
        np.testing.assert_allclose(used, expected["perplexity_by_stage"][i], rtol=1e-6)
    # Dropping stages: the first one alone is plain quantisation, with a traced number too.
    one, plain = jax.jit(residual_quantise)(z, codebooks, num_stages=1), quantise(z, codebooks[0])
    np.testing.assert_array_equal(one.values, plain.values)
    np.testing.assert_array_equal(one.commitment, plain.commitment)
    two = jax.jit(residual_quantise)(z, codebooks, num_stages=2)
    np.testing.assert_allclose(two.commitment, by_stage[:, :2].sum(1), rtol=1e-10)


def test_residuals_shrink_after_kmeans(key):
    """A stage whose codes are the means of what it quantises never adds error."""
    z = jax.random.normal(key, (200, 4))
    residual, codebooks, errors = z, [], [float(jnp.square(z).sum())]
    fit = jax.jit(lambda key, z: kmeans(key, z, 8))
    for stage in range(3):
        codebooks.append(fit(jax.random.fold_in(key, stage), residual))
        residual = residual - quantise(residual, codebooks[-1]).values
        errors.append(float(jnp.square(residual).sum()))
    assert errors[0] > errors[1] > errors[2] > errors[3]
    whole = jax.jit(residual_quantise)(z, codebooks)
    np.testing.assert_allclose(z - whole.values, residual, atol=1e-5)
    np.testing.assert_allclose(whole.commitment.sum(), sum(errors[1:]), rtol=1e-5)


def test_averages_by_loops(x64):
    """Three updates in float64; the codes are the means of what they stood for."""
    state, codes = codebook_state(jnp.asarray(CODES), count=2.0), CODES
    counts, sums = np.full(7, 2.0), 2.0 * CODES
    for _ in range(3):
        index = nearest(Z, codes)
        found = quantise(jnp.asarray(Z), state.codebook)
        np.testing.assert_array_equal(found.index, index)
        state = update(state, jnp.asarray(Z), found.index)
        for k in range(7):
            counts[k] = 0.99 * counts[k] + 0.01 * (index == k).sum()
            sums[k] = 0.99 * sums[k] + 0.01 * Z[index == k].sum(0)
        smoothed = (counts + 1e-5) / (counts.sum() + 7e-5) * counts.sum()
        codes = sums / smoothed[:, None]
        np.testing.assert_allclose(state.counts, counts, rtol=1e-12)
        np.testing.assert_allclose(state.codebook, codes, rtol=1e-12)
    totals = code_totals(jnp.asarray(Z), found.index, 7)
    again = ema_absorb(state, *totals, decay=0.9)
    expected = ema_update(state, jnp.asarray(Z), found.index, decay=0.9)
    jax.tree.map(np.testing.assert_array_equal, again, expected)
    # Without decay the codes are at once the means of the batch, but for the smoothing.
    index = nearest(Z, codes)
    at_once = ema_update(state, jnp.asarray(Z), jnp.asarray(index), decay=0.0, epsilon=1e-12)
    for k in set(index.ravel()):
        np.testing.assert_allclose(at_once.codebook[k], Z[index == k].mean(0), rtol=1e-9)


def test_eight_devices_do_what_one_does():
    z = jax.random.normal(jax.random.key(1), (16, 3, 3))
    index = vector_quantise(z, CODEBOOK).index
    whole = update(STATE, z, index)
    split = jax.pmap(
        lambda z, i: ema_update(STATE, z, i, axis_name="data"),
        axis_name="data",
        devices=jax.devices(),
    )(z.reshape(8, 2, 3, 3), index.reshape(8, 2, 3))
    for found, expected in zip(split, whole, strict=True):
        for device in range(8):
            np.testing.assert_allclose(found[device], expected, rtol=1e-6, atol=1e-7)


def test_nothing_becomes_nan():
    """Latents with NaN leave no trace in the averages; nor do codes that nothing is near."""
    bad = LATENTS.at[1].set(jnp.nan).at[2, 0, 0, 0].set(jnp.inf)
    found = quantise(bad, CODEBOOK)
    assert np.isnan(found.values[1]).all()
    state = update(STATE, bad, found.index)
    good = np.isfinite(np.asarray(bad)).all(-1)
    clean = update(STATE, LATENTS[good], found.index[good])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, clean)
    reset = jax.jit(reset_dead_codes)(jax.random.key(0), state, bad, threshold=1e3)
    assert all(np.isfinite(leaf).all() for leaf in reset)
    untouched = reset_dead_codes(jax.random.key(0), state, jnp.full((3, 3), jnp.nan), threshold=9.0)
    jax.tree.map(np.testing.assert_array_equal, untouched, state)
    # Nothing is ever near: the counts fade, and all stays finite; also from counts of 0.
    nowhere = jnp.full((5, 3), jnp.nan)
    fade = lambda s, _: (ema_update(s, nowhere, jnp.zeros(5, int), decay=0.1), None)  # noqa: E731
    faded = jax.jit(lambda s: jax.lax.scan(fade, s, length=200)[0])(STATE)
    assert all(np.isfinite(leaf).all() for leaf in faded)
    empty = STATE._replace(counts=0 * STATE.counts, sums=0 * STATE.sums)
    np.testing.assert_array_equal(update(empty, nowhere, jnp.zeros(5, int)).codebook, CODEBOOK)


def test_dead_codes_come_back_as_latents(key):
    counts = jnp.array([0.5, 3.0, 0.0, 2.0, 0.9, 1.0, 5.0])
    state = STATE._replace(counts=counts, sums=CODEBOOK * counts[:, None])
    found = jax.jit(reset_dead_codes)(key, state, LATENTS)
    dead = np.array([0, 2, 4])
    kept = np.setdiff1d(np.arange(7), dead)
    for new, old in zip(found, state, strict=True):
        np.testing.assert_array_equal(new[kept], old[kept])
    flat = Z.reshape(-1, 3).astype("f4")
    rows = [np.flatnonzero((flat == code).all(1)) for code in np.asarray(found.codebook[dead])]
    assert len({int(row[0]) for row in rows}) == 3  # latents of the batch, and three of them
    np.testing.assert_array_equal(found.counts[dead], 1)
    np.testing.assert_array_equal(found.sums[dead], found.codebook[dead])
    # All three change together: one update without any latent near them keeps them in place.
    far = jnp.full((1, 3), 100.0)
    after = update(found, far, jnp.ones(1, int))
    np.testing.assert_allclose(after.codebook[dead], found.codebook[dead], rtol=1e-4)


def test_kmeans_is_lloyds(key, x64):
    z = jnp.asarray(np.random.default_rng(2).normal(size=(150, 2)))
    start = kmeans(key, z, 6, num_iterations=0)
    assert all((np.asarray(z) == code).all(1).any() for code in np.asarray(start))
    expected, _ = kmeans2(np.asarray(z), np.asarray(start), iter=10, minit="matrix")
    np.testing.assert_allclose(kmeans(key, z, 6), expected, rtol=1e-10)


def test_cosine_quantises_on_the_sphere():
    found = vector_quantise(LATENTS, 5 * CODEBOOK, cosine=True)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    np.testing.assert_array_equal(found.index, (unit(Z) @ unit(CODES).T).argmax(-1))
    np.testing.assert_allclose(found.values, unit(CODES)[found.index], rtol=1e-5)
    gradient = jax.grad(lambda z: vector_quantise(z, CODEBOOK, cosine=True).commitment.sum())
    assert np.isfinite(gradient(0 * LATENTS)).all()


def test_perplexity():
    assert perplexity(jnp.arange(8), 8) == pytest.approx(8, rel=1e-5)
    assert perplexity(jnp.zeros((3, 4), int), 8) == pytest.approx(1, rel=1e-5)
    shares = np.array([0.5, 0.25, 0.25])
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert jax.jit(perplexity, static_argnums=1)(jnp.array([[0, 0], [2, 5]]), 8) == pytest.approx(
        expected, rel=1e-5
    )


def test_bad_input(key, unchecked):
    with pytest.raises(ValueError, match=r"codebook must have the latents' width 3, got .*7, 2"):
        vector_quantise(LATENTS, CODEBOOK[:, :2])
    with pytest.raises(ValueError, match="z must be finite"):
        vector_quantise(LATENTS * jnp.nan, CODEBOOK)
    with pytest.raises(ValueError, match="codebook must be finite"):
        vector_quantise(LATENTS, CODEBOOK * jnp.inf)
    with pytest.raises(ValueError, match="codebooks must be at least one"):
        residual_quantise(LATENTS, [])
    with pytest.raises(ValueError, match=r"num_stages must lie in \[1, 1\], got 2"):
        residual_quantise(LATENTS, [CODEBOOK], num_stages=2)
    with pytest.raises(ValueError, match="z must have shape"):
        ema_update(STATE, LATENTS[..., :2], jnp.zeros((4, 2, 3), int))
    with pytest.raises(ValueError, match=r"decay must lie in \[0"):
        ema_update(STATE, LATENTS, jnp.zeros((4, 2, 3), int), decay=1.0)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        ema_update(STATE, LATENTS, jnp.zeros((4, 2, 3), int), epsilon=0.0)
    with pytest.raises(ValueError, match="threshold must be positive"):
        reset_dead_codes(key, STATE, LATENTS, threshold=0.0)
    with pytest.raises(ValueError, match="at least num_codes = 40 latents, got 24"):
        kmeans(key, LATENTS, 40)
    with pytest.raises(ValueError, match=r"index must lie in \[0, 7\]"):
        perplexity(jnp.array([0, 8]), 8)
    with pytest.raises(TypeError, match="index must hold integers"):
        perplexity(jnp.zeros(3), 8)
    with pytest.raises(ValueError, match="count must be positive"):
        codebook_state(CODEBOOK, count=0.0)


@pytest.mark.slow
def test_perplexity_counts_beyond_the_whole_numbers_of_float32():
    index = jnp.concatenate([jnp.zeros(40_000_000, jnp.int8), jnp.ones(20_000_000, jnp.int8)])
    expected = np.exp(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    np.testing.assert_allclose(perplexity(index, 2), expected, rtol=1e-5)
