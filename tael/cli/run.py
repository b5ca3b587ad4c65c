"""``tael run``: one question, one answer."""

from __future__ import annotations

import dataclasses
import json
import sys
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
    from tael.llm import LLM, Prompt
    from tael.request import SamplingParams


@click.command("run")
@click.argument("words", nargs=-1, metavar='[MODEL] "PROMPT"')
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="FILE",
    help="Put a text file before the question; may be given several times.",
)
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--raw", is_flag=True, help="Complete the prompt without a chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@sampling_options
@model_options
@speculation_option
def command(
    words: tuple[str, ...],
    files: tuple[str, ...],
    system: str | None,
    raw: bool,
    as_json: bool,
    settings: dict[str, Any],
    speculation: bool,
    **sampling: Any,
) -> None:
    """Answer PROMPT; "-" reads it from standard input. The answer goes to standard output, the
    statistics to standard error."""
    from tael.request import SamplingParams

    model, question = _model_and_question(words)
    text = _prompt_text(question, files)
    params = SamplingParams(**sampling)
    with open_llm(model, quiet=as_json, speculation=speculation, **settings) as llm:
        prompt = _prompt(llm, model, text, system, raw)
        if as_json:
            _print_json(llm, model, prompt, params)
        else:
            _print_stream(llm, prompt, params)


def _model_and_question(words: tuple[str, ...]) -> tuple[str, str]:
    from tael.loader import catalogue

    if not words:
        raise click.UsageError("Give a prompt, or - to read it from standard input.")
    if len(words) > 2:
        raise click.UsageError("Give a model and a prompt; put quotes around the prompt.")
    *models, question = words
    if not models and question in catalogue.entries():
        raise click.UsageError(f"{question} is a model; add a prompt, or: tael chat {question}")
    return (models or [catalogue.DEFAULT_MODEL])[0], question


def _prompt_text(question: str, files: tuple[str, ...]) -> str:
    """The files, each under its name, and then the question."""
    if question == "-":
        try:
            question = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise TaelError(
                "standard input is not text in this terminal's encoding; convert it first."
            ) from error
    parts = [f"{Path(file).name}:\n\n{_read_text(Path(file))}" for file in files]
    return "\n\n".join([*parts, question])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TaelError(f"{path} is not a text file in UTF-8; convert it first.") from error
    except OSError as error:
        raise TaelError(f"cannot read {path}: {error.strerror}; check the path.") from error


def _prompt(llm: LLM, model: str, text: str, system: str | None, raw: bool) -> Prompt:
    if raw or not llm.engine.tokenizer.has_chat_template:
        if system is not None:
            raise TaelError(
                f"a system prompt needs a chat template, and {model} "
                f"{'is run with --raw' if raw else 'has none'}; leave out --system."
            )
        return text
    messages = [{"role": "user", "content": text}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _print_stream(llm: LLM, prompt: Prompt, params: SamplingParams) -> None:
    text = ""
    for delta in llm.stream(prompt, params):
        text = delta.text or text
        click.echo(delta.text, nl=False)
    if not text.endswith("\n"):
        click.echo()
    if delta.error is not None:
        raise TaelError(f"the answer broke off: {delta.error}.")
    assert delta.usage is not None
    click.echo(statistics(delta.usage, delta.finish_reason), err=True)


def _print_json(llm: LLM, model: str, prompt: Prompt, params: SamplingParams) -> None:
    from tael.memory.process import peak_rss_bytes

    result = llm.generate([prompt], params)[0]
    answer = result.outputs[0]
    report = {
        "model": model,
        "text": answer.text,
        "finish_reason": answer.finish_reason.value,
        "error": answer.error,
        "usage": {
            **dataclasses.asdict(result.usage),
            "decode_tokens_per_s": result.usage.decode_tokens_per_s,
            "peak_memory_bytes": peak_rss_bytes(),
        },
    }
    click.echo(json.dumps(report, ensure_ascii=False))
    if answer.error is not None:
        raise TaelError(f"the answer broke off: {answer.error}.")
