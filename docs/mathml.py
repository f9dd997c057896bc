"""Formulas as MathML, which browsers draw themselves: no script, no font, no network."""

import re
import unicodedata

from docutils import nodes
from latex2mathml.converter import convert
from latex2mathml.exceptions import DenominatorNotFoundError
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)


# What the converter does not know, in words that it does.
SPELLED = {r"\arg": r"\operatorname{arg}", r"\Big\|": r"\|", r"\big\|": r"\|"}
# Browsers draw the letters of an alphabet only where they are characters of their own.
ALPHABETS = {
    "double-struck": "DOUBLE-STRUCK CAPITAL",
    "script": "SCRIPT CAPITAL",
    "bold": "BOLD",
    "fraktur": "FRAKTUR CAPITAL",
}


def letter(match: re.Match[str]) -> str:
    """One letter of an alphabet; what the alphabet lacks stays as it is."""
    kind, text = match[1], match[2]
    case = "" if kind != "bold" else " CAPITAL" if text.isupper() else " SMALL"
    for prefix in ("MATHEMATICAL ", ""):
        try:
            found = unicodedata.lookup(f"{prefix}{ALPHABETS[kind]}{case} {text.upper()}")
        except KeyError:
            continue
        return f"<mi>{found}</mi>" if len(text) == 1 else match[0]
    return match[0]


def mathml(tex: str, *, block: bool = False) -> str:
    """One `<math>` element; raises ValueError for TeX that cannot be read."""
    if tex.count("{") - tex.count(r"\{") != tex.count("}") - tex.count(r"\}"):
        raise ValueError("braces do not match")
    for name, other in SPELLED.items():
        tex = re.sub(re.escape(name) + r"(?![a-zA-Z])", lambda _, other=other: other, tex)
    lines = r"\begin{aligned}" + tex + r"\end{aligned}" if needs_lines(tex) else tex
    try:
        found = convert(lines, display="block" if block else "inline")
        kinds = "|".join(ALPHABETS)
        found = re.sub(rf'<mi mathvariant="({kinds})">([^<]+)</mi>', letter, found)
    except (DenominatorNotFoundError, IndexError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    # A command that is unknown comes through as it was written.
    if "\\" in found:
        at = found.index("\\")
        raise ValueError(f"unknown command near {found[at : at + 20]!r}")
    return found


def needs_lines(tex: str) -> bool:
    """Whether line breaks or alignments stand outside of an environment."""
    return r"\begin" not in tex and (r"\\" in tex or "&" in tex.replace(r"\&", ""))


def visit(self, node: nodes.Element, *, block: bool) -> None:
    tex = node.astext()
    try:
        found = mathml(tex, block=block)
    except ValueError as error:
        logger.warning("formula %r: %s", tex, error, location=node)
        found = f"<code>{self.encode(tex)}</code>"
    tag = "div" if block else "span"
    self.body.append(f'<{tag} class="formula">{found}</{tag}>')
    raise nodes.SkipNode


def visit_inline(self, node: nodes.Element) -> None:
    visit(self, node, block=False)


def visit_block(self, node: nodes.Element) -> None:
    visit(self, node, block=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
