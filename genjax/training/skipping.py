"""An optimiser that leaves out the updates whose gradient is far larger than those before them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from genjax import checks
from genjax.training.update import with_norm

__all__ = ["SkipState", "skip_above_median"]


class SkipState(NamedTuple):
    """norms: the gradient norms of the last steps, float32 [window], inf where there was none yet;
    place: int32 [], where the next one goes; skipped: int32 [], updates left out so far; inner: the
    state of the optimiser."""

    norms: Any
    place: Any
    skipped: Any
    inner: Any


def skip_above_median(optimizer: Any, multiple: float, *, window: int = 100) -> Any:
    """Leave out an update whose gradient norm is over `multiple` times the running median.

        update 0, optimiser as it was, where
        |g_t| > multiple median(|g_(t - window)|, ..., |g_(t - 1)|)

    A deep hierarchy's gradient is once in some thousand steps a thousand times as large as
    otherwise; clipped, its direction alone still fills the optimiser's averages. A threshold in
    numbers (Child 2021, arXiv:2011.10650, section 3) is of one model and batch size, and where it
    is below the usual norm it leaves out everything, for ever. The median is of the norms of the
    updates left out too: where norms rise for good it follows within half of the window. Nothing is
    left out before half of the window is there, nor where the median is 0; a norm that is not
    finite is left out always and does not count for the median.

    optimizer: an optax transformation; what is returned is one too, its state a `SkipState`. Put it
    around what clips, so that it sees the norm before that. Raises ValueError for a multiple that
    is not over 1 and a window below 1.

    >>> optimizer = skip_above_median(optax.sgd(1.0), 10.0, window=3)
    >>> state = optimizer.init(jnp.zeros(()))
    >>> for gradient in (1.0, 2.0, 1.0, 50.0):
    ...     update, state = optimizer.update(jnp.float32(gradient), state)
    >>> float(update), int(state.skipped)
    (0.0, 1)
    """
    with checks.extra("train", "skip_above_median"):
        import optax

    checks.positive("multiple", multiple)
    if not multiple > 1:
        raise ValueError(f"multiple must be over 1, got {multiple}")
    checks.integer("window", window, 1)
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> SkipState:
        none = jnp.full(window, jnp.inf, jnp.float32)
        return SkipState(none, jnp.int32(0), jnp.int32(0), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **given: Any) -> tuple[Any, Any]:
        grads, norm = with_norm(updates)
        norm, median = norm.astype(jnp.float32), jnp.median(state.norms)
        finite = jnp.isfinite(norm)
        taken = finite & ((norm <= multiple * median) | (median == 0))
        moved = inner.update(grads, state.inner, params, **given)
        kept = jax.tree.map(jnp.zeros_like, moved[0]), state.inner
        updates, own = jax.tree.map(lambda new, old: jnp.where(taken, new, old), moved, kept)
        norms = state.norms.at[state.place].set(jnp.where(finite, norm, state.norms[state.place]))
        place = jnp.where(finite, (state.place + 1) % window, state.place)
        return updates, SkipState(norms, place, state.skipped + ~taken, own)

    return optax.GradientTransformationExtraArgs(init, update)
