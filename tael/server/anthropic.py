"""``/v1/messages``: the Anthropic dialect."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from tael.economics.usage import anthropic as anthropic_usage
from tael.request import FinishReason, SamplingParams, Usage
from tael.server import chat
from tael.server.anthropic_schema import (
    Block,
    CountTokensRequest,
    Message,
    MessagesRequest,
    NamedChoice,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from tael.server.errors import ApiError
from tael.server.openai_schema import Function, NamedFunction, NamedTool, Tool
from tael.server.service import Piece, Run, Service, Work
from tael.server.streaming import EventStream, data
from tael.server.structured import ToolUse
from tael.server.tool_calls import ToolCallParser


async def answer(
    service: Service, run: Run, request: MessagesRequest
) -> dict[str, Any] | EventStream:
    """The message, or the stream of it. Raises ApiError."""
    prompt = await prompt_of(service, request)
    params = SamplingParams(
        max_tokens=request.max_tokens,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        stop=request.stop_sequences or [],
    )
    grammar = _tool_use(request).grammar()
    await run.start(Work([prompt], params, request.stream, grammar))
    writer = _Writer(service, run, request, len(prompt))
    if request.stream:
        return EventStream(run, writer.events(), _error_event)
    return await writer.whole()


async def prompt_of(service: Service, request: CountTokensRequest) -> list[int]:
    """Token ids of a conversation. Raises ApiError."""
    tool_use = _tool_use(request)
    tool_use.check(service)
    return await chat.prompt_of(service, list(_messages(request)), tool_use)


def _tool_use(request: CountTokensRequest) -> ToolUse:
    tools = [
        Tool(
            type="function",
            function=Function(
                name=tool.name, description=tool.description, parameters=tool.input_schema
            ),
        )
        for tool in request.tools or ()
    ]
    choice = request.tool_choice
    if isinstance(choice, NamedChoice):
        return ToolUse(tools, NamedTool(type="function", function=NamedFunction(name=choice.name)))
    if choice is None or choice.type == "auto":
        return ToolUse(tools, "auto")
    return ToolUse(tools, "required" if choice.type == "any" else "none")


def _messages(request: CountTokensRequest) -> Iterator[dict[str, Any]]:
    if request.system is not None:
        yield {"role": "system", "content": _text(request.system)}
    for message in request.messages:
        yield from _turns(message)


def _turns(message: Message) -> Iterator[dict[str, Any]]:
    """A message in the form of the templates, in which each tool result is a turn of its own."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            yield {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "content": _text(block.content),
            }
    texts = [block.text for block in message.content if isinstance(block, TextBlock)]
    calls = [_call(block) for block in message.content if isinstance(block, ToolUseBlock)]
    if texts or calls or not message.content:
        turn: dict[str, Any] = {"role": message.role, "content": "".join(texts)}
        yield {**turn, "tool_calls": calls} if calls else turn


def _call(block: ToolUseBlock) -> dict[str, Any]:
    return {
        "id": block.id,
        "type": "function",
        "function": {"name": block.name, "arguments": block.input},
    }


def _text(content: str | Sequence[Block]) -> str:
    if isinstance(content, str):
        return content
    return "".join(block.text for block in content if isinstance(block, TextBlock))


def _error_event(error: ApiError) -> str:
    return data(error.anthropic(), event="error")


class _Writer:
    """Writes the message that answers one request, whole or as events."""

    def __init__(
        self, service: Service, run: Run, request: MessagesRequest, num_prompt_tokens: int
    ) -> None:
        self._service = service
        self._run = run
        self._parser = ToolCallParser(_tool_use(request).names)
        self._num_prompt_tokens = num_prompt_tokens
        self._last: Piece | None = None

    async def whole(self) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        async for block, is_new, text in self._blocks():
            if is_new:
                content.append(block)
            content[-1]["text" if block["type"] == "text" else "input"] = (
                content[-1]["text"] + text if block["type"] == "text" else json.loads(text)
            )
        return {
            **self._message(content),
            **self._stop(),
            "usage": self._usage(self._run.usage),
        }

    async def events(self) -> AsyncIterator[str]:
        # The cached part of the prompt is not known yet; message_delta says it.
        usage = self._usage(Usage(num_prompt_tokens=self._num_prompt_tokens))
        not_yet = {"stop_reason": None, "stop_sequence": None, "stop_details": None}
        started = {**self._message([]), **not_yet, "usage": usage}
        yield _event("message_start", {"message": started})
        index = -1
        async for block, is_new, text in self._blocks():
            if is_new:
                if index >= 0:
                    yield _event("content_block_stop", {"index": index})
                index += 1
                yield _event("content_block_start", {"index": index, "content_block": block})
            if block["type"] == "text":
                delta = {"type": "text_delta", "text": text}
            else:
                delta = {"type": "input_json_delta", "partial_json": text}
            yield _event("content_block_delta", {"index": index, "delta": delta})
        if index >= 0:
            yield _event("content_block_stop", {"index": index})
        yield _event(
            "message_delta", {"delta": self._stop(), "usage": self._usage(self._run.usage)}
        )
        yield _event("message_stop", {})

    async def _blocks(self) -> AsyncIterator[tuple[dict[str, Any], bool, str]]:
        """The content as it comes: a block as it begins, whether it does so now, and more of its
        text, or all of its input."""
        in_text = False
        async for piece in self._run.pieces():
            self._last = piece
            parts = self._parser.push(piece.text)
            if piece.finish_reason is not None:
                parts += self._parser.end()
            for part in parts:
                if "content" in part:
                    block: dict[str, Any] = {"type": "text", "text": "", "citations": None}
                    yield block, not in_text, part["content"]
                    in_text = True
                for call in part.get("tool_calls", ()):
                    function = call["function"]
                    block = {
                        "type": "tool_use",
                        "id": call["id"].replace("call_", "toolu_"),
                        "name": function["name"],
                        "input": {},
                        "caller": {"type": "direct"},
                    }
                    yield block, True, function["arguments"]
                    in_text = False

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._run.id}",
            "type": "message",
            "role": "assistant",
            "model": self._service.model,
            "content": content,
            "container": None,
        }

    def _stop(self) -> dict[str, Any]:
        assert self._last is not None
        stop_string = self._last.stop_string
        if self._last.finish_reason is FinishReason.LENGTH:
            reason = "max_tokens"
        elif self._parser.num_calls:
            reason = "tool_use"
        else:
            reason = "end_turn" if stop_string is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stop_string, "stop_details": None}

    def _usage(self, usage: Usage) -> dict[str, Any]:
        return {
            **anthropic_usage(usage),
            "cache_creation": None,
            "inference_geo": None,
            "output_tokens_details": None,
            "server_tool_use": None,
            "service_tier": "standard",
        }


def _event(name: str, fields: Mapping[str, Any]) -> str:
    return data({"type": name, **fields}, event=name)
