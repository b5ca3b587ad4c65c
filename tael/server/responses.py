"""``/v1/responses``: OpenAI's newer endpoint, for text and calls of functions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from tael.economics.usage import openai_responses
from tael.request import FinishReason
from tael.server.chat import arguments_object, prompt_of, sampling_params
from tael.server.errors import ApiError
from tael.server.openai_schema import Function, JsonObjectFormat, NamedFunction, NamedTool, Tool
from tael.server.responses_schema import (
    FunctionCallItem,
    FunctionCallOutput,
    JsonSchemaFormat,
    NamedFunctionTool,
    ResponsesRequest,
)
from tael.server.service import Piece, Run, Service, Work
from tael.server.streaming import EventStream, data
from tael.server.structured import ToolUse, grammar_of, json_grammar
from tael.server.tool_calls import ToolCallParser

Event = tuple[str, dict[str, Any]]
"""Its type and its fields."""


async def answer(
    service: Service, run: Run, request: ResponsesRequest
) -> dict[str, Any] | EventStream:
    """The response, or the stream of it. Raises ApiError."""
    tool_use = _tool_use(request)
    tool_use.check(service)
    grammar = grammar_of(
        tool_use,
        _format_grammar(request),
        param="text.format",
        ignore_eos=request.ignore_eos,
        parallel_tool_calls=request.parallel_tool_calls,
    )
    prompt = await prompt_of(service, _messages(request), tool_use)
    params = sampling_params(
        request,
        vocab_size=service.engine.ready.vocab_size,
        max_tokens=request.max_output_tokens,
    )
    await run.start(Work([prompt], params, request.stream, grammar))
    writer = _Writer(service, run, request, tool_use)
    if request.stream:
        return EventStream(run, writer.events(), writer.failed)
    async for _ in writer.output():
        pass
    return writer.response()


def _tool_use(request: ResponsesRequest) -> ToolUse:
    tools = [
        Tool(type="function", function=Function(**tool.model_dump(exclude={"type"})))
        for tool in request.tools or ()
    ]
    choice = request.tool_choice
    if isinstance(choice, NamedFunctionTool):
        return ToolUse(tools, NamedTool(type="function", function=NamedFunction(name=choice.name)))
    return ToolUse(tools, choice)


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation as templates expect it."""
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for item in request.input:
        if isinstance(item, FunctionCallItem):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(_call(item))
        elif isinstance(item, FunctionCallOutput):
            output = _text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
        else:
            role = "system" if item.role == "developer" else item.role
            messages.append({"role": role, "content": _text(item.content)})
    return messages


def _call(item: FunctionCallItem) -> dict[str, Any]:
    arguments = arguments_object(item.arguments, "input")
    function = {"name": item.name, "arguments": arguments}
    return {"id": item.call_id, "type": "function", "function": function}


