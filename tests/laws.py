"""Laws that every public loss obeys, and how the losses are found.

A per-example loss is a public function of a family that is annotated to return `[batch]`, alone or
before a dictionary of terms. A two-sample objective is one annotated to return a NamedTuple of
scalars or one scalar, from arrays with a leading axis of examples.
"""

import importlib
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FAMILIES = ("transport", "variational", "adversarial", "diffusion", "flows")


class Case(NamedTuple):
    """How to call a loss: call(key, *data); data has a leading axis of examples."""

    call: Callable[..., Any]
    data: tuple[Any, ...]
    extremes: tuple[float, ...] = (0.0, 1e3, -1e3)  # values put into the data for the gradient
    discrete: bool = False  # whole numbers in, no gradient to them
    masked: bool = False  # takes where=


def returns_per_example(function: Any) -> bool:
    """Whether the annotation says [batch], alone or as the first of a tuple."""
    annotation = inspect.signature(function).return_annotation
    parts = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else (annotation,)
    return getattr(parts[0], "dim_str", "").strip() == "batch" and len(parts) <= 2


def per_example_losses(packages: tuple[str, ...] = FAMILIES) -> dict[str, Any]:
    """Every public function of the packages that returns one number per example."""
    found = {}
    for package in packages:
        module = importlib.import_module(package if "." in package else f"genjax.{package}")
        for name, function in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            if returns_per_example(function):
                found[name] = function
    return found


def first(value: Any) -> jax.Array:
    """The losses, without their terms."""
    return value[0] if isinstance(value, tuple) else value


def nudge(x: Any, case: Case, row: int) -> Any:
    """Change one example."""
    x = np.array(x)
    x[row] = 1 - x[row] if case.discrete else x[row] + 1.5
    return jnp.asarray(x)


def check_shape_and_dtype(case: Case, key: Any) -> None:
    """One float32 number per example, for float32 and for bfloat16 data alike."""
    batch = case.data[0].shape[0]
    for dtype in (jnp.float32, jnp.bfloat16):
        data = [x if case.discrete else x.astype(dtype) for x in case.data]
        losses = first(case.call(key, *data))
        assert losses.shape == (batch,), f"shape {losses.shape}, expected ({batch},)"
        assert losses.dtype == jnp.float32, f"{losses.dtype} from {jnp.dtype(dtype).name}"
        assert bool(jnp.all(jnp.isfinite(losses))), "not finite"


def check_depends_on_itself_alone(case: Case, key: Any) -> None:
    """Changing one example changes its own loss and no other's."""
    before = np.asarray(first(case.call(key, *case.data)))
    row = len(before) // 2
    after = np.asarray(first(case.call(key, *[nudge(x, case, row) for x in case.data])))
    others = np.arange(len(before)) != row
    np.testing.assert_allclose(after[others], before[others], rtol=1e-5, atol=1e-5)
    assert after[row] != before[row], "an example's own loss does not depend on it"


def check_jit_equals_eager(case: Case, key: Any) -> None:
    eager = first(case.call(key, *case.data))
    compiled = first(jax.jit(case.call)(key, *case.data))
    np.testing.assert_allclose(compiled, eager, rtol=2e-4, atol=2e-5)


def check_vmap_over_keys(case: Case, key: Any) -> None:
    keys = jax.random.split(key, 2)
    together = jax.vmap(lambda k: first(case.call(k, *case.data)))(keys)
    for i in range(2):
        alone = first(case.call(keys[i], *case.data))
        np.testing.assert_allclose(together[i], alone, rtol=2e-4, atol=2e-5)


def check_gradient_at_extremes(case: Case, key: Any) -> None:
    """Gradients with respect to the data are finite where the data are extreme."""
    if case.discrete:
        return
    total = jax.jit(jax.grad(lambda *data: jnp.sum(first(case.call(key, *data))), argnums=0))
    for value in case.extremes:
        gradient = total(*[jnp.full_like(x, value) for x in case.data])
        assert bool(jnp.all(jnp.isfinite(gradient))), f"gradient at {value} is not finite"


UNITS = r"nats|bits|units? of|unit|squared|\|.*\|\^2|norm|steps"


def check_docstring(function: Any) -> None:
    """A first line, a formula, a unit or scale, and where it is not elementary, the paper."""
    text = inspect.getdoc(function) or ""
    assert text.splitlines()[0].rstrip().endswith("."), "no first line that ends with a full stop"
    assert re.search(r"[=|]|log|sum", text), "no formula"
    assert re.search(UNITS, text), "no unit"


LAWS = (
    check_shape_and_dtype,
    check_depends_on_itself_alone,
    check_jit_equals_eager,
    check_vmap_over_keys,
    check_gradient_at_extremes,
)
