"""Time to the first token of a long prompt: computed, and restored from disk by another process.

    python -m benchmarks.warm_prefix [--model qwen2.5-coder:0.5b] [--tokens 16384]

Every measurement is a process of its own, which loads the model first. The files are read past the
page cache. Two more processes decode one request while the prefix of another is stored or
restored, to show what that costs the first. Writes ``benchmarks/results/warm-prefix.json``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import machine
from tael import LLM, SamplingParams
from tael.backends.base import HeadOutput
from tael.engine.engine import Engine
from tael.loader.paths import cache_dir
from tael.loader.sources import resolve
from tael.request import TokenLogprobs

RESULTS = Path(__file__).with_name("results") / "warm-prefix.json"
NUM_OUTPUT_TOKENS = 8
NUM_DECODE_STEPS = 40


def prompt(engine: Engine, num_tokens: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    ids: list[int] = rng.integers(0, engine.spec.vocab_size, num_tokens).tolist()
    return ids


def first_token(llm: LLM, num_tokens: int) -> dict[str, Any]:
    """Answer the prompt. With a digest of all logits of every token of the answer."""
    engine = llm.engine
    digest = hashlib.sha256()
    sample, forward = engine._sample, engine.backend.forward

    def recording(
        key: str, head: HeadOutput, row: int, accepted: Sequence[int]
    ) -> tuple[int, TokenLogprobs | None]:
        digest.update(np.ascontiguousarray(head.logits[row]).data)
        return sample(key, head, row, accepted)

    engine._sample = recording  # type: ignore[method-assign]
    engine.backend.forward = lambda batch: forward(  # type: ignore[method-assign]
        replace(batch, full_logits=np.ones_like(batch.full_logits))
    )
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    output = llm.generate(prompt(engine, num_tokens), params)[0]
    start = time.perf_counter()
    llm.close()
    assert engine.tier is not None
    return {
        "time_to_first_token_s": round(output.usage.time_to_first_token_s, 3),
        "num_cached_tokens": output.usage.num_cached_tokens,
        "num_restored_tokens": output.usage.num_restored_tokens,
        "logits_sha256": digest.hexdigest(),
        "token_ids": output.outputs[0].token_ids,
        "store_s": round(time.perf_counter() - start, 3),
        "counters": asdict(engine.tier.counters),
    }


def beside(llm: LLM, num_tokens: int, is_busy: Callable[[Engine], bool]) -> dict[str, Any]:
    """Decode a request; after some steps, let a second one come, and time the steps of the first
    as long as the disk ``is_busy`` with the second."""
    engine = llm.engine
    assert engine.tier is not None
    params = SamplingParams(temperature=0, max_tokens=4096, ignore_eos=True)
    engine.add_request("decode", prompt(engine, 64, seed=1), params, speculation=False)
    for _ in range(8):
        engine.step()
    alone = [_timed(engine.step) for _ in range(NUM_DECODE_STEPS)]
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.add_request("other", prompt(engine, num_tokens), one, speculation=False)
    while not is_busy(engine):
        engine.step()
    busy = []
    while is_busy(engine):
        busy.append(_timed(engine.step))
    counters = asdict(engine.tier.counters)
    engine.abort("decode")
    llm.close()
    return {
        "alone_median_ms": round(median(alone), 2),
        "busy_median_ms": round(median(busy[:-1] or busy), 2),
        "num_busy_steps": len(busy),
        "counters": counters,
    }


def is_restoring(engine: Engine) -> bool:
    return bool(engine.tier and engine.tier._loads)


def is_storing(engine: Engine) -> bool:
    return bool(engine.tier and engine.tier._stores)


def _timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def child(model: Path, folder: Path, mode: str, num_tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.warm_prefix", "--model", str(model)]
    command += ["--tokens", str(num_tokens), "--child", mode, "--folder", str(folder)]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(run.stdout)
    return result


def measure(model: Path, num_tokens: int, num_rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        cold = child(model, Path(folder), "first-token", num_tokens)
        warm = [child(model, Path(folder), "first-token", num_tokens) for _ in range(num_rounds)]
        restoring = child(model, Path(folder), "restoring", num_tokens)
        (other := Path(folder) / "other").mkdir()
        storing = child(model, other, "storing", 4096)
    warm_s = median(run["time_to_first_token_s"] for run in warm)
    equal = {run["logits_sha256"] for run in warm} == {cold["logits_sha256"]}
    return {
        "model": model.name,
        "num_prompt_tokens": num_tokens,
        "cold_s": cold["time_to_first_token_s"],
        "restored_s": warm_s,
        "times_sooner": round(cold["time_to_first_token_s"] / warm_s, 1),
        "logits_bitwise_equal": equal,
        "decode_while_restoring": restoring,
        "decode_while_storing": storing,
        "cold": cold,
        "restored": warm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=["first-token", "restoring", "storing"])
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    model = resolve(args.model)
    if args.child:
        llm = LLM(
            str(model), memory=4 << 30, max_model_len=args.tokens + 64, kv_cache_dir=args.folder
        )
        runs: dict[str, Callable[[], dict[str, Any]]] = {
            "first-token": lambda: first_token(llm, args.tokens),
            "restoring": lambda: beside(llm, args.tokens, is_restoring),
            "storing": lambda: beside(llm, args.tokens, is_storing),
        }
        print(json.dumps(runs[args.child]()))
        return
    report = {
        **machine.stamp(),
        **measure(model, args.tokens, args.rounds),
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print({k: v for k, v in report.items() if k not in ("cold", "restored", "machine")})


if __name__ == "__main__":
    main()
