"""From configuration to ``ModelSpec``: what is read, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tael.errors import TaelError
from tael.loader.checkpoint import Checkpoint, TensorInfo
from tael.loader.weights import read_parameter, row_order
from tael.models.config import ModelConfig
from tael.models.registry import FAMILIES, read_spec
from tael.models.spec import ModelSpec, ParameterSource

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "sliding_window": 16,
}
GGUF_SIZES = {
    "embedding_length": 32,
    "feed_forward_length": 48,
    "block_count": 7,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,
    "attention.value_length": 8,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "context_length": 512,
    "rope.freq_base": 10000.0,
}


@dataclass
class FakeCheckpoint:
    """Names and shapes; tensors with values are float32."""

    format: str
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    values: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    files: tuple[Path, ...] = (Path("model.file"),)

    def add(self, name: str, values: NDArray[np.float32]) -> None:
        self.tensors[name] = TensorInfo(name, "F32", values.shape)
        self.values[name] = values

    def read_rows(self, name: str, start: int, count: int) -> NDArray[np.uint8]:
        values = self.values[name]
        rows = values.reshape(-1, values.shape[-1])[start : start + count]
        return np.ascontiguousarray(rows).view(np.uint8)


def with_tensors(checkpoint: FakeCheckpoint, **config: Any) -> FakeCheckpoint:
    """Give ``checkpoint`` the tensors that the family asks for, of the sizes in ``SIZES``."""
    read = FAMILIES[config["model_type"]]
    spec = read(ModelConfig({**SIZES, **config}, "config.json"), checkpoint)
    shapes = spec.parameters()
    for parameter, source in spec.sources:
        checkpoint.tensors[source.name] = TensorInfo(source.name, "F32", shapes[parameter])
    return checkpoint


def hf(model_type: str = "llama", **changes: Any) -> FakeCheckpoint:
    metadata = {**SIZES, "model_type": model_type, **changes}
    return with_tensors(FakeCheckpoint("hf", metadata), model_type=model_type)


def gguf(architecture: str = "llama", **changes: Any) -> FakeCheckpoint:
    """``changes``: metadata keys without the architecture, dots written as two underscores."""
    metadata = {"general.architecture": architecture}
    for key, value in {**GGUF_SIZES, **changes}.items():
        metadata[f"{architecture}.{key.replace('__', '.')}"] = value
    return with_tensors(
        FakeCheckpoint("gguf", metadata), model_type=architecture, tie_word_embeddings=True
    )


def names(spec: ModelSpec) -> dict[str, str]:
    return {parameter: source.name for parameter, source in spec.sources}


def windows(spec: ModelSpec) -> list[int | None]:
    return [layer.mixer.window for layer in spec.layers]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_reads_sizes(model_type: str) -> None:
    spec = read_spec(hf(model_type))
    attention = spec.layers[-1].mixer
    assert (spec.vocab_size, spec.hidden_size, len(spec.layers)) == (96, 32, 7)
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4, 2, 8)
    assert spec.layers[0].ffn.intermediate_size == 48
    assert (spec.norm_eps, spec.max_position_embeddings) == (1e-5, 512)
    assert [parameter for parameter, _ in spec.sources] == list(spec.parameters())


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_gguf_says_the_same_as_hf(architecture: str) -> None:
    from_gguf = read_spec(gguf(architecture, attention__sliding_window=16))
    from_hf = read_spec(
        hf(architecture, tie_word_embeddings=True, query_pre_attn_scalar=8, rope_theta=10000.0)
    )
    assert from_gguf.layers == from_hf.layers
    assert from_gguf.parameters() == from_hf.parameters()
    assert from_gguf.embedding_scale == from_hf.embedding_scale
    assert names(from_gguf)["layers.3.q_proj.weight"] == "blk.3.attn_q.weight"
    assert names(from_hf)["layers.3.q_proj.weight"] == "model.layers.3.self_attn.q_proj.weight"


def test_only_gguf_llama_is_interleaved() -> None:
    sources = dict(read_spec(gguf("llama")).sources)
    assert sources["layers.0.q_proj.weight"].interleaved_heads == 4
    assert sources["layers.0.k_proj.weight"].interleaved_heads == 2
    assert sources["layers.0.v_proj.weight"].interleaved_heads == 0
    for checkpoint in (hf("llama"), gguf("qwen2"), gguf("qwen3"), gguf("gemma3")):
        assert not any(source.interleaved_heads for _, source in read_spec(checkpoint).sources)


def test_gemma_stores_norms_minus_one_in_hf() -> None:
    offsets = {name: source.offset for name, source in read_spec(hf("gemma3_text")).sources}
    norms = [name for name in offsets if name.endswith("norm.weight")]
    assert len(norms) == 7 * 6 + 1
    assert all(offset == (name in norms) for name, offset in offsets.items())
    assert not any(source.offset for _, source in read_spec(gguf("gemma3")).sources)


def test_windows() -> None:
    assert windows(read_spec(hf("llama"))) == [None] * 7
    assert windows(read_spec(hf("mistral"))) == [16] * 7
    assert windows(read_spec(hf("mistral", sliding_window=None))) == [None] * 7
    for model_type in ("qwen2", "qwen3"):
        assert windows(read_spec(hf(model_type))) == [None] * 7
        sliding = hf(model_type, use_sliding_window=True, max_window_layers=5)
        assert windows(read_spec(sliding)) == [None] * 5 + [16, 16]
    listed = ["full_attention", "sliding_attention"] * 3 + ["full_attention"]
    sliding = hf("qwen3", use_sliding_window=True, layer_types=listed)
    assert windows(read_spec(sliding)) == [None, 16] * 3 + [None]

    pattern: list[int | None] = [16, 16, 16, 16, 16, None, 16]
    assert windows(read_spec(hf("gemma3_text"))) == pattern
    assert windows(read_spec(hf("gemma3_text", layer_types=listed))) == [None, 16] * 3 + [None]
    assert windows(read_spec(gguf("gemma3", attention__sliding_window=16))) == pattern
    assert windows(read_spec(gguf("gemma3"))) == [None] * 7


def test_gemma_rope_old_and_new() -> None:
    old = read_spec(
        hf(
            "gemma3_text",
            rope_theta=5e5,
            rope_local_base_freq=2e4,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        )
    )
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    local = {"rope_type": "default", "rope_theta": 2e4}
    nested = {"full_attention": full, "sliding_attention": local}
    assert read_spec(hf("gemma3_text", rope_parameters=nested)).layers == old.layers
    sliding, whole = old.layers[0].mixer.rope.inv_freq, old.layers[5].mixer.rope.inv_freq
    np.testing.assert_allclose(sliding, [2e4 ** (-i / 4) for i in range(4)], rtol=1e-6)
    np.testing.assert_allclose(whole, [5e5 ** (-i / 4) / 8 for i in range(4)], rtol=1e-6)


def test_gemma_attention_scale() -> None:
    scale = read_spec(hf("gemma3_text", query_pre_attn_scalar=168)).layers[0].mixer.scale
    assert scale == 168**-0.5
    assert read_spec(hf("gemma3_text")).layers[0].mixer.scale == 256**-0.5
    assert read_spec(gguf("gemma3")).layers[0].mixer.scale == 8**-0.5


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_part_of_a_multimodal_gemma(prefix: str) -> None:
    text = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    checkpoint = FakeCheckpoint("hf", {"model_type": "gemma3", "text_config": text})
    embed = f"{prefix}embed_tokens.weight"
    checkpoint.tensors[embed] = TensorInfo(embed, "F32", (262208, 32))
    sizes = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
    with_tensors(checkpoint, model_type="gemma3", head_dim=256, **sizes)
    vision = "vision_tower.vision_model.encoder.layers.0.layer_norm1.bias"
    checkpoint.tensors[vision] = TensorInfo(vision, "F32", (8,))
    spec = read_spec(checkpoint)
    assert names(spec)["layers.0.q_norm.weight"] == f"{prefix}layers.0.self_attn.q_norm.weight"
    assert spec.tie_word_embeddings and spec.max_position_embeddings == 131072
    assert windows(spec)[:6] == [4096] * 5 + [None]


def test_tied_embeddings() -> None:
    assert read_spec(gguf()).tie_word_embeddings
    untied = gguf()
    untied.tensors["output.weight"] = TensorInfo("output.weight", "F32", (96, 32))
    assert names(read_spec(untied))["lm_head.weight"] == "output.weight"
    assert names(read_spec(hf()))["lm_head.weight"] == "lm_head.weight"
    assert "lm_head.weight" not in names(read_spec(hf(tie_word_embeddings=True)))


def test_gguf_rope_factors() -> None:
    checkpoint = gguf()
    plain = read_spec(checkpoint).layers[0].mixer.rope
    checkpoint.add("rope_freqs.weight", np.array([1, 2, 4, 8], np.float32))
    divided = read_spec(checkpoint).layers[0].mixer.rope
    expected = np.array(plain.inv_freq, np.float32) / np.array([1, 2, 4, 8], np.float32)
    assert divided.inv_freq == tuple(expected.tolist())


def test_gguf_rope_scaling() -> None:
    yarn = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 128,
        "rope__scaling__yarn_log_multiplier": 1.0,
    }
    settings = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    assert read_spec(gguf(**yarn)).layers == read_spec(hf(rope_scaling=settings)).layers
    plain = read_spec(gguf()).layers
    assert read_spec(gguf(rope__scaling__type="none", rope__scaling__factor=4.0)).layers == plain
    linear = read_spec(hf(rope_scaling={"rope_type": "linear", "factor": 4.0})).layers
    assert read_spec(gguf(rope__scaling__factor=4.0)).layers == linear != plain


HOSTILE: dict[str, tuple[Callable[[], FakeCheckpoint], str]] = {
    "unknown type": (
        lambda: FakeCheckpoint("hf", {**SIZES, "model_type": "mamba"}),
        "type 'mamba'; Tael runs llama, mistral, qwen2, qwen3, gemma3",
    ),
    "no type": (lambda: FakeCheckpoint("hf", SIZES), "no model_type"),
    "unknown architecture": (
        lambda: FakeCheckpoint("gguf", {"general.architecture": "rwkv"}),
        "type 'rwkv'",
    ),
    "architecture of a wrong type": (
        lambda: FakeCheckpoint("gguf", {"general.architecture": 7}),
        "no general.architecture",
    ),
    "no metadata": (lambda: FakeCheckpoint("gguf", {}), "no general.architecture"),
    "quantised": (lambda: hf(quantization_config={"quant_method": "awq"}), "quantization_config"),
    "biases": (lambda: hf(attention_bias=True), "attention_bias"),
    "ffn biases": (lambda: hf(mlp_bias=True), "mlp_bias"),
    "biases of qwen3": (lambda: hf("qwen3", attention_bias=True), "attention_bias"),
    "experts": (lambda: gguf(expert_count=8), "num_local_experts"),
    "soft cap": (lambda: gguf("gemma3", final_logit_softcapping=30.0), "final_logit_softcapping"),
    "not causal": (lambda: gguf(attention__causal=False), "use_bidirectional_attention"),
    "both directions": (
        lambda: hf("gemma3_text", use_bidirectional_attention=True),
        "use_bidirectional_attention",
    ),
    "activation": (lambda: hf(hidden_act="relu"), "hidden_act is 'relu'"),
    "odd heads": (lambda: hf(head_dim=7), "7 channels"),
    "heads of no size": (
        lambda: hf(head_dim=None, num_attention_heads=5, num_key_value_heads=5),
        "a divisor of hidden_size",
    ),
    "kv heads": (lambda: hf(num_key_value_heads=3), "a divisor of 4"),
    "values of another size": (lambda: gguf(attention__value_length=16), "v_head_dim"),
    "partial rotary": (lambda: gguf(rope__dimension_count=4), "rotary_dim"),
    "head counts by layer": (
        lambda: gguf(attention__head_count_kv=np.array([2, 2], np.int32)),
        r"num_key_value_heads is \[2, 2\]",
    ),
    "unknown rope": (lambda: gguf(rope__scaling__type="longrope"), "'longrope'"),
    "unknown rope key": (lambda: gguf(rope__scaling__attn_factor=1.2), "attn_factor"),
    "layer types": (
        lambda: hf("gemma3_text", layer_types=["full_attention"] * 6 + ["linear"]),
        "a list of",
    ),
    "layer types of a wrong length": (
        lambda: hf("gemma3_text", layer_types=["full_attention"]),
        "of length 7",
    ),
    "layer types not a list": (
        lambda: hf("gemma3_text", layer_types={"0": "full_attention"}),
        "a list of",
    ),
    "sliding without a window": (
        lambda: hf("qwen2", layer_types=["sliding_attention"] * 7),
        "sliding_window",
    ),
    "text part of a wrong type": (lambda: hf("gemma3", text_config=[1]), "text_config"),
}


@pytest.mark.parametrize(("checkpoint", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_refuses(checkpoint: Callable[[], FakeCheckpoint], message: str) -> None:
    with pytest.raises(TaelError, match=message) as error:
        read_spec(checkpoint())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [-1, 0, 2**31, 1.5, float("nan"), float("inf"), "32", True, [4]])
@pytest.mark.parametrize("key", sorted(set(SIZES) - {"rms_norm_eps"}))
def test_refuses_sizes(key: str, value: Any) -> None:
    with pytest.raises(TaelError, match=key):
        read_spec(hf("gemma3_text", **{key: value}))


@pytest.mark.parametrize("value", [-1e-5, 0, float("nan"), float("inf"), 10**400, "1e-5", True])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "query_pre_attn_scalar"])
def test_refuses_numbers(key: str, value: Any) -> None:
    with pytest.raises(TaelError, match=key):
        read_spec(hf("gemma3_text", **{key: value}))


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers"])
def test_refuses_what_is_missing(key: str) -> None:
    with pytest.raises(TaelError, match=f"no {key}"):
        read_spec(hf(**{key: None}))


def test_tensors_are_checked() -> None:
    checkpoint = hf()
    name = "model.layers.6.mlp.down_proj.weight"
    info = checkpoint.tensors[name]
    checkpoint.tensors[name] = TensorInfo(name, "F32", info.shape[::-1])
    with pytest.raises(TaelError, match=f"{name} has shape"):
        read_spec(checkpoint)
    del checkpoint.tensors[name]
    with pytest.raises(TaelError, match=f"{name} is missing from model.file"):
        read_spec(checkpoint)

    checkpoint = hf()
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    checkpoint.tensors[frequencies] = TensorInfo(frequencies, "F32", (4,))
    read_spec(checkpoint)
    bias = "model.layers.0.self_attn.q_proj.bias"
    checkpoint.tensors[bias] = TensorInfo(bias, "F32", (32,))
    with pytest.raises(TaelError, match=f"{bias} has no place"):
        read_spec(checkpoint)


def test_row_order_undoes_the_permutation_of_llama_cpp() -> None:
    rows = np.arange(32)
    # LlamaModel.permute in llama.cpp's conversion/llama.py, for 4 heads
    stored = rows.reshape(4, 2, 4).swapaxes(1, 2).reshape(-1)
    order = row_order(ParameterSource("q", interleaved_heads=4), 32)
    assert order is not None and stored[order].tolist() == rows.tolist()
    assert row_order(ParameterSource("v"), 32) is None


def test_read_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 32), np.float32)
    checkpoint: Checkpoint = (llama := gguf())
    llama.add("blk.2.attn_q.weight", weight.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32))
    monkeypatch.setattr("tael.loader.weights.CHUNK_ELEMENTS", 96)  # three rows at a time
    read = read_parameter(checkpoint, read_spec(checkpoint), "layers.2.q_proj.weight")
    np.testing.assert_array_equal(read, weight)

    gemma = hf("gemma3_text")
    gemma.add("model.norm.weight", weight[0])
    read = read_parameter(gemma, read_spec(gemma), "norm.weight")
    np.testing.assert_array_equal(read, weight[0] + 1)
