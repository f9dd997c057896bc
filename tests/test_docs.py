"""Every cell of the notes-to-code table resolves, and no experiment or notebook is left out."""

import dataclasses
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote

import jax
import jax.numpy as jnp
import pytest

import genjax
from experiments.__main__ import experiments
from experiments.benchmarks import _workload

ROOT = Path(__file__).resolve().parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


COVERAGE = load(ROOT / "docs" / "coverage.py")
ROWS = COVERAGE.rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.system)
def test_each_cell_resolves(row):
    test = (ROOT / row.test).read_text()
    for name in row.functions:
        module, _, attribute = name.rpartition(".")
        public = getattr(importlib.import_module(module), attribute)
        assert public.__doc__, f"{name} has no docstring"
        assert re.search(rf"\b{attribute}\b", test), f"{row.test} does not test {name}"
    assert (ROOT / "experiments" / f"{row.experiment}.py").is_file()
    assert (ROOT / "notebooks" / f"{row.notebook}.ipynb").is_file()
    assert all(row), "a cell is empty"


def test_every_experiment_and_notebook_is_in_the_table():
    experiments = {p.stem for p in (ROOT / "experiments").glob("[a-z]*.py")}
    others = {"compare", "features", "leaderboard", "sample"}
    assert experiments - {row.experiment for row in ROWS} - others == set()
    notebooks = {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks == {row.notebook for row in ROWS}


def test_the_rendered_table_has_a_line_per_row():
    assert len(COVERAGE.table().splitlines()) == 2 + len(ROWS)


COMMAND = re.compile(r"\b([a-z_]+(?:\.[a-z_]+)*)((?: +[\w./:-]+)*? --[a-z].*)")


def test_options_of_the_pages_exist():
    """Of every `experiment --option ...`, alone in code or after python -m."""
    seen = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("docs/*/*.md")]:
        text = page.read_text().replace("\\\n", " ").replace("python -m ", "")
        lines = [line for part in text.split("`") for line in part.splitlines()]
        for name, words in (found.groups() for found in map(COMMAND.search, lines) if found):
            path = f"experiments.{name.removeprefix('experiments.')}"
            if path not in experiments():
                continue
            names = {field.name for field in dataclasses.fields(options_of(path))} | {"help"}
            for option in re.findall(r"--([a-z][a-z0-9-]*)", words):
                known = {option.replace("-", "_"), option.removeprefix("no-").replace("-", "_")}
                assert known & names, f"{page.name}: {name} --{option}"
                seen += 1
    assert seen > 80


def options_of(path):
    module = importlib.import_module(path)
    return getattr(module, "Config", _workload.Options)


def test_links_between_files_resolve():
    """Relative links in the README and the pages lead to files that exist."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" in target or target.startswith("tutorials/"):
                continue
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


BLOCKS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_of_the_readme_runs_as_it_stands(block):
    """Each by itself, as a reader pastes it, on eight examples of four numbers."""
    if "import equinox" in block:
        pytest.importorskip("equinox")
    found = {}
    exec(compile(block, "README.md", "exec"), found)
    out = found["encode"](jnp.ones((8, 4)))
    assert {len(a) for a in jax.tree.leaves(out)} == {8}
    if "losses" in found:
        assert found["losses"].shape == (8,)
        assert jnp.all(jnp.isfinite(found["losses"]))


def test_the_readme_has_blocks():
    assert len(BLOCKS) >= 3


def test_reference_and_gallery_name_everything(monkeypatch):
    """Signatures in the words of the source, a card and figures for experiments that exist."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    docstrings, reference = importlib.import_module("docstrings"), load(ROOT / "docs/reference.py")
    for room in reference.ROOMS[:8]:
        page = reference.page(f"genjax.{room}")
        for name, _ in reference.public(f"genjax.{room}"):
            assert re.search(rf":: genjax\.{room}\.{name}$", page, re.MULTILINE), name
    assert "``moons``" in reference.page("genjax.data")
    parameters, returned = docstrings.signature(genjax.variational.elbo)
    assert parameters.startswith("(encode: genjax.typing.EncoderFn, log_likelihood: ")
    assert "x: Shaped[Array, 'batch *event'], *, num_samples: int=1, " in parameters
    assert returned == "tuple[Float[Array, 'batch'], dict[str, Float[Array, 'batch']]]"

    gallery = load(ROOT / "docs" / "gallery.py")
    cards = gallery.cards()
    names = {path.stem for path in (ROOT / "experiments").glob("[a-z]*.py")}
    for name in names - {"leaderboard"}:
        assert f"python -m experiments.{name}\n" in cards
    assert set(tomllib.loads((ROOT / "docs" / "gallery.toml").read_text())) <= names
    assert {path.stem for path in (ROOT / "docs/_static/gallery").glob("*")} <= names


