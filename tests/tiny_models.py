"""Tiny random models, and how to run one through a backend in any chunking.

Blocks are scattered over the pool, and those behind a window are taken away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from random_weights import random_rows
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tael.backends.base import Backend, ForwardBatch
from tael.backends.cpu.backend import CPUBackend
from tael.config import BLOCK_SIZE, SchedulerConfig
from tael.loader.checkpoint import Checkpoint
from tael.loader.tile_file import open_tile_file, write_tile_file
from tael.models.spec import ModelSpec, cache_groups

NUM_TOKENS = 107  # three blocks and a part of a fourth
WINDOW = 24
CHUNKS = [1, 40, 5, 33, 20, 1, 1, 1, 1, 1, 1, 1, 1]
assert sum(CHUNKS) == NUM_TOKENS

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA = {**SIZES, "num_hidden_layers": 7, "head_dim": 32, "sliding_window": WINDOW}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with as many kv heads": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "llama with one kv head": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "llama with wide heads": LlamaConfig(**SIZES, head_dim=32),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with llama3 rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama with linear rope": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama with yarn rope": LlamaConfig(**SIZES, rope_parameters=YARN),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "mistral without a window": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 with yarn rope": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen2 sliding": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=24),
    "gemma3 with linear rope": Gemma3TextConfig(**GEMMA, rope_parameters=GEMMA_ROPE),
}


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that matter: transformers starts with zero biases, norms of one and scores so
    small that attention hardly depends on them."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim == 2:
            parameter.data = noise * (1.5 / parameter.shape[1] ** 0.5)
        else:
            parameter.data += noise * (0.2 if "norm" in name else 0.5)
    return model.eval()


def transformers_logits(model: PreTrainedModel, token_ids: NDArray[np.int32]) -> NDArray[Any]:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(token_ids).long()[None]).logits[0].numpy()


def run(
    spec: ModelSpec,
    backend: Backend,
    sequences: list[NDArray[np.int32]],
    chunks: list[list[int]],
) -> list[NDArray[np.float32]]:
    """The logits of every token of each sequence; step i computes chunk i of all of them."""
    num_tokens = max(len(tokens) for tokens in sequences)
    pages = [Pages(spec, s, len(sequences), num_tokens) for s in range(len(sequences))]
    backend.bind_kv(
        [
            np.zeros((pages[0].num_blocks, group.block_bytes), np.uint8)
            for group in cache_groups(spec, BLOCK_SIZE)
        ]
    )
    outputs: list[list[NDArray[np.float32]]] = [[] for _ in sequences]
    starts = [0] * len(sequences)
    for sizes in zip(*chunks, strict=True):
        spans = [np.arange(a, a + n, dtype=np.int32) for a, n in zip(starts, sizes, strict=True)]
        positions = np.concatenate(spans)
        query_start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        tables = [p.tables(span) for p, span in zip(pages, spans, strict=True)]
        logits = backend.forward(
            ForwardBatch(
                token_ids=np.concatenate(
                    [tokens[span] for tokens, span in zip(sequences, spans, strict=True)]
                ),
                positions=positions,
                query_start=query_start,
                block_tables=tuple(np.stack(rows) for rows in zip(*tables, strict=True)),
                logits_indices=np.arange(len(positions), dtype=np.int32)[::-1],
                temperatures=np.ones(len(positions), np.float32),
                full_logits=np.ones(len(positions), np.bool_),
            )
        ).logits[::-1]
        for s, output in enumerate(outputs):
            output.append(logits[query_start[s] : query_start[s + 1]].copy())
        starts = [a + n for a, n in zip(starts, sizes, strict=True)]
    return [np.concatenate(output) for output in outputs]


class Pages:
    """The block tables of one of several sequences."""

    def __init__(self, spec: ModelSpec, sequence: int, num_sequences: int, num_tokens: int) -> None:
        self.groups = cache_groups(spec, BLOCK_SIZE)
        self.length = -(-num_tokens // BLOCK_SIZE)
        self.num_blocks = self.length * num_sequences
        shuffled = np.random.default_rng(2).permutation(self.num_blocks).astype(np.int32)
        self.blocks = shuffled[sequence::num_sequences]

    def tables(self, positions: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """One row per group, -1 where no query at ``positions`` looks."""
        rows = []
        for group in self.groups:
            row = self.blocks.copy()
            row[positions[-1] // BLOCK_SIZE + 1 :] = -1
            if group.window is not None:
                row[: max(0, positions[0] - group.window + 1) // BLOCK_SIZE] = -1
            rows.append(row)
        return rows


def cpu_backend(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    num_threads: int = 2,
    max_tokens: int = 256,
) -> CPUBackend:
    """Ready for steps of ``max_tokens`` that want the logits of all of them."""
    write_tile_file(folder / "weights.tael", checkpoint, spec)
    backend = CPUBackend(spec, open_tile_file(folder / "weights.tael"), num_threads)
    backend.reserve(SchedulerConfig(max_tokens, max_tokens), max_model_len=2048)
    return backend


def divergence(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> NDArray[np.float64]:
    """Kullback-Leibler divergence per row, in nats."""
    log_p, log_q = log_softmax(expected), log_softmax(actual)
    divergences: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return divergences


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def write_gguf(path: Path, model: PreTrainedModel, dtype: type[np.floating[Any]]) -> None:
    """What llama.cpp's converter makes of ``model``, which takes on the rounding of ``dtype``."""
    config = model.config
    architecture = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if rope.get("rope_type") == "llama3":
        plain = 10000.0 ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        writer.add_tensor("rope_freqs.weight", (plain / scaled).astype(np.float32))

    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])

    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers
    )
    for name, parameter in model.named_parameters():  # tied weights come once
        if parameter.ndim == 2:
            parameter.data = torch.from_numpy(parameter.numpy(force=True).astype(dtype)).float()
        values = parameter.numpy(force=True).copy()
        if architecture == "gemma3" and name.endswith("norm.weight"):
            values += 1
        for role, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if architecture == "llama" and role in name:
                halves = values.reshape(getattr(config, heads), 2, -1, values.shape[-1])
                values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        stored = values.astype(dtype) if values.ndim == 2 else values
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_quantized_gguf(path: Path, format_name: str, seed: int = 0) -> None:
    """A Llama whose matrices are random blocks of one format."""
    hidden, intermediate, heads, kv_heads, vocab = 256, 512, 8, 2, 320
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    kv = hidden // heads * kv_heads
    matrices = {"token_embd": (vocab, hidden), "output": (vocab, hidden)}
    vectors = {"output_norm": hidden}
    for i in range(2):
        matrices |= {
            f"blk.{i}.attn_q": (hidden, hidden),
            f"blk.{i}.attn_k": (kv, hidden),
            f"blk.{i}.attn_v": (kv, hidden),
            f"blk.{i}.attn_output": (hidden, hidden),
            f"blk.{i}.ffn_gate": (intermediate, hidden),
            f"blk.{i}.ffn_up": (intermediate, hidden),
            f"blk.{i}.ffn_down": (hidden, intermediate),
        }
        vectors |= {f"blk.{i}.attn_norm": hidden, f"blk.{i}.ffn_norm": hidden}
    rng = np.random.default_rng(seed)
    for name, size in vectors.items():
        weights = 1 + 0.2 * rng.standard_normal(size)
        writer.add_tensor(f"{name}.weight", weights.astype(np.float32))
    for i, (name, (rows, columns)) in enumerate(matrices.items()):
        raw = random_rows(format_name, rows, columns, seed=seed + i, std=columns**-0.5)
        raw_dtype = gguf.GGMLQuantizationType[format_name]
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
