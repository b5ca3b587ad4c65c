"""Kills 200 processes while they store KV blocks; every later one must give the right tokens.

    python -m benchmarks.kill [--kills 200]

Writes ``benchmarks/results/kill.json``. The model is tiny and random: what is tested is the disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import machine

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "kill.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from byte_llama import save_byte_llama
    from fault.kills import kill_often

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        save_byte_llama(model, head_dim=16)
        result = kill_often(model, Path(folder) / "kv", args.kills)
    report = {
        **machine.stamp(),
        **result,
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(result)


if __name__ == "__main__":
    main()
