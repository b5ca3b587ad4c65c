"""What a result file says about where and with what it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from tael import __version__
from tael.backends.cpu.backend import chosen_isa
from tael.errors import TaelError
from tael.evals.limits import Limits, measure_limits

QUIET = 0.9
"""Of the best rate of the run: below it, something else takes the cores."""


def machine() -> dict[str, Any]:
    """The hardware, without any name of the host."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "isa": chosen_isa(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of Tael, with its commit, and of Python."""
    return {"tael": f"{__version__} {_commit()}", "python": platform.python_version()}


def stamp() -> dict[str, Any]:
    """What a result file of Tael alone begins with."""
    return {"machine": machine(), "date": today(), "versions": versions()}


def today() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d")


def middle(samples: list[Limits]) -> dict[str, int | None]:
    """The median of every limit that the machine has."""
    rows = [asdict(sample) for sample in samples]
    return {
        key: None if rows[0][key] is None else round(median(row[key] for row in rows))
        for key in rows[0]
    }


class QuietMachine:
    """Measures the limits, and waits while other processes take the cores: two engines that
    share a core with a third program lose unequally, the one that spins at barriers most."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._best = max(_compute_rate(measure_limits(num_threads)) for _ in range(5))

    def __call__(self) -> Limits:
        for _ in range(120):
            limits = measure_limits(self._num_threads)
            self._best = max(self._best, _compute_rate(limits))
            if _compute_rate(limits) >= QUIET * self._best:
                return limits
            time.sleep(5)
        raise TaelError("other processes keep the cores busy; end them, then measure again.")


def _compute_rate(limits: Limits) -> float:
    """0 where nothing but the bandwidth can be measured; that changes by itself."""
    return limits.int8_ops_per_s or 0.0


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    fields = dict(line.split("\t: ", 1) for line in reversed(lines) if "\t: " in line)
    fields = {key.strip(): value for key, value in fields.items()}
    if "model name" not in fields:
        return platform.processor()
    return f"{fields['model name']}, family {fields['cpu family']} model {fields['model']}"


def _commit() -> str:
    """Of the working tree; a plus sign if it has changes besides result files and documents."""
    root = Path(__file__).parents[1]
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    code = ["--", "tael", "csrc", "CMakeLists.txt", "benchmarks/*.py"]
    changes = subprocess.run(
        [*git, "status", "--short", *code], capture_output=True, text=True
    ).stdout
    return commit.stdout.strip() + ("+" if changes else "")
