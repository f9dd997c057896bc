"""Sphinx configuration: pages in MyST, notebooks as tutorials, warnings are errors."""

import os
import pathlib
import shutil
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

project = "genjax"
extensions = ["myst_nb", "mathml", "sphinx.ext.viewcode", "sphinx_design"]
html_math_renderer = "mathml"
myst_heading_anchors = 3
# Links into the documentation of jax, flax and optax need their inventories, so a network.
if os.environ.get("GENJAX_DOCS_ONLINE"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest/", None),
        "flax": ("https://flax.readthedocs.io/en/latest/", None),
        "optax": ("https://optax.readthedocs.io/en/latest/", None),
    }
html_theme = "furo"
html_title = "genjax"
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
nb_execution_mode = "auto"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
suppress_warnings = ["mystnb.unknown_mime_type"]

# The notebooks stay where users look for them; the pages read copies.
(HERE / "tutorials").mkdir(exist_ok=True)
for notebook in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
    shutil.copy(notebook, HERE / "tutorials" / notebook.name)

# Generated pages: the table from the notes to the code, and the reference of each room.
from coverage import table  # noqa: E402
from gallery import cards  # noqa: E402
from reference import page  # noqa: E402

FAMILIES = ["variational", "transport", "adversarial", "diffusion", "flows", "autoregressive"]
FAMILIES += ["state_space", "alignment"]
ROOMS = [*FAMILIES, "training", "data", "metrics", "networks", "numerics", "ode", "randomness"]
(HERE / "notes_to_code.md").write_text("# From the notes to the code\n\n" + table())
(HERE / "gallery.md").write_text(cards())
(HERE / "reference").mkdir(exist_ok=True)
for room in ROOMS:
    (HERE / "reference" / f"{room}.md").write_text(page(f"genjax.{room}"))
