"""Run one benchmark in this process and leave its rows: MODULE, its options as JSON, a file."""

import importlib
import json
import sys
from pathlib import Path

from experiments.benchmarks import _table


def main(module: str, options: str, path: str) -> None:
    benchmark = importlib.import_module(f"experiments.benchmarks.{module}")
    # JSON has lists where the options are tuples.
    given = {k: tuple(x) if isinstance(x, list) else x for k, x in json.loads(options).items()}
    rows = benchmark.main(benchmark.Config(**given))
    Path(path).write_text(json.dumps(_table.to_json(rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
