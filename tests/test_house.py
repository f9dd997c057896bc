"""Sizes: a file is read in one sitting."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 400


@pytest.mark.parametrize("room", ["genjax", "experiments", "tests", "docs"])
def test_no_file_is_long(room):
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / room).rglob("*.py")}
    assert lines
    long = {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > LIMIT}
    assert not long, f"over {LIMIT} lines: {long}"
