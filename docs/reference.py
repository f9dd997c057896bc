"""Pages of the reference: every public function with its types, its text, and a link to its source.

Docstrings are plain text whose formulas are indented; these stay as they are written.
"""

import enum
import importlib
import inspect
import re

SEEN: set[str] = set()  # what several rooms export has one canonical place
ESCAPED = re.compile(r"([\\*_$<>\[\]|#~^{}])")


def public(package: str) -> list[tuple[str, object]]:
    """List the documented callables that a package exports, in alphabetical order."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [name for name in dir(module) if not name.startswith("_")])
    pairs = [(name, getattr(module, name)) for name in sorted(names)]
    # A package also exports what it takes from the ground floor; a module what it defines.
    home = "genjax." if hasattr(module, "__path__") else package
    own = [(n, v) for n, v in pairs if str(getattr(v, "__module__", "")).startswith(home)]
    return [(name, value) for name, value in own if callable(value) and inspect.getdoc(value)]


def plain(x: object) -> str:
    """A default or a type as one would write it."""
    if isinstance(x, enum.Enum):
        return str(x)
    if inspect.isclass(x) or inspect.isfunction(x):
        return x.__name__
    x = str(x).replace("jaxlib._jax.Array", "Array").replace("jaxlib._Array", "Array")
    text = re.sub(r"<(?:function|class|object) ?'?([\w.]*)[^>]*>", r"\1", str(x))
    return re.sub(r"(?:jaxtyping|jax|typing|collections\.abc|genjax(?:\.\w+)*)\.(?=\w)", "", text)


def signature(value: object, types: bool = True) -> str:
    """Names, types and defaults."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    parts, starred = [], False
    for p in found.parameters.values():
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        if p.kind == p.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        if types and p.annotation is not p.empty:
            text += f": {plain(p.annotation)}"
        if p.default is not p.empty:
            text += "=" + (repr(p.default) if isinstance(p.default, str) else plain(p.default))
        parts.append(text)
    end = found.return_annotation
    arrow = "" if not types or end is found.empty else f" -> {plain(end)}"
    return " ".join(f"({', '.join(parts)}){arrow}".split())


def escaped(text: str) -> str:
    """A paragraph as Markdown that reads as it is written; code between backticks stays code."""
    pieces = re.split(r"(`+[^`]+`+)", text)
    return "".join(p if p.startswith("`") else ESCAPED.sub(r"\\\1", p) for p in pieces)


def body(text: str) -> str:
    """Paragraphs as text, what is indented as it stands."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text):
        formula = all(line.startswith("    ") for line in paragraph.splitlines())
        parts.append(f"```text\n{paragraph}\n```" if formula else escaped(paragraph))
    return "\n\n".join(parts).replace("\n```\n\n```text\n", "\n\n")


def page(package: str) -> str:
    """One section for each public name."""
    head = inspect.getdoc(importlib.import_module(package)) or ""
    parts = [f"# `{package}`\n\n{escaped(head.split(chr(10) * 2)[0])}\n",
             f"```{{py:module}} {package}\n```\n"]  # fmt: skip
    for name, value in public(package):
        kind = "class" if inspect.isclass(value) else "function"
        canonical = f"{getattr(value, '__module__', package)}.{name}"
        option = "" if canonical in SEEN else f":canonical: {canonical}\n"
        SEEN.add(canonical)
        parts.append(
            f"## {name}\n\n````{{py:{kind}}} {name}{signature(value)}\n{option}\n"
            f"{body(inspect.getdoc(value) or '')}\n````\n"
        )
    return "\n".join(parts)
