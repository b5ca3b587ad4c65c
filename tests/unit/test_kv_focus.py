"""Layers that read more of a context than the others."""

from __future__ import annotations

import pytest

from tael.config import EngineConfig
from tael.errors import TaelError
from tael.models.spec import Attention, Dense, LayerSpec, ModelSpec, Rope, with_kv_focus


def model(windows: list[int | None]) -> ModelSpec:
    layers = tuple(
        LayerSpec(Attention(4, 2, 16, Rope((1.0,) * 8), 0.25, window), Dense(96, "silu"))
        for window in windows
    )
    return ModelSpec("qwen2", 96, 64, layers, 1e-6, 4096, True)


@pytest.mark.parametrize("focus", [(), (0,), (9, 11), (2, 5, 23)])
def test_all_layers_read_as_much_together_as_without(focus: tuple[int, ...]) -> None:
    spec = with_kv_focus(model([None] * 24), focus)
    percents = [layer.mixer.budget_percent for layer in spec.layers]
    assert 2400 - 24 <= sum(percents) <= 2400
    assert {i for i, percent in enumerate(percents) if percent > 100} == set(focus)
    assert len(set(percents)) == 1 + bool(focus)


def test_windows_have_no_share() -> None:
    spec = with_kv_focus(model([64, None] * 8), (3,))
    assert all(layer.mixer.budget_percent == 100 for layer in spec.layers[::2])
    assert sum(layer.mixer.budget_percent for layer in spec.layers[1::2]) <= 800


@pytest.mark.parametrize(
    ("focus", "message"),
    [((8,), "layer 8 cannot"), ((0,), "layer 0 cannot"), ((1, 3, 5), "less than half")],
)
def test_layers_that_cannot_read_more_are_refused(focus: tuple[int, ...], message: str) -> None:
    with pytest.raises(TaelError, match=message):
        with_kv_focus(model([64, None] * 4), focus)


def test_there_is_nothing_to_share_without_a_budget() -> None:
    with pytest.raises(TaelError, match="give a KV budget"):
        EngineConfig(kv_focus=(1,))
    assert EngineConfig(kv_focus=(1,), prefill_budget=2048).reads_sparsely
