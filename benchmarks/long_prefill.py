"""A prompt that fills a model's context: exact, read sparsely, and llama.cpp, in turn.

    python -m benchmarks.long_prefill [--model qwen2.5-coder:0.5b] [--tokens 32767] [--rounds 2]

llama.cpp runs with the setting that is the fastest at a quarter of the length. Writes
``benchmarks/results/long-prefill.json``.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import machine, peers
from benchmarks.compare import TaelRunner, compare, fastest, median_ratio
from tael.evals.context.calibrate import PREFILL_BUDGET
from tael.evals.speed import Workload
from tael.llm import LLM
from tael.loader.sources import resolve

RESULTS = Path(__file__).with_name("results") / "long-prefill.json"
SPARSE = f"tael, {PREFILL_BUDGET:,} tokens read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--tokens", type=int, default=32767)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    path, llama_cpp = resolve(args.model), peers.peer("llama.cpp")
    limits = machine.QuietMachine(args.threads)
    workload = Workload(num_prompt_tokens=args.tokens)
    engine = llama_cpp.engine(path, args.threads)
    quarter = replace(workload, num_prompt_tokens=args.tokens // 4)
    best, tried = fastest(engine.runners(quarter), limits)
    best.close()
    runner = next(r for r in engine.runners(workload) if r.options == best.options)
    with ExitStack() as stack:
        exact = stack.enter_context(LLM(str(path), num_threads=args.threads))
        sparse = stack.enter_context(
            LLM(str(path), num_threads=args.threads, prefill_budget=PREFILL_BUDGET)
        )
        candidates: dict[str, list[peers.Runner]] = {
            "tael": [TaelRunner(exact, workload)],
            SPARSE: [TaelRunner(sparse, workload)],
            llama_cpp.NAME: [runner],
        }
        result = compare(candidates, args.rounds, limits)
    seconds = {name: engine["prefill_s"] for name, engine in result["engines"].items()}
    result["ratio_of_sparse"] = {
        name: median_ratio(seconds[name], seconds[SPARSE]) for name in ("tael", llama_cpp.NAME)
    }
    report = {
        **machine.stamp(),
        "peer": llama_cpp.VERSION,
        "model": path.stem,
        "workload": asdict(workload),
        "tried_at_a_quarter": tried,
        **result,
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(result["ratio"], result["ratio_of_sparse"])


if __name__ == "__main__":
    main()
