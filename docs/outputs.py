"""Run notebooks from top to bottom and keep what they show: python docs/outputs.py [NOTEBOOK ...]

The pages show stored outputs. A digest of the code beside them says whether they are its own.
"""

import base64
import hashlib
import io
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of the code, without what it showed."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def smaller(picture: str, colours: int = 64) -> str:
    """A PNG in base64 with a palette, which takes a third of the bytes."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(colours).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def run(path: Path) -> list[float]:
    """Execute and write; seconds of each cell. Raises where a cell does, or warns."""
    notebook = nbformat.read(path, as_version=4)
    seconds: list[float] = []
    client = NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
        on_cell_execute=lambda **_: seconds.append(-time.monotonic()),
        on_cell_executed=lambda **_: seconds.append(seconds.pop() + time.monotonic()),
    )
    client.execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise RuntimeError(f"{path.name} warns: {output.text}")
            if "image/png" in output.get("data", {}):
                output.data = {"image/png": smaller(output.data["image/png"])}
    notebook.metadata["outputs_of"] = digest(notebook)
    nbformat.write(notebook, path)
    return seconds


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")):
        seconds = run(path)
        size = path.stat().st_size / 1024
        print(
            f"{path.name}: {sum(seconds):.1f} s, at most {max(seconds):.1f} a cell, {size:.0f} kB"
        )
