"""A ``tael serve`` in a process of its own, to be measured and tormented from outside."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tael.errors import TaelError

COMMAND = [sys.executable, "-c", "from tael.cli.main import main; main()", "serve"]
MODEL = "m"
"""What callers call the model."""


@dataclass(frozen=True)
class Serving:
    url: str
    process: subprocess.Popen[str]


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Serving]:
    """A server of ``model`` with ``options`` of the command line, without keys and with a ledger
    of its own; it is told to end at the end. Raises TaelError if it does not start."""
    with tempfile.TemporaryDirectory() as folder:
        own = ["--keys", f"{folder}/keys.sqlite", "--ledger", f"{folder}/ledger.sqlite"]
        command = [*COMMAND, str(model), "--name", MODEL, "--port", "0", *own, *options]
        log = Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(command, stderr=file, text=True)
        try:
            yield Serving(_address(process, log), process)
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    """What the server says that it listens on, once it does."""
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if "listening on " in line:
                return line.split()[-1]
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    raise TaelError(f"the server did not start: {log.read_text()[-500:]}")
