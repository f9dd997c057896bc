"""Docstrings, which are plain text with formulas as one types them, as pages with links.

What stands between single backticks becomes a link where it is a name of the library. Indented
lines stay as they are, unless `formulas.toml` has the formula in TeX, which then stands in the
place of the first such lines. Papers become links, by their arXiv number.
"""

import ast
import copy
import functools
import importlib.util
import inspect
import re
import tomllib
import typing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from docutils import nodes
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

ROOMS = tomllib.loads((Path(__file__).parent / "formulas.toml").read_text())
FORMULAS = {f"{room}.{name}": tex for room, of in ROOMS.items() for name, tex in of.items()}
ARXIV = re.compile(r"(?:arXiv:)?\b(\d{4}\.\d{5})\b")
SPECIAL = re.compile(r"([\\*|_])")
# Short names in signatures, and where they are documented.
ELSEWHERE = {
    "Array": "jax.Array",
    "ArrayLike": "jax.typing.ArrayLike",
    "GradientTransformation": "optax.GradientTransformation",
    "Mesh": "jax.sharding.Mesh",
    "Module": "flax.linen.Module",
    "optax.GradientTransformation": "optax.GradientTransformation",
}


def escaped(text: str) -> str:
    """Prose without markup but for the code in it."""
    parts = re.split(r"(``.+?``|`[^`]+`)", text, flags=re.DOTALL)
    for i in range(0, len(parts), 2):
        plain = SPECIAL.sub(r"\\\1", parts[i])
        parts[i] = ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", plain)
        if i and parts[i][:1].isalnum():  # a letter right after a name
            parts[i] = "\\ " + parts[i]
    return "".join(parts)


def blocks(lines: list[str]) -> list[list[str]]:
    """Runs of lines between empty ones, and of indented ones; examples with what they print."""
    found: list[list[str]] = [[]]
    for line in lines:
        within = found[-1] and not found[-1][0].startswith(">>>")
        turn = within and line.startswith("    ") != found[-1][-1].startswith("    ")
        if not line.strip() or turn:
            found.append([])
        if line.strip():
            found[-1].append(line)
    return [block for block in found if block]


def formula(tex: str) -> list[str]:
    return [".. math::", "", *(f"    {line}" for line in tex.strip().splitlines()), ""]


def prose(block: list[str], known: frozenset[str]) -> list[str]:
    """A paragraph, and then a list of the parameters or fields that its sentences begin with."""
    text = " ".join(block)
    starts = []
    for found in re.finditer(r"(?:^|(?<=[.;)] ))(\w+(?:, \w+)*): ", text):
        if known.issuperset(found[1].split(", ")):
            starts.append(found)
    if not starts:
        return [*escaped("\n".join(block)).splitlines(), ""]
    first = text[: starts[0].start()].strip()
    out = [escaped(first), ""] if first else []
    ends = [found.start() for found in starts[1:]] + [len(text)]
    for found, end in zip(starts, ends, strict=True):
        out.append(f"- **{found[1]}**: {escaped(text[found.end() : end].strip())}")
    return [*out, ""]


def unpacked(value: object) -> dict[str, type]:
    """The dictionaries of options that a function takes as `**options: Unpack[Some]`."""
    try:
        parameters = inspect.signature(value).parameters
    except (TypeError, ValueError):
        return {}
    found = {name: parameter.annotation for name, parameter in parameters.items()}
    return {
        name: typing.get_args(annotation)[0]
        for name, annotation in found.items()
        if typing.get_origin(annotation) is typing.Unpack
    }


def names_of(value: object) -> frozenset[str]:
    """Parameters of a function, those of its `**options` too; fields of a class."""
    names = set(getattr(value, "__annotations__", ()))
    for options in unpacked(value).values():
        names |= set(options.__annotations__)
    try:
        return frozenset(names | set(inspect.signature(value).parameters))
    except (TypeError, ValueError):
        return frozenset(names)


def pages(name: str, lines: list[str], known: frozenset[str] = frozenset()) -> list[str]:
    """A docstring as reStructuredText."""
    tex = FORMULAS.get(name.removeprefix("genjax."))
    out: list[str] = []
    found = blocks(lines)
    for i, block in enumerate(found):
        if block[0].startswith(">>>"):
            out += [*block, ""]
            continue
        # Columns too are kept as they are typed.
        if block[0].startswith("    ") or any(re.search(r"\S {3,}\S", line) for line in block):
            if tex:
                out += formula(tex)
                tex = None
            else:
                out += ["::", "", *(f"    {line}" for line in block), ""]
            continue
        if block[0].startswith("- ") and out and out[-1]:
            out.append("")
        out += prose(block, known)
        # A formula without a place of its own comes after the first sentence.
        if tex and i == 0 and not any(other[0].startswith("    ") for other in found):
            out += formula(tex)
            tex = None
    return out


