"""What several commands share: options, the progress of a pull, the statistics line."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress


def byte_size(text: str) -> int:
    """Bytes in a size such as 2GiB: the type of a click option."""
    from tael.memory.budget import parse_bytes

    return parse_bytes(text)


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
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn, TransferSpeedColumn

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
