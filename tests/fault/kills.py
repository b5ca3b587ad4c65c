"""Kills processes while they store blocks. Used by the test and by ``benchmarks.kill``."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fault.kill_child import NUM_CHECKED

CHILD = Path(__file__).with_name("kill_child.py")
LONGEST_S = 0.25
"""From when a process begins to store until it is killed: enough for some hundred blocks."""


def kill_often(model: Path, folder: Path, num_kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill ``num_kills`` processes at random moments while they store. Each is followed by one that
    asks for what the one before was storing. Raises AssertionError if it gets another token than
    without a disk."""
    expected: list[list[int]] = json.loads(_start(model, "-", 0, 0).communicate()[0])
    rng = random.Random(seed)
    totals = {"num_restored_tokens": 0, "num_corrupt_blocks": 0, "num_mismatched_blocks": 0}
    num_lives_restored = num_parts = check = 0
    for life in range(num_kills + 1):
        store = check + NUM_CHECKED
        process = _start(model, str(folder), check, store)
        report = _report(process)
        asked = [expected[i % len(expected)] for i in range(check, store)]
        assert report["token_ids"] == asked, f"life {life}: wrong tokens"
        assert report["failure"] is None, report["failure"]
        num_lives_restored += report["num_restored_tokens"] > 0
        for name in totals:
            totals[name] += report[name]
        time.sleep(rng.random() * LONGEST_S)
        process.kill()
        process.communicate()
        num_parts += len(list(folder.glob("*.part")))
        check = store
    return {
        "num_kills": num_kills,
        "num_wrong": 0,
        "num_starts_that_restored": num_lives_restored,
        "num_unfinished_files": num_parts,
        **totals,
    }


def _start(model: Path, folder: str, check: int, store: int) -> subprocess.Popen[str]:
    root = str(CHILD.parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(CHILD), str(model), folder, str(check), str(store)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def _report(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    report: dict[str, Any] = json.loads(process.stdout.readline() or "{}")
    assert process.stdout.readline() == "storing\n", "it failed before it was killed"
    return report
