"""Laws that every public loss obeys, and how the losses are found.

A per-example loss is a public function of a family that is annotated to return `[batch]`, alone or
before a dictionary of terms. An objective is one annotated to return a scalar or a record with a
scalar in it: a number for whole samples.
"""

import dataclasses
import functools
import importlib
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genjax.numerics import masked_mean

FAMILIES = (
    "transport",
    "variational",
    "adversarial",
    "diffusion",
    "flows",
    "alignment",
    "autoregressive",
)
GROUND = ("numerics", "checks", "ode", "randomness", "likelihoods", "divergences")


def public_functions(packages: tuple[str, ...] = FAMILIES) -> dict[str, Any]:
    """Every public function of the packages, by name; the second of a name as "package.name"."""
    found = {}
    for package in packages:
        module = importlib.import_module(package if "." in package else f"genjax.{package}")
        for name, function in vars(module).items():
            if not name.startswith("_") and inspect.isfunction(function):
                taken = found.get(name, function) is not function
                found[f"{package}.{name}" if taken else name] = function
    return found


def returns_per_example(function: Any) -> bool:
    """Whether the annotation says [batch], alone or as the first of a tuple."""
    annotation = inspect.signature(function).return_annotation
    parts = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else (annotation,)
    return getattr(parts[0], "dim_str", "").strip() == "batch" and len(parts) <= 2


def returns_objective(function: Any) -> bool:
    """Whether the annotation says a floating scalar, a record with one, or one of them first."""
    annotation = inspect.signature(function).return_annotation
    if typing.get_origin(annotation) is tuple:
        annotation = typing.get_args(annotation)[0]
    fields = getattr(annotation, "__annotations__", {}).values()
    scalar = lambda a: getattr(a, "dim_str", None) == "" and "float32" in a.dtypes  # noqa: E731
    return any(map(scalar, [annotation, *fields]))


def per_example_losses(packages: tuple[str, ...] = FAMILIES) -> dict[str, Any]:
    found = public_functions(packages)
    return {name: f for name, f in found.items() if returns_per_example(f)}


def objectives(packages: tuple[str, ...] = FAMILIES) -> dict[str, Any]:
    found = public_functions(packages)
    return {name: f for name, f in found.items() if returns_objective(f)}


def first(value: Any) -> jax.Array:
    """The losses, without their terms."""
    return value[0] if isinstance(value, tuple) else value


def close(a: Any, b: Any, rtol: float = 2e-4) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=2e-5), a, b)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """How to call a loss: call(key, *data); data has a leading axis of examples.

    extremes: values put into the data for the gradient. bad: data that must be refused, beside
    those that every loss must refuse. discrete: whole numbers in, no gradient to them.
    """

    call: Callable[..., Any]
    data: tuple[Any, ...]
    extremes: tuple[float, ...] = (0.0, 1e3, -1e3)
    discrete: bool = False

    # Compiled once for all laws.
    @functools.cached_property
    def losses(self) -> Callable[..., jax.Array]:
        return jax.jit(lambda key, *data: first(self.call(key, *data)))

    @functools.cached_property
    def gradient(self) -> Callable[..., jax.Array]:
        """Of the masked mean of the losses, with respect to the first data."""

        def mean(x: Any, key: Any, where: Any, *rest: Any) -> jax.Array:
            return masked_mean(first(self.call(key, x, *rest)), where)

        compiled = jax.jit(jax.grad(mean))
        return lambda key, where, *data: compiled(data[0], key, where, *data[1:])

    def with_row(self, row: int, change: Callable[[Any], Any]) -> list[jax.Array]:
        """The data with one example changed."""
        changed = [np.array(x) for x in self.data]
        for x in changed:
            x[row] = change(x[row])
        return [jnp.asarray(x) for x in changed]


def check_shape_and_dtype(case: Case, key: Any) -> None:
    """One float32 number per example, for float32 and for bfloat16 data alike."""
    batch = case.data[0].shape[0]
    for dtype in (jnp.float32, jnp.bfloat16):
        data = [x if case.discrete else x.astype(dtype) for x in case.data]
        losses = jax.eval_shape(case.call, key, *data)
        losses = first(losses)
        assert losses.shape == (batch,), f"shape {losses.shape}, expected ({batch},)"
        assert losses.dtype == jnp.float32, f"{losses.dtype} from {jnp.dtype(dtype).name}"
    assert bool(jnp.all(jnp.isfinite(case.losses(key, *case.data)))), "not finite"


