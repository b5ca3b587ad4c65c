"""``tael chat``: a conversation on the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tael.cli.common import (
    model_options,
    open_llm,
    sampling_options,
    speculation_option,
    statistics,
)
from tael.errors import TaelError

if TYPE_CHECKING:
    from tael.llm import LLM
    from tael.request import FinishReason, SamplingParams, Usage

HELP = """\
/help             this list
/clear            forget the conversation
/system [TEXT]    set the system prompt; without TEXT, remove it
/save FILE        write the conversation as JSON
/load FILE        go on with a saved conversation
/stats            statistics of the last answer, and how full the context is
/set NAME VALUE   change a sampling parameter, such as temperature 0.7; without, show them
/exit             leave (or Ctrl-D)
A line that ends in \\ goes on in the next one; \"\"\" begins and ends a block of lines.
Ctrl-C stops an answer."""

ANSWER_ROOM = 256
"""Tokens of the context that a question leaves for its answer."""

INTEGERS = ("max_tokens", "top_k", "seed")
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@click.command("chat")
@click.argument("model", required=False)
@click.option("--system", metavar="TEXT", help="System prompt.")
@sampling_options
@model_options
@speculation_option
def command(
    model: str | None,
    system: str | None,
    settings: dict[str, Any],
    speculation: bool,
    **sampling: Any,
) -> None:
    """Talk with a model. /help lists the commands."""
    from tael.loader.catalogue import DEFAULT_MODEL
    from tael.request import SamplingParams

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it gives input() line editing and history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text must not end the program

    params = SamplingParams(**sampling)
    model = model or DEFAULT_MODEL
    with open_llm(model, quiet=False, speculation=speculation, **settings) as llm:
        if not llm.engine.tokenizer.has_chat_template:
            raise TaelError(f"{model} has no chat template; complete texts with: tael run {model}.")
        chat = Chat(llm, params, system)
        if sys.stdin.isatty():
            click.echo("/help lists the commands.", err=True)
        while not chat.is_over:
            try:
                text = read_message()
            except EOFError:
                click.echo()
                break
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D or /exit to leave)", err=True)
                continue
            try:
                chat.handle(text)
            except TaelError as error:
                click.echo(f"tael: {error}", err=True)
            except KeyboardInterrupt:  # while a long conversation became tokens
                click.echo()


def read_message() -> str:
    """One message from standard input: a line, lines joined by a backslash, or a block between
    triple quotes. Raises EOFError at the end."""
    first, more = (">>> ", "... ") if sys.stdin.isatty() else ("", "")
    line = input(first)
    if line.startswith('"""'):
        block = [line[3:]]
        while not block[-1].endswith('"""'):
            block.append(input(more))
        return "\n".join(block).removesuffix('"""').strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(more)
    return line


