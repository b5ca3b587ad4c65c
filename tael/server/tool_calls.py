"""Tool calls in the text of a model.

The families that Tael ships write them as Hermes does, and as the templates of Qwen ask for:
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``. Qwen2.5-Coder leaves out the tags, so
an answer that is nothing but such an object, with the name of a tool that was offered, is a call
too. A model whose template has no tools is offered none.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection
from typing import Any

from tael.engine.output import overlap

BEGIN, END = "<tool_call>", "</tool_call>"


class ToolCallParser:
    """Splits a text that comes in pieces into content and tool calls, as parts of an OpenAI delta:
    ``{"content": ...}`` or ``{"tool_calls": [...]}``. A call is passed on whole, once it has ended;
    one that is not a call after all is content.
    """

    def __init__(self, names: Collection[str]) -> None:
        """``names`` are those of the tools on offer."""
        self.num_calls = 0
        self._names = names
        self._is_begun = False
        """Whether anything was said before ``_text``."""
        self._text = ""
        """What is not yet known to be content or a call."""

    def push(self, text: str) -> list[dict[str, Any]]:
        if not self._names:
            return [{"content": text}] if text else []
        self._text += text
        if not self._is_begun and self._text.lstrip()[:1] in ("", "{"):
            return []  # it could be a call without tags
        self._is_begun = True
        parts: list[dict[str, Any]] = []
        while True:
            begin = self._text.find(BEGIN)
            if begin < 0:
                num_shown = len(self._text) - overlap(self._text, BEGIN)
                self._take_content(num_shown, parts)
                return parts
            self._take_content(begin, parts)
            end = self._text.find(END)
            if end < 0:
                return parts
            self._take_call(end + len(END), parts)

    def end(self) -> list[dict[str, Any]]:
        """What was held back."""
        parts: list[dict[str, Any]] = []
        call = None if self._is_begun else _parsed(self._text)
        if (call is not None and call["name"] in self._names) or self._text.startswith(BEGIN):
            self._take_call(len(self._text), parts)
        self._take_content(len(self._text), parts)
        return parts

    def _take_content(self, num_characters: int, parts: list[dict[str, Any]]) -> None:
        content, self._text = self._text[:num_characters], self._text[num_characters:]
        # Around a call there are line ends, which nobody said.
        if content.strip() or (content and not self.num_calls):
            parts.append({"content": content})

    def _take_call(self, num_characters: int, parts: list[dict[str, Any]]) -> None:
        text, self._text = self._text[:num_characters], self._text[num_characters:]
        call = _parsed(text.removeprefix(BEGIN).removesuffix(END))
        if call is None:
            parts.append({"content": text})
            return
        function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
        parts.append(
            {
                "tool_calls": [
                    {
                        "index": self.num_calls,
                        "id": f"call_{secrets.token_hex(12)}",
                        "type": "function",
                        "function": function,
                    }
                ]
            }
        )
        self.num_calls += 1


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    return {"name": call["name"], "arguments": call.get("arguments", {})}
