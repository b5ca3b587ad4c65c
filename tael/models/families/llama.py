"""Llama (SmolLM2, Llama 2 and 3) and Mistral: the plain decoder that other families vary."""

from __future__ import annotations

from tael.loader.checkpoint import Checkpoint
from tael.models.config import ModelConfig
from tael.models.rope import context_length, rope, rope_parameters
from tael.models.spec import Attention, Dense, LayerSpec, ModelSpec
from tael.models.tensor_names import with_sources


def read(config: ModelConfig, checkpoint: Checkpoint) -> ModelSpec:
    config.refuse("attention_bias", "mlp_bias", "num_local_experts")
    num_heads, num_kv_heads, head_dim = config.heads()
    # Only Mistral slides (v0.1), and only where the key is set. GGUF calls Mistral "llama"
    # and has no window, as llama.cpp does not apply one.
    slides = config.text("model_type") == "mistral" and config.is_set("sliding_window")
    layer = LayerSpec(
        mixer=Attention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope(rope_parameters(config), head_dim),
            scale=head_dim**-0.5,
            window=config.integer("sliding_window", maximum=2**30) if slides else None,
        ),
        ffn=Dense(config.integer("intermediate_size"), config.activation("hidden_act", "silu")),
    )
    spec = ModelSpec(
        family="llama",
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        layers=(layer,) * config.num_layers(),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        max_position_embeddings=context_length(config),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
    )
    # llama.cpp rotates adjacent channels in this architecture, so its converter permutes q and k.
    interleaved = {"q_proj": num_heads, "k_proj": num_kv_heads}
    is_gguf = checkpoint.format == "gguf"
    return with_sources(spec, checkpoint, interleaved_heads=interleaved if is_gguf else None)
