"""What a long context costs each token, with KV formats and reading budgets.

    python -m benchmarks.long_context [--model NAME] [--depths 1024,30720] [--output FILE]

For each mode, a context of every depth is computed once, with the mode's own prefill, and timed.
Then 64 tokens are decoded behind each, in turn, and the ratio to the shortest is taken round by
round. Bytes are those of the blocks that a request held.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from tael.evals.context.calibrate import BUDGET, PREFILL_BUDGET
from tael.evals.speed import Workload, measure
from tael.llm import LLM

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "q8": {"kv_format": "q8"},
    "k8v4": {"kv_format": "k8v4"},
    "sparse": {"kv_budget": BUDGET, "prefill_budget": PREFILL_BUDGET},
    "q8-sparse": {"kv_format": "q8", "kv_budget": BUDGET, "prefill_budget": PREFILL_BUDGET},
}
NUM_DECODE_TOKENS = 64
RESULTS = Path(__file__).with_name("results") / "long-context.json"


def measure_mode(model: str, settings: dict[str, Any], depths: list[int], rounds: int) -> Any:
    with LLM(model, max_model_len=max(depths) + 1024, speculation=False, **settings) as llm:
        engine = llm.engine
        prefill_s = {}
        for depth in depths:
            start = time.perf_counter()
            measure(engine, Workload(depth=depth))
            prefill_s[depth] = time.perf_counter() - start
        workloads = [Workload(num_decode_tokens=NUM_DECODE_TOKENS, depth=d) for d in depths]
        times: dict[int, list[float]] = {depth: [] for depth in depths}
        for i in range(rounds):
            for workload in workloads[:: -1 if i % 2 else 1]:
                times[workload.depth].append(measure(engine, workload).decode_s)
        shortest = times[min(depths)]
        return {
            "settings": settings,
            "kv_bytes_per_token": sum(g.block_bytes for g in engine.manager.groups) // 32,
            "depths": {
                depth: {
                    "prefill_s": round(prefill_s[depth], 3),
                    "decode_ms": round(1000 * median(times[depth]) / NUM_DECODE_TOKENS, 3),
                    "ratio_to_shortest": round(
                        median(a / b for a, b in zip(times[depth], shortest, strict=True)), 3
                    ),
                }
                for depth in depths
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--depths", default="1024,30720")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    depths = [int(depth) for depth in args.depths.split(",")]
    report: dict[str, Any] = {"model": args.model, **machine.stamp(), "modes": {}}
    for mode in args.modes.split(","):
        report["modes"][mode] = measure_mode(args.model, MODES[mode], depths, args.rounds)
        print(mode, json.dumps(report["modes"][mode]), flush=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
