"""``tael inspect``: what a model is made of and what its context costs, without loading it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from tael.cli.common import TransferBar, byte_size

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
    report = describe(path, checkpoint, read_spec(checkpoint), memory)
    click.echo(json.dumps(report, indent=2) if as_json else _render(model, report))


def describe(
    path: Path, checkpoint: Checkpoint, spec: ModelSpec, memory_bytes: int | None
) -> dict[str, Any]:
    """The facts that ``tael inspect`` prints. ``memory_bytes`` None: what the machine spares."""
    from math import prod

    from tael.config import BLOCK_SIZE, SchedulerConfig
    from tael.engine.engine import SPARE_FRACTION
    from tael.memory.budget import available_memory_bytes, kv_budget, plan_pools
    from tael.models.spec import cache_groups
    from tael.quant.formats import FORMATS

    types: dict[str, dict[str, int]] = {}
    for info in checkpoint.tensors.values():
        *rows, columns = info.shape
        entry = types.setdefault(info.type, {"num_tensors": 0, "bytes": 0})
        entry["num_tensors"] += 1
        entry["bytes"] += prod(rows) * FORMATS[info.type].row_bytes(columns)
    weights_bytes = sum(entry["bytes"] for entry in types.values())
    groups = cache_groups(spec, BLOCK_SIZE)
    if memory_bytes is None:
        memory_bytes = int(SPARE_FRACTION * available_memory_bytes())
    plan = plan_pools(
        groups,
        kv_budget(memory_bytes, weights_bytes, workspace_bytes=0, baseline_bytes=0),
        BLOCK_SIZE,
        spec.max_position_embeddings,
        SchedulerConfig(),
    )
    return {
        "path": str(path),
        "format": checkpoint.format,
        "family": spec.family,
        "num_layers": len(spec.layers),
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "num_parameters": sum(prod(shape) for shape in spec.parameters().values()),
        "tensor_types": dict(sorted(types.items())),
        "weights_bytes": weights_bytes,
        "cache": [
            {
                "num_layers": len(group.layers),
                "window": group.window,
                "num_kv_heads": spec.layers[group.layers[0]].mixer.num_kv_heads,
                "head_dim": spec.layers[group.layers[0]].mixer.head_dim,
                "bytes_per_token": group.block_bytes // BLOCK_SIZE,
            }
            for group in groups
        ],
        "trained_context": spec.max_position_embeddings,
        "memory_bytes": memory_bytes,
        "max_context": plan.max_model_len,
    }


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
                f"{group['head_dim']}: {group['bytes_per_token']:,} bytes a token, "
                f"{group['bytes_per_token'] // group['num_layers']:,} a layer",
            )
        )
    rows.append(
        (
            "context",
            f"{report['max_context']:,} tokens in {format_bytes(report['memory_bytes'])}, "
            f"{report['trained_context']:,} trained for",
        )
    )
    return "\n".join(f"{label:8} {text}" for label, text in rows)
