"""Laws of numbers over every public function: float32, 64-bit types, derivatives, ties.

Each function has an entry in tests/tables, by which it is called; a new one without is refused. The
laws over all of them are slow tests; the fast ones hold that each law catches what breaks it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tables import ENTRIES, EXEMPT, entry_of, public, rules
from tests.tables.entry import Entry, of

every = pytest.mark.parametrize("name", ENTRIES)
# Those made when asked for have no rows of their own.
MADE = {name: entry for name, entry in ENTRIES.items() if isinstance(entry, Entry)}
of_rows = pytest.mark.parametrize("name", [name for name, entry in MADE.items() if entry.rows])
of_masks = pytest.mark.parametrize("name", [name for name, entry in MADE.items() if entry.masked])
pytestmark = pytest.mark.usefixtures("unchecked")


def test_every_public_function_has_an_entry_or_a_reason():
    named = {name.partition(",")[0] for name in ENTRIES} | set(EXEMPT)
    missing = {name for name in public() if name not in named}
    assert not missing, "give each an entry in tests/tables, or a reason in its EXEMPT"
    stale = {name for name in named if name not in public()}
    assert not stale, "no such public function"
    assert not set(ENTRIES) & set(EXEMPT)


@pytest.mark.slow
@every
def test_values_are_traced_with_64_bit_types(name):
    rules.traced_with_64_bit_types(entry_of(name), order=False)


@pytest.mark.slow
@every
def test_derivatives_are_traced_with_64_bit_types(name):
    rules.traced_with_64_bit_types(entry_of(name), order=True)


@pytest.mark.slow
@every
def test_float32_is_close_to_float64(name):
    for change in entry_of(name).changes:
        rules.float32_is_close_to_float64(entry_of(name), change)


@pytest.mark.slow
@every
def test_derivatives_are_finite(name):
    rules.derivatives_are_finite(entry_of(name))


@pytest.mark.slow
@of_rows
def test_ties_are_defined(name):
    rules.ties_are_defined(entry_of(name))


@pytest.mark.slow
@of_rows
def test_small_and_whole_data_are_defined(name):
    rules.small_and_whole_data_are_defined(entry_of(name))


@of_masks
def test_masked_is_defined(name):
    rules.masked_is_defined(entry_of(name))


X = np.array([[0.0, 1.1], [2.2, 3.3]], np.float32)
BROKEN = {
    "an offset": (
        lambda x: jnp.mean(x * x, 0) - jnp.mean(x, 0) ** 2,
        lambda entry: rules.float32_is_close_to_float64(entry, "offset 1e3"),
    ),
    "a wide constant": (
        lambda x: x * np.float64(2),
        lambda entry: rules.traced_with_64_bit_types(entry, order=False),
    ),
    "a root of 0": (jnp.sqrt, rules.derivatives_are_finite),
    "a norm of 0": (lambda x: jnp.sqrt(jnp.sum(x * x, 1)), rules.ties_are_defined),
    "a mean of nothing": (lambda x: jnp.mean(x), rules.small_and_whole_data_are_defined),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_function_that_breaks_a_law_is_caught(kind):
    call, rule = BROKEN[kind]
    with pytest.raises((AssertionError, FloatingPointError)):
        rule(of(call, X))
    rule(of(lambda x: jnp.sin(x), X))


def test_a_mask_after_the_fact_is_caught():
    late = of(jnp.sum, X, masked=lambda x: jnp.sum(x * jnp.zeros_like(x)))
    with pytest.raises(AssertionError, match="not finite"):
        rules.masked_is_defined(late)
    first = of(jnp.sum, X, masked=lambda x: jnp.sum(jnp.where(jnp.zeros(x.shape, bool), x, 0.0)))
    rules.masked_is_defined(first)


def test_a_public_function_without_an_entry_is_found(monkeypatch):
    def new(x: jax.Array) -> jax.Array:
        return x

    new.__module__ = "genjax.metrics.new"
    monkeypatch.setattr("genjax.metrics.new", new, raising=False)
    with pytest.raises(AssertionError, match="give each an entry"):
        test_every_public_function_has_an_entry_or_a_reason()
