"""The engines that Tael is compared with, one module each.

Every module has ``NAME``, ``VERSION`` (of the package that ``install`` fetches), ``install()`` and
``runners(model, workload, num_threads)``. An environment of its own, below the cache of Tael, holds
what a peer needs:

    python -m benchmarks.peers.llama_cpp install
"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from tael.evals.speed import Speed
from tael.loader.paths import cache_dir


class Runner(Protocol):
    """One engine at one workload. Uses no core between two measurements."""

    options: list[str]
    """That differ from the engine's defaults."""

    def measure(self) -> Speed:
        """The first call may take longer than it says: it loads the model and computes what lies
        before the workload's depth."""

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


def run(*command: str | Path, **options: Any) -> None:
    """A step of an installation. Raises CalledProcessError if it fails."""
    subprocess.run(command, check=True, **options)
