"""Sizes: a file is read in one sitting, a function on one screen."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LIMIT, FUNCTION_LIMIT = 400, 80  # lines
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions(text):
    """(name, lines without decorators) of every function of a source."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, FUNCTIONS)]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in nodes]


@pytest.mark.parametrize("room", ["genjax", "experiments", "tests", "docs"])
def test_no_file_and_no_function_is_long(room):
    found = {path: path.read_text() for path in (ROOT / room).rglob("*.py")}
    assert found
    long = []
    for path, text in found.items():
        sizes = [("the file", len(text.splitlines()), FILE_LIMIT)]
        sizes += [(name, size, FUNCTION_LIMIT) for name, size in functions(text)]
        place = path.relative_to(ROOT)
        long += [f"{place}: {name}, {n} of {most}" for name, n, most in sizes if n > most]
    assert not long, "\n".join(long)


def test_a_long_function_is_seen():
    inner = "    def inner():\n" + "        pass\n" * 80
    assert functions(f"class A:\n{inner}") == [("inner", 81)]
