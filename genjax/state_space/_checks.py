"""What state space models refuse, by name, before anything is traced."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from genjax import checks


def fit(eigenvalues: Any, dt: Any, **vectors: Any) -> tuple[Array, ...]:
    """Eigenvalues, dt and vectors as arrays of one shape [*channels, pairs], dt [*channels].

    Leading axes that one of them lacks are those of the others. Raises TypeError or ValueError for
    real eigenvalues, real parts above 0, steps that are not above 0, and shapes that do not fit.
    """
    checks.min_rank("eigenvalues", eigenvalues, 1)
    if not jnp.iscomplexobj(eigenvalues):
        raise TypeError(f"eigenvalues must be complex, got {jnp.asarray(eigenvalues).dtype}")
    if checks.is_concrete(eigenvalues):
        worst = float(np.max(np.real(np.asarray(eigenvalues)), initial=-np.inf))
        if not worst <= 0:
            raise ValueError(f"eigenvalues must have real parts of at most 0, got {worst}")
    checks.positive("dt", dt)
    shapes = {"eigenvalues": np.shape(eigenvalues)}
    shapes |= {name: np.shape(x) for name, x in vectors.items()}
    steps = np.shape(dt)
    for name, found in shapes.items():
        if found[-1:] != np.shape(eigenvalues)[-1:]:
            wanted = np.shape(eigenvalues)[-1]
            raise ValueError(f"{name} must have {wanted} pairs on its last axis, got shape {found}")
    try:
        full = np.broadcast_shapes((*steps, 1), *shapes.values())
    except ValueError:
        listed = ", ".join(f"{name} {found}" for name, found in shapes.items())
        raise ValueError(f"channels must agree, got {listed}, dt {steps}") from None
    wide = [jnp.broadcast_to(jnp.asarray(x), full) for x in (eigenvalues, *vectors.values())]
    kind = jnp.result_type(wide[0].dtype, *(x.dtype for x in wide))
    dt = jnp.broadcast_to(jnp.asarray(dt), full[:-1]).astype(jnp.finfo(kind).dtype)
    return wide[0].astype(kind), dt, *(x.astype(kind) for x in wide[1:])


def state(h0: Any, expected: tuple[int, ...]) -> None:
    """The initial state, where one is given."""
    if h0 is not None:
        checks.shape("h0", h0, expected)


def mask(where: Any, expected: tuple[int, ...]) -> None:
    """The mask [batch, length], where one is given."""
    if where is not None:
        checks.shape("where", where, expected)
        if jnp.asarray(where).dtype != jnp.bool_:
            raise TypeError(f"where must be boolean, got {jnp.asarray(where).dtype}")


def decays(A: Any, dt: Any, where: Any = None) -> None:
    """Rates of a scan at most 0; steps at least 0, where one of 0 leaves the state as it is."""
    if checks.is_concrete(A) and not bool(np.all(np.asarray(A) <= 0)):
        raise ValueError(f"A must be at most 0, got {float(np.max(np.asarray(A)))}")
    if checks.is_concrete(dt) and checks.is_concrete(where):
        steps = np.asarray(dt)
        steps = steps if where is None else steps[np.asarray(where)]
        if not bool(np.all(steps >= 0)):
            raise ValueError(f"dt must be at least 0, got {float(np.min(steps))}")


def length(name: str, x: Any) -> int:
    """The length of [batch, length, ...], at least 1."""
    checks.min_rank(name, x, 2)
    if np.shape(x)[1] == 0:
        raise ValueError(f"{name} must have at least one position, got shape {np.shape(x)}")
    return np.shape(x)[1]
