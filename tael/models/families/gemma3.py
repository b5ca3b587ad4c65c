"""Gemma 3 (text): most layers slide with a RoPE of their own, norms before and after each half
of a layer and over the heads of q and k, scaled embeddings."""

from __future__ import annotations

from tael.loader.checkpoint import Checkpoint
from tael.models.config import ModelConfig
from tael.models.rope import rope
from tael.models.spec import Attention, Dense, LayerSpec, ModelSpec
from tael.models.tensor_names import LAYER_NAMES, with_sources

# Published multimodal configs leave out what equals the defaults of transformers' Gemma3TextConfig.
HF_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
NAMES = {
    **LAYER_NAMES,
    "mixer_post_norm": ("post_attention_layernorm", "post_attention_norm"),
    "ffn_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "ffn_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}


def read(config: ModelConfig, checkpoint: Checkpoint) -> ModelSpec:
    is_gguf = checkpoint.format == "gguf"
    if not is_gguf:  # the text part of a multimodal model is nested
        given = {k: v for k, v in config.values.items() if v is not None}
        config = ModelConfig(
            {**HF_DEFAULTS, **given, **config.section("text_config")}, config.file_name
        )
    config.refuse("attention_bias", "attn_logit_softcapping", "final_logit_softcapping")
    num_heads, num_kv_heads, head_dim = config.heads()
    num_layers, hidden_size = config.num_layers(), config.integer("hidden_size")
    # GGUF does not store it; llama.cpp (src/models/gemma3.cpp) tells the 27B by its 62 layers.
    scalar = hidden_size // num_heads if is_gguf and num_layers == 62 else head_dim
    scale = config.number("query_pre_attn_scalar", scalar) ** -0.5
    global_rope, local_rope = (rope(p, head_dim) for p in rope_parameters(config))

    def layer(window: int | None) -> LayerSpec:
        return LayerSpec(
            mixer=Attention(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                rope=local_rope if window else global_rope,
                scale=scale,
                window=window,
                qk_norm=True,
            ),
            ffn=Dense(
                config.integer("intermediate_size"),
                config.activation("hidden_activation", "gelu_pytorch_tanh"),
            ),
            post_norms=True,
        )

    spec = ModelSpec(
        family="gemma3",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        layers=tuple(layer(window) for window in windows(config, num_layers)),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        max_position_embeddings=config.integer("max_position_embeddings", maximum=2**30),
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        embedding_scale=hidden_size**0.5,
    )
    # Hugging Face's layer computes x * (1 + weight); GGUF stores 1 + weight.
    norm_offset = 0.0 if is_gguf else 1.0
    return with_sources(spec, checkpoint, layer_names=NAMES, norm_offset=norm_offset)


def windows(config: ModelConfig, num_layers: int) -> tuple[int | None, ...]:
    """Every sixth layer sees everything; a GGUF without a window has no sliding layers."""
    if not config.is_set("sliding_window"):
        return config.windows(None, [False] * num_layers)
    pattern = config.integer("sliding_window_pattern", 6)
    window = config.integer("sliding_window", maximum=2**30)
    return config.windows(window, [(i + 1) % pattern != 0 for i in range(num_layers)])


def rope_parameters(config: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """RoPE settings of global and of sliding layers: nested by layer type since transformers 5,
    before that flat, with the scaling for global layers only."""
    nested = ModelConfig(config.section("rope_parameters"), config.file_name)
    shared = {
        "max_position_embeddings": config.values.get("max_position_embeddings"),
        "rotary_dim": config.values.get("rotary_dim"),
    }
    full = {
        **shared,
        "rope_theta": config.number("rope_theta", 1_000_000.0),
        **nested.section("full_attention"),
        **config.section("rope_scaling"),
    }
    local = {
        **shared,
        "rope_theta": config.number("rope_local_base_freq", 10_000.0),
        **nested.section("sliding_attention"),
    }
    return ModelConfig(full, config.file_name), ModelConfig(local, config.file_name)
