"""Laws of every public function, by its entry: each raises AssertionError where it is broken."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tests.tables.entry import CHANGES, Entry

# Of the largest value: float32 has 1.2e-7, and a gradient loses as much as its values cancel; most
# where two points lie together at 1e4, whose distance is differentiated by a product of matrices.
TOLERANCE = 3e-3


def float32(data: Any) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.float32) for x in data]


DRAWS = {"normal": jnp.float32, "uniform": jnp.float32, "gumbel": jnp.float32,
         "rademacher": jnp.int32, "randint": jnp.int32, "bernoulli": None,
         "categorical": None}  # fmt: skip


def same_draw(name: str, dtype: Any) -> Any:
    """The draw of jax that is the same number with 64-bit types, where it would be another."""
    draw = getattr(jax.random, name)

    @functools.wraps(draw)
    def drawn(*args: Any, **options: Any) -> Any:
        given = inspect.signature(draw).bind(*args, **options).arguments
        for each in {"p", "logits"} & set(given):
            given[each] = jnp.asarray(given[each], jnp.float32)
        if dtype is None:
            return draw(**given)
        if name == "rademacher":  # in jax by a probability of the widest type
            signs = jax.random.bernoulli(given["key"], jnp.float32(0.5), given["shape"])
            return jnp.where(signs, 1, -1).astype(given.get("dtype", int))
        asked = given.get("dtype") or (jnp.float64 if dtype == jnp.float32 else dtype)
        return draw(**{**given, "dtype": dtype}).astype(asked)

    return mock.patch.object(jax.random, name, drawn)


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """With 64-bit types, the numbers that are drawn without."""
    with contextlib.ExitStack() as stack:
        for name, dtype in DRAWS.items():
            stack.enter_context(same_draw(name, dtype))
        yield


def narrow(entry: Entry, tree: Any) -> None:
    """Nothing of float32 data is of 64 bits."""
    wide = [leaf.dtype for leaf in jax.tree.leaves(tree) if leaf.dtype in ("float64", "complex128")]
    assert entry.wide or not wide, f"{len(wide)} of float32 data are of 64 bits"


def finite(tree: Any, where: str) -> None:
    """No NaN and no infinity, but for the log of a probability that is 0."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        number = np.isfinite(leaf) | np.isneginf(np.real(leaf))
        assert np.all(number), f"{where}: {jax.tree_util.keystr(path)} is not finite: {leaf}"


def close(narrow: Any, wide: Any, where: str) -> None:
    """float32 within TOLERANCE of float64's largest, leaf by leaf."""
    for (path, a), b in zip(jax.tree.leaves_with_path(narrow), jax.tree.leaves(wide), strict=True):
        a, b = np.asarray(a, np.complex128), np.asarray(b, np.complex128)
        name = f"{where}: {jax.tree_util.keystr(path)}"
        assert (np.isneginf(a.real) == np.isneginf(b.real)).all(), f"{name}: log of 0 at others"
        a, b = (np.where(np.isneginf(z.real), 0, z) for z in (a, b))
        assert np.isfinite(a).all(), f"{name} is not finite in float32"
        off = np.max(np.abs(a - b), initial=0) / max(np.max(np.abs(b), initial=0), 1e-30)
        assert off < TOLERANCE, f"{name} is {off:.1e} of the largest off"


def values_and_gradient(entry: Entry, *data: Any) -> dict[str, Any]:
    """What law 1 compares."""
    found: dict[str, Any] = {"values": entry.numbers(*data)}
    if entry.order:
        where = tuple(range(len(data)))
        found["gradient"] = jax.grad(entry.total, argnums=where)(*data)
    return found


def float32_is_close_to_float64(entry: Entry, change: str) -> None:
    """Law 1: values and gradient at the same data, those of float32."""
    data = [CHANGES[change](x).astype(np.float32) for x in entry.data]
    run = jax.jit(lambda *data: values_and_gradient(entry, *data))
    narrow = jax.tree.map(np.asarray, run(*data))
    with jax.enable_x64(True), same_draws():
        wide = run(*[jnp.asarray(x, jnp.float64) for x in data])
        close(narrow, wide, change)


def traced_with_64_bit_types(entry: Entry, order: bool) -> None:
    """Law 2: jit of vmap, of values or of two derivatives both ways, of float32 data."""
    with jax.enable_x64(True):
        data = [jnp.stack([x] * 2) for x in float32(entry.data)]
        call = entry.everything if order else entry.numbers
        narrow(entry, jax.eval_shape(jax.jit(jax.vmap(call)), *data))


def derivatives_are_finite(entry: Entry) -> None:
    """Laws 2 and 3: no NaN on the way either, by each of the data, schedules and times too."""
    with jax.debug_nans(True):
        finite(jax.jit(entry.everything)(*float32(entry.data)), "at the data")


def ties_are_defined(entry: Entry) -> None:
    """Law 5: all rows equal, and nothing but zeros: values and gradient are finite."""
    run = jax.jit(lambda *data: values_and_gradient(entry, *data))
    finite(run(*[jnp.broadcast_to(x[:1], x.shape) for x in float32(entry.data)]), "rows all equal")
    finite(run(*[jnp.zeros_like(x) for x in float32(entry.data)]), "zeros")


def small_and_whole_data_are_defined(entry: Entry) -> None:
    """Law 5: no rows, one row, whole numbers: a finite value, or an error that says why."""
    for kind, data in {
        "no rows": [x[:0] for x in entry.data],
        "one row": [x[:1] for x in entry.data],
        "integers": [np.round(3 * x).astype(np.int32) for x in entry.data],
    }.items():
        try:
            found = entry.call(*map(jnp.asarray, data))
        except (ValueError, TypeError) as error:
            said = str(error)
            if len(said) < 10 or "\n" in said:
                raise AssertionError(
                    f"{kind}: an error that is not the library's: {said}"
                ) from error
        else:
            finite(jax.tree.map(as_floats, found), kind)


def as_floats(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf if leaf.dtype.kind in "fc" else np.zeros(0)


def masked_is_defined(entry: Entry) -> None:
    """Law 5: everything masked, and NaN behind the mask: finite values and gradient."""
    hidden = Entry(entry.masked, entry.data, order=entry.order)
    nothing = [jnp.full_like(x, jnp.nan) for x in float32(entry.data)]
    finite(jax.jit(lambda *data: values_and_gradient(hidden, *data))(*nothing), "masked")
