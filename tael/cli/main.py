"""The ``tael`` command.

A command is the object ``command`` of the module of its name. Modules of this package import
only click at the top, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import errno
import importlib

import click

from tael import __version__
from tael.errors import TaelError

COMMANDS = (
    "run",
    "chat",
    "serve",
    "pull",
    "rm",
    "inspect",
    "bench",
    "calibrate",
    "cache",
    "keys",
    "usage",
)


class _Failure(click.ClickException):
    """A TaelError as click shows it: one line on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: object = None) -> None:
        click.echo(f"tael: {self.message}", err=True)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"tael.cli.{name}").command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TaelError as error:
            raise _Failure(str(error)) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise _Failure(f"cannot write: {error.strerror}; free some space.") from error
        except KeyboardInterrupt:
            ctx.exit(130)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="tael %(version)s")
def main() -> None:
    """Run large language models with long contexts on the machine you have."""
