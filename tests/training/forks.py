"""Runs of the tiny experiment in processes of their own, forked from one that has all imported.

A process that starts from nothing spends three seconds on imports before it can be killed.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 120  # after so long a child is ended


class Forks:
    """Ask for runs, one at a time; use in a `with`."""

    def __enter__(self):
        # Nothing is imported from the tests' own process; one device, not eight.
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.training.forks"],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "XLA_FLAGS": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error):
        self._server.stdin.close()
        self._server.wait(timeout=SECONDS)
        self._server.stdout.close()

    def run(self, folder, *options, fault="none -1"):
        """Run `python -m tests.training.tiny --run-dir FOLDER OPTIONS` and wait for its end."""
        arguments = ["tiny", "--run-dir", str(folder), *map(str, options)]
        with tempfile.TemporaryDirectory() as place:
            request = {"arguments": arguments, "fault": fault, "place": place}
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            texts = [Path(place, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(arguments, code, *texts)


def serve():
    """Fork a child for each line of standard input, and answer with its exit status."""
    import tyro  # noqa: F401

    from experiments import _run
    from tests.training import tiny

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            signal.alarm(SECONDS)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(Path(request["place"], name), os.O_CREAT | os.O_WRONLY), number)
            sys.argv[:] = request["arguments"]
            os.environ["TINY_FAULT"] = request["fault"]
            return _run.launch(tiny.main_with_fault, tiny.Config)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
