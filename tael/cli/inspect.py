"""``tael inspect``: what a model is made of and what its context costs, without loading it."""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any

import click

from tael.cli.common import TransferBar, byte_size
from tael.errors import TaelError

if TYPE_CHECKING:
    from pathlib import Path

    from tael.loader.checkpoint import Checkpoint
    from tael.models.spec import ModelSpec


@click.command("inspect")
@click.argument("model")
@click.option("--memory", type=byte_size, metavar="SIZE", help="Memory budget, such as 2GiB.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(model: str, memory: int | None, as_json: bool) -> None:
    """Show layers, tensor types, bytes of weights, cache bytes per token and the maximum context
    for this machine."""
    from tael.loader import sources
    from tael.loader.prepared import open_checkpoint
    from tael.models.registry import read_spec

    with TransferBar() as progress:
        path = sources.resolve(model, progress=progress)
    checkpoint = open_checkpoint(path)
    spec = read_spec(checkpoint)
    report = {
        "path": str(path),
        "format": checkpoint.format,
        **_layers(spec),
        **_tensors(checkpoint),
        **_capacity(path, checkpoint, spec, memory),
    }
    click.echo(json.dumps(report, indent=2) if as_json else _render(model, report))


def _layers(spec: ModelSpec) -> dict[str, Any]:
    from tael.models.extension import extension_of

    extension = extension_of(spec)
    return {
        "family": spec.family,
        "num_layers": len(spec.layers),
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "num_parameters": sum(prod(shape) for shape in spec.parameters().values()),
        "trained_context": spec.max_position_embeddings,
        "rope_scaling": extension
        and {"kinds": extension.scalings, "max_context": extension.max_length},
        "cache": _cache(spec),
    }


def _cache(spec: ModelSpec) -> list[dict[str, Any]]:
    """The cache groups, with the bytes that the allocator gives a token in each KV format."""
    from tael.config import BLOCK_SIZE, KV_FORMATS
    from tael.models.spec import cache_groups, with_kv_format

    def bytes_per_token(kv_format: str, key_summaries: bool = False) -> list[int]:
        groups = cache_groups(with_kv_format(spec, kv_format, key_summaries), BLOCK_SIZE)
        return [group.block_bytes // BLOCK_SIZE for group in groups]

    formats = {kv_format: bytes_per_token(kv_format) for kv_format in KV_FORMATS}
    with_summaries = bytes_per_token("bf16", key_summaries=True)
    report = []
    for g, group in enumerate(cache_groups(spec, BLOCK_SIZE)):
        mixer = spec.layers[group.layers[0]].mixer
        report.append(
            {
                "num_layers": len(group.layers),
                "window": group.window,
                "num_kv_heads": mixer.num_kv_heads,
                "head_dim": mixer.head_dim,
                "bytes_per_token": {name: sizes[g] for name, sizes in formats.items()},
                "summary_bytes_per_token": with_summaries[g] - formats["bf16"][g],
            }
        )
    return report


def _tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    from tael.quant.formats import FORMATS

    types: dict[str, dict[str, int]] = {}
    for info in checkpoint.tensors.values():
        *rows, num_columns = info.shape
        entry = types.setdefault(info.type, {"num_tensors": 0, "bytes": 0})
        entry["num_tensors"] += 1
        entry["bytes"] += prod(rows) * FORMATS[info.type].row_bytes(num_columns)
    return {
        "tensor_types": dict(sorted(types.items())),
        "weights_bytes": sum(entry["bytes"] for entry in types.values()),
    }


def _capacity(
    path: Path, checkpoint: Checkpoint, spec: ModelSpec, memory_bytes: int | None
) -> dict[str, Any]:
    """What the engine itself would reserve, learnt from one without weights."""
    from tael.backends.cpu.backend import CPUBackend
    from tael.config import EngineConfig
    from tael.engine.engine import Engine
    from tael.loader.prepared import load_tokenizer
    from tael.loader.tile_file import blank_tile_file
    from tael.memory.process import rss_bytes

    tokenizer = load_tokenizer(path, checkpoint)
    config = EngineConfig(memory_bytes=memory_bytes)
    baseline_bytes = rss_bytes()
    backend = CPUBackend(spec, blank_tile_file(checkpoint, spec))
    try:
        engine = Engine(spec, backend, tokenizer, config, baseline_bytes=baseline_bytes)
    except TaelError as error:  # too little memory; the rest is worth knowing all the same
        return {"max_context": 0, "problem": str(error)}
    return {"max_context": engine.max_model_len, "memory_bytes": engine.memory_bytes}


def _render(model: str, report: dict[str, Any]) -> str:
    from tael.memory.budget import format_bytes

    rows = [
        ("model", f"{model} ({report['path']})"),
        (
            "family",
            f"{report['family']}: {report['num_layers']} layers, hidden size "
            f"{report['hidden_size']:,}, vocabulary {report['vocab_size']:,}",
        ),
    ]
    for name, entry in report["tensor_types"].items():
        rows.append(
            ("tensors", f"{name:6} {entry['num_tensors']:5}  {format_bytes(entry['bytes'])}")
        )
    rows.append(
        (
            "weights",
            f"{format_bytes(report['weights_bytes'])} for {report['num_parameters']:,} parameters",
        )
    )
    for group in report["cache"]:
        window = group["window"]
        seen = "full attention" if window is None else f"window of {window:,} tokens"
        rows.append(
            (
                "cache",
                f"{group['num_layers']} layers, {seen}, {group['num_kv_heads']} KV heads of "
                f"{group['head_dim']}",
            )
        )
        sizes = ", ".join(f"{name} {size:,}" for name, size in group["bytes_per_token"].items())
        if group["summary_bytes_per_token"]:
            sizes += f"; with a budget {group['summary_bytes_per_token']:,} more"
        rows.append(("", f"bytes a token: {sizes}"))
    if "problem" in report:
        here = report["problem"]
    else:
        here = f"{report['max_context']:,} tokens here, in {format_bytes(report['memory_bytes'])}"
    rows.append(("context", f"{report['trained_context']:,} tokens trained for"))
    if scaling := report["rope_scaling"]:
        kinds = " or ".join(scaling["kinds"])
        rows.append(("", f"{scaling['max_context']:,} tokens with --rope-scaling {kinds}"))
    rows.append(("", here))
    return "\n".join(f"{label:8} {text}" for label, text in rows)
