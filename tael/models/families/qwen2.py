"""Qwen 2 and 2.5: Llama with biases on q, k and v, and layers that may slide."""

from __future__ import annotations

from dataclasses import replace

from tael.loader.checkpoint import Checkpoint
from tael.models.config import ModelConfig
from tael.models.rope import context_length, rope, rope_parameters
from tael.models.spec import Attention, ContextExtension, Dense, LayerSpec, ModelSpec
from tael.models.tensor_names import with_sources

# The model cards of Qwen2 and Qwen2.5 ("Processing Long Texts") set YaRN with factor 4 and
# original_max_position_embeddings 32768. They vouch for the result from 7B on. Of "dynamic" they
# say nothing; it is there to compare with.
EXTENSION = ContextExtension(
    scalings=("yarn", "dynamic"),
    rope_theta=1_000_000.0,
    native_lengths=(32_768,),
    original_length=32_768,
    max_length=131_072,
)


def read(config: ModelConfig, checkpoint: Checkpoint) -> ModelSpec:
    num_heads, num_kv_heads, head_dim = config.heads()
    attention = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope(rope_parameters(config), head_dim),
        scale=head_dim**-0.5,
        qkv_bias=True,
    )
    ffn = Dense(config.integer("intermediate_size"), config.activation("hidden_act", "silu"))
    spec = ModelSpec(
        family="qwen2",
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=tuple(LayerSpec(replace(attention, window=w), ffn) for w in windows(config)),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        max_position_embeddings=context_length(config),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
    )
    return with_sources(spec, checkpoint)


def windows(config: ModelConfig) -> tuple[int | None, ...]:
    """The window of each layer: with ``use_sliding_window``, layers from ``max_window_layers``
    on slide."""
    num_layers = config.num_layers()
    if not config.flag("use_sliding_window"):
        return config.windows(None, [False] * num_layers)
    first = config.integer("max_window_layers", 28, minimum=0)
    window = config.integer("sliding_window", 4096, maximum=2**30)
    return config.windows(window, [i >= first for i in range(num_layers)])
