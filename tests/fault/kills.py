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

CHILD = Path(__file__).with_name("kill_child.py")
LONGEST_S = 0.25
"""From when a process begins to store until it is killed: enough for some hundred blocks."""


def kill_often(model: Path, folder: Path, num_kills: int, seed: int = 0) -> dict[str, Any]:
    """Start, check and kill a process ``num_kills`` times, at random moments, and start it once
    more. Raises AssertionError if any gives another token than one with an empty folder."""
    expected = _finish(_start(model, folder.with_name("empty"), "once"))["token_ids"]
    rng = random.Random(seed)
    totals = {"num_restored_tokens": 0, "num_corrupt_blocks": 0, "num_mismatched_blocks": 0}
    num_parts = 0
    for i in range(num_kills + 1):
        process = _start(model, folder, str(i) if i < num_kills else "once")
        report = _report(process)
        assert report["token_ids"] == expected, f"start {i}: wrong tokens"
        assert report["failure"] is None, report["failure"]
        for name in totals:
            totals[name] += report[name]
        if i < num_kills:
            time.sleep(rng.random() * LONGEST_S)
            process.kill()
        process.communicate()
        num_parts += len(list(folder.glob("*.part")))
    return {"num_kills": num_kills, "num_wrong": 0, "num_unfinished_files": num_parts, **totals}


def _start(model: Path, folder: Path, seed: str) -> subprocess.Popen[str]:
    root = str(CHILD.parents[2])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(CHILD), str(model), str(folder), seed]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def _report(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    report: dict[str, Any] = json.loads(process.stdout.readline() or "{}")
    assert process.stdout.readline() == "storing\n", "it failed before it was killed"
    return report


def _finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    report = _report(process)
    assert process.wait(60) == 0
    return report
