"""A ``ModelSpec`` as JSON, so that a warm start need not parse the model file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tael.models.spec import Attention, Dense, LayerSpec, ModelSpec, ParameterSource, Rope


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    return asdict(spec)


def spec_from_json(data: dict[str, Any]) -> ModelSpec:
    """Inverse of ``spec_to_json``, also after a passage through text."""
    layers = tuple(_layer(layer) for layer in data["layers"])
    sources = tuple((name, ParameterSource(**source)) for name, source in data["sources"])
    return ModelSpec(**{**data, "layers": layers, "sources": sources})


def _layer(data: dict[str, Any]) -> LayerSpec:
    mixer = data["mixer"]
    rope = Rope(tuple(mixer["rope"]["inv_freq"]), mixer["rope"]["attention_factor"])
    return LayerSpec(
        mixer=Attention(**{**mixer, "rope": rope}),
        ffn=Dense(**data["ffn"]),
        post_norms=data["post_norms"],
    )