class Chat:
    """A conversation and its settings."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self.llm = llm
        self.params = params
        self.system = system
        self.turns: list[dict[str, str]] = []
        """Questions and answers by turns, a question first."""
        self.statistics = ""
        """Of the last answer."""
        self.is_over = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda rest: click.echo(HELP),
            "/clear": lambda rest: self.turns.clear(),
            "/system": self._set_system,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
            "/set": self._set,
            "/exit": self._exit,
        }

    @property
    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    def handle(self, text: str) -> None:
        """Carry out a command or answer a question. Raises TaelError; the conversation is then
        as it was before."""
        if text.startswith("/"):
            name, _, rest = text.partition(" ")
            if name not in self._commands:
                raise TaelError(f"unknown command {name}; /help lists them.")
            self._commands[name](rest.strip())
        elif text.strip():
            self.ask(text)

    def ask(self, question: str) -> None:
        """Print the model's answer as it comes, and its statistics."""
        before = list(self.turns)
        self.turns.append({"role": "user", "content": question})
        try:
            token_ids = self._fitting_prompt()
            answer = self._print_answer(token_ids)
        except BaseException:
            self.turns = before
            raise
        if answer:
            self.turns.append({"role": "assistant", "content": answer})
        else:  # stopped before its first word
            self.turns = before

    def _fitting_prompt(self) -> list[int]:
        """The conversation as tokens. One that leaves no room for an answer loses its oldest
        turns, down to half the context: every cut makes the model read all that remains again,
        so it should be rare."""
        limit = self.llm.engine.max_model_len
        token_ids = self.llm.encode(self.messages)
        if len(token_ids) + ANSWER_ROOM <= limit:
            return token_ids
        num_dropped = 0
        while len(self.turns) > 1 and len(token_ids) > limit // 2:
            del self.turns[:2]
            num_dropped += 1
            token_ids = self.llm.encode(self.messages)
        if num_dropped:
            click.echo(
                f"tael: the context of {limit:,} tokens is full; the oldest {num_dropped} "
                "questions and answers were dropped. /clear starts anew.",
                err=True,
            )
        return token_ids

    def _print_answer(self, token_ids: list[int]) -> str:
        # Steps the engine itself instead of using LLM.stream: an interrupt must not fall into the
        # middle of a step, and must be seen while a long prompt is read.
        engine = self.llm.engine
        text = ""
        usage: Usage | None = None
        reason: FinishReason | None = None
        with interrupts() as interrupted:
            engine.add_request("chat", token_ids, self.params)
            while usage is None:
                for delta in engine.step():
                    click.echo(delta.text, nl=False)
                    text += delta.text
                    usage, reason = delta.usage, delta.finish_reason
                    if delta.error is not None:
                        raise TaelError(f"the answer broke off: {delta.error}.")
                if interrupted() and usage is None:
                    usage = engine.abort("chat")
        click.echo()
        self.statistics = statistics(usage, reason)
        click.echo(self.statistics, err=True)
        return text

    def _set_system(self, rest: str) -> None:
        self.system = rest or None

    def _save(self, rest: str) -> None:
        conversation = {"system": self.system, "messages": self.turns}
        try:
            Path(rest).write_text(json.dumps(conversation, ensure_ascii=False, indent=1), "utf-8")
        except OSError as error:
            raise TaelError(
                f"cannot write {rest or 'without a name'}: {error.strerror}."
            ) from error

    def _load(self, rest: str) -> None:
        try:
            conversation = json.loads(Path(rest).read_text("utf-8"))
            system, turns = conversation["system"], conversation["messages"]
            roles = [turn["role"] for turn in turns]
            texts = [turn["content"] for turn in turns] + ([] if system is None else [system])
        except OSError as error:
            raise TaelError(f'cannot read "{rest}": {error.strerror}.') from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise TaelError(f"{rest} is not a conversation that /save wrote.") from error
        expected = ["user", "assistant"] * (len(roles) // 2)
        if roles != expected or not all(isinstance(text, str) for text in texts):
            raise TaelError(f"{rest} is not a conversation that /save wrote.")
        self.system = system
        self.turns = [{"role": t["role"], "content": t["content"]} for t in turns]

    def _stats(self, rest: str) -> None:
        if self.statistics:
            click.echo(self.statistics)
        num_tokens = len(self.llm.encode(self.messages)) if self.turns else 0
        click.echo(f"context {num_tokens:,} of {self.llm.engine.max_model_len:,} tokens")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not name:
            for field in (*INTEGERS, *NUMBERS):
                click.echo(f"{field} {getattr(self.params, field)}")
            return
        if name not in INTEGERS and name not in NUMBERS:
            raise TaelError(f"unknown parameter {name}; known are {', '.join(INTEGERS + NUMBERS)}.")
        try:
            change: dict[str, Any] = {name: int(value) if name in INTEGERS else float(value)}
        except ValueError as error:
            raise TaelError(f'"{value}" is not a value for {name}.') from error
        self.params = dataclasses.replace(self.params, **change)

    def _exit(self, rest: str) -> None:
        self.is_over = True


@contextlib.contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Collect Ctrl-C instead of raising KeyboardInterrupt; yields whether it was pressed."""
    pressed = False

    def note(signum: int, frame: object) -> None:
        nonlocal pressed
        pressed = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
