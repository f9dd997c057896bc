"""The gallery: a card for every experiment, with its first sentence, its command and a picture."""

import ast
import re
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
HIDDEN = ("leaderboard",)


def cards() -> str:
    """The page. A picture is docs/_static/gallery/NAME.png where there is one."""
    figures = tomllib.loads((HERE / "gallery.toml").read_text())
    parts = ["# Gallery\n\nEvery experiment of a checkout; `--help` lists the options of each.\n"]
    parts.append("::::{grid} 1 2 2 3\n:gutter: 3\n")
    for path in sorted((HERE.parent / "experiments").glob("[a-z]*.py")):
        if path.stem in HIDDEN:
            continue
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        sentence = re.split(r"(?<=\.)\s", " ".join(text.split()))[0]
        picture = HERE / "_static" / "gallery" / f"{path.stem}.png"
        image = f":img-top: _static/gallery/{path.stem}.png\n" if picture.exists() else ""
        measured = f"*{figures[path.stem]}.*\n\n" if path.stem in figures else ""
        parts.append(
            f":::{{grid-item-card}} {path.stem}\n{image}\n{sentence}\n\n{measured}"
            f"```sh\npython -m experiments.{path.stem}\n```\n:::\n"
        )
    return "\n".join([*parts, "::::\n"])
