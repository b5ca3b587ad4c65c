"""The chat template of a model: Jinja source that turns messages into a prompt.

The source comes with the model file and is not trusted; ``template_sandbox`` confines it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2

from tael.errors import TaelError
from tael.loader.template_sandbox import MAX_CHARACTERS, TemplateSandbox

# The largest of 70 published templates has 18,000 characters.
MAX_TEMPLATE_CHARACTERS = 1 << 18

ARGUMENTS = frozenset(
    {
        "tools",
        "documents",
        "enable_thinking",
        "thinking",
        "reasoning_effort",
        "thinking_budget",
        "preserve_thinking",
        "clear_thinking",
        "model_identity",
        "builtin_tools",
        "date_string",
        "response_format",
    }
)
"""Names of what a caller may give a template besides the messages. An allowlist, because a name
such as ``messages`` or ``raise_exception`` would replace what the template relies on."""


class ChatTemplate:
    """A compiled chat template, rendered as transformers renders it. Thread-safe.

    Raises TaelError for source that is not valid Jinja or uses what the sandbox does not offer.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise TaelError(
                f"the model's chat template has {len(source)} characters, more than the "
                f"{MAX_TEMPLATE_CHARACTERS} Tael reads; use another model file."
            )
        try:
            self._code = TemplateSandbox().compile(source)
        except Exception as error:  # Jinja's errors, and Python's for too deep nesting
            raise _failure(error) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
        bos_token: str,
        eos_token: str,
    ) -> str:
        """Raises TaelError for an argument that is not in ``ARGUMENTS``, and when the template
        refuses the messages, fails, or exceeds its bounds of work and output."""
        if unknown := sorted(set(arguments) - ARGUMENTS):
            raise TaelError(
                f"{unknown[0]!r} is not a chat template argument; known: "
                f"{', '.join(sorted(ARGUMENTS))}."
            )
        sandbox = TemplateSandbox()
        template = jinja2.Template.from_code(
            sandbox,
            self._code,
            sandbox.make_globals(
                {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
            ),
        )
        context = {
            "tools": None,
            "documents": None,
            **arguments,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos_token,
            "eos_token": eos_token,
        }
        pieces: list[str] = []
        num_characters = 0
        try:
            for piece in template.generate(context):
                sandbox.spend(len(piece))
                num_characters += len(piece)
                if num_characters > MAX_CHARACTERS:
                    raise jinja2.TemplateError(f"it wrote more than {MAX_CHARACTERS} characters")
                pieces.append(piece)
        except _RefusalError as error:
            raise TaelError(
                f"the model's chat template refused the conversation: {error}; change the messages."
            ) from error
        except Exception as error:  # a template can raise anything
            raise _failure(error) from error
        return "".join(pieces)


class _RefusalError(jinja2.TemplateError):
    """The template called ``raise_exception``."""


def _raise_exception(message: object) -> None:
    raise _RefusalError(" ".join(str(message).split())[:200].rstrip("."))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _failure(error: Exception) -> TaelError:
    reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    return TaelError(
        f"the model's chat template failed: {reason}; use another model file or a plain prompt."
    )
