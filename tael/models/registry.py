"""From a checkpoint to a ``ModelSpec``: picks the family and checks that the tensors are there."""

from __future__ import annotations

from collections.abc import Callable

from tael.errors import TaelError
from tael.loader.checkpoint import Checkpoint
from tael.models.config import ModelConfig
from tael.models.families import gemma3, llama, qwen2, qwen3
from tael.models.gguf_config import gguf_config
from tael.models.spec import ModelSpec
from tael.models.tensor_names import hf_prefix

FAMILIES: dict[str, Callable[[ModelConfig, Checkpoint], ModelSpec]] = {
    "llama": llama.read,
    "mistral": llama.read,
    "qwen2": qwen2.read,
    "qwen3": qwen3.read,
    "gemma3": gemma3.read,
    "gemma3_text": gemma3.read,
}
"""By ``model_type`` of ``config.json`` or ``general.architecture`` of GGUF."""


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The model in a checkpoint. Every parameter has a source of the right shape.

    Raises TaelError for a model that is not supported, a setting out of bounds, and a tensor
    that is missing, of another shape, or of no use to the family.
    """
    if checkpoint.format == "gguf":
        config = ModelConfig(gguf_config(checkpoint), checkpoint.files[0].name)
    else:
        config = ModelConfig(checkpoint.metadata, "config.json")
    model_type = config.text("model_type")
    if model_type not in FAMILIES:
        raise TaelError(
            f"{config.file_name} is a model of type {model_type[:60]!r}; Tael runs "
            f"{', '.join(FAMILIES)}."
        )
    if config.is_set("quantization_config"):
        raise TaelError(
            f"{config.file_name} has a quantization_config, and of quantised weights Tael reads "
            "GGUF only; use the original model or a GGUF file of it."
        )
    config.refuse("use_bidirectional_attention")
    spec = FAMILIES[model_type](config, checkpoint)
    _check_tensors(spec, checkpoint)
    return spec


def _check_tensors(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    shapes = spec.parameters()
    for parameter, source in spec.sources:
        info = checkpoint.tensors.get(source.name)
        if info is None:
            raise TaelError(
                f"tensor {source.name} is missing from {_files(checkpoint)}; the model "
                "may be incomplete: pull it again."
            )
        if info.shape != shapes[parameter]:
            raise TaelError(
                f"tensor {source.name} has shape {info.shape}, and the configuration "
                f"says {shapes[parameter]}; the model may be damaged."
            )
    # A bias or a norm that the family does not know would be left out without a word.
    used = {source.name for _, source in spec.sources}
    layers = "blk." if checkpoint.format == "gguf" else f"{hf_prefix(checkpoint)}layers."
    for name in checkpoint.tensors:
        derived = name.endswith("rotary_emb.inv_freq")  # saved by old versions of transformers
        if name.startswith(layers) and name not in used and not derived:
            raise TaelError(
                f"tensor {name} has no place in the {spec.family} family; this variant "
                "of the model is not supported."
            )


def _files(checkpoint: Checkpoint) -> str:
    first, *rest = checkpoint.files
    return first.name + (f" and {len(rest)} more" if rest else "")
