"""One matrix product after the other, Tael and llama.cpp in turn: every weight type of the four
models, for one token up to a prefill.

    python -m benchmarks.kernels [--rounds 5] [--output benchmarks/results/kernels.json]

Both sides read many copies of a matrix, so that one token's weights come from memory and not from
a cache, and both round the activations to int8 within the time. llama.cpp may use its plain kernels
or those for repacked weights: the faster are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks.peers import ggml, llama_cpp
from tael import _native
from tael.backends.cpu.backend import chosen_isa
from tael.loader.tile_file import ALIGNMENT
from tael.quant.formats import FORMATS
from tests.random_weights import random_rows

SHAPES = ((4864, 896), (896, 4864), (8960, 1536), (1536, 8960))
"""(rows, columns) of the feed-forward layers of Qwen2.5 0.5B and 1.5B."""

NUM_TOKENS = (1, 2, 4, 8, 16, 32, 128, 512)
FROM_MEMORY = 32
"""Tokens up to which the weights should come from memory: above, arithmetic takes the time."""

CACHES_BYTES = 64 << 20
"""Twice the last level of cache."""

PAUSE_S = 0.05
"""After which llama.cpp's threads have stopped to spin."""

PASSES_S = 0.05
"""How long a side warms up, and then runs: passes of 3 ms vary by half, their threads are new."""


def matrices(name: str, raw: NDArray[np.uint8], columns: int, count: int) -> list[_native.Matrix]:
    """Copies of one matrix, each in memory of its own."""
    rows = len(raw)
    num_bytes = _native.num_tiles(rows) * _native.tile_bytes(name, columns)
    copies = [_aligned(num_bytes) for _ in range(count)]
    _native.repack(name, raw, columns, copies[0])
    for copy in copies[1:]:
        copy[:] = copies[0]
    return [_native.Matrix(name, rows, columns, copy) for copy in copies]


def _aligned(num_bytes: int) -> NDArray[np.uint8]:
    """At a multiple of 64, as in the file of a prepared model."""
    buffer = np.empty(num_bytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + num_bytes]


def measure_cell(
    name: str, raw: NDArray[np.uint8], x: NDArray[np.float32], num_rounds: int, num_threads: int
) -> dict[str, Any]:
    """Median microseconds of one product, and the median ratio."""
    count = max(2, CACHES_BYTES // raw.nbytes if len(x) <= FROM_MEMORY else 0)
    own = matrices(name, raw, x.shape[1], count)
    peers = ggml.products(name, raw, x, count, num_threads)
    seconds: list[tuple[float, float]] = []
    best = min(peers, key=lambda products: products.run(PASSES_S))
    for i in range(num_rounds):
        pair = {}
        for side in ("tael", "llama.cpp") if i % 2 else ("llama.cpp", "tael"):
            time.sleep(PAUSE_S)
            if side == "tael":
                pair[side] = _native.time_matmul(own, x, chosen_isa(), num_threads, PASSES_S)
            else:
                pair[side] = best.run(PASSES_S)
        seconds.append((pair["tael"], pair["llama.cpp"]))
    for products in peers:
        products.close()
    return {
        "type": name,
        "rows": len(raw),
        "columns": x.shape[1],
        "num_tokens": len(x),
        "tael_us": round(1e6 * median(tael for tael, _ in seconds) / count, 1),
        "llama.cpp_us": round(1e6 * median(peer for _, peer in seconds) / count, 1),
        "llama.cpp_kernels": best.kernels,
        "ratio": round(median(peer / tael for tael, peer in seconds), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--types", default=",".join(ggml.TYPES))
    parser.add_argument("--tokens", default=",".join(map(str, NUM_TOKENS)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    limits = machine.QuietMachine(args.threads)
    measured_limits, cells = [], []
    for name in args.types.split(","):
        for rows, columns in SHAPES:
            if columns % FORMATS[name].block_elements:
                continue
            raw = random_rows(name, rows, columns, std=columns**-0.5)
            measured_limits.append(limits())
            for num_tokens in map(int, args.tokens.split(",")):
                x = np.random.default_rng(0).standard_normal((num_tokens, columns), np.float32)
                cells.append(measure_cell(name, raw, x, args.rounds, args.threads))
                print(cells[-1], flush=True)
    report = {
        "date": machine.today(),
        "machine": machine.machine(),
        "versions": machine.versions() | {llama_cpp.NAME: llama_cpp.VERSION},
        "rounds": args.rounds,
        "limits": machine.middle(measured_limits),
        "cells": cells,
    }
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
