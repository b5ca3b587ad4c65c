"""Contexts beyond the length a model was trained for, by scaling its rotary embedding.

A scaling is chosen once, for the context that an engine is opened with, and holds for every
position of every request. transformers' "dynamic" scaling follows the running length instead,
so that a key would depend on how long the text became after it, and no cached key would be
right at the next length. Here the same formula is fixed at the length of the context.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tael.config import RopeScaling
from tael.errors import TaelError
from tael.models.config import ModelConfig
from tael.models.families import qwen2, qwen3
from tael.models.rope import rope
from tael.models.spec import ContextExtension, ModelSpec, Rope

EXTENSIONS = {"qwen2": qwen2.EXTENSION, "qwen3": qwen3.EXTENSION}
"""By ``ModelSpec.family``. Families whose authors describe none are absent: Gemma 3 and Llama 3.1
come with the scaling that they were trained with."""


def extension_of(spec: ModelSpec) -> ContextExtension | None:
    """What can be chosen for this model; None also if its file scales already."""
    extension = EXTENSIONS.get(spec.family)
    if extension is None or spec.max_position_embeddings not in extension.native_lengths:
        return None
    plain = _rope(spec, rope_theta=extension.rope_theta)
    return extension if all(layer.mixer.rope == plain for layer in spec.layers) else None


def for_context(
    spec: ModelSpec, scaling: RopeScaling | None, max_model_len: int | None
) -> ModelSpec:
    """The model for a context of ``max_model_len`` tokens: itself if that is within its trained
    length, else with its RoPE scaled. Raises TaelError if it does not reach that far.

    A scaling without a factor goes as far as the context, or, if that is None too, as far as the
    authors describe it; where the trained length is enough it is not applied, since it would only
    cost quality.
    """
    trained, extension = spec.max_position_embeddings, extension_of(spec)
    if scaling is None:
        if max_model_len is not None and max_model_len > trained:
            raise TaelError(
                f"a context of {max_model_len:,} tokens is beyond the {trained:,} that the model "
                "was trained for; lower it"
                + (", or add --rope-scaling yarn." if extension is not None else ".")
            )
        return spec
    if extension is None or scaling.kind not in extension.scalings:
        raise TaelError(
            f"this {spec.family} model has a context of {trained:,} tokens, and its authors "
            f"describe no RoPE scaling {scaling.kind} beyond it; leave --rope-scaling out."
        )
    if scaling.kind == "yarn" and scaling.factor is not None:
        reach = int(scaling.factor * extension.original_length)
    else:
        reach = max_model_len or extension.max_length
    length = max_model_len or reach
    if max(reach, length) > extension.max_length:
        raise TaelError(
            f"RoPE scaling of this {spec.family} model is described up to "
            f"{extension.max_length:,} tokens, and not for {max(reach, length):,}; lower the "
            "context or the factor."
        )
    if length > reach:
        raise TaelError(
            f"a context of {length:,} tokens is beyond the {reach:,} that the factor "
            f"{scaling.factor:g} reaches; lower the context or raise the factor."
        )
    return spec if reach <= trained else scaled(spec, extension, scaling, reach)


def scaled(
    spec: ModelSpec, extension: ContextExtension, scaling: RopeScaling, length: int
) -> ModelSpec:
    """The model with its RoPE scaled to reach ``length`` tokens."""
    stretch = length / extension.original_length
    if scaling.kind == "yarn":
        new = _rope(
            spec,
            rope_type="yarn",
            rope_theta=extension.rope_theta,
            factor=scaling.factor or stretch,
            original_max_position_embeddings=extension.original_length,
            max_position_embeddings=length,
        )
    else:
        # _compute_dynamic_ntk_parameters of transformers. With a factor of 1 the slowest pair of
        # channels turns as far over ``length`` as it did over the original length.
        factor, head_dim = scaling.factor or 1.0, spec.layers[0].mixer.head_dim
        growth = (factor * stretch - (factor - 1)) ** (head_dim / (head_dim - 2))
        new = _rope(spec, rope_theta=extension.rope_theta * growth)
    layers = tuple(replace(x, mixer=replace(x.mixer, rope=new)) for x in spec.layers)
    return replace(spec, layers=layers, max_position_embeddings=length)


def _rope(spec: ModelSpec, **parameters: Any) -> Rope:
    return rope(ModelConfig(parameters, "--rope-scaling"), spec.layers[0].mixer.head_dim)
