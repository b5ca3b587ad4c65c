"""What several commands share: options, tables, the progress of a pull, the statistics line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from tael.config import KV_FORMATS, MODES
from tael.errors import TaelError

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from tael.llm import LLM
    from tael.request import FinishReason, Usage

F = TypeVar("F", bound=Callable[..., Any])


def byte_size(text: str) -> int:
    """Bytes in a size such as 2GiB: the type of a click option."""
    from tael.memory.budget import parse_bytes

    return parse_bytes(text)


def token_count(text: str) -> int:
    """Tokens in a count such as 32768 or 32K: the type of a click option."""
    match = re.fullmatch(r"(\d{1,12})([km]?)", text, re.IGNORECASE)
    if match is None:
        raise TaelError(f"{text} is no number of tokens; write one such as 32768, 32K or 1M.")
    return int(match[1]) << {"": 0, "k": 10, "m": 20}[match[2].lower()]


def layer_numbers(text: str) -> tuple[int, ...]:
    """Layers in a list such as 9,11: the type of a click option."""
    if re.fullmatch(r"(\d{1,4}(,\d{1,4})*)?", text) is None:
        raise TaelError(f"{text} is no list of layers; write one such as 9,11.")
    return tuple(int(layer) for layer in text.split(",") if layer)


def model_options(command: F) -> F:
    """How a model is loaded: keyword arguments of ``LLM``, as the command's ``settings``."""
    options = {
        "memory": click.option(
            "--memory",
            type=byte_size,
            metavar="SIZE",
            help="Memory for everything, such as 2GiB.  [default: what the machine can spare]",
        ),
        "num_threads": click.option(
            "--threads", "num_threads", type=int, metavar="N", help="Threads to compute with."
        ),
        "max_model_len": click.option(
            "--context",
            "max_model_len",
            type=token_count,
            metavar="TOKENS",
            help="Longest context, such as 32K.",
        ),
        "rope_scaling": click.option(
            "--rope-scaling",
            metavar="KIND[:FACTOR]",
            help="Go beyond the trained context: yarn or dynamic.",
        ),
        "kv_format": click.option(
            "--kv-format",
            type=click.Choice(KV_FORMATS),
            default="bf16",
            show_default=True,
            help="How the KV of complete blocks is held.",
        ),
        "kv_budget": click.option(
            "--kv-budget",
            type=token_count,
            metavar="TOKENS",
            help="Context that each token of the answer reads, chosen anew for every token and KV "
            "head.  [default: all]",
        ),
        "prefill_budget": click.option(
            "--prefill-budget",
            type=token_count,
            metavar="TOKENS",
            help="The same for each token of the prompt, chosen anew for every four.  "
            "[default: all]",
        ),
        "kv_focus": click.option(
            "--kv-focus",
            type=layer_numbers,
            default="",
            metavar="LAYERS",
            help="Layers that read more than the budgets, the others less (tael calibrate).",
        ),
        "mode": click.option(
            "--mode",
            type=click.Choice(MODES),
            default="exact",
            show_default=True,
            help="KV format and budgets by what they lose on this model (tael calibrate).",
        ),
        "kv_disk": click.option(
            "--kv-disk",
            type=byte_size,
            metavar="SIZE",
            help="Let contexts be larger than the memory: KV is in a file of up to this size.",
        ),
        "kv_cache_dir": click.option(
            "--kv-cache-dir",
            type=click.Path(file_okay=False),
            metavar="DIR",
            help="Keep the KV of finished requests in this folder, also for later runs.",
        ),
        "kv_cache_size": click.option(
            "--kv-cache-size",
            type=byte_size,
            default="10GiB",
            metavar="SIZE",
            show_default=True,
            help="Most that the folder holds.",
        ),
    }

    @wraps(command)
    def with_settings(**arguments: Any) -> None:
        command(settings={name: arguments.pop(name) for name in options}, **arguments)

    for option in reversed(options.values()):
        with_settings = option(with_settings)
    return cast(F, with_settings)


