"""The official client of Anthropic drives its endpoint, streaming and not."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest
from anthropic import Anthropic
from running import MODEL, Running

from tael import LLM, SamplingParams

MESSAGES: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Say hi"}]}]
GREEDY = {"temperature": 0}
"""Newer clients do not offer it, older ones send it."""
PLAIN = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi"}]


@pytest.fixture
def client(server: Running) -> Anthropic:
    return server.anthropic()


def test_message(client: Anthropic, llm: LLM) -> None:
    expected = llm.chat(PLAIN, SamplingParams(temperature=0, max_tokens=20))
    answer = client.messages.create(
        model=MODEL, max_tokens=20, system="Be brief.", messages=MESSAGES, extra_body=GREEDY
    )
    assert [block.text for block in answer.content if block.type == "text"] == [expected.text]
    assert answer.stop_reason == "max_tokens" and answer.stop_sequence is None
    usage = answer.usage
    prompt = (
        usage.input_tokens
        + (usage.cache_read_input_tokens or 0)
        + (usage.cache_creation_input_tokens or 0)
    )
    assert prompt == len(expected.prompt_token_ids) and usage.output_tokens == 20


def test_message_stream(client: Anthropic, llm: LLM) -> None:
    expected = llm.chat(PLAIN, SamplingParams(temperature=0, max_tokens=20))
    with client.messages.stream(
        model=MODEL, max_tokens=20, system="Be brief.", messages=MESSAGES, extra_body=GREEDY
    ) as stream:
        assert "".join(stream.text_stream) == expected.text
        answer = stream.get_final_message()
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 20


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequence(client: Anthropic, llm: LLM, stream: bool) -> None:
    text = llm.chat(PLAIN, SamplingParams(temperature=0, max_tokens=20)).text
    parameters: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 20,
        "extra_body": GREEDY,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": MESSAGES,
        "stop_sequences": ["never to be seen", text[5:8]],
    }
    if stream:
        with client.messages.stream(**parameters) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**parameters)
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", text[5:8])
    (block,) = answer.content
    assert block.type == "text" and text.startswith(block.text) and len(block.text) <= 5


TOOLS: list[Any] = [
    {
        "name": name,
        "description": "Looks it up.",
        "input_schema": {
            "type": "object",
            "properties": {"today": {"type": "boolean"}},
            "required": ["today"],
            "additionalProperties": False,
        },
    }
    for name in ("weather", "news")
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "news"}])
def test_tools(client: Anthropic, stream: bool, choice: dict[str, Any]) -> None:
    parameters: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 150,
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "extra_body": GREEDY,
    }
    if stream:
        with client.messages.stream(**parameters) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**parameters)
    assert answer.stop_reason == "tool_use"
    (call,) = answer.content
    assert call.type == "tool_use" and call.name in ("weather", "news")
    assert choice["type"] == "any" or call.name == "news"
    assert isinstance(call.input["today"], bool)
    follow_up = client.messages.create(
        model=MODEL,
        max_tokens=2,
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": [call.model_dump(exclude_none=True)]},  # type: ignore[list-item]
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": call.id, "content": "rain"},
                    {"type": "text", "text": "And?"},
                ],
            },
        ],
        tools=TOOLS,
        extra_body=GREEDY,
    )
    assert follow_up.usage.output_tokens == 2


def test_count_tokens(client: Anthropic, llm: LLM) -> None:
    count = client.messages.count_tokens(model=MODEL, system="Be brief.", messages=MESSAGES)
    assert count.input_tokens == len(llm.encode(PLAIN))


def test_errors(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="claude", max_tokens=2, messages=MESSAGES)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        client.messages.create(
            model=MODEL, max_tokens=2, messages=MESSAGES, extra_body={"thinking": {}}
        )
    with pytest.raises(anthropic.BadRequestError, match="context"):
        client.messages.create(
            model=MODEL, max_tokens=2, messages=[{"role": "user", "content": "x" * 300}]
        )