def check_depends_on_itself_alone(case: Case, key: Any) -> None:
    """Changing one example changes its own loss and no other's."""
    before = np.asarray(case.losses(key, *case.data))
    row = len(before) // 2
    data = case.with_row(row, lambda x: 1 - x if case.discrete else x + 1.5)
    after = np.asarray(case.losses(key, *data))
    others = np.arange(len(before)) != row
    np.testing.assert_allclose(after[others], before[others], rtol=1e-5, atol=1e-5)
    assert after[row] != before[row], "an example's own loss does not depend on it"


def check_masking_equals_dropping(case: Case, key: Any) -> None:
    """An example that is masked in the mean leaves no trace, though it holds NaN."""
    batch = case.data[0].shape[0]
    row = batch // 2
    keep = jnp.arange(batch) != row
    poisoned = case.data if case.discrete else case.with_row(row, lambda x: np.nan * x)
    mean = masked_mean(case.losses(key, *poisoned), keep)
    dropped = jnp.mean(case.losses(key, *case.data)[keep])
    np.testing.assert_allclose(mean, dropped, rtol=1e-5, atol=1e-5)
    if not case.discrete:
        clean = case.gradient(key, keep, *case.data)
        close(case.gradient(key, keep, *poisoned)[keep], clean[keep], 1e-4)
        np.testing.assert_array_equal(clean[row], 0)


def check_jit_equals_eager(case: Case, key: Any) -> None:
    close(case.losses(key, *case.data), first(case.call(key, *case.data)))


def check_vmap_over_keys(case: Case, key: Any) -> None:
    keys = jax.random.split(key, 2)
    together = jax.jit(jax.vmap(lambda k: first(case.call(k, *case.data))))(keys)
    for i in range(2):
        close(together[i], case.losses(keys[i], *case.data))


def check_gradient_at_extremes(case: Case, key: Any) -> None:
    """Gradients with respect to the data are finite where the data are extreme."""
    if case.discrete:
        return
    everything = jnp.ones(case.data[0].shape[0], bool)
    for value in case.extremes:
        gradient = case.gradient(key, everything, *[jnp.full_like(x, value) for x in case.data])
        assert bool(jnp.all(jnp.isfinite(gradient))), f"gradient at {value} is not finite"


# What came, a shape or dtype, and what was expected of it.
SAYS = re.compile(
    r"(?s)(?=.*(\(\d*,?[\d, ]*\)|int32|\[\]|got))(?=.*(must|expected|got|equal|needs?|should))"
)


def check_refuses(call: Callable[..., Any], wrong: dict[str, list[Any]]) -> None:
    """Data of a shape that cannot be meant are refused by name, before any computation."""
    for what, data in wrong.items():
        with pytest.raises((ValueError, TypeError)) as error:
            jax.eval_shape(call, *data)
        assert SAYS.search(str(error.value)), f"{what}: {error.value}"


def check_errors(case: Case, key: Any) -> None:
    data = case.data
    wrong = {"a scalar": [data[0].ravel()[0], *data[1:]]}
    if len(data) > 1 and len({x.shape for x in data}) == 1:
        wrong["fewer of the last"] = [*data[:-1], data[-1][:-1]]
    check_refuses(functools.partial(case.call, key), wrong)


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """How to call an objective of samples: call(*samples), each with a leading axis of examples.

    weighted: call(*samples, *masks) where it takes a mask for each sample (or weights made of
    them). paired: the samples have one order. bounded: scores are kept within it.
    """

    call: Callable[..., Any]
    samples: tuple[Any, ...]
    weighted: Callable[..., Any] | None = None
    paired: bool = False
    extremes: tuple[float, ...] = (0.0, 1e3, -1e3)
    poison: float = float("nan")
    rtol: float = 2e-4

    def numbers(self, value: Any) -> list[jax.Array]:
        """The floating scalars of what is returned."""
        leaves = jax.tree.leaves(value)
        return [x for x in leaves if x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.floating)]

    @functools.cached_property
    def compiled(self) -> Callable[..., list[jax.Array]]:
        return jax.jit(lambda *samples: self.numbers(self.call(*samples)))

    @functools.cached_property
    def gradient(self) -> Callable[..., tuple[jax.Array, ...]]:
        """Of every number, summed, with respect to all samples."""
        total = lambda *samples: sum(self.numbers(self.call(*samples)))  # noqa: E731
        return jax.jit(jax.grad(total, argnums=tuple(range(len(self.samples)))))


