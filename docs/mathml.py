"""Formulas as MathML, which browsers draw themselves: no script, no font, no network."""

import re
import unicodedata
from xml.etree import ElementTree
from xml.sax.saxutils import escape

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


NAMESPACE = "http://www.w3.org/1998/Math/MathML"
ElementTree.register_namespace("", NAMESPACE)
BELOW = ("min", "max", "inf", "sup", "argmin", "argmax")


def word(element: ElementTree.Element) -> str:
    """The name of a function, such as log or KL, without its index."""
    if element.tag.endswith(("msub", "msup", "munder")):
        return word(element[0])
    return element.text if len(element.text or "") > 1 and element.text.isalpha() else ""


def spaced(found: str, block: bool) -> str:
    """Thin spaces around names of functions, and in a block the range of a minimum below it."""
    # The converter leaves a sign of less as it is.
    root = ElementTree.fromstring(re.sub(r">([<&])</", lambda m: f">{escape(m[1])}</", found))
    tag = f"{{{NAMESPACE}}}"
    for parent in root.iter():
        if block and parent.tag == f"{tag}msub" and word(parent[0]) in BELOW:
            parent.tag = f"{tag}munder"
    for bar in root.iter(f"{tag}mo"):
        if bar.text in ("|", "\u2016"):  # no relation, unlike \mid
            bar.set("lspace", "0")
            bar.set("rspace", "0")
    for parent in root.iter(f"{tag}mrow"):
        children = list(parent)
        for i, child in reversed(list(enumerate(children))):
            if not word(child):
                continue
            for inner in (child, *child):
                if inner.tag == f"{tag}mo":
                    inner.set("lspace", "0")
                    inner.set("rspace", "0")
            after = children[i + 1] if i + 1 < len(children) else None
            before = children[i - 1] if i else None
            if after is not None and (after.tag != f"{tag}mo" or after.text in "|∥{⟨"):
                parent.insert(i + 1, ElementTree.Element(f"{tag}mspace", width="0.167em"))
            if before is not None and (before.tag != f"{tag}mo" or before.text == ")"):
                parent.insert(i, ElementTree.Element(f"{tag}mspace", width="0.167em"))
    return ElementTree.tostring(root, encoding="unicode")


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
    return spaced(found, block)


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
