"""Decoding behind up to a million tokens, in one memory budget.

    python -m benchmarks.million_tokens [--tokens 1M] [--memory 3400MiB]

A model with the shape and the weight formats of one of the catalogue, its weights random: none of
them was trained for such lengths, and what a token costs does not depend on what it says. The
prompt is computed once, reading as little as a budget may say; then tokens are decoded behind its
beginnings, in turn. Writes ``benchmarks/results/million-tokens.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np

from benchmarks import machine
from tael import LLM, SamplingParams
from tael.backends.base import TieredBlocks
from tael.cli.common import byte_size, token_count
from tael.config import BLOCK_SIZE, MIN_BUDGET_BLOCKS
from tael.engine.engine import Engine
from tael.loader.sources import resolve
from tael.memory.process import peak_rss_bytes
from tests.random_weights import random_rows

RESULTS = Path(__file__).with_name("results") / "million-tokens.json"
SETTINGS: dict[str, Any] = {
    "kv_format": "q8",
    "kv_budget": 2048,
    "prefill_budget": MIN_BUDGET_BLOCKS * BLOCK_SIZE,
}
SHORTEST = 32768
NUM_STEPS = 32
"""Of a turn, timed..."""
NUM_WARM_UP_STEPS = 192
"""...after these, which bring in what the turns before it had pushed out."""


def write_random_model(like: Path, path: Path, max_position_embeddings: int) -> None:
    """A GGUF file with the metadata, shapes and types of another, and random weights."""
    reader = gguf.GGUFReader(like)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if name == f"{architecture}.context_length":
            value = max_position_embeddings
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type=element)
    for seed, tensor in enumerate(reader.tensors):
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, np.array(tensor.data))
            continue
        columns, rows = map(int, tensor.shape)
        kind = tensor.tensor_type
        raw = random_rows(kind.name, rows, columns, seed=seed, std=columns**-0.5)
        writer.add_tensor(tensor.name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def begin(engine: Engine, prompt: list[int], num_tokens: int) -> float:
    """Seconds until the first token of an answer."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    start = time.perf_counter()
    engine.add_request("x", prompt, params)
    while not any(delta.token_ids for delta in engine.step()):
        pass
    return time.perf_counter() - start


def decode(engine: Engine, tiered: TieredBlocks, num_steps: int) -> tuple[float, float]:
    """Milliseconds a token, and the share of what the tokens read that was not in memory."""
    before, start = dict(tiered.counters), time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    milliseconds = 1000 * (time.perf_counter() - start) / num_steps
    num_loads, num_hits = (
        tiered.counters[name] - before[name] for name in ("num_loads", "num_hits")
    )
    return milliseconds, num_loads / (num_loads + num_hits)


def measure(model: Path, num_tokens: int, memory_bytes: int, num_rounds: int) -> dict[str, Any]:
    depths = [SHORTEST << i for i in range(20) if SHORTEST << i <= num_tokens]
    with LLM(
        str(model),
        memory=memory_bytes,
        kv_disk="16GiB",
        max_model_len=depths[-1] + NUM_WARM_UP_STEPS + 2 * NUM_STEPS,
        max_num_seqs=1,
        speculation=False,
        **SETTINGS,
    ) as llm:
        engine = llm.engine
        tiered = engine.kv_store.tiered
        assert tiered is not None
        rng = np.random.default_rng(0)
        prompt = rng.integers(0, engine.spec.vocab_size, depths[-1]).tolist()
        rows: dict[int, dict[str, Any]] = {}
        for depth in depths:
            seconds = begin(engine, prompt[:depth], 1)
            rows[depth] = {"prefill_s": round(seconds, 1), "peak_rss_bytes": peak_rss_bytes()}
            print(depth, rows[depth], flush=True)
        times: dict[int, list[float]] = {depth: [] for depth in depths}
        loads: dict[int, list[float]] = {depth: [] for depth in depths}
        for i in range(num_rounds):
            for depth in depths[:: -1 if i % 2 else 1]:
                begin(engine, prompt[:depth], NUM_WARM_UP_STEPS + NUM_STEPS + 1)
                decode(engine, tiered, NUM_WARM_UP_STEPS)
                milliseconds, share = decode(engine, tiered, NUM_STEPS)
                times[depth].append(milliseconds)
                loads[depth].append(share)
        for depth in depths:
            rows[depth] |= {
                "decode_ms": round(median(times[depth]), 3),
                "decode_ms_of_rounds": [round(ms, 3) for ms in times[depth]],
                "ratio_to_shortest": round(
                    median(a / b for a, b in zip(times[depth], times[SHORTEST], strict=True)), 3
                ),
                "share_from_disk": round(median(loads[depth]), 3),
                "kv_bytes": depth * sum(g.payload_bytes for g in engine.manager.groups) // 32,
            }
        return {
            "settings": SETTINGS,
            "memory_bytes": engine.memory_bytes,
            "kv_memory_bytes": engine.kv_store.num_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "depths": {str(depth): row for depth, row in rows.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--like", default="qwen2.5-coder:0.5b")
    parser.add_argument("--tokens", type=token_count, default=1 << 20)
    parser.add_argument("--memory", type=byte_size, default=byte_size("3400MiB"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    like = resolve(args.like)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # the prepared model and the KV go with it
        path = Path(folder) / "random.gguf"
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            # Not here: the peak of this process is measured.
            executor.submit(write_random_model, like, path, args.tokens + 1024).result()
        report = {
            **machine.stamp(),
            "like": like.stem,
            **measure(path, args.tokens, args.memory, args.rounds),
        }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(report, file=sys.stderr)


if __name__ == "__main__":
    main()
