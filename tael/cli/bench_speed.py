"""``tael bench speed``: tokens per second on this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tael.cli.common import model_options, open_llm, output_file

if TYPE_CHECKING:
    from tael.evals.limits import Limits


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 512,4096") from None


COUNT = click.IntRange(min=1)
COUNT.name = "N"


@click.command("speed")
@click.argument("model", required=False)
@click.option("--prompt", default=512, type=COUNT, show_default=True, help="Tokens to prefill.")
@click.option("--decode", default=64, type=COUNT, show_default=True, help="Tokens to decode.")
@click.option(
    "--depth",
    default="0",
    type=_numbers,
    metavar="N,...",
    show_default=True,
    help="Tokens in the cache before the prompt.",
)
@click.option(
    "--batch",
    default="1",
    type=_numbers,
    metavar="N,...",
    show_default=True,
    help="Sequences at once.",
)
@click.option("--runs", default=3, type=COUNT, show_default=True, help="The median counts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=output_file,
    metavar="FILE.png",
    help="Draw the decoding over the depths, or over the batches if those are more.",
)
@model_options
def command(
    model: str | None,
    prompt: int,
    decode: int,
    depth: list[int],
    batch: list[int],
    runs: int,
    as_json: bool,
    plot: Path | None,
    settings: dict[str, Any],
) -> None:
    """Measure prefill and decode, for every --depth and size of --batch, beside what the machine's
    memory and arithmetic allow."""
    from tael.backends.cpu.backend import available_cores
    from tael.evals.limits import measure_limits
    from tael.evals.speed import Workload, median_speed, token_cost
    from tael.loader.catalogue import DEFAULT_MODEL
    from tael.loader.prepared import load_prepared
    from tael.loader.sources import resolve

    name = model or DEFAULT_MODEL
    llm = open_llm(name, quiet=as_json, **settings)
    weights = load_prepared(resolve(name)).weights
    limits = measure_limits(settings["num_threads"] or available_cores())
    rows: list[dict[str, Any]] = []
    for num_tokens in depth:
        for batch_size in batch:
            workload = Workload(prompt, decode, num_tokens, batch_size)
            speed = median_speed(llm.engine, workload, runs)
            cost = token_cost(llm.engine.spec, weights, num_tokens + prompt + decode // 2)
            rows.append(
                {
                    "depth": num_tokens,
                    "batch": batch_size,
                    "prompt": prompt,
                    "prefill_tokens_per_s": speed.prefill_tokens_per_s,
                    "decode_tokens_per_s": speed.decode_tokens_per_s,
                    "decode_limit": cost.decode_limit(limits, batch_size),
                }
            )
            if not as_json:
                _print_row(rows[-1], limits if len(rows) == 1 else None)
    if as_json:
        click.echo(json.dumps({"model": name, "limits": asdict(limits), "rows": rows}, indent=2))
    if plot:
        _plot(plot, Path(name).name, rows, by="batch" if len(batch) > len(depth) else "depth")


def _print_row(row: dict[str, Any], limits: Limits | None) -> None:
    """A line of the table, after its head if there are ``limits`` to go with it."""
    if limits:
        rates = {
            "GB/s read": limits.read_bytes_per_s,
            "Gop/s int8": limits.int8_ops_per_s,
            "Gflop/s bf16": limits.bf16_flops_per_s,
        }
        measured = ", ".join(f"{rate / 1e9:.0f} {unit}" for unit, rate in rates.items() if rate)
        click.echo(f"limits of {limits.num_threads} threads: {measured}", err=True)
        click.echo(f"{'depth':>8} {'batch':>6} {'prefill t/s':>12} {'decode t/s':>12} {'limit':>8}")
    click.echo(
        f"{row['depth']:>8} {row['batch']:>6} {row['prefill_tokens_per_s']:>12.1f} "
        f"{row['decode_tokens_per_s']:>12.1f} {row['decode_limit']:>8.0f}"
    )


def _plot(path: Path, title: str, rows: list[dict[str, Any]], by: str) -> None:
    """One line and one limit for each value of what is not ``by``."""
    from tael.evals.plot import plot

    other = "depth" if by == "batch" else "batch"
    lines: dict[str, list[tuple[float, float]]] = {}
    limits: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = f"{other} {row[other]}"
        lines.setdefault(label, []).append((row[by], row["decode_tokens_per_s"]))
        limits.setdefault(f"limit, {label}", []).append((row[by], row["decode_limit"]))
    plot(path, lines, limits, title=f"{title}: decode", x_label=by, log_x=by == "batch")
