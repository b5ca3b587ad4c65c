"""Inverse frequencies equal those of transformers.

Not bit by bit: torch's float32 power is off by one unit in the last place for one exponent in
two hundred, ours is rounded correctly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tael.backends.reference.layers import rotary
from tael.errors import TaelError
from tael.models.config import ModelConfig
from tael.models.rope import context_length, rope, rope_parameters
from tael.models.spec import Rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "llama3": LLAMA3,
    "llama3 of 3.2": {**LLAMA3, "factor": 32.0},
    "yarn": YARN,
    "yarn with its own factor": {**YARN, "attention_factor": 0.5},
    "yarn of DeepSeek": {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn with betas": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn with a sharp ramp": {**YARN, "truncate": False},
    "yarn with a short context": {**YARN, "original_max_position_embeddings": 64},
}


def our_config(**values: Any) -> ModelConfig:
    return ModelConfig({"max_position_embeddings": 131072, **values}, "config.json")


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, head_dim: int, theta: float) -> None:
    parameters = {**CASES[case], "rope_theta": theta}
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters=dict(parameters)
    )
    expected = LlamaRotaryEmbedding(config)
    ours = rope(rope_parameters(our_config(rope_parameters=parameters)), head_dim)
    assert ours.attention_factor == expected.attention_scaling
    inv_freq = np.array(ours.inv_freq, np.float32)
    assert tuple(inv_freq.tolist()) == ours.inv_freq  # they are float32 values
    # Where llama3 starts to blend it subtracts nearly equal numbers.
    max_ulp = 16 if case.startswith("llama3") else 1
    np.testing.assert_array_max_ulp(inv_freq, expected.inv_freq.numpy(), maxulp=max_ulp)


def test_settings_before_transformers_5() -> None:
    old = our_config(rope_theta=5e5, rope_scaling={**LLAMA3, "type": "linear"})
    new = our_config(rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert rope(rope_parameters(old), 64) == rope(rope_parameters(new), 64)
    unnamed = our_config(rope_scaling={"type": "linear", "factor": 2})
    halved = tuple(f / 2 for f in rope(rope_parameters(our_config()), 64).inv_freq)
    assert rope(rope_parameters(unnamed), 64).inv_freq == halved


def test_gguf_factors_divide() -> None:
    factors = np.linspace(1, 32, 32, dtype=np.float32)
    plain = rope(rope_parameters(our_config()), 64)
    ours = rope(rope_parameters(our_config(rope_scaling={"freq_factors": factors})), 64)
    np.testing.assert_array_equal(
        np.array(ours.inv_freq, np.float32), np.float32(plain.inv_freq) / factors
    )


def test_rotary_turns_the_first_channels() -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 10), np.float32)
    positions = np.array([0, 5, 100], np.int32)
    turned = rotary(x, positions, Rope((1.0, 0.1, 0.01), attention_factor=2.0))
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
    pairs = x[..., :3] + 1j * x[..., 3:6]
    pairs = pairs * 2 * np.exp(1j * positions[:, None, None] * np.array([1.0, 0.1, 0.01]))
    np.testing.assert_allclose(turned[..., :3], pairs.real, atol=1e-5)
    np.testing.assert_allclose(turned[..., 3:6], pairs.imag, atol=1e-5)


def test_yarn_extends_the_context() -> None:
    qwen = our_config(max_position_embeddings=32768, rope_scaling={**YARN, "factor": 4.0})
    assert context_length(qwen) == 131072
    already = our_config(max_position_embeddings=131072, rope_scaling={**YARN, "factor": 2.0})
    assert context_length(already) == 131072
    assert context_length(our_config(rope_scaling=LLAMA3)) == 131072


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope"},
        {"rope_type": 3},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": float("nan")},
        {"rope_type": "linear", "factor": 1e300},
        {**LLAMA3, "low_freq_factor": 4.0},
        {**LLAMA3, "original_max_position_embeddings": -1},
        {**YARN, "attention_factor": -1.0},
        {**YARN, "beta_fast": "32"},
        {"rope_theta": 1.0},
        {"rope_theta": None, "full_attention": {"rope_theta": 1e6}},
        {"partial_rotary_factor": 0.5},
        {"rotary_dim": 32},
        {"freq_factors": np.ones(31, np.float32)},
        [],
        "yarn",
    ],
    ids=str,
)
def test_refuses(parameters: Any) -> None:
    with pytest.raises(TaelError) as error:
        rope(rope_parameters(our_config(rope_scaling=parameters or {"rope_type": []})), 64)
    assert "\n" not in str(error.value)
