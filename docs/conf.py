"""Sphinx configuration: pages in MyST, notebooks as tutorials, warnings are errors."""

import pathlib
import shutil
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

# Generated pages: the table from the notes to the code, the gallery, the reference of each room.
from coverage import page as page_of_notes  # noqa: E402
from gallery import cards  # noqa: E402
from inventories import mapping  # noqa: E402
from reference import ROOMS, page  # noqa: E402

from genjax import __version__  # noqa: E402

project = "genjax"
release = __version__
extensions = [
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "docstrings",
    "links",
    "mathml",
]
html_theme = "furo"
html_title = "genjax"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["genjax.css"]
html_math_renderer = "mathml"
exclude_patterns = ["_build"]
# A name between backticks is a link where the library has it.
default_role = "py:obj"
maximum_signature_line_length = 80
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
intersphinx_mapping = mapping(HERE / "_inventories")
intersphinx_timeout = 3
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
# Outputs are stored in the notebooks, by docs/outputs.py; only solutions are hidden.
nb_execution_mode = "off"
nb_code_prompt_show = "Show the solution"
nb_code_prompt_hide = "Hide the solution"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# The notebooks stay where users look for them; the pages read copies.
(HERE / "tutorials").mkdir(exist_ok=True)
for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
    shutil.copy(notebook, HERE / "tutorials" / notebook.name)

(HERE / "notes_to_code.md").write_text(page_of_notes())
(HERE / "gallery.md").write_text(cards())
(HERE / "reference").mkdir(exist_ok=True)
for room in ROOMS:
    (HERE / "reference" / f"{room}.rst").write_text(page(f"genjax.{room}"))
