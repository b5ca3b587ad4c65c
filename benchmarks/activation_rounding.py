"""What each rounding on the way costs: divergence of the reference backend with one or more of its
values rounded as a kernel might, from itself in float32.

    python benchmarks/activation_rounding.py MODEL.gguf [--output results/activation-rounding.json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import kld
import numpy as np

from tael.backends.base import ForwardBatch
from tael.backends.reference import backend as reference
from tael.backends.reference.kv_cache import KVCache
from tael.config import BLOCK_SIZE
from tael.loader.prepared import load_prepared, open_checkpoint
from tael.models.registry import read_spec

Round = Callable[[np.ndarray], np.ndarray]


def exact(x: np.ndarray) -> np.ndarray:
    return x


def int8(group: int) -> Round:
    """Int8 with one scale per ``group`` columns."""

    def rounded(x: np.ndarray) -> np.ndarray:
        groups = x.reshape(-1, group)
        scale = np.abs(groups).max(-1, keepdims=True) / 127
        scale[scale == 0] = 1
        return (np.rint(groups / scale) * scale).astype(np.float32).reshape(x.shape)

    return rounded


def two_terms(x: np.ndarray) -> np.ndarray:
    first = int8(32)(x)
    return first + int8(32)(x - first)


def bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def f16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


CASES: dict[str, tuple[Round, Round, Round]] = {
    # what is rounded: inputs of the layers' matrices, input of the head, KV
    "KV in bf16": (exact, exact, bf16),
    "KV in f16": (exact, exact, f16),
    "head in int8, 32 columns": (exact, int8(32), exact),
    "head in two int8 terms": (exact, two_terms, exact),
    "layers in int8, 16 columns": (int8(16), exact, exact),
    "layers in int8, 32 columns": (int8(32), exact, exact),
    "layers in int8, 64 columns": (int8(64), exact, exact),
    "layers and head in int8, 32 columns; KV in bf16": (int8(32), int8(32), bf16),
    "the same, head in two terms: the cpu backend": (int8(32), two_terms, bf16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    ids = load_prepared(args.model).tokenizer.encode(kld.evaluation_text())
    tokens = np.array(ids[: args.chunks * kld.CONTEXT], np.int32).reshape(-1, kld.CONTEXT)
    checkpoint = open_checkpoint(args.model)
    spec = read_spec(checkpoint)
    backend = reference.ReferenceBackend(spec, checkpoint)
    linear, write = reference.linear, KVCache.write
    num_blocks = kld.CONTEXT // BLOCK_SIZE
    num_groups = len({layer.mixer.window for layer in spec.layers})

    def logits(layers: Round, head: Round, kv: Round) -> np.ndarray:
        def rounded_linear(x: np.ndarray, weight: np.ndarray, *bias: np.ndarray) -> np.ndarray:
            round_input = head if len(weight) == spec.vocab_size else layers
            return linear(round_input(x), weight, *bias)

        reference.linear = rounded_linear
        KVCache.write = lambda self, layer, table, positions, k, v: write(
            self, layer, table, positions, kv(k), kv(v)
        )
        rows = []
        for chunk in tokens:
            backend.bind_kv([np.zeros((num_blocks, 1), np.uint8)] * num_groups)
            rows.append(
                backend.forward(
                    ForwardBatch(
                        token_ids=chunk,
                        positions=np.arange(kld.CONTEXT, dtype=np.int32),
                        query_start=np.array([0, kld.CONTEXT], np.int32),
                        block_tables=(np.arange(num_blocks, dtype=np.int32)[None],) * num_groups,
                        logits_indices=np.arange(kld.CONTEXT, dtype=np.int32),
                        temperatures=np.ones(kld.CONTEXT, np.float32),
                        full_logits=np.ones(kld.CONTEXT, np.bool_),
                    )
                ).logits
            )
        return np.stack(rows)

    base = logits(exact, exact, exact)
    cases = {}
    for name, case in CASES.items():
        divergences, same_top = kld.divergence(base, logits(*case))
        cases[name] = {"mean_kld": float(divergences.mean()), "same_top": same_top}
        print(name, cases[name], flush=True)
    if args.output:
        result = {"model": args.model.name, "positions": len(divergences), "cases": cases}
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
