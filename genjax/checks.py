"""Checks of what callers pass: each raises by name, with what came and what was expected.

Shapes and dtypes are known while tracing, so these run before any computation. Checks of values
(`positive`, `finite`) apply to concrete values only and pass traced ones through.
"""

import contextlib
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def is_concrete(x: Any) -> bool:
    """Whether the value can be read now, that is outside a trace."""
    return not isinstance(x, Tracer)


def one_of(
    name: str, value: Any, options: Iterable[Any], aliases: Mapping[str, str] | None = None
) -> None:
    """Raise ValueError unless `value` is one of `options`; names the nearest option, or the one
    that `aliases` gives for it."""
    options = list(options)
    if value in options:
        return
    wanted = (aliases or {}).get(value, value)
    near = difflib.get_close_matches(str(wanted), [str(o) for o in options], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {options}, got {value!r}{hint}")


def floating(name: str, x: Any) -> None:
    """Raise TypeError unless the array has a floating dtype."""
    dtype = jnp.asarray(x).dtype if not hasattr(x, "dtype") else x.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, got {dtype}")


def rank(name: str, x: Any, expected: int | Sequence[int]) -> None:
    """Raise ValueError unless the array has (one of) the expected rank(s)."""
    allowed = (expected,) if isinstance(expected, int) else tuple(expected)
    if np.ndim(x) not in allowed:
        wanted = " or ".join(str(a) for a in allowed)
        raise ValueError(f"{name} must have rank {wanted}, got shape {np.shape(x)}")


def min_rank(name: str, x: Any, least: int) -> None:
    """Raise ValueError where the array has fewer axes than `least`."""
    if np.ndim(x) < least:
        raise ValueError(f"{name} must have rank at least {least}, got shape {np.shape(x)}")


def shape(name: str, x: Any, expected: Sequence[int | None]) -> None:
    """Raise ValueError unless the shape is the expected one (None matches any size)."""
    got = np.shape(x)
    if len(got) != len(expected) or any(
        e is not None and g != e for g, e in zip(got, expected, strict=False)
    ):
        wanted = tuple("any" if e is None else e for e in expected)
        raise ValueError(f"{name} must have shape {wanted}, got {got}")


def same_shape(**arrays: Any) -> None:
    """Raise ValueError unless all the named arrays have one shape."""
    shapes = {name: np.shape(x) for name, x in arrays.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {s}" for name, s in shapes.items())
        raise ValueError(f"shapes must be equal, got {listed}")


def same_event(**arrays: Any) -> None:
    """Raise ValueError unless all the named arrays agree in every axis but the first."""
    events = {name: np.shape(x)[1:] for name, x in arrays.items()}
    if len(set(events.values())) > 1:
        listed = ", ".join(f"{name} {e}" for name, e in events.items())
        raise ValueError(f"events (all axes but the first) must be equal, got {listed}")


def same_batch(**arrays: Any) -> None:
    """Raise ValueError unless all the named arrays have the same first axis."""
    sizes = {name: (np.shape(x) or (None,))[0] for name, x in arrays.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {np.shape(x)}" for name, x in arrays.items())
        raise ValueError(f"batch sizes (first axes) must be equal, got {listed}")


def not_empty(name: str, x: Any) -> None:
    """Raise ValueError where the first axis is empty."""
    if np.shape(x)[:1] == (0,):
        raise ValueError(f"{name} must hold at least one example, got shape {np.shape(x)}")


def at_least(name: str, value: Any, least: float | int) -> None:
    """Raise ValueError where a concrete number is below `least` or is NaN."""
    if is_concrete(value) and not bool(np.all(np.asarray(value) >= least)):
        raise ValueError(f"{name} must be at least {least}, got {value}")


def integer(name: str, value: Any, least: int | None = None) -> None:
    """Raise TypeError unless `value` is a Python or numpy integer, ValueError below `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r} of {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def integers(name: str, values: Sequence[Any], least: int) -> None:
    """Raise unless `values` are integers of at least `least`, one of them or more."""
    if not len(values):
        raise ValueError(f"{name} must hold at least one number, got none")
    for value in values:
        integer(name, value, least)


def positive(name: str, value: Any) -> None:
    """Raise ValueError where a concrete number is not finite and above 0."""
    if is_concrete(value):
        array = np.asarray(value, dtype=np.float64)
        if not bool(np.all((array > 0) & np.isfinite(array))):
            raise ValueError(f"{name} must be positive and finite, got {value}")


def between(name: str, value: Any, low: float | int, high: float | int) -> None:
    """Raise ValueError where a concrete number lies outside [low, high] or is NaN."""
    if is_concrete(value):
        array = np.asarray(value, dtype=np.float64)
        if not bool(np.all((array >= low) & (array <= high))):
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")


def finite(name: str, x: Any) -> None:
    """Raise ValueError where a concrete array holds NaN or infinity; says how many and where."""
    if not is_concrete(x):
        return
    bad = ~np.isfinite(np.asarray(x, dtype=np.float64))
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} must be finite, got {int(bad.sum())} of {math.prod(bad.shape)} values that "
            f"are not, the first at index {first}"
        )


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Imports inside the context that fail name the extra of the distribution that brings them."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs {error.name}: pip install 'genjax-models[{name}]'", name=error.name
        ) from error
