"""Discrete codes by a codebook: nearest codes, residual stages, averages, dead codes, k-means.

Latents are z [batch, *grid, dim], one code for each place of the grid. Values are straight through:
those of the codes, with the gradient of z. Losses are sums over the grid and the features, so that
a weight tuned for means over them is another number.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from genjax import checks
from genjax.numerics import DIRECT_DIMS, HIGHEST, at_least_float32, squared_distances, sum_event
from genjax.typing import PRNGKey

__all__ = [
    "CodebookState",
    "Quantised",
    "code_totals",
    "codebook_state",
    "ema_absorb",
    "ema_update",
    "kmeans",
    "perplexity",
    "reset_dead_codes",
    "residual_quantise",
    "vector_quantise",
]


class Quantised(NamedTuple):
    """values [batch, *grid, dim], index [batch, *grid] (residual: [batch, *grid, stages]), and the
    two losses [batch], squared distances with a gradient for the encoder or for the codebook."""

    values: Float[Array, "batch *grid dim"]
    index: Int[Array, "batch *places"]
    commitment: Float[Array, " batch"]
    codebook: Float[Array, " batch"]


class CodebookState(NamedTuple):
    """A codebook that no gradient moves: codebook = sums / counts, smoothed averages of both."""

    codebook: Float[Array, "codes dim"]
    counts: Float[Array, " codes"]
    sums: Float[Array, "codes dim"]


def vector_quantise(
    z: Float[Array, "batch *grid dim"], codebook: Float[Array, "codes dim"], *, cosine: bool = False
) -> Quantised:
    """Put the nearest code in the place of each latent: k = argmin_j |z - e_j|.

    van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning", 2017, eqs (1)
    to (3): loss = -log p(x|values) + |sg z - e|^2 + beta |z - sg e|^2, whose second term is
    `codebook` and whose third, unweighted, `commitment`; beta = .25 multiplies the commitment. With
    averages in the state (`ema_update`) the codebook term is left out. cosine: latents and codes
    are scaled to norm 1 first (Yu et al., "Vector-quantized Image Modeling", 2021).

    A latent with NaN has values of NaN and the last index, and leaves no trace in `ema_update`.
    Raises ValueError for a codebook of other width and concrete latents that are not finite.

    >>> codebook = jnp.array([[0.0, 0.0], [1.0, 1.0]])
    >>> vector_quantise(jnp.array([[0.9, 0.8]]), codebook).index
    Array([1], dtype=int32)
    """
    check_latents(z)
    checks.rank("codebook", codebook, 2)
    checks.not_empty("codebook", codebook)
    if codebook.shape[1] != z.shape[-1]:
        raise ValueError(
            f"codebook must have the latents' width {z.shape[-1]}, got shape {codebook.shape}"
        )
    checks.finite("codebook", codebook)
    z, codebook = at_least_float32(z), at_least_float32(codebook)
    if cosine:
        z, codebook = _unit(z), _unit(codebook)
    index = _nearest(z.reshape(-1, z.shape[-1]), codebook).reshape(z.shape[:-1])
    code = codebook[index]
    held = jax.lax.stop_gradient(code)
    return Quantised(
        straight_through(z, held),
        index,
        sum_event(jnp.square(z - held)),
        sum_event(jnp.square(jax.lax.stop_gradient(z) - code)),
    )


def residual_quantise(
    z: Float[Array, "batch *grid dim"],
    codebooks: Sequence[Float[Array, "_ dim"]],
    *,
    num_stages: int | Int[Array, ""] | None = None,
) -> Quantised:
    """Quantise what the stages before have left: r_0 = z, r_{i+1} = r_i - sg e_{k_i}.

    values = sum_i e_{k_i}, straight through as a whole; both losses are sums over the stages
    (Zeghidour et al., "SoundStream", 2021, algorithm 1; Lee et al. 2022). No gradient of a stage
    reaches the codes of an earlier one. One stage is `vector_quantise`. num_stages: only the first
    so many count, such as a random number for each batch (quantiser dropout); the index has the
    later ones too. Raises ValueError as `vector_quantise` does, and for no codebooks.

    >>> codebooks = [jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [0.25]])]
    >>> residual_quantise(jnp.array([[1.2]]), codebooks).values
    Array([[1.25]], dtype=float32)
    """
    if not len(codebooks):
        raise ValueError("codebooks must be at least one, got none")
    if num_stages is not None:
        checks.between("num_stages", num_stages, 1, len(codebooks))
    residual, total = at_least_float32(z), jnp.zeros_like(at_least_float32(z))
    indices, commitment, of_codes = [], 0.0, 0.0
    for i, codebook in enumerate(codebooks):
        found = vector_quantise(residual, codebook)
        kept = True if num_stages is None else i < num_stages
        code = jax.lax.stop_gradient(at_least_float32(codebook)[found.index])
        indices.append(found.index)
        commitment += jnp.where(kept, found.commitment, 0)
        of_codes += jnp.where(kept, found.codebook, 0)
        total = total + jnp.where(kept, code, 0)
        residual = residual - code
    values = straight_through(at_least_float32(z), total)
    return Quantised(
        values, jnp.stack(indices, axis=-1), jnp.asarray(commitment), jnp.asarray(of_codes)
    )


def codebook_state(
    codebook: Float[Array, "codes dim"], *, count: float | Float[Array, ""] = 1.0
) -> CodebookState:
    """The state at the start: every code as if it were the mean of `count` latents.

    Sums start at codebook * count: at 0 the first averages would take the codes to the origin.
    Take the codebook from data (`kmeans`, or latents of a batch). Raises ValueError unless the
    codebook is [codes, dim] and finite where concrete, and count positive.

    >>> codebook_state(jnp.zeros((16, 4))).codebook.shape
    (16, 4)
    """
    checks.rank("codebook", codebook, 2)
    checks.finite("codebook", codebook)
    checks.positive("count", count)
    codebook = at_least_float32(codebook)
    counts = jnp.full(len(codebook), count, codebook.dtype)
    return CodebookState(codebook, counts, codebook * counts[:, None])


def code_totals(
    z: Float[Array, "batch *grid dim"], index: Int[Array, "batch *grid"], num_codes: int
) -> tuple[Float[Array, " codes"], Float[Array, "codes dim"]]:
    """How many latents each code stands for, and the sum of those. No gradient flows.

    Latents that are not finite count as none. Raises ValueError where the index does not fit.

    >>> counts, sums = code_totals(jnp.ones((3, 2)), jnp.array([0, 1, 1]), 2)
    >>> counts
    Array([1., 2.], dtype=float32)
    """
    checks.shape("index", index, z.shape[:-1])
    checks.integer("num_codes", num_codes, 1)
    flat = jax.lax.stop_gradient(at_least_float32(z)).reshape(-1, z.shape[-1])
    finite = jnp.all(jnp.isfinite(flat), axis=1)
    flat = jnp.where(finite[:, None], flat, 0)
    place = jnp.where(finite, index.reshape(-1), num_codes)  # beyond the last: dropped
    counts = jax.ops.segment_sum(jnp.ones(len(flat), flat.dtype), place, num_codes)
    return counts, jax.ops.segment_sum(flat, place, num_codes)


def ema_update(
    state: CodebookState,
    z: Float[Array, "batch *grid dim"],
    index: Int[Array, "batch *grid"],
    *,
    decay: float = 0.99,
    epsilon: float = 1e-5,
    axis_name: str | None = None,
) -> CodebookState:
    """Move each code towards the mean of its latents: averages of counts and sums.

    N <- g N + (1 - g) n,  m <- g m + (1 - g) sum z,  e = m / N',
    N' = (N + epsilon) / (sum N + K epsilon) * sum N

    van den Oord et al. 2017, appendix A.1, with Laplace smoothing, so that no count divides by 0.
    z, index: of the codebook before the update. axis_name: counts and sums are summed over these
    devices before they are averaged, so that n devices do what one does. Raises ValueError where
    shapes do not fit, decay is not in [0, 1) and epsilon not positive.

    >>> state = codebook_state(jnp.zeros((2, 1)))
    >>> ema_update(state, jnp.ones((3, 1)), jnp.array([0, 1, 1]), decay=0.5).codebook.round(3)
    Array([[0.5       ],
           [0.667]], dtype=float32)
    """
    checks.shape("z", z, (*index.shape, state.codebook.shape[1]))
    totals = code_totals(z, index, len(state.codebook))
    if axis_name is not None:
        totals = jax.lax.psum(totals, axis_name)
    return ema_absorb(state, *totals, decay=decay, epsilon=epsilon)


def ema_absorb(
    state: CodebookState,
    counts: Float[Array, " codes"],
    sums: Float[Array, "codes dim"],
    *,
    decay: float = 0.99,
    epsilon: float = 1e-5,
) -> CodebookState:
    """`ema_update` by the totals of a batch (`code_totals`), such as a train step has carried out.

    Raises ValueError as it does.

    >>> state = codebook_state(jnp.zeros((2, 1)))
    >>> counts, sums = code_totals(jnp.ones((3, 1)), jnp.array([0, 1, 1]), 2)
    >>> ema_absorb(state, counts, sums, decay=0.5).codebook.round(3)
    Array([[0.5       ],
           [0.667]], dtype=float32)
    """
    checks.same_shape(**{"counts": counts, "state.counts": state.counts})
    checks.same_shape(**{"sums": sums, "state.sums": state.sums})
    checks.between("decay", decay, 0, 1 - 1e-9)
    checks.positive("epsilon", epsilon)
    # Kept as x + w (new - x): g x + (1 - g) x is below x in float32.
    counts = state.counts + (1 - decay) * (counts - state.counts)
    sums = state.sums + (1 - decay) * (sums - state.sums)
    total = jnp.sum(counts)
    smoothed = (counts + epsilon) / (total + len(counts) * epsilon) * total
    used = smoothed > 0
    codebook = sums / jnp.where(used, smoothed, 1)[:, None]
    return CodebookState(jnp.where(used[:, None], codebook, state.codebook), counts, sums)


def reset_dead_codes(
    key: PRNGKey,
    state: CodebookState,
    z: Float[Array, "batch *grid dim"],
    *,
    threshold: float | Float[Array, ""] = 1.0,
) -> CodebookState:
    """Put random latents of the batch in the place of codes whose average count is below threshold.

    Codebook, counts (= threshold) and sums (= code * threshold) change together, or the next
    average would take the code back. Each code gets another latent as long as there are enough;
    latents that are not finite are none, and a batch without any changes nothing. Zeghidour et al.
    2021, section III-C. Raises ValueError for latents of other width and a threshold of 0 or less.

    >>> state = codebook_state(jnp.zeros((4, 2)), count=0.1)
    >>> reset_dead_codes(jax.random.key(0), state, jnp.ones((8, 2))).codebook.sum(1)
    Array([2., 2., 2., 2.], dtype=float32)
    """
    dim = state.codebook.shape[1]
    checks.min_rank("z", z, 2)
    checks.shape("z", z, (*z.shape[:-1], dim))
    checks.positive("threshold", threshold)
    flat = jax.lax.stop_gradient(at_least_float32(z)).reshape(-1, dim)
    finite = jnp.all(jnp.isfinite(flat), axis=1)
    # A random order of the latents, those that are finite first.
    order = jnp.argsort(jnp.where(finite, jax.random.uniform(key, finite.shape), 2.0))
    dead = (state.counts < threshold) & jnp.any(finite)
    turn = (jnp.cumsum(dead) - 1) % jnp.maximum(jnp.sum(finite), 1)
    new = jnp.where(dead[:, None], flat[order[turn]], 0).astype(state.codebook.dtype)
    return CodebookState(
        jnp.where(dead[:, None], new, state.codebook),
        jnp.where(dead, threshold, state.counts),
        jnp.where(dead[:, None], new * threshold, state.sums),
    )


def kmeans(
    key: PRNGKey, z: Float[Array, "... dim"], num_codes: int, *, num_iterations: int = 10
) -> Float[Array, "codes dim"]:
    """Codes for these latents by Lloyd's algorithm (1982), started at random ones among them.

    Each round takes a code to the mean of the latents nearest to it, which never raises the mean of
    min_j |z - e_j|^2; one that has none stays. Raises ValueError for fewer latents than codes and
    concrete ones that are not finite.

    >>> z = jnp.array([[0.0], [0.1], [5.0], [5.1]])
    >>> jnp.sort(kmeans(jax.random.key(1), z, 2), axis=0).round(2)
    Array([[0.05     ],
           [5.05]], dtype=float32)
    """
    check_latents(z)
    checks.integer("num_codes", num_codes, 1)
    checks.integer("num_iterations", num_iterations, 0)
    flat = at_least_float32(z).reshape(-1, z.shape[-1])
    if len(flat) < num_codes:
        raise ValueError(f"z must hold at least num_codes = {num_codes} latents, got {len(flat)}")

    def one(codebook: Array, _: None) -> tuple[Array, None]:
        counts, sums = code_totals(flat, _nearest(flat, codebook), num_codes)
        mean = sums / jnp.maximum(counts, 1)[:, None]
        return jnp.where(counts[:, None] > 0, mean, codebook), None

    start = flat[jax.random.permutation(key, len(flat))[:num_codes]]
    return jax.lax.scan(one, start, length=num_iterations)[0]


def perplexity(index: Int[Array, "..."], num_codes: int) -> Float[Array, ""]:
    """exp H of how often each code is used, H = -sum_k f_k log f_k: between 1 and num_codes.

    Of all the indices given: over an epoch, since a batch holds but some of the codes (van den Oord
    et al. 2017 in common code; the entropy is in nats). Indices outside are left out. Raises
    ValueError for no indices, concrete ones outside [0, num_codes), TypeError unless integers.

    >>> round(float(perplexity(jnp.array([0, 1, 2, 3]), 8)), 3)
    4.0
    """
    checks.integer("num_codes", num_codes, 1)
    if not jnp.issubdtype(jnp.result_type(index), jnp.integer):
        raise TypeError(f"index must hold integers, got {jnp.result_type(index)}")
    if not np.size(index):
        raise ValueError(f"index must hold at least one index, got shape {np.shape(index)}")
    checks.between("index", index, 0, num_codes - 1)
    flat = jnp.reshape(index, -1)
    # Whole numbers: float32 stops counting at 2^24.
    counts = jax.ops.segment_sum(jnp.ones(flat.shape, jnp.int32), flat, num_codes)
    share = counts / jnp.maximum(jnp.sum(counts), 1)
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0)))


def check_latents(z: Array) -> None:
    checks.min_rank("z", z, 2)
    checks.not_empty("z", z)
    checks.finite("z", z)


def straight_through(z: Array, code: Array) -> Array:
    """The code, exactly, with the gradient of z."""
    return jax.lax.stop_gradient(code) + (z - jax.lax.stop_gradient(z))


def _unit(x: Array) -> Array:
    """x / |x|, 0 where x is 0."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)


def _nearest(z: Array, codebook: Array) -> Int[Array, " n"]:
    """Index of the nearest code of each row, the first where several are; without gradient."""
    z, codebook = jax.lax.stop_gradient((z, codebook))
    if codebook.shape[1] <= DIRECT_DIMS:
        distances = squared_distances(z, codebook)
    else:
        # Without |z|^2, around the mean of the codes: the order is the same.
        middle = jnp.mean(codebook, axis=0, keepdims=True)
        codes = codebook - middle
        products = jnp.matmul(z - middle, codes.T, precision=HIGHEST)
        distances = 0.5 * jnp.sum(jnp.square(codes), axis=1)[None] - products
    # Two plain reductions, which vectorise where XLA's argmin does not; no code is at NaN.
    least = jnp.min(distances, axis=1, keepdims=True)
    place = jnp.where(distances == least, jnp.arange(len(codebook))[None], len(codebook) - 1)
    return jnp.min(place, axis=1)
