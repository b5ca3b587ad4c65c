"""Kullback-Leibler divergence of Tael, and of llama.cpp, from transformers in float32.

All three read the same GGUF file; transformers computes with its dequantised weights. For every
position of the second half of each chunk: KLD of the predicted distributions, and whether the
most likely token is the same. llama.cpp is given the same base through the file format of its
``llama-perplexity --kl-divergence``, and its output is parsed; Tael's figures are computed with
the same formula from the same 16-bit base.

    python benchmarks/kld.py MODEL.gguf [--llama-perplexity PATH] [--output results/kld.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np

CONTEXT = 512


def evaluation_text() -> str:
    """Prose and code that every Python installation carries."""
    modules = ("statistics", "textwrap", "heapq", "fractions", "calendar")
    return "\n".join(Path(__import__(name).__file__).read_text() for name in modules)


def reference_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """float32 [num_chunks, CONTEXT, vocab_size] of transformers on the dequantised file."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return np.stack([model(torch.tensor(c[None].astype(np.int64))).logits[0] for c in tokens])


def tael_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    from tael.backends.base import ForwardBatch
    from tael.backends.cpu.backend import CPUBackend
    from tael.config import BLOCK_SIZE, SchedulerConfig
    from tael.loader.prepared import load_prepared
    from tael.memory.kv_store import KVStore
    from tael.models.spec import cache_groups

    step = 64
    model = load_prepared(path)
    backend = CPUBackend(model.spec, model.weights)
    backend.reserve(SchedulerConfig(max_num_seqs=step, max_num_batched_tokens=step), CONTEXT)
    groups = cache_groups(model.spec, BLOCK_SIZE)
    num_blocks = CONTEXT // BLOCK_SIZE
    store = KVStore(groups, [num_blocks] * len(groups))
    backend.bind_kv(store.pools)
    table = np.arange(num_blocks, dtype=np.int32)[None]
    logits = np.empty((*tokens.shape, model.spec.vocab_size), np.float32)
    for c, chunk in enumerate(tokens):
        for start in range(0, CONTEXT, step):
            positions = np.arange(start, start + step, dtype=np.int32)
            logits[c, positions] = backend.forward(
                ForwardBatch(
                    token_ids=chunk[positions].astype(np.int32),
                    positions=positions,
                    query_start=np.array([0, step], np.int32),
                    block_tables=(table,) * len(groups),
                    logits_indices=np.arange(step, dtype=np.int32),
                    temperatures=np.ones(step, np.float32),
                    full_logits=np.ones(step, np.bool_),
                )
            ).logits
    return logits


def compressed(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """llama-perplexity's 16-bit log-probabilities: (scale, floor, uint16 values) per row."""
    top = logits.max(-1, keepdims=True)
    floor = np.maximum(logits.min(-1, keepdims=True), top - 16)
    log_sum = np.log(np.exp(logits - top, dtype=np.float64).sum(-1, keepdims=True))
    scale = ((top - floor) / 65535).astype(np.float32)
    values = np.rint(np.maximum(logits - floor, 0) / scale).astype(np.uint16)
    return scale, (floor - top - log_sum).astype(np.float32), values


def write_base(path: Path, tokens: np.ndarray, logits: np.ndarray) -> None:
    """The file of ``--kl-divergence-base``."""
    num_chunks, context = tokens.shape
    vocab_size = logits.shape[-1]
    with open(path, "wb") as file:
        file.write(b"_logits_" + struct.pack("<Iii", context, vocab_size, num_chunks))
        file.write(tokens.astype("<i4").tobytes())
        for chunk in logits[:, context // 2 : context - 1]:
            for scale, floor, values in zip(*compressed(chunk), strict=True):
                odd = b"\0\0" * (vocab_size % 2)
                file.write(scale.tobytes() + floor.tobytes() + values.tobytes() + odd)


def divergence(base: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, float]:
    """(KLD per position, share of equal most likely tokens) over the scored positions."""
    scored = slice(CONTEXT // 2, CONTEXT - 1)
    klds, same = [], []
    for b, o in zip(base[:, scored], other[:, scored], strict=True):
        scale, floor, values = compressed(b)
        log_p = scale * values.astype(np.float64) + floor
        top = o.max(-1, keepdims=True)
        log_q = o - (top + np.log(np.exp(o - top, dtype=np.float64).sum(-1, keepdims=True)))
        klds.append(np.where(log_p > -16, np.exp(log_p) * (log_p - log_q), 0).sum(-1))
        same.append(b.argmax(-1) == o.argmax(-1))
    return np.concatenate(klds), float(np.mean(same))


def llama_cpp(binary: Path, model: Path, base: Path) -> dict[str, float]:
    command = [binary, "-m", model, "--kl-divergence", "--kl-divergence-base", base]
    run = subprocess.run(
        [*map(str, command), "-t", "2", "-c", str(CONTEXT)], capture_output=True, text=True
    )
    output = run.stdout + run.stderr
    figures = {
        "mean_kld": r"Mean\s+KLD:\s+([-\d.]+)",
        "median_kld": r"Median\s+KLD:\s+([-\d.]+)",
        "p99_kld": r"99\.0%\s+KLD:\s+([-\d.]+)",
        "same_top": r"Same top p:\s+([\d.]+)",
    }
    found = {name: re.search(pattern, output) for name, pattern in figures.items()}
    if not all(found.values()):
        raise SystemExit(f"cannot read the output of {binary}:\n{output[-2000:]}")
    result = {name: float(match[1]) for name, match in found.items() if match}
    return {**result, "same_top": result["same_top"] / 100}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--llama-perplexity", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    from tael import __version__
    from tael.backends.cpu.backend import chosen_isa
    from tael.loader.prepared import load_prepared

    tokenizer = load_prepared(args.model).tokenizer
    ids = np.array(tokenizer.encode(evaluation_text(), add_special_tokens=False))
    tokens = ids[: args.chunks * CONTEXT].reshape(args.chunks, CONTEXT)
    if len(tokenizer.encode("")):  # llama-perplexity begins every chunk with bos, if there is one
        tokens[:, 0] = tokenizer.bos_token_id
    base = reference_logits(args.model, tokens)
    kld, same_top = divergence(base, tael_logits(args.model, tokens))
    result = {
        "model": args.model.name,
        "positions": len(kld),
        "python": platform.python_version(),
        "tael": {
            "version": __version__,
            "isa": chosen_isa(),
            "mean_kld": float(kld.mean()),
            "median_kld": float(statistics.median(kld)),
            "p99_kld": float(np.quantile(kld, 0.99)),
            "same_top": same_top,
        },
    }
    if args.llama_perplexity:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "base"
            write_base(file, tokens, base)
            result["llama.cpp"] = llama_cpp(args.llama_perplexity, args.model, file)
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
