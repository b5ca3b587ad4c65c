"""``tael cache``: what a folder of KV blocks holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from tael.errors import TaelError

FOLDER = click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))


@click.group("cache")
def command() -> None:
    """Look after a folder that --kv-cache-dir names."""


@command.command("ls")
@FOLDER
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def ls(folder: Path, as_json: bool) -> None:
    """List what is kept in DIR, model by model, the one used last first."""
    from datetime import datetime

    from tael.loader.prepared import prepared_names
    from tael.memory.budget import format_bytes
    from tael.memory.tiers.folder import sections

    names = prepared_names()
    found = sections(folder)
    if as_json:
        click.echo(json.dumps([asdict(section) for section in found], indent=2))
        return
    for section in found:
        # The header of a file may say anything.
        digest, family = (str(section.fingerprint.get(key)) for key in ("weights", "family"))
        name = names.get(digest, f"{family} {digest[:12]}")
        used = datetime.fromtimestamp(section.last_used_ns / 1e9)
        click.echo(
            f"{name}  {section.num_tokens:,} tokens  {section.num_blocks:,} blocks  "
            f"{format_bytes(section.num_bytes)}  used {used:%Y-%m-%d %H:%M}"
        )
    if not found:
        click.echo("no blocks", err=True)


@command.command("verify")
@FOLDER
def verify(folder: Path) -> None:
    """Read every block in DIR and remove those that are damaged."""
    from tael.memory.tiers import folder as blocks

    def report(path: Path, reason: str) -> None:
        click.echo(f"{path.name}: {reason}", err=True)

    num_right, num_wrong = blocks.verify(folder, report)
    click.echo(f"{num_right:,} blocks are right, {num_wrong:,} are not")
    if num_wrong:
        raise TaelError("there were damaged blocks; check the disk.")


@command.command("clear")
@FOLDER
def clear(folder: Path) -> None:
    """Remove all blocks from DIR, and nothing else."""
    from tael.memory.budget import format_bytes
    from tael.memory.tiers import folder as blocks

    num_blocks, num_bytes = blocks.clear(folder)
    click.echo(f"{num_blocks:,} blocks, {format_bytes(num_bytes)} freed")