def test_docstrings_are_pages(monkeypatch):
    """Names and papers become links, formulas stand in the place of typed ones."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    docstrings = importlib.import_module("docstrings")
    text = ["p(z|x) of `elbo`s * 2_", "", "    a = b", "", "Paper, arXiv:1312.61140.", "", ">>> 1"]
    page = "\n".join(docstrings.pages("genjax.nowhere", text))
    assert r"p(z\|x) of `elbo`\ s \* 2\_" in page
    assert "::\n\n        a = b\n" in page
    assert "`arXiv:1312.61140 <https://arxiv.org/abs/1312.61140>`__" in page
    assert ">>> 1" in page
    text = ["Solves. x: the points. y,", "z: more. tol, n: when to stop (late). As: usual."]
    page = docstrings.pages("genjax.nowhere", text, frozenset({"x", "y", "z", "tol", "n"}))
    assert page[:2] == ["Solves.", ""]
    assert page[2:4] == ["- **x**: the points.", "- **y, z**: more."]
    assert page[4] == "- **tol, n**: when to stop (late). As: usual."
    text = ["First.", "", ">>> f(x)", "Array([[1.],", "       [2.]])"]  # an example in one piece
    for name in ("nowhere", "flows.affine"):
        page = "\n".join(docstrings.pages(f"genjax.{name}", text))
        assert ">>> f(x)\nArray([[1.],\n       [2.]])" in page
        assert (".. math::" in page) == (name in docstrings.FORMULAS)
    assert "max_iterations" in docstrings.names_of(genjax.transport.sinkhorn)
    for name in docstrings.FORMULAS:
        page = docstrings.pages(f"genjax.{name}", ["First.", "", "    a = b"])
        assert ".. math::" in page
        assert "    a = b" not in page


def test_formulas_of_the_pages_are_mathml(monkeypatch):
    """Of every page, notebook and entry of the reference; an unknown command raises."""
    pytest.importorskip("docutils")
    pytest.importorskip("latex2mathml")
    monkeypatch.syspath_prepend(ROOT / "docs")
    mathml = importlib.import_module("mathml").mathml
    docstrings = importlib.import_module("docstrings")
    texts = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    texts += [path.read_text() for path in (ROOT / "docs" / "families").glob("*.md")]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        texts += ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    found = list(docstrings.FORMULAS.values())
    for text in texts:
        text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        found += [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$", text, re.DOTALL)]
    assert len(found) > 300
    for tex in found:
        assert mathml(tex).startswith("<math")
    assert "𝔼" in mathml(r"\mathbb E")
    with pytest.raises(ValueError, match="unknown command"):
        mathml(r"\nosuch x")
    with pytest.raises(ValueError, match="braces"):
        mathml(r"\frac{a}{b")


def test_formulas_of_the_reference_belong_to_public_names():
    for room, formulas in tomllib.loads((ROOT / "docs" / "formulas.toml").read_text()).items():
        public = importlib.import_module(f"genjax.{room}")
        assert [name for name in formulas if not hasattr(public, name)] == []


@pytest.mark.slow
def test_built_pages_show_their_formulas_and_their_links_resolve(tmp_path):
    """Without the notebooks' execution, which other tests do."""
    pytest.importorskip("sphinx_design")
    pytest.importorskip("latex2mathml")
    pytest.importorskip("sphinx_copybutton")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-D", "nb_execution_mode=off"]
    subprocess.run([*command, "-b", "html", ROOT / "docs", tmp_path], check=True, cwd=ROOT)
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    diffusion = pages[tmp_path / "families" / "diffusion.html"]
    assert diffusion.count("<math") > 10
    reference = pages[tmp_path / "reference" / "transport.html"]
    assert 'href="../reference/diffusion.html#genjax.diffusion.heun_step"' in diffusion
    for path in (tmp_path / "tutorials").glob("*.html"):
        assert pages[path].count("Show the solution") >= 2
        assert 'type="range"' in pages[path]
    assert (tmp_path / "_static" / "formulas.woff2").is_file()
    assert 'class="viewcode-link"' in reference
    assert reference.count("<math") > 5
    assert "https://docs.jax.dev/en/latest/_autosummary/jax.Array.html" in reference
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    for path, text in pages.items():
        for formula in re.findall(r'class="formula">(.*?)</(?:div|span)>', text, re.DOTALL):
            assert formula.startswith("<math"), f"{path.name}: {formula}"
        for target, anchor in re.findall(r'href="([^"#:]*)(?:#([^"]*))?"', text):
            to = (path.parent / target.partition("?")[0]).resolve() if target else path
            assert to.exists(), f"{path.name}: {target}"
            known = to in ids and "_modules" not in f"{to} {path}"  # lines of sources
            assert not (anchor and known) or unquote(anchor) in ids[to], f"{path.name}: #{anchor}"
