"""Where each parameter lies: Hugging Face and GGUF tensor names.

GGUF names are those of ``gguf-py/gguf/constants.py``, Hugging Face names those of the plain
decoder (Llama). A family passes its own table where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tael.loader.checkpoint import Checkpoint
from tael.models.spec import ModelSpec, ParameterSource

Names = Mapping[str, tuple[str, str]]

MODEL_NAMES: Names = {
    "embed_tokens": ("embed_tokens", "token_embd"),
    "norm": ("norm", "output_norm"),
}
LAYER_NAMES: Names = {
    "mixer_norm": ("input_layernorm", "attn_norm"),
    "q_proj": ("self_attn.q_proj", "attn_q"),
    "k_proj": ("self_attn.k_proj", "attn_k"),
    "v_proj": ("self_attn.v_proj", "attn_v"),
    "o_proj": ("self_attn.o_proj", "attn_output"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
    "gate_proj": ("mlp.gate_proj", "ffn_gate"),
    "up_proj": ("mlp.up_proj", "ffn_up"),
    "down_proj": ("mlp.down_proj", "ffn_down"),
}
"""Role -> (Hugging Face, GGUF), without ``.weight`` or ``.bias``."""

HF_PREFIXES = {
    "model.": "",
    "": "",
    "language_model.model.": "language_model.",
    "model.language_model.": "",
}
"""What precedes the decoder's names, and then ``lm_head``: in a causal model, in a bare decoder,
and in the text part of a multimodal model (as published, and by transformers' module names)."""


def with_sources(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    *,
    layer_names: Names = LAYER_NAMES,
    interleaved_heads: Mapping[str, int] | None = None,
    norm_offset: float = 0.0,
) -> ModelSpec:
    """``spec`` with the source of every parameter.

    ``interleaved_heads`` (role -> heads) and ``norm_offset`` fill the fields of
    ``ParameterSource`` for the roles concerned.
    """
    interleaved_heads = interleaved_heads or {}
    is_gguf = checkpoint.format == "gguf"
    prefix = "" if is_gguf else hf_prefix(checkpoint)

    def source(parameter: str) -> ParameterSource:
        path, suffix = parameter.rsplit(".", 1)
        *layer, role = path.split(".")
        if role == "lm_head":
            name = "output" if is_gguf else HF_PREFIXES[prefix] + "lm_head"
        elif layer:
            start = f"blk.{layer[1]}." if is_gguf else f"{prefix}layers.{layer[1]}."
            name = start + layer_names[role][is_gguf]
        else:
            name = prefix + MODEL_NAMES[role][is_gguf]
        offset = norm_offset if role.endswith("norm") else 0.0
        return ParameterSource(f"{name}.{suffix}", interleaved_heads.get(role, 0), offset)

    return replace(spec, sources=tuple((name, source(name)) for name in spec.parameters()))


def hf_prefix(checkpoint: Checkpoint) -> str:
    """The key of ``HF_PREFIXES`` that fits a checkpoint."""
    for prefix in HF_PREFIXES:
        if f"{prefix}embed_tokens.weight" in checkpoint.tensors:
            return prefix
    return "model."
