"""``tael serve``: a model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tael.cli.common import TransferBar, byte_size, model_options, speculation_option


def _address(text: str) -> tuple[str, int]:
    """Of a listener; on the loopback interface unless told otherwise."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal():
        raise click.BadParameter(f"{text!r} is no port and no ADDRESS:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


@click.command("serve")
@click.argument("model", required=False)
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", show_default=True)
@click.option("--port", default=8000, metavar="PORT", show_default=True, help="0: any.")
@click.option(
    "--metrics-listen",
    "metrics_address",
    type=_address,
    metavar="[ADDRESS:]PORT",
    help="Have /metrics there, without a key, and not beside the other routes.",
)
@click.option("--name", metavar="NAME", help="What callers call the model.  [default: MODEL]")
@click.option(
    "--keys",
    "keys_path",
    type=Path,
    metavar="FILE",
    help="Who may call.  [default: ~/.local/share/tael/keys.sqlite]",
)
@click.option(
    "--ledger",
    "ledger_path",
    type=Path,
    metavar="FILE",
    help="Where usage is recorded.  [default: ~/.local/share/tael/ledger.sqlite]",
)
@click.option(
    "--rate-card", type=Path, metavar="FILE", help="Prices.  [default: all is counted and free]"
)
@click.option(
    "--parallel", default=32, metavar="N", show_default=True, help="Answers computed at once."
)
@click.option(
    "--max-requests", default=256, metavar="N", show_default=True, help="Requests held at once."
)
@click.option(
    "--max-held-tokens",
    default=4_000_000,
    metavar="N",
    show_default=True,
    help="Tokens that the requests held may take, prompts and longest answers.",
)
@click.option(
    "--queue-timeout",
    default=60.0,
    metavar="SECONDS",
    show_default=True,
    help="Longest wait for a turn.",
)
@click.option(
    "--stall-timeout",
    default=8.0,
    metavar="SECONDS",
    show_default=True,
    help="Longest step. Past it the server is not ready; at one and a half, a new engine starts.",
)
@click.option(
    "--drain-timeout",
    default=300.0,
    metavar="SECONDS",
    show_default=True,
    help="Longest wait for requests at the end.",
)
@click.option(
    "--max-body",
    type=byte_size,
    default="16MiB",
    metavar="SIZE",
    show_default=True,
    help="Largest request.",
)
@model_options
@speculation_option
def command(
    model: str | None,
    host: str,
    port: int,
    metrics_address: tuple[str, int] | None,
    name: str | None,
    keys_path: Path | None,
    ledger_path: Path | None,
    rate_card: Path | None,
    parallel: int,
    max_requests: int,
    max_held_tokens: int,
    queue_timeout: float,
    stall_timeout: float,
    drain_timeout: float,
    max_body: int,
    settings: dict[str, Any],
    speculation: bool,
) -> None:
    """Serve MODEL to clients of the OpenAI and Anthropic APIs until Ctrl-C or SIGTERM; then what
    is under way is finished."""
    import asyncio
    import logging
    from contextlib import closing

    from tael.economics.keys import Keys
    from tael.economics.ledger import Ledger
    from tael.economics.rate_card import FREE, RateCard
    from tael.errors import TaelError
    from tael.loader import catalogue
    from tael.loader.paths import keys_file, ledger_file
    from tael.loader.sources import resolve

    try:
        from tael.server.admission import Limits
        from tael.server.messages import EngineSettings
        from tael.server.serve import ServerConfig, serve
    except ModuleNotFoundError as error:
        raise TaelError(
            f"{error.name} is missing; pip install 'tael[server]' brings what a server needs."
        ) from error

    logging.basicConfig(format="tael: %(message)s", level=logging.WARNING)
    logging.getLogger("tael").setLevel(logging.INFO)
    model = model or catalogue.DEFAULT_MODEL
    with TransferBar() as progress:
        path = resolve(model, progress=progress)
    config = ServerConfig(
        model=name or _shown(model),
        engine=EngineSettings(
            model=str(path),
            speculation=speculation,
            max_num_seqs=parallel,
            **settings,
        ),
        host=host,
        port=port,
        limits=Limits(max_requests, max_held_tokens, queue_timeout),
        stall_s=stall_timeout,
        drain_s=drain_timeout,
        max_body_bytes=max_body,
        metrics_address=metrics_address,
    )
    card = FREE if rate_card is None else RateCard.load(rate_card)
    with (
        closing(Keys(keys_path or keys_file())) as keys,
        closing(Ledger(ledger_path or ledger_file(), card)) as ledger,
    ):
        if not keys.exist():
            click.echo("tael: THERE ARE NO KEYS: every program on this machine may call.", err=True)
        asyncio.run(serve(config, keys=keys, ledger=ledger))


def _shown(model: str) -> str:
    """A name of the catalogue or a repository as it is; of a path its last part, since callers
    need not know where it lies."""
    path = Path(model.removeprefix("file:"))
    return path.stem if path.exists() else model
