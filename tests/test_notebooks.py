"""Every notebook runs from top to bottom, each cell in under a minute, solutions too.

Its names and options exist, and the outputs that it stores are those of its code.
"""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import typing

import nbformat
import pytest

OURS = ("genjax", "experiments")
NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    numbers = [int(path.stem[:2]) for path in NOTEBOOKS]
    assert numbers[0] == 1
    assert len(set(numbers)) == len(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")
def test_notebook_runs(path):
    from nbclient import NotebookClient

    NotebookClient(
        nbformat.read(path, as_version=4),
        timeout=60,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OUTPUTS = module_of(pathlib.Path(__file__).parents[1] / "docs" / "outputs.py")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_those_of_the_code(path):
    """Pictures and text, small, without warnings; made again by docs/outputs.py."""
    notebook = nbformat.read(path, as_version=4)
    stale = f"run `python docs/outputs.py notebooks/{path.name}`"
    assert notebook.metadata.get("outputs_of") == OUTPUTS.digest(notebook), stale
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert any('type="range"' in o.get("data", {}).get("text/html", "") for o in outputs)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_end_the_notebook_with_solutions_that_are_hidden_and_check_themselves(path):
    cells = nbformat.read(path, as_version=4).cells
    at = [i for i, cell in enumerate(cells) if cell.source.startswith("## Exercises")]
    assert len(at) == 1, "no exercises"
    questions, solutions = cells[at[0] :: 2], cells[at[0] + 1 :: 2]
    assert len(questions) == len(solutions) >= 2
    for question, solution in zip(questions, solutions, strict=True):
        assert (question.cell_type, solution.cell_type) == ("markdown", "code")
        assert solution.metadata.tags == ["hide-cell"]
        assert "assert" in solution.source


def test_a_slider_has_a_picture_for_each_value():
    """The first value shown, the others hidden until the control moves."""
    plt = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("IPython")
    slider = module_of(NOTEBOOKS[0].parent / "slider.py").slider
    html = slider("k", [1, 2, 5], lambda k: plt.figure(figsize=(k, 1)), start=1).data
    assert html.count("<img") == 3
    assert html.count(" hidden>") == 2
    assert 'max="2" value="1"' in html
    assert "<output>k = 2</output>" in html
    assert not plt.get_fignums()


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
