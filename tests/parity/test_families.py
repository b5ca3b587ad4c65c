"""The reference gives the logits of transformers (float32, eager) on tiny random models.

Every model is computed three ways: in one chunk; in chunks of odd sizes and single tokens; and
beside a second sequence. Blocks are scattered over the pool, and those behind a window are
taken away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tael.backends.base import ForwardBatch
from tael.backends.reference import ReferenceBackend
from tael.config import BLOCK_SIZE
from tael.loader.checkpoint import Checkpoint
from tael.loader.gguf import GGUFCheckpoint
from tael.loader.safetensors import SafetensorsCheckpoint
from tael.models.registry import read_spec
from tael.models.spec import ModelSpec, cache_groups

TOLERANCE = 2e-4
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
    "qwen2 sliding": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=24),
    "gemma3 with linear rope": Gemma3TextConfig(**GEMMA, rope_parameters=GEMMA_ROPE),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_family(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    model.save_pretrained(tmp_path)
    check(SafetensorsCheckpoint(tmp_path), model)


def test_bf16_in_shards(tmp_path: Path) -> None:
    model = random_model(CONFIGS["gemma3"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert len(checkpoint.files) > 2
    assert {info.type for info in checkpoint.tensors.values()} == {"BF16"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    check(checkpoint, loaded.eval())


def test_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {key: value for key, value in GEMMA.items() if key != "attn_implementation"}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = randomised(
        Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    )
    model.save_pretrained(tmp_path)
    check(SafetensorsCheckpoint(tmp_path), model)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "name", ["llama", "llama tied", "llama with llama3 rope", "qwen2", "qwen3", "gemma3"]
)
def test_gguf(name: str, dtype: type[np.floating[Any]], tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    if name == "gemma3":  # GGUF has no place for query_pre_attn_scalar
        model = random_model(Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=GEMMA["head_dim"]))
    path = tmp_path / "model.gguf"
    write_gguf(path, model, dtype)
    check(GGUFCheckpoint(path), model)


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


def check(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    spec = read_spec(checkpoint)
    rng = np.random.default_rng(1)
    first = rng.integers(0, spec.vocab_size, NUM_TOKENS, dtype=np.int32)
    second = rng.integers(0, spec.vocab_size, NUM_TOKENS, dtype=np.int32)
    expected = [transformers_logits(model, tokens) for tokens in (first, second)]
    assert np.abs(expected[0]).max() > 1  # else the tolerance says nothing

    backend = ReferenceBackend(spec, checkpoint)
    whole = run(backend, [first], [[NUM_TOKENS]])
    chunked = run(backend, [first], [CHUNKS])
    beside = run(backend, [first, second], [CHUNKS, CHUNKS[::-1]])
    for ours, reference in [
        (whole[0], expected[0]),
        (chunked[0], expected[0]),
        (beside[0], expected[0]),
        (beside[1], expected[1]),
    ]:
        assert np.abs(ours - reference).max() < TOLERANCE


def transformers_logits(model: PreTrainedModel, token_ids: NDArray[np.int32]) -> NDArray[Any]:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(token_ids).long()[None]).logits[0].numpy()


def run(
    backend: ReferenceBackend, sequences: list[NDArray[np.int32]], chunks: list[list[int]]
) -> list[NDArray[np.float32]]:
    """The logits of every token of each sequence; step i computes chunk i of all of them."""
    pages = [Pages(backend.spec, s, len(sequences)) for s in range(len(sequences))]
    pool_sizes = [pages[0].num_blocks] * len(cache_groups(backend.spec, BLOCK_SIZE))
    backend.bind_kv([np.zeros((size, 1), np.uint8) for size in pool_sizes])
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
            )
        )[::-1]
        for s, output in enumerate(outputs):
            output.append(logits[query_start[s] : query_start[s + 1]].copy())
        starts = [a + n for a, n in zip(starts, sizes, strict=True)]
    return [np.concatenate(output) for output in outputs]


class Pages:
    """The block tables of one of several sequences."""

    def __init__(self, spec: ModelSpec, sequence: int, num_sequences: int) -> None:
        self.groups = cache_groups(spec, BLOCK_SIZE)
        self.length = -(-NUM_TOKENS // BLOCK_SIZE)
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
