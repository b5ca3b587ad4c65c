"""Rotary position embeddings: from configuration to inverse frequencies.

Default, linear, llama3 and YaRN, computed in float32 in the order of operations of Hugging
Face's ``modeling_rope_utils``, so that a frequency is within one unit in the last place of
theirs: at position 100 000 a larger difference would already show in the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tael.errors import TaelError
from tael.models.config import ModelConfig
from tael.models.spec import Rope


def rope(parameters: ModelConfig, head_dim: int) -> Rope:
    """The embedding over all ``head_dim`` channels that ``rope_parameters`` describe."""
    rope_type = parameters.text("rope_type", parameters.text("type", "default"))
    if any(isinstance(value, Mapping) for value in parameters.values.values()):
        raise TaelError(
            f"{parameters.file_name} has one RoPE per layer type, which Tael does "
            "not support for this model family; use another model."
        )
    if parameters.number("partial_rotary_factor", 1.0) != 1.0:
        parameters.refuse("partial_rotary_factor")
    if parameters.integer("rotary_dim", head_dim) != head_dim:
        parameters.refuse("rotary_dim")
    if rope_type not in _SCALINGS:
        raise TaelError(
            f"{parameters.file_name} asks for RoPE scaling {rope_type[:60]!r}; Tael has "
            f"{', '.join(_SCALINGS)}. Use another model."
        )
    inv_freq, attention_factor = _SCALINGS[rope_type](parameters, head_dim)
    factors = parameters.values.get("freq_factors")
    if factors is not None:  # GGUF stores what llama3 scaling divides by
        if factors.shape != inv_freq.shape:
            raise TaelError(
                f"{parameters.file_name} has {factors.size} RoPE factors for heads of "
                f"{head_dim} channels; the file may be damaged."
            )
        inv_freq = inv_freq / factors
    return Rope(tuple(inv_freq.tolist()), attention_factor)


def rope_parameters(config: ModelConfig) -> ModelConfig:
    """The RoPE settings of a model with one kind of layer: ``rope_parameters``, or, before
    transformers 5, ``rope_theta`` beside ``rope_scaling``."""
    inherited = {
        "rope_theta": config.number("rope_theta", 10000.0),
        "partial_rotary_factor": config.values.get("partial_rotary_factor"),
        "rotary_dim": config.values.get("rotary_dim"),
        "max_position_embeddings": config.values.get("max_position_embeddings"),
    }
    own = config.section("rope_scaling") or config.section("rope_parameters")
    return ModelConfig({**inherited, **own}, config.file_name)


def context_length(config: ModelConfig) -> int:
    """Tokens that the model can hold. Qwen's instructions turn YaRN on by adding
    ``rope_scaling`` and leave ``max_position_embeddings`` at the length before it."""
    length = config.integer("max_position_embeddings", maximum=2**30)
    parameters = rope_parameters(config)
    if parameters.values.get("rope_type", parameters.values.get("type")) == "yarn":
        original = parameters.integer("original_max_position_embeddings", 1, maximum=2**30)
        length = max(length, int(original * parameters.number("factor", 1.0)))
    return length


Float32 = NDArray[np.float32]


def _powers(parameters: ModelConfig, head_dim: int) -> Float32:
    """theta ** (2 i / head_dim), rounded once (numpy's float32 power is not)."""
    theta = parameters.number("rope_theta")
    if theta <= 1.0:
        raise TaelError(
            f"{parameters.file_name} says rope_theta is {theta}; it must be above 1. "
            "The file may be damaged."
        )
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (theta ** exponents.astype(np.float64)).astype(np.float32)


def _default(parameters: ModelConfig, head_dim: int) -> tuple[Float32, float]:
    return 1.0 / _powers(parameters, head_dim), 1.0


def _linear(parameters: ModelConfig, head_dim: int) -> tuple[Float32, float]:
    return 1.0 / _powers(parameters, head_dim) / np.float32(parameters.number("factor")), 1.0


def _llama3(parameters: ModelConfig, head_dim: int) -> tuple[Float32, float]:
    """Llama 3.1: long wavelengths are divided by ``factor``, short ones kept, the rest blended."""
    factor = parameters.number("factor")
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if low >= high:
        raise TaelError(
            f"{parameters.file_name} says low_freq_factor is {low} and "
            f"high_freq_factor {high}; the file may be damaged."
        )
    original = _original_length(parameters)
    inv_freq = 1.0 / _powers(parameters, head_dim)
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > original / low, inv_freq / factor, blended)
    return np.where(wavelength < original / high, inv_freq, scaled), 1.0


def _yarn(parameters: ModelConfig, head_dim: int) -> tuple[Float32, float]:
    """YaRN (arXiv:2309.00071): pairs that turn often are kept, pairs that turn less than once
    over the original context are interpolated, a linear ramp between."""
    original = _original_length(parameters)
    factor = parameters.number("factor", parameters.number("max_position_embeddings") / original)
    theta = parameters.number("rope_theta")

    def pair_that_turns(num_turns: float) -> float:
        return head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    powers = _powers(parameters, head_dim)
    low = pair_that_turns(parameters.number("beta_fast", 32.0))
    high = pair_that_turns(parameters.number("beta_slow", 1.0))
    if parameters.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    kept = 1 - ramp
    inv_freq = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
    return inv_freq.astype(np.float32), _yarn_attention_factor(parameters, factor)


def _yarn_attention_factor(parameters: ModelConfig, factor: float) -> float:
    if parameters.is_set("attention_factor"):
        return parameters.number("attention_factor")

    def mscale(multiplier: float) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.values.get("mscale") and parameters.values.get("mscale_all_dim"):
        return mscale(parameters.number("mscale")) / mscale(parameters.number("mscale_all_dim"))
    return mscale(1.0)


def _original_length(parameters: ModelConfig) -> int:
    """The context before scaling, in tokens."""
    name = "original_max_position_embeddings"
    fallback: Any = parameters.values.get("max_position_embeddings")
    return parameters.integer(name, fallback, maximum=2**30)


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
