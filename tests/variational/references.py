"""Reference numbers by name: (inputs, expected), their lists as float64 arrays."""

import json
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parents[1] / "references"


def reference(name):
    read = json.loads((FOLDER / f"{name}.json").read_text())
    return tuple({k: _array(v) for k, v in read[part].items()} for part in ("inputs", "expected"))


def _array(value):
    """An array where the lists have one shape; a list of arrays where not."""
    if not isinstance(value, list):
        return value
    try:
        return np.array(value)
    except ValueError:
        return [np.array(part) for part in value]
