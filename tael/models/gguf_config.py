"""GGUF metadata under Hugging Face's names, so that a family reads one kind of configuration.

Meanings are those of llama.cpp: its ``src/llama-model.cpp`` reads these keys, and
``conversion/base.py`` writes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tael.errors import TaelError
from tael.loader.checkpoint import Checkpoint
from tael.quant.dequantize import dequantize

NAMES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "expert_count": "num_local_experts",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "v_head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.dimension_count": "rotary_dim",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
}
"""After the architecture's name and a dot."""

ROPE_NAMES = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_log_multiplier": "mscale_all_dim",
    "finetuned": "finetuned",
}
"""After ``rope.scaling.``; they become ``rope_scaling``."""


def gguf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The contents of a ``config.json`` that says what the metadata and tensors of a GGUF say."""
    metadata = checkpoint.metadata
    file_name = checkpoint.files[0].name
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise TaelError(f"{file_name} names no general.architecture; it may be damaged.")

    config: dict[str, Any] = {"model_type": architecture}
    for key, name in NAMES.items():
        config[name] = _plain(metadata.get(f"{architecture}.{key}"))
    config["use_bidirectional_attention"] = (
        metadata.get(f"{architecture}.attention.causal", True) is not True
    )
    config["tie_word_embeddings"] = "output.weight" not in checkpoint.tensors
    if "token_embd.weight" in checkpoint.tensors:  # few files have a vocab_size
        config["vocab_size"] = checkpoint.tensors["token_embd.weight"].shape[0]

    prefix = f"{architecture}.rope.scaling."
    scaling: dict[str, Any] = {}
    for key, value in metadata.items():
        if key.startswith(prefix):
            name = ROPE_NAMES.get(key.removeprefix(prefix), "")
            if not name:
                raise TaelError(
                    f"{file_name} has {key}, which Tael does not know; use another "
                    "file of this model."
                )
            scaling[name] = _plain(value)
    if scaling.get("rope_type") == "none":
        scaling = {}
    elif "factor" in scaling:
        scaling = {"rope_type": "linear", "mscale": 1.0} | scaling
    if "rope_freqs.weight" in checkpoint.tensors:
        info = checkpoint.tensors["rope_freqs.weight"]
        raw = checkpoint.read_rows(info.name, 0, 1)
        factors = dequantize(info.type, raw, info.shape[-1])[0]
        if not ((factors > 1e-6) & (factors < 1e6)).all():
            raise TaelError(
                f"{file_name} has RoPE factors that are not positive; it may be damaged."
            )
        scaling["freq_factors"] = factors
    config["rope_scaling"] = scaling
    return config


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value
