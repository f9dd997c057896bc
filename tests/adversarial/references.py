"""Reference numbers by name, and the names that they use for the divergences."""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "references"
# genjax -> reference files
NAMES = {
    "kl": "kl",
    "reverse_kl": "reverse_kl",
    "jensen_shannon": "js",
    "gan": "gan",
    "pearson": "pearson_chi2",
    "neyman": "neyman_chi2",
    "squared_hellinger": "squared_hellinger",
    "jeffreys": "jeffreys",
    "total_variation": "total_variation",
}


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())
