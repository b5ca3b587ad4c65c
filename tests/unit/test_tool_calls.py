"""Tool calls in a text, however it is cut into pieces."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("fastapi")
from tael.server.tool_calls import ToolCallParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": [1, "</b>"]}}\n</tool_call>'


def parsed(pieces: list[str], is_active: bool = True) -> tuple[str, list[Any]]:
    parser = ToolCallParser(is_active)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.end()
    calls = [call for part in parts for call in part.get("tool_calls", ())]
    assert [call["index"] for call in calls] == list(range(parser.num_calls))
    return "".join(part.get("content", "") for part in parts), [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls
    ]


TEXTS = [
    ("hello", "hello", 0),
    (CALL, "", 1),
    (f"Let me see.\n{CALL}\n{CALL}", "Let me see.\n", 2),
    ("a < b <tool", "a < b <tool", 0),
    ("<tool_call>nonsense</tool_call>!", "<tool_call>nonsense</tool_call>!", 0),
    ('<tool_call>{"name": "f", "arguments": {"x": [1, "</b>"]}}', "", 1),
    ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', 0),
    ("<tool_call>" * 3, "<tool_call>" * 3, 0),
]


@given(st.data())
@pytest.mark.parametrize(("text", "content", "num_calls"), TEXTS)
def test_calls_are_found(text: str, content: str, num_calls: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    shown, calls = parsed(pieces)
    assert shown == content
    assert calls == [("f", {"x": [1, "</b>"]})] * num_calls


def test_without_tools_nothing_is_a_call() -> None:
    assert parsed([CALL], is_active=False) == (CALL, [])
