"""Every notebook runs from top to bottom, in under a minute; its names and options exist."""

import ast
import importlib
import inspect
import pathlib
import typing

import nbformat
import pytest

OURS = ("genjax", "experiments")
NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
# Minutes together: one runs in `make test`, all of them in `make test-all`.
RUNS = [
    pytest.param(path, id=path.stem, marks=[] if path.stem == "01_elbo" else pytest.mark.slow)
    for path in NOTEBOOKS
]


def test_there_are_notebooks():
    numbers = [int(path.stem[:2]) for path in NOTEBOOKS]
    assert numbers[0] == 1
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("path", RUNS)
@pytest.mark.filterwarnings("ignore")
def test_notebook_runs(path):
    from nbclient import NotebookClient

    NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=60,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()


def code(path):
    """The notebook's cells as one syntax tree, without the shell's and the kernel's lines."""
    cells = [
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
    ]
    lines = [
        line for cell in cells for line in cell.splitlines() if not line.startswith(("%", "!"))
    ]
    return ast.parse("\n".join(lines))


def imported(tree):
    """What the notebook's imports of genjax and experiments bind, by name."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                names[name.asname or name.name] = getattr(module, name.name)
    return names


def unknown_names(tree):
    """Attributes that a module of ours lacks, and options that a function of ours does not take."""
    names, unknown = imported(tree), set()

    def resolve(node):
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = resolve(node.value)
        if not inspect.ismodule(owner):
            return None
        if not hasattr(owner, node.attr):
            unknown.add(f"{owner.__name__}.{node.attr}")
        return getattr(owner, node.attr, None)

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node)
        if isinstance(node, ast.Call) and callable(function := resolve(node.func)):
            options = taken(function)
            given = [keyword.arg for keyword in node.keywords if keyword.arg and options]
            wrong = {name for name in given if name not in options}
            unknown |= {f"{function.__name__}({name}=)" for name in wrong}
    return unknown


def taken(function):
    """The names of the options, those of `**options: Unpack[Some]` too; none if it takes any."""
    names = set()
    for name, option in inspect.signature(function).parameters.items():
        if option.kind != option.VAR_KEYWORD:
            names.add(name)
        elif typing.get_origin(option.annotation) is typing.Unpack:
            names |= typing.get_args(option.annotation)[0].__annotations__.keys()
        else:
            return set()
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_name_and_option_exists(path):
    tree = code(path)
    assert imported(tree), "the notebook imports nothing of ours"
    assert not unknown_names(tree)


def test_a_wrong_name_or_option_is_found():
    text = "from genjax import transport as t\nt.sinkhorn(1, epsilom=2)\nt.wrong(1)"
    assert unknown_names(ast.parse(text)) == {"sinkhorn(epsilom=)", "genjax.transport.wrong"}
