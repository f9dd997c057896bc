"""The gallery: a card for every experiment, with its first sentence, its command and a picture."""

import ast
import re
import tomllib
from pathlib import Path

from coverage import rows

HERE = Path(__file__).parent
HIDDEN = ("leaderboard",)
# Heading and page of each room that experiments belong to; the others draw on several.
FAMILIES = {
    "variational": ("Variational inference, latent variables", "families/variational.md"),
    "transport": ("Optimal transport", "families/transport.md"),
    "adversarial": ("Adversarial families", "families/adversarial.md"),
    "diffusion": ("Diffusion", "families/diffusion.md"),
    "flows": ("Flows and flow matching", "families/flows.md"),
    "autoregressive": ("Autoregressive models", "families/autoregressive.md"),
    "state_space": ("State spaces", "families/state_spaces.md"),
    "alignment": ("Alignment", "families/alignment.md"),
}
OTHERS = ("Runs, samples, features", "runs.md")


def places() -> dict[str, tuple[str, str]]:
    """The family of each experiment, and its tutorial, as the table of the notes has them."""
    found: dict[str, tuple[str, str]] = {}
    of_notebook = {}
    for row in rows():
        room = row.functions[0].split(".")[1]
        if room in FAMILIES:
            of_notebook.setdefault(row.notebook, room)
            found.setdefault(row.experiment, (room, row.notebook))
    for row in rows():  # what begins with a network or a metric belongs where its tutorial does
        found.setdefault(row.experiment, (of_notebook[row.notebook], row.notebook))
    return found


def card(path: Path, notebook: str, figure: str) -> str:
    """A picture is docs/_static/gallery/NAME.png where there is one."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    sentence = re.split(r"(?<=\.)\s", " ".join(text.split()))[0]
    picture = HERE / "_static" / "gallery" / f"{path.stem}.png"
    image = f":img-top: _static/gallery/{path.stem}.png\n" if picture.exists() else ""
    measured = f"*{figure}.*\n\n" if figure else ""
    tutorial = f"[Tutorial](tutorials/{notebook}.ipynb)\n" if notebook else ""
    return (
        f":::{{grid-item-card}} {path.stem}\n{image}\n{sentence}\n\n{measured}"
        f"```sh\npython -m experiments.{path.stem}\n```\n{tutorial}:::\n"
    )


def cards() -> str:
    """The page, by family; within one, cards with a picture first."""
    figures = tomllib.loads((HERE / "gallery.toml").read_text())
    known = places()
    groups: dict[str, list[Path]] = {}
    for path in sorted((HERE.parent / "experiments").glob("[a-z]*.py")):
        if path.stem not in HIDDEN:
            groups.setdefault(known.get(path.stem, ("", ""))[0], []).append(path)
    parts = [
        "# Gallery\n\nEvery experiment of a checkout; `--help` lists the options of each. What a "
        "run leaves, and how to sample it again: [run an experiment](runs.md).\n"
    ]
    for room in (*FAMILIES, ""):
        heading, page = FAMILIES.get(room, OTHERS)
        parts.append(f"## {heading}\n\n[What is computed, and how well]({page})\n")
        parts.append("::::{grid} 1 2 2 3\n:gutter: 3\n")
        pictures = HERE / "_static" / "gallery"
        for path in sorted(groups[room], key=lambda p: not (pictures / f"{p.stem}.png").exists()):
            parts.append(card(path, known.get(path.stem, ("", ""))[1], figures.get(path.stem, "")))
        parts.append("::::\n")
    return "\n".join(parts)
