"""Tool calls in the text of a model.

The families that Tael ships write them as Hermes does, and as the templates of Qwen ask for:
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``. A model whose template has no tools is
offered none.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from tael.engine.output import overlap

BEGIN, END = "<tool_call>", "</tool_call>"


class ToolCallParser:
    """Splits a text that comes in pieces into content and tool calls, as parts of an OpenAI delta:
    ``{"content": ...}`` or ``{"tool_calls": [...]}``. A call is passed on whole, once it has ended;
    one that is not a call after all is content.
    """

    def __init__(self, is_active: bool) -> None:
        self.num_calls = 0
        self._is_active = is_active
        self._text = ""
        """What is not yet known to be content or a call."""

    def push(self, text: str) -> list[dict[str, Any]]:
        if not self._is_active:
            return [{"content": text}] if text else []
        self._text += text
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
        if self._text.startswith(BEGIN):  # some models leave out the closing tag
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
