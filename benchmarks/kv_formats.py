"""What compressed KV changes in the predictions behind a context, beside KV in bf16.

    python -m benchmarks.kv_formats [--models NAME,...] [--tokens 4096] [--scored 512]

The last tokens of a text of code and prose are forced one by one; for each, the Kullback-Leibler
divergence of the distribution from that with KV in bf16 and whether the most likely token is the
same. Nothing is timed. Writes ``benchmarks/results/kv-formats.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks.cases import MODELS
from tael import LLM
from tael.config import BLOCK_SIZE, KV_FORMATS
from tael.evals.context.teacher import forced_logprobs

RESULTS = Path(__file__).with_name("results") / "kv-formats.json"
MODULES = ("statistics", "textwrap", "heapq", "fractions", "calendar", "argparse", "inspect", "ast")


def text() -> str:
    """That every Python installation carries."""
    return "\n".join(Path(__import__(name).__file__ or "").read_text() for name in MODULES)


def logprobs(
    model: str, kv_format: str, num_tokens: int, num_scored: int
) -> tuple[NDArray[np.float32], int]:
    """[num_scored, vocab_size], and the bytes of a token."""
    with LLM(model, kv_format=kv_format, max_model_len=num_tokens, max_num_seqs=1) as llm:
        ids = llm.engine.tokenizer.encode(text())[:num_tokens]
        assert len(ids) == num_tokens
        block_bytes = sum(group.block_bytes for group in llm.engine.manager.groups)
        rows = forced_logprobs(llm.engine, ids, num_tokens - num_scored)
        return rows, block_bytes // BLOCK_SIZE


def measure(model: str, num_tokens: int, num_scored: int) -> dict[str, Any]:
    exact, exact_bytes = logprobs(model, "bf16", num_tokens, num_scored)
    formats: dict[str, Any] = {"bf16": {"bytes_per_token": exact_bytes}}
    for kv_format in KV_FORMATS[1:]:
        rows, num_bytes = logprobs(model, kv_format, num_tokens, num_scored)
        log_p = exact.astype(np.float64)
        klds = (np.exp(log_p) * (log_p - rows)).sum(axis=1)
        formats[kv_format] = {
            "bytes_per_token": num_bytes,
            "mean_kld": round(float(klds.mean()), 6),
            "p99_kld": round(float(np.quantile(klds, 0.99)), 5),
            "same_top": round(float((exact.argmax(1) == rows.argmax(1)).mean()), 4),
        }
    return {"model": model, "num_tokens": num_tokens, "num_scored": num_scored, "formats": formats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="catalogue names or paths")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--scored", type=int, default=512)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    report: dict[str, Any] = {**machine.stamp(), "results": []}
    for model in args.models.split(","):
        report["results"].append(measure(model, args.tokens, args.scored))
        print(json.dumps(report["results"][-1]), flush=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
