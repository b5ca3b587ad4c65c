"""``tael keys``: who may call the server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tael.economics.keys import Key, Keys


@click.group("keys")
def command() -> None:
    """Make, list and revoke API keys. Once there is one, every request needs a key."""


def file_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--keys",
        "path",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The file of keys. Default: ~/.local/share/tael/keys.sqlite.",
    )(function)


@command.command("create")
@click.argument("name")
@click.option("--tenant", help="Whose key it is. Default: nobody else's.")
@click.option(
    "--share-group",
    help="Share cached prefixes with all keys of this group, of whatever tenant. Who shares can "
    "find out from times and counts which prompts the others have sent.",
)
@click.option("--max-concurrency", type=click.IntRange(1), help="Requests at a time.")
@click.option("--requests-per-min", type=click.IntRange(1))
@click.option("--tokens-per-min", type=click.IntRange(1), help="Prompts and answers.")
@click.option("--weight", type=click.IntRange(1), default=1, help="Of its share under load.")
@file_option
def create(name: str, share_group: str | None, path: Path | None, **limits: Any) -> None:
    """Make a key. It is printed once: only its hash is kept."""
    key, token = _open(path).create(name, sharing_group=share_group, **limits)
    click.echo(token)
    click.echo(
        f"key {key.key_id} of tenant {key.tenant}; store it now, it cannot be shown again.",
        err=True,
    )


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@file_option
def list_keys(path: Path | None, as_json: bool) -> None:
    """Show all keys, revoked ones too, without their secrets."""
    from tael.cli.common import print_table

    keys = _open(path).list()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(key) for key in keys], indent=2))
        return
    header = ("KEY", "NAME", "TENANT", "SHARES WITH", "LIMITS", "CREATED", "REVOKED")
    print_table([header, *(_row(key) for key in keys)])


@command.command("revoke")
@click.argument("key_id", metavar="KEY")
@file_option
def revoke(key_id: str, path: Path | None) -> None:
    """Refuse a key, named by its id, from now on. A running server obeys at once."""
    _open(path).revoke(key_id)
    click.echo(f"{key_id}: revoked")


def _open(path: Path | None) -> Keys:
    from tael.economics.keys import Keys
    from tael.loader.paths import keys_file

    return Keys(path or keys_file())


def _row(key: Key) -> tuple[str, ...]:
    limits = {
        "at a time": key.max_concurrency,
        "requests/min": key.requests_per_min,
        "tokens/min": key.tokens_per_min,
    }
    parts = [f"{limit:,} {unit}" for unit, limit in limits.items() if limit is not None]
    if key.weight > 1:
        parts.append(f"weight {key.weight}")
    return (
        key.key_id,
        key.name,
        key.tenant,
        key.sharing_group or "",
        ", ".join(parts),
        _day(key.created_at),
        _day(key.revoked_at),
    )


def _day(seconds: int | None) -> str:
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d")
