"""The command line of a run: read in one place, and the line that goes on with it.

With --resume the options are those of the run's config.json, so that only what changes is typed.
A mistake ends in one line on standard error that names the nearest right choice, and status 2.
"""

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

USAGE = 2  # the status of a mistake, as argparse has it


def experiment_of(config: Any) -> str:
    """The module that defines the Config (or is one), by the name to import it by."""
    kind = config if isinstance(config, type) else type(config)
    module = sys.modules[kind.__module__]
    spec = getattr(module, "__spec__", None)
    return spec.name if spec is not None else Path(module.__file__ or "run").stem


def runs_of(experiment: str) -> tuple[Path, list[int]]:
    """The folder above an experiment's runs, and their numbers."""
    above = Path("runs", experiment.rpartition(".")[2]).absolute()
    return above, sorted(int(p.name) for p in above.glob("*") if p.name.isdecimal())


def config_of(stored: Mapping[str, Any], kind: type) -> Any:
    """The Config that config.json holds; what a newer Config has beside it is at its default."""
    fields = {field.name for field in dataclasses.fields(kind)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in fields}
    return kind(**given)


def read(kind: type, description: str | None, args: Sequence[str] | None = None) -> Any:
    """The Config of a command line; a mistake in it ends the process, see above."""
    import tyro

    args = _spelled(kind, sys.argv[1:] if args is None else args)
    given = {"description": description, "args": args}
    if "--resume" in args:
        stored = _resumed(kind, args)
        given |= {} if stored is None else {"default": stored}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, **given)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        mistake(_explain(kind, args) or _in_one_line(said.getvalue()))


def _spelled(kind: type, args: Sequence[str]) -> list[str]:
    """The words, with --x and --no-x of an option that may also be left open as tyro has them."""
    flags = {}
    for field in dataclasses.fields(kind):
        if field.type == bool | None:
            name = field.name.replace("_", "-")
            flags |= {f"--{name}": "True", f"--no-{name}": "False"}
    words: list[str] = []
    for word, after in zip(args, [*args, ""][1:], strict=True):
        value = flags.get(word.replace("_", "-"))
        if value is None or after in ("True", "False", "None"):
            words.append(word)
        else:
            words += ["--" + word[2:].replace("_", "-").removeprefix("no-"), value]
    return words


def mistake(text: str) -> NoReturn:
    """End with one line and the status of a mistake."""
    print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
    raise SystemExit(USAGE)


def _resumed(kind: type, args: Sequence[str]) -> Any:
    """The stored Config of the run that is to go on; None where there is none to be read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--run-dir", "--run_dir", dest="folder")
    folder = parser.parse_known_args(args)[0].folder
    if folder is None:
        above, numbers = runs_of(experiment_of(kind))
        folder = above / str(numbers[-1]) if numbers else None
    path = None if folder is None else Path(folder) / "config.json"
    if path is None or not path.is_file():
        return None  # what follows says so
    try:
        stored = json.loads(path.read_text())
        return dataclasses.replace(config_of(stored, kind), run_dir=str(folder))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        mistake(f"{path} cannot be read ({error}): mend it, or start anew")


def _explain(kind: type, args: Sequence[str]) -> str | None:
    """What is wrong with an option that there is not, or with a choice, and what is nearest."""
    choices = {
        "--" + field.name.replace("_", "-"): get_args(field.type)
        if get_origin(field.type) is Literal
        else ()
        for field in dataclasses.fields(kind)
    }
    known = {*choices, "--help", *("--no-" + name[2:] for name in choices)}
    for i, word in enumerate(args):
        flag, _, value = word.replace("_", "-").partition("=")
        if not word.startswith("--"):
            continue
        if flag not in known:
            near = difflib.get_close_matches(flag, choices, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"there is no option {flag}{hint} (--help lists them all)"
        value = word.partition("=")[2] or (args[i + 1] if i + 1 < len(args) else "")
        if choices.get(flag) and value not in map(str, choices[flag]):
            near = difflib.get_close_matches(value, map(str, choices[flag]), n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"{flag} must be one of {list(choices[flag])}, got {value!r}{hint}"
    return None


def _in_one_line(box: str) -> str:
    """The first paragraph of what tyro draws in a box."""
    lines = [re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in box.splitlines()]
    told: list[str] = []
    for line in lines:
        if line.startswith(("╭", "╰")) or not line:
            continue
        if line.startswith("─"):
            break
        told.append(line)
    return " ".join(told) or " ".join(box.split())


def resume_command(config: Any, folder: Path) -> str:
    """The shell's line that goes on with a run, whose config.json has the options; where nothing
    is trained step by step, those that are not the defaults."""
    line = [sys.executable, "-m", experiment_of(config)]
    if hasattr(config, "resume"):
        return shlex.join([*line, "--resume", "--run-dir", str(folder)])
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if value == default or field.name == "run_dir":
            continue
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            line += [f"--{flag}", *map(str, values)]
    return shlex.join([*line, "--run-dir", str(folder)])
