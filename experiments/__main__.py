"""List the experiments: python -m experiments."""

import ast
import re
from pathlib import Path


def describe(path: Path) -> str:
    """Read the first sentence of a module's docstring without importing it."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<=\.)\s", " ".join(text.split()))[0]


def experiments(folder: Path = Path(__file__).parent) -> dict[str, str]:
    """Name every experiment and benchmark, with the line that describes it."""
    files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("benchmarks/*.py"))]
    return {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts): describe(path)
        for path in files
        if not path.name.startswith("_")
    }


def main() -> None:
    found = experiments()
    width = max(map(len, found), default=0)
    print("python -m NAME [--help], with NAME one of:")
    for name, line in found.items():
        print(f"  {name:<{width}}  {line}")


if __name__ == "__main__":
    main()
