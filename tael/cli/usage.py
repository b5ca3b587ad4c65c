"""``tael usage``: what was used and what it costs, from the ledger."""

from __future__ import annotations

import csv
import io
import json
from datetime import datetime, timezone
from pathlib import Path

import click

GROUP_NAMES = ("key", "model", "day")


def groups(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(value.split(","))
    if not set(names) <= set(GROUP_NAMES) or len(set(names)) < len(names):
        raise click.BadParameter(f"choose some of {','.join(GROUP_NAMES)}.")
    return names


@click.group("usage", invoke_without_command=True)
@click.option(
    "--ledger",
    "path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Default: ~/.local/share/tael/ledger.sqlite.",
)
@click.option("--by", callback=groups, default="key,model", help="Some of key,model,day.")
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), help="First day, UTC.")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), help="The day after the last one.")
@click.option("--format", "form", type=click.Choice(["table", "csv", "json"]), default="table")
@click.pass_context
def command(
    ctx: click.Context,
    path: Path | None,
    by: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
    form: str,
) -> None:
    """Report tokens and costs by key, model and day. May be used while the server runs."""
    from tael.cli.common import print_table
    from tael.economics.report import format_nano, usage_report
    from tael.loader.paths import ledger_file

    ctx.obj = path or ledger_file()
    if ctx.invoked_subcommand is not None:
        return
    currency, rows = usage_report(ctx.obj, by, _utc(since), _utc(until))
    if form == "json":
        click.echo(json.dumps({"currency": currency, "rows": rows}, indent=2))
        return
    if form == "csv":
        buffer = io.StringIO()
        names = rows[0].keys() if rows else ()
        writer = csv.DictWriter(buffer, [*names, "currency"], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "currency": currency} for row in rows)
        click.echo(buffer.getvalue(), nl=False)
        return
    shown = (
        "requests",
        "fresh_tokens",
        "cache_read_tokens",
        "cache_write_tokens",
        "output_tokens",
    )
    header = [*by, "requests", "fresh", "cache read", "cache write", "output", currency]
    table = [
        [
            *(str(row[name]) for name in by),
            *(f"{row[name]:,}" for name in shown),
            format_nano(int(row["amount_nano"])),
        ]
        for row in rows
    ]
    print_table([[name.upper() for name in header], *table], num_left=len(by))


@command.command("refund")
@click.argument("request_id", metavar="REQUEST")
@click.option("--reason", required=True, help="Goes on record.")
@click.option(
    "--rate-card",
    "card_path",
    type=click.Path(path_type=Path),
    help="Charge it by this card instead of nothing.",
)
@click.pass_obj
def refund(path: Path, request_id: str, reason: str, card_path: Path | None) -> None:
    """Take back the charge of a request, by a row that reverses it: nothing is ever changed."""
    from tael.economics.journal import Journal
    from tael.economics.rate_card import RateCard
    from tael.economics.report import format_nano, usage_report

    usage_report(path, ["day"])  # a TaelError if this is no ledger; a journal would make one
    card = RateCard.load(card_path) if card_path is not None else None
    journal = Journal(path)
    with journal.transaction():
        amount_nano = journal.correct(request_id, reason, card)
    journal.close()
    click.echo(f"{request_id}: now charged {format_nano(amount_nano)}")


def _utc(day: datetime | None) -> datetime | None:
    return None if day is None else day.replace(tzinfo=timezone.utc)