def _text(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _format_grammar(request: ResponsesRequest) -> str | None:
    wanted = request.text.format if request.text else None
    if isinstance(wanted, JsonSchemaFormat):
        return json_grammar(wanted.schema_, "text.format")
    if isinstance(wanted, JsonObjectFormat):
        return json_grammar({"type": "object"}, "text.format")
    return None


class _Writer:
    """Writes the response of one request, whole or as events."""

    def __init__(
        self, service: Service, run: Run, request: ResponsesRequest, tool_use: ToolUse
    ) -> None:
        self._service = service
        self._run = run
        self._request = request
        self._parser = ToolCallParser(tool_use.names)
        self._created_at = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._texts: list[str] | None = None
        """Of the last item, as long as that is a message that goes on."""
        self._reason: FinishReason | None = None
        self._num_events = 0

    async def output(self) -> AsyncIterator[Event]:
        """The items of the output as they grow."""
        async for piece in self._run.pieces():
            for event in self._grow(piece):
                yield event

    def response(self) -> dict[str, Any]:
        """The response object as it is now."""
        is_cut = self._reason is FinishReason.LENGTH
        status = "incomplete" if is_cut else "completed"
        if self._reason is None:
            status = "in_progress"
        request, choice = self._request, self._request.tool_choice or "auto"
        return {
            "id": f"resp_{self._run.id}",
            "object": "response",
            "created_at": self._created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "frequency_penalty": 0.0,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata or {},
            "model": self._service.model,
            "output": self._items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "presence_penalty": 0.0,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": self._run.service_tier,
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": self._format()},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_logprobs": 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None if self._reason is None else openai_responses(self._run.usage),
            "user": request.user,
        }

    async def events(self) -> AsyncIterator[str]:
        started = self.response()
        yield self._event("response.created", {"response": started})
        yield self._event("response.in_progress", {"response": started})
        async for name, fields in self.output():
            yield self._event(name, fields)
        response = self.response()
        yield self._event(f"response.{response['status']}", {"response": response})

    def failed(self, error: ApiError) -> str:
        """The last event of a response that cannot be brought to its end. The name ``error`` makes
        the clients raise."""
        return self._event(
            "error", {"message": error.message, "code": error.code, "param": error.param}
        )

    def _grow(self, piece: Piece) -> Iterator[Event]:
        parts = self._parser.push(piece.text)
        self._reason = piece.finish_reason
        if self._reason is not None:
            parts += self._parser.end()
        for part in parts:
            if "content" in part:
                yield from self._add_text(part["content"])
            for call in part.get("tool_calls", ()):
                yield from self._end_message("completed")
                yield from self._add_call(call)
        if self._reason is not None:
            if not self._items:  # it said nothing
                yield from self._begin_message()
            is_cut = self._reason is FinishReason.LENGTH
            yield from self._end_message("incomplete" if is_cut else "completed")

    def _add_text(self, text: str) -> Iterator[Event]:
        if self._texts is None:
            yield from self._begin_message()
        assert self._texts is not None
        self._texts.append(text)
        delta = {**self._part_place, "delta": text, "logprobs": []}
        yield "response.output_text.delta", delta

    def _begin_message(self) -> Iterator[Event]:
        self._texts = []
        item = {
            "id": f"msg_{self._run.id}_{len(self._items)}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        self._items.append(item)
        yield "response.output_item.added", {**self._place, "item": item}
        yield "response.content_part.added", {**self._part_place, "part": _part("")}

    def _end_message(self, status: str) -> Iterator[Event]:
        """If the last item is a message that goes on."""
        if self._texts is None:
            return
        text, self._texts = "".join(self._texts), None
        item = self._items[-1]
        item |= {"status": status, "content": [_part(text)]}
        yield "response.output_text.done", {**self._part_place, "text": text, "logprobs": []}
        yield "response.content_part.done", {**self._part_place, "part": _part(text)}
        yield "response.output_item.done", {**self._place, "item": item}

    def _add_call(self, call: Mapping[str, Any]) -> Iterator[Event]:
        arguments = call["function"]["arguments"]
        item = {
            "id": f"fc_{self._run.id}_{len(self._items)}",
            "type": "function_call",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": arguments,
            "status": "completed",
        }
        self._items.append(item)
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield "response.output_item.added", {**self._place, "item": begun}
        place = {**self._place, "item_id": item["id"]}
        yield "response.function_call_arguments.delta", {**place, "delta": arguments}
        done = {**place, "name": item["name"], "arguments": arguments}
        yield "response.function_call_arguments.done", done
        yield "response.output_item.done", {**self._place, "item": item}

    @property
    def _place(self) -> dict[str, Any]:
        """Of the last item."""
        return {"output_index": len(self._items) - 1}

    @property
    def _part_place(self) -> dict[str, Any]:
        """Of the text of the last item."""
        return {**self._place, "item_id": self._items[-1]["id"], "content_index": 0}

    def _format(self) -> dict[str, Any]:
        wanted = self._request.text.format if self._request.text else None
        if wanted is None:
            return {"type": "text"}
        return wanted.model_dump(by_alias=True, exclude_none=True)

    def _event(self, name: str, fields: Mapping[str, Any]) -> str:
        self._num_events += 1
        return data({"type": name, "sequence_number": self._num_events - 1, **fields}, event=name)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
