"""Every public function has an example in its docstring, and every example runs."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import genjax
from tests.examples import WITHOUT

ROOMS = [room for room in dir(genjax) if (Path(genjax.__path__[0]) / room).is_dir()]
ROOMS += ["divergences", "likelihoods", "numerics", "ode", "randomness"]
ROOMS = [room for room in ROOMS if not room.startswith("_")]
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")


def public(room):
    """What a room exports, by name."""
    module = importlib.import_module(f"genjax.{room}")
    names = getattr(module, "__all__", [name for name in dir(module) if not name.startswith("_")])
    return {name: getattr(module, name) for name in names}


def functions():
    """Public functions by the dotted name of where they are defined, each once."""
    found = {}
    for room in ROOMS:
        for value in public(room).values():
            if inspect.isfunction(value) and value.__module__.startswith("genjax."):
                found[f"{value.__module__}.{value.__name__}".removeprefix("genjax.")] = value
    return found


FUNCTIONS = functions()
EXAMPLES = {name: f for name, f in FUNCTIONS.items() if ">>>" in (f.__doc__ or "")}


class Nearly(doctest.OutputChecker):
    """Numbers to three digits, spaces in arrays of no account."""

    def check_output(self, want, got, optionflags):
        if re.sub(r"\s", "", NUMBER.sub("#", want)) != re.sub(r"\s", "", NUMBER.sub("#", got)):
            return False
        wanted, found = (np.array(NUMBER.findall(text), float) for text in (want, got))
        return np.allclose(wanted, found, rtol=1e-3, atol=1e-4)


def examples(name):
    """The doctest of a function, with the names of its room, jax, jnp, np and optax."""
    function = EXAMPLES[name]
    names = public(name.split(".")[0]) | {"jax": jax, "jnp": jnp, "np": np, "optax": optax}
    return doctest.DocTestParser().get_doctest(function.__doc__, names, name, None, 0)


def run(test):
    """What went wrong, as text."""
    said = []
    doctest.DocTestRunner(Nearly(), verbose=False).run(test, out=said.append)
    return "".join(said)


def test_functions_without_an_example_are_listed_and_no_others():
    assert sorted(FUNCTIONS.keys() - EXAMPLES.keys()) == sorted(WITHOUT)


def test_examples_are_short():
    lines = {name: len(examples(name).examples) for name in EXAMPLES}
    assert [name for name, n in lines.items() if n > 6] == []
    assert len(lines) > 300


def test_a_wrong_example_is_found():
    parse = doctest.DocTestParser().get_doctest
    for text in (
        ">>> [1.0, 2.0]\n[1.0, 2.1]\n",
        ">>> [1.0]\n(1.0)\n",
        ">>> 1\n1 2\n",
        ">>> x\n1\n",
    ):
        assert "Failed example" in run(parse(text, {}, "", None, 0))
    assert run(parse(">>> 2.0004\n2.\n", {}, "", None, 0)) == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained")
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_runs(name):
    assert run(examples(name)) == ""
