"""Pages of the reference: a room's public names, in the order of its modules."""

import importlib
import inspect

from docstrings import escaped

ROOMS = [
    *("variational", "transport", "adversarial", "diffusion", "flows", "autoregressive"),
    *("state_space", "alignment", "training", "data", "metrics", "networks"),
    *(
        "numerics",
        "ode",
        "randomness",
        "likelihoods",
        "divergences",
        "checks",
        "sharding",
        "typing",
    ),
]


def public(package: str) -> list[tuple[str, object]]:
    """List the documented callables that a package exports, in alphabetical order."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", [name for name in dir(module) if not name.startswith("_")])
    pairs = [(name, getattr(module, name)) for name in sorted(names)]
    # A package also exports what it takes from the ground floor; a module what it defines.
    home = "genjax." if hasattr(module, "__path__") else package
    own = [(n, v) for n, v in pairs if str(getattr(v, "__module__", "")).startswith(home)]
    return [(name, value) for name, value in own if callable(value) and inspect.getdoc(value)]


def tables(package: str) -> dict[str, dict]:
    """The dictionaries that a room exports: one entry by each name."""
    members = vars(importlib.import_module(package))
    return {
        n: v
        for n, v in sorted(members.items())
        if n.isupper() and n[0] != "_" and isinstance(v, dict)
    }


def sections(package: str) -> dict[str, list[tuple[str, object]]]:
    """The names by the module that defines them, the package's own modules first."""
    found: dict[str, list[tuple[str, object]]] = {}
    for name, value in public(package):
        found.setdefault(value.__module__, []).append((name, value))
    return dict(sorted(found.items(), key=lambda item: (not item[0].startswith(package), item[0])))


def summary(text: str | None) -> str:
    """The first sentence, which may go over the end of its line."""
    lines: list[str] = []
    for line in (text or "").strip().splitlines():
        if not line.strip() or (lines and lines[-1].endswith(".")):
            break
        lines.append(line.strip())
    return " ".join(lines)


def title(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def entry(package: str, name: str, value: object) -> list[str]:
    """The directive of one name."""
    if not inspect.isclass(value):
        return [f".. autofunction:: {package}.{name}", ""]
    members = [
        attribute
        for attribute, member in vars(value).items()
        if (attribute == "__call__" or not attribute.startswith("_"))
        and (inspect.isfunction(member) or isinstance(member, property))
        and inspect.getdoc(member)
        and attribute != "setup"  # what flax calls, and nobody else
    ]
    options = [f"   :members: {', '.join(members)}"] if members else []
    return [f".. autoclass:: {package}.{name}", *options, ""]


def aliases(module: str) -> list[str]:
    """The names of types, each with the comment above it."""
    parts, comment = [], []
    for line in inspect.getsource(importlib.import_module(module)).splitlines():
        name, _, value = line.partition(": TypeAlias = ")
        if value:
            parts += [f".. py:data:: {module}.{name}", "", f"   ``{value}``", ""]
            parts += [f"   {escaped(' '.join(comment))}", ""]
        comment = [*comment, line.removeprefix("# ")] if line.startswith("# ") else []
    return parts


def page(package: str) -> str:
    """A room: what it is, its modules, a line of every name, and then each in full."""
    room = importlib.import_module(package)
    if package == "genjax.typing":
        return "\n".join([*title(package, "="), *aliases(package)])
    parts = [f".. py:currentmodule:: {package}", "", *title(package, "=")]
    parts += [escaped(summary(room.__doc__)), ""]
    found = sections(package)
    for module, pairs in found.items():
        parts += title(module.removeprefix("genjax."), "-")
        parts += [escaped(summary(importlib.import_module(module).__doc__)), ""]
        parts += [".. list-table::", "   :widths: 30 70", ""]
        for name, value in pairs:
            parts.append(f"   * - :py:obj:`~{package}.{name}`")
            parts.append(f"     - {escaped(summary(inspect.getdoc(value)))}")
        parts.append("")
        for name, value in pairs:
            parts += entry(package, name, value)
    for name, table in tables(package).items():
        parts += [*title(name, "-"), f".. py:data:: {name}", ""]
        parts += [f"   A table, by name: {', '.join(f'``{key}``' for key in table)}.", ""]
    return "\n".join(parts)
