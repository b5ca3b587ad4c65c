"""``tael bench``: tokens per second on this machine."""

from __future__ import annotations

import json
import statistics

import click

from tael.cli.common import model_options, open_llm


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 512,4096") from None


@click.command("bench")
@click.argument("model", required=False)
@click.option(
    "--prompt",
    default="512",
    type=_numbers,
    metavar="N,...",
    show_default=True,
    help="Tokens of a prompt: the depth at which decoding starts.",
)
@click.option("--decode", default=64, metavar="N", show_default=True, help="Tokens to decode.")
@click.option(
    "--batch",
    default="1",
    type=_numbers,
    metavar="N,...",
    show_default=True,
    help="Sequences at once.",
)
@click.option("--runs", default=3, metavar="N", show_default=True, help="The median counts.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
@model_options
def command(
    model: str | None,
    prompt: list[int],
    decode: int,
    batch: list[int],
    runs: int,
    as_json: bool,
    memory: int | None,
    threads: int | None,
    context: int | None,
) -> None:
    """Measure prefill and decode, for every length of --prompt and size of --batch."""
    from tael.evals.speed import Workload, measure
    from tael.loader.catalogue import DEFAULT_MODEL

    llm = open_llm(model or DEFAULT_MODEL, memory, threads, context, quiet=as_json)
    rows = []
    for num_tokens in prompt:
        for batch_size in batch:
            speeds = [
                measure(llm.engine, Workload(num_tokens, decode, batch_size=batch_size))
                for _ in range(runs)
            ]
            rows.append(
                {
                    "prompt": num_tokens,
                    "batch": batch_size,
                    "prefill_tokens_per_s": statistics.median(
                        speed.prefill_tokens_per_s for speed in speeds
                    ),
                    "decode_tokens_per_s": statistics.median(
                        speed.decode_tokens_per_s for speed in speeds
                    ),
                }
            )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f"{'prompt':>8} {'batch':>6} {'prefill t/s':>12} {'decode t/s':>12}")
    for row in rows:
        click.echo(
            f"{row['prompt']:>8} {row['batch']:>6} {row['prefill_tokens_per_s']:>12.1f} "
            f"{row['decode_tokens_per_s']:>12.1f}"
        )
