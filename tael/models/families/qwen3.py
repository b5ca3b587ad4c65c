"""Qwen 3 (dense): Qwen 2 with a norm over each head of q and k in place of the biases."""

from __future__ import annotations

from dataclasses import replace

from tael.loader.checkpoint import Checkpoint
from tael.models.config import ModelConfig
from tael.models.families import qwen2
from tael.models.families.qwen2 import windows
from tael.models.rope import context_length, rope, rope_parameters
from tael.models.spec import Attention, Dense, LayerSpec, ModelSpec
from tael.models.tensor_names import with_sources

# As Qwen 2; its configurations count 8,192 tokens of answer on top of the training's length
# ("Enabling Long Context" in Qwen's documentation).
EXTENSION = replace(qwen2.EXTENSION, native_lengths=(32_768, 40_960))


def read(config: ModelConfig, checkpoint: Checkpoint) -> ModelSpec:
    config.refuse("attention_bias")
    num_heads, num_kv_heads, head_dim = config.heads(head_dim=128)
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope(rope_parameters(config), head_dim),
        scale=head_dim**-0.5,
        qk_norm=True,
    )
    ffn = Dense(config.integer("intermediate_size"), config.activation("hidden_act", "silu"))
    spec = ModelSpec(
        family="qwen3",
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=tuple(LayerSpec(replace(attention, window=w), ffn) for w in windows(config)),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        max_position_embeddings=context_length(config),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
    )
    return with_sources(spec, checkpoint)
