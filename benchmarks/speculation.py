"""Decoding with and without speculation, in turn, while a model repeats or edits a file of code.

python -m benchmarks.speculation MODEL... [--runs 5] [--max-tokens 1024] [--output FILE]

The file is examples/stock.py, 1,000 tokens that are part of the prompt. Both ways must give the
same tokens. Every run has a cache salt of its own: it reads its prompt itself, and drafts from
nothing but its prompt and its output. The times of single steps are what
tael/speculative/draft_length.py is calibrated with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from tael import LLM, SamplingParams
from tael.backends.base import ForwardBatch
from tael.config import BLOCK_SIZE
from tael.engine.engine import Engine
from tael.request import Usage

CODE = (Path(__file__).parents[1] / "examples" / "stock.py").read_text()
GREEDY = {"temperature": 0.0}
CASES = {
    "repeat": ("Repeat this file exactly as it is.", GREEDY),
    "rename": ("Rename the class Warehouse to Depot. Print the whole file.", GREEDY),
    "extend": (
        "Add a method `empty` to Shelf that removes everything. Print the whole file.",
        GREEDY,
    ),
    "extend, temperature 0.8": (
        "Add a method `empty` to Shelf that removes everything. Print the whole file.",
        {"temperature": 0.8, "top_p": 0.95, "seed": 1},
    ),
    "explain": ("Explain what this file does.", GREEDY),
}
STEP_TOKENS = (1, 2, 4, 8, 16)
CONTEXT = 4096


def answer(
    engine: Engine, prompt: list[int], params: SamplingParams, salt: str, speculation: bool
) -> tuple[list[int], Usage]:
    engine.add_request("0", prompt, params, cache_salt=salt, speculation=speculation)
    token_ids: list[int] = []
    while True:
        for delta in engine.step():
            token_ids += delta.token_ids
            if delta.usage is not None:
                return token_ids, delta.usage


def measure(
    engine: Engine, prompt: list[int], params: SamplingParams, salt: str, runs: int
) -> dict[str, Any]:
    """``runs`` pairs, plain and speculative."""
    speeds: dict[bool, list[float]] = {False: [], True: []}
    for run in range(runs):
        outputs = {}
        for speculation in (False, True):
            salts = f"{salt} {run} {speculation}"
            outputs[speculation], usage = answer(engine, prompt, params, salts, speculation)
            speeds[speculation].append(usage.decode_tokens_per_s)
        assert outputs[True] == outputs[False], "speculation changed the output"
    ratios = [fast / plain for plain, fast in zip(speeds[False], speeds[True], strict=True)]
    return {
        "num_prompt_tokens": len(prompt),
        "num_output_tokens": usage.num_output_tokens,
        "num_draft_tokens": usage.num_draft_tokens,
        "num_accepted_tokens": usage.num_accepted_tokens,
        "plain_tokens_per_s": round(statistics.median(speeds[False]), 2),
        "speculative_tokens_per_s": round(statistics.median(speeds[True]), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }


def step_times(engine: Engine, runs: int, depth: int = 1000) -> dict[int, float]:
    """Median milliseconds of a step of so many tokens of one sequence, with all their logits."""
    times: dict[int, list[float]] = {num_tokens: [] for num_tokens in STEP_TOKENS}
    for _ in range(runs):
        for num_tokens, samples in times.items():
            num_blocks = -(-(depth + num_tokens) // BLOCK_SIZE)
            blocks = np.arange(num_blocks, dtype=np.int32)[None]
            batch = ForwardBatch(
                token_ids=np.full(num_tokens, 100, np.int32),
                positions=np.arange(depth, depth + num_tokens, dtype=np.int32),
                query_start=np.array([0, num_tokens], np.int32),
                block_tables=(blocks,) * len(engine.manager.groups),
                logits_indices=np.arange(num_tokens, dtype=np.int32),
                temperatures=np.ones(num_tokens, np.float32),
                full_logits=np.zeros(num_tokens, np.bool_),
            )
            start = time.perf_counter()
            engine.backend.forward(batch)
            samples.append(time.perf_counter() - start)
    return {n: round(1000 * statistics.median(samples), 3) for n, samples in times.items()}


def save(output: Path, result: dict[str, Any]) -> None:
    """Add a model to the result file, in place of its earlier result."""
    report: dict[str, Any] = {"machine": machine.machine(), "results": []}
    if output.exists():
        report = json.loads(output.read_text())
    report["results"] = [r for r in report["results"] if r["model"] != result["model"]]
    report["results"].append(result)
    output.write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    for path in args.models:
        with LLM(str(path), max_model_len=CONTEXT) as llm:
            milliseconds = step_times(llm.engine, 10 * args.runs)
            print(f"{path.name}: ms per step of n tokens {milliseconds}", flush=True)
            cases = []
            for name in args.cases:
                task, sampling = CASES[name]
                text = f"```python\n{CODE}```\n\n{task}"
                prompt = llm.encode([{"role": "user", "content": text}])
                params = SamplingParams(max_tokens=args.max_tokens, **sampling)
                case = measure(llm.engine, prompt, params, name, args.runs)
                cases.append({"case": name, **case})
                print(json.dumps(cases[-1]), flush=True)
        if args.output:
            result = {"model": path.stem, "date": machine.today(), "versions": machine.versions()}
            save(args.output, {**result, "step_ms": milliseconds, "cases": cases})


if __name__ == "__main__":
    main()
