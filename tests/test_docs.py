"""Every cell of the notes-to-code table resolves, and no experiment or notebook is left out."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

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


def test_reference_and_gallery_name_everything():
    """Signatures with types, text that reads as written, a card for each experiment."""
    reference, gallery = load(ROOT / "docs" / "reference.py"), load(ROOT / "docs" / "gallery.py")
    page = reference.page("genjax.flows")
    assert "py:function} mean_flow_loss(mean_velocity_fn: " in page
    assert "```text\n    target = sg[v + (s - t) du/dt]" in page
    cards = gallery.cards()
    for path in (ROOT / "experiments").glob("[a-z]*.py"):
        assert path.stem == "leaderboard" or f"python -m experiments.{path.stem}\n" in cards


@pytest.mark.slow
def test_built_pages_show_their_formulas_and_their_links_resolve(tmp_path):
    """Without the notebooks' execution, which other tests do."""
    pytest.importorskip("sphinx_design")
    pytest.importorskip("latex2mathml")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-D", "nb_execution_mode=off"]
    subprocess.run([*command, "-b", "html", ROOT / "docs", tmp_path], check=True, cwd=ROOT)
    diffusion = (tmp_path / "families" / "diffusion.html").read_text()
    assert diffusion.count("<math") > 10
    assert r"\mathbb" not in diffusion
    reference = (tmp_path / "reference" / "transport.html").read_text()
    assert 'class="viewcode-link"' in reference
    for page in tmp_path.rglob("*.html"):
        for target in re.findall(r'href="([^"#]+?\.html)(?:#[^"]*)?"', page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
