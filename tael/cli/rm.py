"""``tael rm``: delete a pulled model."""

from __future__ import annotations

import click


@click.command("rm")
@click.argument("name")
def command(name: str) -> None:
    """Delete a pulled model and the weights prepared from it. Files of your own stay."""
    from tael.loader import sources
    from tael.memory.budget import format_bytes

    click.echo(f"{name}: {format_bytes(sources.remove(name))} freed")
