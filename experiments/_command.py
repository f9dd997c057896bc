"""The command line of a run: the name of its experiment, and the line that goes on with it."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any


def experiment_of(config: Any) -> str:
    """The module that defines the Config, by the name under which it can be imported again."""
    module = sys.modules[type(config).__module__]
    spec = getattr(module, "__spec__", None)
    return spec.name if spec is not None else Path(module.__file__ or "run").stem


def resume_command(config: Any, folder: Path) -> str:
    """The shell's line that goes on with a run: the options that are not the defaults, its folder,
    and --resume where it trains step by step."""
    line = [sys.executable, "-m", experiment_of(config)]
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value == default or field.name in ("run_dir", "resume"):
            continue
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            line += [f"--{flag}", *map(str, values)]
    line += ["--run-dir", str(folder)]
    return shlex.join([*line, "--resume"] if hasattr(config, "resume") else line)