@functools.cache
def parsed(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


@functools.cache
def shorthands(file: str) -> dict[str, ast.expr]:
    """Names that a file gives to types, which mean nothing outside of it."""
    found = {}
    for node in parsed(file).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        named = isinstance(target, ast.Name) and target.id[0].isupper()
        if named and (isinstance(node.value, ast.Constant) or not target.id.isupper()):
            found[target.id] = node.value
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("genjax."):
            for name in node.names:  # in full, so that a link leads to the one that is meant
                if name.name[0].isupper() and not name.name.isupper() and not name.asname:
                    full = ast.parse(f"{node.module}.{name.name}", mode="eval").body
                    found[name.name] = borrowed(node.module).get(name.name, full)
    return found


def borrowed(module: str) -> dict[str, ast.expr]:
    """The shorthands of another module, spelled out; those of `genjax.typing` have a page."""
    spec = importlib.util.find_spec(module)
    if module == "genjax.typing" or spec is None or not spec.origin:
        return {}
    names = shorthands(spec.origin)
    return {name: Spelled(names).visit(copy.deepcopy(value)) for name, value in names.items()}


class Spelled(ast.NodeTransformer):
    """Annotations with what shorthands stand for."""

    def __init__(self, names: dict[str, ast.expr]):
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        found = self.names.get(node.id)
        return self.visit(copy.deepcopy(found)) if found is not None else node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        return ast.Constant(node.value.strip()) if isinstance(node.value, str) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return node


@functools.cache
def definitions(file: str) -> dict[str, ast.stmt]:
    """What a file defines, by its name."""
    tree = parsed(file)
    defined = (ast.FunctionDef, ast.ClassDef)
    found = {node.name: node for node in tree.body if isinstance(node, defined)}
    for node in list(found.values()):
        if isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if isinstance(n, ast.FunctionDef)]
            found |= {f"{node.name}.{n.name}": n for n in inner}
    return found


def outline(node: ast.stmt) -> ast.stmt:
    """A copy without the body of functions, which no signature shows."""
    kept = copy.copy(node)
    if isinstance(kept, ast.FunctionDef):
        kept.body, kept.args = [ast.Pass()], copy.deepcopy(kept.args)
    else:
        kept.body = copy.deepcopy([n for n in kept.body if isinstance(n, ast.AnnAssign)])
    return kept


def signature(value: object) -> tuple[str, str] | None:
    """Parameters and what comes back, in the words of the source."""
    value = inspect.unwrap(value) if callable(value) else value
    try:
        file = inspect.getsourcefile(value) or ""
        node = definitions(file).get(value.__qualname__)
    except (TypeError, OSError, AttributeError):
        return None
    if not file.endswith("typing.py"):
        node = Spelled(shorthands(file)).visit(outline(node)) if node else None
    if isinstance(node, ast.FunctionDef):
        arguments = ast.unparse(node.args)
        if "." in value.__qualname__:  # a method, without its self
            arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
        return f"({arguments})", ast.unparse(node.returns) if node.returns else ""
    if not isinstance(node, ast.ClassDef):
        return None
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
    fields = [n for n in fields if not n.target.id.startswith("_")]
    if not fields:
        return None
    return f"({', '.join(ast.unparse(n) for n in fields)})", ""


def on_docstring(app: "Sphinx", what: str, name: str, value: object, options, lines: list[str]):
    if lines == ["Call self as a function.", ""] or lines == ["Call self as a function."]:
        lines.clear()  # what Python says of any `__call__` that has no docstring
    lines[:] = pages(name, lines, names_of(value))
    for options, kind in unpacked(value).items():  # which have no page of their own
        text = (inspect.getdoc(kind) or "").splitlines()
        lines += ["", f"``**{options}``", "", *pages("", text, names_of(kind))]


def on_signature(app: "Sphinx", what: str, name: str, value: object, options, args, returns):
    return signature(value)


def on_missing(
    app: "Sphinx", env: "BuildEnvironment", node: "nodes.Element", content: "nodes.Element"
):
    """Short names of types: one of ours in `genjax.typing`, others in the inventories."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target:
        return None
    node["reftarget"] = ELSEWHERE.get(target, target)
    domain = env.get_domain("py")
    page = node["refdoc"]
    for full in (f"genjax.typing.{target}", f"genjax.{target}"):
        if full in domain.objects:
            return domain.resolve_xref(env, page, app.builder, "obj", full, node, content)
    return None


def setup(app: "Sphinx") -> dict[str, bool]:
    app.connect("autodoc-process-docstring", on_docstring)
    app.connect("autodoc-process-signature", on_signature)
    app.connect("missing-reference", on_missing, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
