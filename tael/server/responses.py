"""``/v1/responses``: OpenAI's newer endpoint, for text."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

from tael.economics.usage import openai_responses
from tael.request import FinishReason
from tael.server.chat import check_length, sampling_params
from tael.server.errors import ApiError, bad_request
from tael.server.responses_schema import (
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponsesRequest,
)
from tael.server.service import Run, Service, Work
from tael.server.streaming import EventStream, data
from tael.server.structured import json_grammar


async def answer(
    service: Service, run: Run, request: ResponsesRequest
) -> dict[str, Any] | EventStream:
    """The response, or the stream of it. Raises ApiError."""
    messages = _messages(request)
    check_length(service, messages)
    tokenizer = service.engine.tokenizer
    prompt = await service.in_thread(partial(tokenizer.apply_chat_template, messages))
    params = sampling_params(
        request,
        vocab_size=service.engine.ready.vocab_size,
        max_tokens=request.max_output_tokens,
    )
    await run.start(Work([prompt], params, request.stream, _grammar(request)))
    writer = _Writer(service, run, request)
    if request.stream:
        return EventStream(run, writer.events(), writer.failed)
    async for piece in run.pieces():
        writer.add(piece.text, piece.finish_reason)
    return writer.response()


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for message in request.input:
        role = "system" if message.role == "developer" else message.role
        content = message.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        messages.append({"role": role, "content": content})
    return messages


def _grammar(request: ResponsesRequest) -> str | None:
    wanted = request.text.format if request.text else None
    if isinstance(wanted, JsonObjectFormat | JsonSchemaFormat):
        if request.ignore_eos:
            raise bad_request(
                "ignore_eos cannot be combined with text.format.",
                "unsupported_parameter",
                param="ignore_eos",
            )
        schema = wanted.schema_ if isinstance(wanted, JsonSchemaFormat) else {"type": "object"}
        return json_grammar(schema, "text.format")
    return None


class _Writer:
    """Writes the response of one request, whole or as events."""

    def __init__(self, service: Service, run: Run, request: ResponsesRequest) -> None:
        self._service = service
        self._run = run
        self._request = request
        self._created_at = int(time.time())
        self._texts: list[str] = []
        self._reason: FinishReason | None = None
        self._num_events = 0

    def add(self, text: str, finish_reason: FinishReason | None) -> None:
        self._texts.append(text)
        self._reason = finish_reason

    def response(self, status: str | None = None, error: ApiError | None = None) -> dict[str, Any]:
        """The response object as it is now."""
        is_cut = self._reason is FinishReason.LENGTH
        if self._reason is not None:
            status = "incomplete" if is_cut else "completed"
        request = self._request
        return {
            "id": f"resp_{self._run.id}",
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._service.model,
            "output": [] if self._reason is None else [self._item(status)],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "service_tier": self._run.service_tier,
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": self._format()},
            "tool_choice": request.tool_choice or "auto",
            "tools": [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None if self._reason is None else openai_responses(self._run.usage),
            "user": request.user,
        }

    async def events(self) -> AsyncIterator[str]:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        started = self.response("in_progress")
        yield self._event("response.created", {"response": started})
        yield self._event("response.in_progress", {"response": started})
        item = {**self._item("in_progress"), "content": []}
        yield self._event("response.output_item.added", {"output_index": 0, "item": item})
        yield self._event("response.content_part.added", {**place, "part": _part("")})
        async for piece in self._run.pieces():
            self.add(piece.text, piece.finish_reason)
            if piece.text:
                delta = {**place, "delta": piece.text, "logprobs": []}
                yield self._event("response.output_text.delta", delta)
        response = self.response()
        status = response["status"]
        text = self._text
        yield self._event("response.output_text.done", {**place, "text": text, "logprobs": []})
        yield self._event("response.content_part.done", {**place, "part": _part(text)})
        item = self._item(status)
        yield self._event("response.output_item.done", {"output_index": 0, "item": item})
        yield self._event(f"response.{status}", {"response": response})

    def failed(self, error: ApiError) -> str:
        """The last event of a response that cannot be brought to its end. The name ``error`` makes
        the clients raise."""
        return self._event(
            "error", {"message": error.message, "code": error.code, "param": error.param}
        )

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    @property
    def _item_id(self) -> str:
        return f"msg_{self._run.id}"

    def _item(self, status: str | None) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [_part(self._text)],
        }

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
