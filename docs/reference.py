"""Render the public functions of a package: signature and docstring, verbatim.

The docstrings are plain text with aligned formulas, which a markup parser would reflow.
"""

import importlib
import inspect


def public(package: str) -> list[tuple[str, object]]:
    """List the documented callables that a package exports, in alphabetical order."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [name for name in dir(module) if not name.startswith("_")])
    pairs = [(name, getattr(module, name)) for name in sorted(names)]
    # A package also exports what it takes from the ground floor; a module what it defines.
    home = "genjax." if hasattr(module, "__path__") else package
    own = [(n, v) for n, v in pairs if str(getattr(v, "__module__", "")).startswith(home)]
    return [(name, value) for name, value in own if callable(value) and inspect.getdoc(value)]


def signature(value: object) -> str:
    """Parameter names and defaults, without the annotations (the docstring says the shapes)."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "(...)"
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def page(package: str) -> str:
    """One section for each public name."""
    parts = [f"# Reference: `{package}`\n"]
    for name, value in public(package):
        text = inspect.getdoc(value)
        call = f"```python\n{name}{signature(value)}\n```"
        parts.append(f"## {name}\n\n{call}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)
