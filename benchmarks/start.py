"""Time from the start of a process to its first token, of Tael and of llama.cpp in turn.

    python -m benchmarks.start [--models NAME,...] [--rounds 7]

A round starts Tael with an empty cache (cold: weights are repacked and written to disk), again
with what that left there (warm), and ``llama-bench`` with as long a prompt. The model file is in
the page cache. Results go to ``benchmarks/results/start.json``; models that are there already and
were not asked for stay.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.cases import MODELS
from benchmarks.peers import llama_cpp
from tael.errors import TaelError
from tael.loader.paths import cache_dir
from tael.loader.sources import resolve

RESULTS = Path(__file__).with_name("results") / "start.json"
PROMPT = "Name one colour."
NUM_PROMPT_TOKENS = 33
"""Of the prompt in the chat template of most of the models."""


def seconds(command: list[str], cache: Path) -> float:
    """From the start of a process to the first byte that it prints."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    start = time.perf_counter()
    with subprocess.Popen(
        command, bufsize=0, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        first = process.stdout.read(1)
        elapsed = time.perf_counter() - start
        process.stdout.read()
    if process.returncode or not first:
        raise TaelError(f"it failed; try it by hand: {' '.join(command)}")
    return elapsed


def measure(model: Path, num_rounds: int) -> dict[str, Any]:
    """Medians, and the times that they come from."""
    tael = [sys.executable, "-c", "from tael.cli.main import main; main()", "run", str(model)]
    tael += [PROMPT, "--max-tokens", "1", "--temperature", "0"]
    peer = llama_cpp.one_token(model, NUM_PROMPT_TOKENS)
    limits = machine.QuietMachine(os.cpu_count() or 1)
    samples: dict[str, list[float]] = {"cold": [], "warm": [], "llama.cpp": []}
    for i in range(num_rounds + 1):
        limits()  # waits until the machine is quiet
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            cache = Path(folder)
            times = {
                "cold": seconds(tael, cache),
                "warm": seconds(tael, cache),
                "llama.cpp": seconds(peer, cache),
            }
        if i:  # the first brings the files into the page cache
            for name, value in times.items():
                samples[name].append(round(value, 3))
    return {
        "model": model.name,
        "bytes": model.stat().st_size,
        "date": machine.today(),
        "versions": machine.versions() | {llama_cpp.NAME: llama_cpp.VERSION},
        "median_s": {name: median(times) for name, times in samples.items()},
        "samples_s": samples,
    }


def save(output: Path, result: dict[str, Any]) -> None:
    """Add a model to the result file, in place of its earlier result. Raises TaelError if the
    file is of another machine."""
    report: dict[str, Any] = {"machine": machine.machine(), "results": []}
    if output.exists():
        earlier = json.loads(output.read_text())
        if earlier["machine"] != report["machine"]:
            raise TaelError(f"{output} is of another machine; give another --output.")
        report = earlier
    others = [r for r in report["results"] if r["model"] != result["model"]]
    report["results"] = sorted([*others, result], key=lambda r: r["bytes"])
    output.write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="catalogue names or paths")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    for model in args.models.split(","):
        result = measure(resolve(model), args.rounds)
        save(args.output, result)
        print(result["model"], result["median_s"], flush=True)


if __name__ == "__main__":
    main()
