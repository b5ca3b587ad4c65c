"""Both backends give the logits of transformers (float32, eager) on tiny random models.

Every model is computed three ways: in one chunk; in chunks of odd sizes and single tokens; and
beside a second sequence.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import (
    CHUNKS,
    CONFIGS,
    GEMMA,
    NUM_TOKENS,
    SIZES,
    cpu_backend,
    divergence,
    random_model,
    randomised,
    run,
    transformers_logits,
    write_gguf,
    write_quantized_gguf,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
    Qwen2Config,
)

from tael.backends.base import Backend
from tael.backends.reference import ReferenceBackend
from tael.config import RopeScaling
from tael.loader.checkpoint import Checkpoint
from tael.loader.gguf import GGUFCheckpoint
from tael.loader.safetensors import SafetensorsCheckpoint
from tael.models.extension import scaled
from tael.models.families import qwen2
from tael.models.registry import read_spec
from tael.models.spec import ModelSpec
from tael.quant.formats import FORMATS

TOLERANCE = 2e-4
"""Of a logit, for the reference."""
MAX_DIVERGENCE = 1e-3
"""Nats per token (mean), for the cpu backend."""

MAX_DIVERGENCES = {
    **dict.fromkeys(("F32", "F16", "BF16"), 1e-5),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"), 3e-4),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), 4e-4),
}
"""The same by weight format, on matrices that neither shrink nor grow their input."""

LONG = 250
"""Tokens, of a model that was trained with 64."""

Tokens: TypeAlias = NDArray[np.int32]
Logits: TypeAlias = NDArray[np.float32]


@pytest.mark.parametrize("name", CONFIGS)
def test_family(name: str, tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    model.save_pretrained(tmp_path)
    check(SafetensorsCheckpoint(tmp_path), model, tmp_path)


def test_bf16_in_shards(tmp_path: Path) -> None:
    model = random_model(CONFIGS["gemma3"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert len(checkpoint.files) > 2
    assert {info.type for info in checkpoint.tensors.values()} == {"BF16"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    check(checkpoint, loaded.eval(), tmp_path)


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
    check(SafetensorsCheckpoint(tmp_path), model, tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama tied",
        "llama with llama3 rope",
        "qwen2",
        "qwen2 with yarn rope",
        "qwen3",
        "gemma3",
    ],
)
def test_gguf(name: str, dtype: type[np.floating[Any]], tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    if name == "gemma3":  # GGUF has no place for query_pre_attn_scalar
        model = random_model(Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=GEMMA["head_dim"]))
    path = tmp_path / "model.gguf"
    write_gguf(path, model, dtype)
    check(GGUFCheckpoint(path), model, tmp_path)


@pytest.mark.parametrize("scaling", ["yarn", "yarn:3.9", "dynamic", "dynamic:2"])
def test_beyond_the_trained_length(scaling: str, tmp_path: Path) -> None:
    """A plain model, extended on request, is the one whose configuration asks for it."""
    kind, factor = (parsed := RopeScaling.parse(scaling)).kind, parsed.factor
    extension = replace(qwen2.EXTENSION, rope_theta=1e4, original_length=64, max_length=256)
    parameters = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    parameters["factor"] = factor or (LONG / 64 if kind == "yarn" else 1.0)
    sizes = {**SIZES, "max_position_embeddings": 64}
    plain = random_model(Qwen2Config(**sizes))
    plain.save_pretrained(tmp_path)
    expected_model = random_model(Qwen2Config(**sizes, rope_parameters=parameters))
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], LONG, dtype=np.int32)
    expected = transformers_logits(expected_model, tokens)
    assert np.abs(expected - transformers_logits(plain, tokens))[64:].max() > 0.1

    checkpoint = SafetensorsCheckpoint(tmp_path)
    spec = scaled(read_spec(checkpoint), extension, parsed, LONG)
    logits = run(spec, ReferenceBackend(spec, checkpoint), [tokens], [[LONG]])[0]
    assert np.abs(logits - expected).max() < TOLERANCE
    cpu = cpu_backend(spec, checkpoint, tmp_path)
    whole = run(spec, cpu, [tokens], [[LONG]])[0]
    assert divergence(expected, whole).mean() < MAX_DIVERGENCE
    pieces = run(spec, cpu, [tokens], [[1, 63, 1, 60, LONG - 126, 1]])[0]
    np.testing.assert_array_equal(pieces, whole)


def check(checkpoint: Checkpoint, model: PreTrainedModel, folder: Path) -> None:
    spec = read_spec(checkpoint)
    rng = np.random.default_rng(1)
    first = rng.integers(0, spec.vocab_size, NUM_TOKENS, dtype=np.int32)
    second = rng.integers(0, spec.vocab_size, NUM_TOKENS, dtype=np.int32)
    expected = [transformers_logits(model, tokens) for tokens in (first, second)]
    assert np.abs(expected[0]).max() > 1  # else the tolerance says nothing

    reference = ReferenceBackend(spec, checkpoint)
    for logits, right in three_ways(spec, reference, first, second, expected):
        assert np.abs(logits - right).max() < TOLERANCE

    cpu = cpu_backend(spec, checkpoint, folder)
    ways = three_ways(spec, cpu, first, second, expected)
    for logits, right in ways:
        assert divergence(right, logits).mean() < MAX_DIVERGENCE
    for logits, _ in ways[1:3]:
        np.testing.assert_array_equal(logits, ways[0][0])


def three_ways(
    spec: ModelSpec,
    backend: Backend,
    first: Tokens,
    second: Tokens,
    expected: list[Logits],
) -> list[tuple[Logits, Logits]]:
    """(logits, what they should be): whole, in chunks, and both sequences side by side."""
    beside = run(spec, backend, [first, second], [CHUNKS, CHUNKS[::-1]])
    return [
        (run(spec, backend, [first], [[NUM_TOKENS]])[0], expected[0]),
        (run(spec, backend, [first], [CHUNKS])[0], expected[0]),
        (beside[0], expected[0]),
        (beside[1], expected[1]),
    ]


@pytest.mark.parametrize("format_name", FORMATS)
def test_weight_format(format_name: str, isa: str, tmp_path: Path) -> None:
    """On matrices of each format the cpu backend stays close to the reference: KV in bf16 costs
    little, activations in int8 more."""
    path = tmp_path / "model.gguf"
    write_quantized_gguf(path, format_name)
    checkpoint = GGUFCheckpoint(path)
    spec = read_spec(checkpoint)
    tokens = np.random.default_rng(1).integers(0, spec.vocab_size, NUM_TOKENS, dtype=np.int32)
    expected = run(spec, ReferenceBackend(spec, checkpoint), [tokens], [[NUM_TOKENS]])[0]
    assert expected.std() > 0.5  # else a divergence says nothing
    backend = cpu_backend(spec, checkpoint, tmp_path)
    whole = run(spec, backend, [tokens], [[NUM_TOKENS]])[0]
    assert divergence(expected, whole).mean() < MAX_DIVERGENCES[format_name]
    np.testing.assert_array_equal(run(spec, backend, [tokens], [CHUNKS])[0], whole)
