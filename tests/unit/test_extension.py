"""Contexts beyond the trained length: which settings, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tael.config import RopeScaling
from tael.errors import TaelError
from tael.models.config import ModelConfig
from tael.models.extension import extension_of, for_context
from tael.models.rope import rope
from tael.models.spec import Attention, Dense, LayerSpec, ModelSpec, Rope

HEAD_DIM = 64
CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""``rope_scaling`` in the model cards of Qwen2.5."""


def rope_of(**parameters: Any) -> Rope:
    defaults = {"rope_theta": 1e6, "max_position_embeddings": 32768}
    return rope(ModelConfig({**defaults, **parameters}, "config.json"), HEAD_DIM)


def model(family: str = "qwen2", trained: int = 32768, **parameters: Any) -> ModelSpec:
    attention = Attention(4, 2, HEAD_DIM, rope_of(**parameters), HEAD_DIM**-0.5)
    return ModelSpec(
        family=family,
        vocab_size=96,
        hidden_size=256,
        layers=(LayerSpec(attention, Dense(96, "silu")),) * 2,
        norm_eps=1e-6,
        max_position_embeddings=trained,
        tie_word_embeddings=True,
    )


def extended(text: str, context: int | None, **changes: Any) -> ModelSpec:
    return for_context(model(**changes), RopeScaling.parse(text), context)


def ropes(spec: ModelSpec) -> set[Rope]:
    return {layer.mixer.rope for layer in spec.layers}


def test_yarn_is_what_the_model_card_says() -> None:
    for context in (None, 131072):
        spec = extended("yarn", context)
        assert ropes(spec) == {rope_of(**CARD)}
        assert spec.max_position_embeddings == 131072


def test_factor_follows_the_context() -> None:
    spec = extended("yarn", 65536)
    assert ropes(spec) == {rope_of(**{**CARD, "factor": 2.0})}
    assert spec.max_position_embeddings == 65536
    odd = extended("yarn", 40000)
    assert ropes(odd) == {rope_of(**{**CARD, "factor": 40000 / 32768})}
    assert odd.max_position_embeddings == 40000


def test_a_given_factor_makes_one_model_for_all_contexts() -> None:
    assert extended("yarn:4", 8192) == extended("yarn:4", 100_000) == extended("yarn:4", None)
    assert ropes(extended("yarn:2.5", 50_000)) == {rope_of(**{**CARD, "factor": 2.5})}


@pytest.mark.parametrize("text", ["yarn", "dynamic", "dynamic:2"])
def test_nothing_is_scaled_within_the_trained_length(text: str) -> None:
    assert extended(text, 32768) == model()
    assert ropes(extended(text, 32769)) != ropes(model())
    # The configurations of Qwen 3 count 8,192 more than it was trained with.
    assert extended(text, 40960, family="qwen3", trained=40960) == model("qwen3", 40960)


def test_qwen3_counts_from_its_training() -> None:
    spec = extended("yarn", 65536, family="qwen3", trained=40960)
    assert ropes(spec) == ropes(extended("yarn", 65536))


@pytest.mark.parametrize("text", ["dynamic", "dynamic:1", "dynamic:2.5"])
@pytest.mark.parametrize("context", [40_000, 131_072])
def test_dynamic_equals_transformers_at_the_length_of_the_context(text: str, context: int) -> None:
    factor = RopeScaling.parse(text).factor or 1.0
    config = Qwen2Config(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e6, "factor": factor},
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS["dynamic"](config, None, seq_len=context)
    (ours,) = ropes(extended(text, context))
    assert ours.attention_factor == attention_factor == 1.0
    np.testing.assert_array_max_ulp(np.float32(ours.inv_freq), expected.numpy(), maxulp=2)


def test_dynamic_slows_the_slowest_pair_by_the_stretch() -> None:
    (plain,), (stretched,) = ropes(model()), ropes(extended("dynamic", 131_072))
    assert stretched.inv_freq[0] == plain.inv_freq[0]
    assert stretched.inv_freq[-1] == pytest.approx(plain.inv_freq[-1] / 4, rel=1e-5)


def test_every_setting_is_a_model_of_its_own() -> None:
    """The fingerprint of an engine is made of the spec, so that no KV is shared between them."""
    texts = ["yarn:2", "yarn:3", "yarn:4", "dynamic", "dynamic:2"]
    specs = [model(), extended("dynamic", 65536), *(extended(text, None) for text in texts)]
    assert len({repr(spec.layers) for spec in specs}) == len(specs)


def test_what_can_be_extended() -> None:
    assert extension_of(model()) is not None
    assert extension_of(model("qwen3", 40960)) is not None
    assert extension_of(model(trained=40960)) is None
    assert extension_of(model(trained=131072)) is None  # of Qwen2.5 base models
    assert extension_of(model(trained=131072, **CARD)) is None
    assert extension_of(model(**CARD)) is None
    assert extension_of(model(trained=4096, rope_theta=1e4)) is None  # Qwen2.5-Math
    assert extension_of(model(rope_theta=1e4)) is None
    assert extension_of(model("llama")) is None
    assert extension_of(model("gemma3")) is None


REFUSED: dict[str, tuple[ModelSpec, str | None, int | None, str]] = {
    "beyond": (model(), None, 32769, "32,769 tokens is beyond the 32,768.*add --rope-scaling yarn"),
    "beyond, and no way": (model("llama", 8192), None, 8193, r"trained for; lower it\.$"),
    "a family without": (model("llama", 8192), "yarn", 4096, "this llama model has a context"),
    "scaled already": (model(trained=131072, **CARD), "yarn", None, "131,072 tokens.*no RoPE"),
    "too long": (model(), "yarn", 131073, "up to 131,072 tokens, and not for 131,073"),
    "too long for dynamic": (model(), "dynamic", 1 << 20, "up to 131,072"),
    "factor too large": (model(), "yarn:4.5", 65536, "not for 147,456"),
    "factor too small": (model(), "yarn:2", 65537, "65,537 tokens is beyond the 65,536"),
}


@pytest.mark.parametrize(
    ("spec", "text", "context", "message"), REFUSED.values(), ids=REFUSED.keys()
)
def test_refuses(spec: ModelSpec, text: str | None, context: int | None, message: str) -> None:
    with pytest.raises(TaelError, match=message) as error:
        for_context(spec, RopeScaling.parse(text) if text else None, context)
    assert "\n" not in str(error.value)


def test_without_a_scaling_nothing_changes() -> None:
    assert for_context(model(), None, None) == for_context(model(), None, 32768) == model()


def test_parse() -> None:
    assert RopeScaling.parse("yarn") == RopeScaling("yarn", None)
    assert RopeScaling.parse("yarn:4") == RopeScaling("yarn", 4.0)
    assert RopeScaling.parse("dynamic:1.5") == RopeScaling("dynamic", 1.5)


@pytest.mark.parametrize(
    "text",
    ["", "ntk", "yarn:", "yarn:x", "yarn:0.5", "yarn:-1", "yarn:nan", "yarn:99999", "yarn 4"],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(TaelError, match="is no RoPE scaling"):
        RopeScaling.parse(text)