speculation_option = click.option(
    "--speculation/--no-speculation",
    default=True,
    help="Guess tokens from the text and verify several at once, which changes no token.  "
    "[default: on]",
)
"""An argument of ``LLM`` too, but not for what measures steps of one token."""


def sampling_options(command: F) -> F:
    """Fields of ``SamplingParams``. The defaults suit small models: nearly greedy, since they
    lose the thread at temperature 1, and bounded, since some never end by themselves."""
    for option in (
        click.option("--seed", type=int, metavar="N", help="Makes the answer reproducible."),
        click.option("--repetition-penalty", default=1.0, metavar="X", show_default=True),
        click.option("--min-p", default=0.0, metavar="P", show_default=True),
        click.option("--top-p", default=0.9, metavar="P", show_default=True),
        click.option("--top-k", default=0, metavar="K", show_default=True, help="0: off."),
        click.option(
            "--temperature", default=0.2, metavar="T", show_default=True, help="0: greedy."
        ),
        click.option(
            "--max-tokens", default=1024, metavar="N", show_default=True, help="Longest answer."
        ),
    ):
        command = option(command)
    return command


def open_llm(model: str, *, quiet: bool, **settings: Any) -> LLM:
    """Load a model, pulling it if need be, and say on stderr what it can hold."""
    from tael.llm import LLM

    with TransferBar() as progress:
        llm = LLM(model, progress=progress, **settings)
    if not quiet:
        click.echo(f"{model}: {llm.engine.describe()}", err=True)
    return llm


def statistics(usage: Usage, reason: FinishReason | None) -> str:
    """The line after an answer, and why it ended if that was not the model's choice."""
    from tael.memory.budget import format_bytes
    from tael.memory.process import peak_rss_bytes
    from tael.request import FinishReason

    cached = f"{usage.num_cached_tokens:,} cached"
    if usage.num_restored_tokens > 0:
        cached += f", {usage.num_restored_tokens:,} of them from disk"
    cut = ", cut off at the token limit" if reason is FinishReason.LENGTH else ""
    speculation = ""
    if usage.num_draft_tokens > 0:
        tokens_per_step = usage.num_output_tokens / (
            usage.num_output_tokens - usage.num_accepted_tokens
        )
        speculation = (
            f"{usage.num_accepted_tokens:,} of {usage.num_draft_tokens:,} drafts accepted "
            f"({tokens_per_step:.1f} tokens a step), "
        )
    return (
        f"prompt {usage.num_prompt_tokens:,} tokens ({cached}), "
        f"first token after {usage.time_to_first_token_s:.2f} s, "
        f"{usage.num_output_tokens:,} tokens at {usage.decode_tokens_per_s:.1f}/s, "
        f"{speculation}KV {format_bytes(usage.kv_bytes)}, "
        f"peak memory {format_bytes(peak_rss_bytes())}{cut}"
    )


def print_table(rows: Sequence[Sequence[str]], *, num_left: int | None = None) -> None:
    """Print rows in columns, of which the first ``num_left``, or all, are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if num_left is None or i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


def output_file(_: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Callback of options for files that are written at the end of a long run: what would be in
    the way is noticed before it."""
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise click.BadParameter(f"cannot write into {path.parent}")
    if path is not None and option.name == "plot" and find_spec("matplotlib") is None:
        raise click.BadParameter("a plot needs matplotlib; run: pip install 'tael[plot]'")
    return path


class TransferBar:
    """Progress of a pull on stderr: a bar on a terminal, one line elsewhere.

    Implements ``tael.loader.download.Progress``.
    """

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._completed_bytes = 0

    def __enter__(self) -> TransferBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, description: str, total_bytes: int) -> None:
        if not sys.stderr.isatty():
            click.echo(f"tael: {description}", err=True)
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._completed_bytes = 0
        self._bar.add_task(description, total=total_bytes or None)

    def update(self, completed_bytes: int) -> None:
        if self._bar is None:
            return
        # pip moves what it has downloaded, so that a measurement may fall behind the last one.
        self._completed_bytes = max(self._completed_bytes, completed_bytes)
        self._bar.update(self._bar.task_ids[0], completed=self._completed_bytes)
