"""The engines that Tael is compared with, one module each.

Every module has ``NAME``, ``VERSION`` (of the package that ``install`` fetches), ``install()`` and
``engine(model, num_threads)``. An environment of its own, below the cache of Tael, holds what a
peer needs:

    python -m benchmarks.peers.llama_cpp install
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from tael.errors import TaelError
from tael.evals.speed import Speed, Workload
from tael.loader.paths import cache_dir


class Runner(Protocol):
    """One engine at one workload. Uses no core between two measurements."""

    options: list[str]
    """That differ from the engine's defaults."""

    def measure(self) -> Speed:
        """The first call may take longer than it says: it loads the model and computes what lies
        before the workload's depth."""

    def close(self) -> None: ...


class Engine(Protocol):
    """One peer with one model."""

    def runners(self, workload: Workload) -> list[Runner]:
        """One for each setting that may be the fastest."""

    def close(self) -> None: ...


def peer(name: str) -> Any:
    """The module of a peer such as "llama.cpp"."""
    return import_module(f"benchmarks.peers.{name.replace('.', '_').replace('-', '_')}")


def environment(name: str) -> Path:
    """Where a peer is installed."""
    return cache_dir() / "peers" / name


def create_environment(name: str, *requirements: str) -> Path:
    """Make a virtual environment with packages of the index; return its folder."""
    folder = environment(name)
    run(sys.executable, "-m", "venv", "--clear", folder)
    pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet")
    run(*pip, "--upgrade", "pip")
    run(*pip, *requirements)
    return folder


class WorkerEngine:
    """A peer whose Python module, run in its own environment, answers workloads (``workers/``).

    The worker starts with the first measurement and is stopped in between.
    """

    def __init__(self, name: str, script: str, *arguments: str) -> None:
        self._python = environment(name) / "bin" / "python"
        path = Path(__file__).with_name("workers") / script
        self._command = [str(self._python), str(path), *arguments]
        self._worker: subprocess.Popen[str] | None = None

    def runners(self, workload: Workload) -> list[Runner]:
        return [_WorkerRunner(self, workload)]

    def measure(self, workload: Workload) -> Speed:
        if self._worker is None:
            if not self._python.exists():
                raise TaelError(f"{self._python} is not here; install the peer first.")
            pipe = subprocess.PIPE
            self._worker = subprocess.Popen(
                self._command, stdin=pipe, stdout=pipe, text=True, start_new_session=True
            )
        else:
            os.killpg(self._worker.pid, signal.SIGCONT)
        assert self._worker.stdin and self._worker.stdout
        print(json.dumps(asdict(workload)), file=self._worker.stdin, flush=True)
        answer = self._worker.stdout.readline()
        if not answer:
            raise TaelError(f"the peer failed; try it by hand: {' '.join(self._command)}")
        os.killpg(self._worker.pid, signal.SIGSTOP)
        return Speed(workload, **json.loads(answer))

    def close(self) -> None:
        if self._worker:
            os.killpg(self._worker.pid, signal.SIGKILL)
            self._worker.communicate()


class _WorkerRunner:
    options: list[str] = []  # noqa: RUF012

    def __init__(self, engine: WorkerEngine, workload: Workload) -> None:
        self._engine, self._workload = engine, workload

    def measure(self) -> Speed:
        return self._engine.measure(self._workload)

    def close(self) -> None:
        """The engine goes on for the next workload."""


def run(*command: str | Path, **options: Any) -> None:
    """A step of an installation. Raises CalledProcessError if it fails."""
    subprocess.run(command, check=True, **options)
