"""Time of a warm start: from the start of the process to its end after one token.

python benchmarks/start.py MODEL... [--runs 5] [--output results/start.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tael import __version__

COMMAND = [sys.executable, "-c", "from tael.cli.main import main; main()"]
PROMPT = "Name one colour."


def seconds(model: Path) -> float:
    """One process: interpreter, imports, tokenizer, weights, prompt, one token, exit."""
    start = time.perf_counter()
    options = ["--max-tokens", "1", "--temperature", "0"]
    subprocess.run([*COMMAND, "run", str(model), PROMPT, *options], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    results = []
    for model in args.models:
        seconds(model)  # prepares the model and fills the page cache
        times = [seconds(model) for _ in range(args.runs)]
        results.append(
            {
                "model": model.name,
                "bytes": model.stat().st_size,
                "median_s": round(statistics.median(times), 3),
                "max_s": round(max(times), 3),
            }
        )
        print(results[-1], flush=True)
    if args.output:
        report = {
            "tael": __version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "runs": args.runs,
            "results": results,
        }
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
