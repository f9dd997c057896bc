"""Run one benchmark in this process and leave its rows: MODULE, its options as JSON, a file."""

import importlib
import json
import sys
from pathlib import Path

from experiments.benchmarks import _table


def main(module: str, options: str, path: str) -> None:
    benchmark = importlib.import_module(f"experiments.benchmarks.{module}")
    # JSON has lists where the options are tuples.
    plain = json.loads(options)
    plain = {key: tuple(x) if isinstance(x, list) else x for key, x in plain.items()}
    _table.write(Path(path), benchmark.main(benchmark.Config(**plain)))


if __name__ == "__main__":
    main(*sys.argv[1:])