def check_scalars(case: Objective) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        value = jax.eval_shape(case.call, *[x.astype(dtype) for x in case.samples])
        numbers = case.numbers(value)
        assert numbers, "no floating scalar"
        assert {x.dtype for x in numbers} == {jnp.dtype(jnp.float32)}, jnp.dtype(dtype).name
    assert np.isfinite(case.compiled(*case.samples)).all()


def check_order_is_free(case: Objective) -> None:
    """The order of the examples of a sample changes nothing."""
    orders = [np.random.default_rng(i).permutation(len(x)) for i, x in enumerate(case.samples)]
    orders = [orders[0] if case.paired else order for order in orders]
    moved = [x[order] for x, order in zip(case.samples, orders, strict=True)]
    close(case.compiled(*moved), case.compiled(*case.samples), case.rtol)


def check_masked_is_dropped(case: Objective) -> None:
    """What is masked, or has no weight, changes nothing, whatever it holds."""
    if case.weighted is None:
        return
    extended = [jnp.concatenate([x, jnp.full_like(x[:2], case.poison)]) for x in case.samples]
    masks = [jnp.arange(len(x) + 2) < len(x) for x in case.samples]
    masked = jax.jit(lambda *given: case.numbers(case.weighted(*given)))(*extended, *masks)
    close(masked, case.compiled(*case.samples), case.rtol)


def check_objective_jit_equals_eager(case: Objective) -> None:
    close(case.compiled(*case.samples), case.numbers(case.call(*case.samples)), case.rtol)


def check_vmap_over_samples(case: Objective) -> None:
    others = [0.5 * x + 0.1 for x in case.samples]
    pairs = [jnp.stack(pair) for pair in zip(case.samples, others, strict=True)]
    together = jax.jit(jax.vmap(lambda *samples: case.numbers(case.call(*samples))))(*pairs)
    close([x[0] for x in together], case.compiled(*case.samples), case.rtol)
    close([x[1] for x in together], case.compiled(*others), case.rtol)


def check_objective_gradient(case: Objective) -> None:
    """Gradients are finite for all examples equal, and for extreme ones."""
    for value in case.extremes:
        for gradient in case.gradient(*[jnp.full_like(x, value) for x in case.samples]):
            assert bool(jnp.all(jnp.isfinite(gradient))), f"gradient at {value} is not finite"


def check_objective_errors(case: Objective) -> None:
    samples = case.samples
    wrong = {"a scalar": [samples[0].ravel()[0], *samples[1:]]}
    if len(samples) > 1 and samples[0].ndim > 1:
        wrong["other events"] = [*samples[:-1], samples[-1][..., :1]]
    check_refuses(case.call, wrong)


FORMULA = r"[=|]|log|sum|<.*,.*>"
UNITS = r"nats|bits|units?\b|squared|\|.*\|\^2|norm|steps|cost|distance|TV|bound|<P"
# Densities of any textbook, and what stands on a documented neighbour.
TEXTBOOK = {
    "gaussian_kl_between", "gaussian_log_prob", "gaussian_log_likelihood", "mixture_log_prob",
    "standard_normal_log_prob", "bernoulli_log_likelihood", "categorical_log_likelihood",
    "logistic_mixture_log_likelihood", "ppca_log_likelihood", "f_divergence",
    "sinkhorn_from_cost",
}  # fmt: skip


def check_docstring(function: Any) -> None:
    """A first sentence, a formula, a unit, and where it is not elementary the paper's year."""
    text = inspect.getdoc(function) or ""
    assert re.match(r"(?s).*?\.(\s|$)", text), "no first sentence"
    assert re.search(FORMULA, text), "no formula"
    assert re.search(UNITS, text), "no unit"
    assert function.__name__ in TEXTBOOK or re.search(r"\b(1[89]|20)\d\d", text), "no reference"


def check_annotations(function: Any) -> None:
    """What is returned has a type, and an array a shape."""
    annotation = inspect.signature(function).return_annotation
    assert annotation is not inspect.Signature.empty, "no annotation of what is returned"
    assert annotation is not jax.Array, "an array without a shape is returned"


LAWS = (
    check_shape_and_dtype,
    check_depends_on_itself_alone,
    check_masking_equals_dropping,
    check_jit_equals_eager,
    check_vmap_over_keys,
    check_gradient_at_extremes,
    check_errors,
)
OBJECTIVE_LAWS = (
    check_scalars,
    check_order_is_free,
    check_masked_is_dropped,
    check_objective_jit_equals_eager,
    check_vmap_over_samples,
    check_objective_gradient,
    check_objective_errors,
)
