"""Decoding behind a context that is larger than the memory, beside the same with all KV in memory.

    python -m benchmarks.tiered [--model qwen2.5-coder:0.5b] [--tokens 131072] [--memory 848MiB]

Two processes compute the same text, the one with ``--kv-disk`` and a budget for the whole process,
the other with all the memory it asks for, and then decode in turn. Both read sparsely. Their tokens
must be the same. Writes ``benchmarks/results/tiered.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import machine
from tael import LLM, SamplingParams
from tael.cli.common import byte_size, token_count
from tael.evals.context.texts import fetch_texts, prose
from tael.loader.prepared import load_prepared
from tael.loader.sources import resolve
from tael.memory.process import peak_rss_bytes

RESULTS = Path(__file__).with_name("results") / "tiered.json"
SETTINGS: dict[str, Any] = {"kv_format": "q8", "kv_budget": 2048, "prefill_budget": 512}
NUM_STEPS = 64
"""Of one turn."""


class Engine:
    """One of the two processes."""

    def __init__(self, **arguments: Any) -> None:
        command = [sys.executable, "-m", "benchmarks.tiered", "--child", json.dumps(arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.start = self._answer()

    def turn(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def write_prompt(model: Path, num_tokens: int, path: Path) -> None:
    """Of a text, for the children, whose memory is measured: a server's engine gets ids too."""
    fetch_texts()
    text = " ".join(islice(prose(random.Random(0)), num_tokens // 8))
    np.save(path, np.array(load_prepared(model).tokenizer.encode(text)[:num_tokens], np.int32))


def serve(model: str, prompt: str, num_tokens: int, num_turns: int, settings: Any) -> None:
    """What a child does: the prompt, then a turn for every line of its input."""
    num_output_tokens = (num_turns + 1) * NUM_STEPS
    llm = LLM(
        model,
        max_model_len=num_tokens,
        max_num_seqs=1,
        speculation=False,
        **settings,
    )
    engine = llm.engine
    prompt_ids = np.load(prompt)[: num_tokens - num_output_tokens - 1].tolist()
    params = SamplingParams(temperature=0, max_tokens=num_output_tokens, ignore_eos=True)
    token_ids: list[int] = []
    start = time.perf_counter()
    engine.add_request("x", prompt_ids, params)
    while not token_ids:
        token_ids += [t for delta in engine.step() for t in delta.token_ids]
    tiered = engine.kv_store.tiered
    (request,) = engine.scheduler.running

    def report(**figures: Any) -> None:
        counters = dict(tiered.counters) if tiered else {}
        print(json.dumps({**figures, "peak_rss_bytes": peak_rss_bytes(), **counters}), flush=True)

    report(
        num_prompt_tokens=len(prompt_ids),
        prefill_s=round(time.perf_counter() - start, 1),
        kv_bytes=engine.manager.kv_bytes(request),
        kv_memory_bytes=engine.kv_store.num_bytes,
        budget_bytes=engine.memory_bytes,
        file_bytes=tiered.file_bytes if tiered else 0,
    )
    for _ in sys.stdin:
        times = []
        token_ids = []
        for _ in range(NUM_STEPS):
            start = time.perf_counter()
            token_ids += [t for delta in engine.step() for t in delta.token_ids]
            times.append(1000 * (time.perf_counter() - start))
        report(
            median_ms=round(median(times), 3),
            mean_ms=round(sum(times) / NUM_STEPS, 3),
            token_ids=token_ids,
        )


def measure(
    model: Path, prompt: Path, num_tokens: int, memory_bytes: int, num_turns: int
) -> dict[str, Any]:
    shared = {
        "model": str(model),
        "prompt": str(prompt),
        "num_tokens": num_tokens,
        "num_turns": num_turns,
    }
    settings = SETTINGS | ({"rope_scaling": "yarn"} if num_tokens > 32768 else {})
    disk = Engine(**shared, settings=settings | {"memory": memory_bytes, "kv_disk": "16GiB"})
    memory = Engine(**shared, settings=settings)
    turns: dict[str, list[dict[str, Any]]] = {"disk": [], "memory": []}
    for i in range(num_turns):
        for name, engine in [("disk", disk), ("memory", memory)][:: -1 if i % 2 else 1]:
            turns[name].append(engine.turn())
    disk.close()
    memory.close()
    tokens = {name: [turn.pop("token_ids") for turn in turns[name]] for name in turns}
    steady = slice(1, None)  # the first turn brings in what the prompt did not need
    ratios = [
        m["mean_ms"] / d["mean_ms"]
        for d, m in zip(turns["disk"][steady], turns["memory"][steady], strict=True)
    ]
    return {
        "model": model.name,
        "settings": settings,
        "num_tokens": num_tokens,
        "memory_bytes": memory_bytes,
        "share_of_kv_in_memory": round(disk.start["kv_memory_bytes"] / disk.start["kv_bytes"], 3),
        "peak_rss_bytes": turns["disk"][-1]["peak_rss_bytes"],
        "same_tokens": tokens["disk"] == tokens["memory"],
        "speed_to_memory": round(median(ratios), 3),
        "start": {"disk": disk.start, "memory": memory.start},
        "turns": turns,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--tokens", type=token_count, default=131072)
    parser.add_argument("--memory", type=byte_size, default=byte_size("848MiB"))
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", type=json.loads)
    args = parser.parse_args()
    if args.child:
        serve(**args.child)
        return
    model = resolve(args.model)
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt.npy"
        write_prompt(model, args.tokens, prompt)
        report = {
            **machine.stamp(),
            **measure(model, prompt, args.tokens, args.memory, args.turns),
        }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print({k: v for k, v in report.items() if k not in ("machine", "start", "turns")})


if __name__ == "__main__":
    main()
