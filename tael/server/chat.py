"""``/v1/chat/completions``."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from tael.economics.usage import openai_chat
from tael.request import FinishReason, SamplingParams, TokenLogprobs
from tael.server.errors import ApiError, bad_request
from tael.server.openai_schema import (
    AssistantMessage,
    ChatMessage,
    ChatRequest,
    CompletionSampling,
    Content,
    JsonObjectFormat,
    JsonSchemaFormat,
    Sampling,
    ToolMessage,
)
from tael.server.service import Piece, Run, Service, Work
from tael.server.streaming import EventStream, data
from tael.server.structured import ToolUse, grammar_of, json_grammar
from tael.server.tool_calls import ToolCallParser

FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


async def answer(service: Service, run: Run, request: ChatRequest) -> dict[str, Any] | EventStream:
    """The response, or the stream of it. Raises ApiError."""
    tool_use = ToolUse(request.tools or (), request.tool_choice)
    tool_use.check(service)
    grammar = grammar_of(
        tool_use,
        _format_grammar(request),
        param="response_format",
        ignore_eos=request.ignore_eos,
        parallel_tool_calls=request.parallel_tool_calls,
    )
    messages = [template_message(message) for message in request.messages]
    prompt = await prompt_of(service, messages, tool_use)
    params = _params(request, service)
    await run.start(Work([prompt], params, request.stream, grammar))
    writer = _Writer(service, run, request, tool_use)
    if request.stream:
        return EventStream(run, writer.events(), openai_error_event)
    return await writer.whole()


def template_message(message: ChatMessage) -> dict[str, Any]:
    """A message as templates expect it. Raises ApiError."""
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": text_of(message.content)}
    if isinstance(message, ToolMessage):
        turn["tool_call_id"] = message.tool_call_id
    if isinstance(message, AssistantMessage) and message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": arguments_object(call.function.arguments, "messages"),
                },
            }
            for call in message.tool_calls
        ]
    return turn


def arguments_object(text: str, param: str) -> dict[str, Any]:
    """The arguments of a tool call, which templates want as an object. Raises ApiError, which names
    ``param``, for what is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise bad_request("The arguments of a tool call must be a JSON object.", param=param)
    return value


async def prompt_of(
    service: Service, messages: Sequence[Mapping[str, Any]], tool_use: ToolUse
) -> list[int]:
    """The tokens of a conversation, in any dialect. Raises ApiError for one so long that it cannot
    fit, before it takes the time to be written and tokenised."""
    service.check_length(sum(len(message["content"]) for message in messages))
    tokenizer = service.engine.tokenizer
    arguments = tool_use.template_arguments()
    return await service.in_thread(lambda: tokenizer.apply_chat_template(messages, **arguments))


def text_of(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


def sampling_params(
    request: Sampling, *, vocab_size: int, max_tokens: int | None, logprobs: int | None = None
) -> SamplingParams:
    """The engine's parameters for those of an endpoint."""
    common: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "ignore_eos": request.ignore_eos,
        "logprobs": logprobs,
    }
    if isinstance(request, CompletionSampling):
        stop = request.stop or []
        common |= {
            "n": request.n or 1,
            "seed": request.seed,
            "stop": [stop] if isinstance(stop, str) else stop,
            "presence_penalty": request.presence_penalty or 0.0,
            "frequency_penalty": request.frequency_penalty or 0.0,
            "logit_bias": _logit_bias(request.logit_bias or {}, vocab_size),
        }
    return SamplingParams(**common)


def openai_error_event(error: ApiError) -> str:
    """Instead of [DONE]."""
    return data(error.openai())


def _format_grammar(request: ChatRequest) -> str | None:
    wanted = request.response_format
    if isinstance(wanted, JsonSchemaFormat):
        return json_grammar(wanted.json_schema.schema_ or {}, "response_format")
    if isinstance(wanted, JsonObjectFormat):
        return json_grammar({"type": "object"}, "response_format")
    return None


def _params(request: ChatRequest, service: Service) -> SamplingParams:
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", param="top_logprobs")
    return sampling_params(
        request,
        vocab_size=service.engine.ready.vocab_size,
        max_tokens=request.max_completion_tokens or request.max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _logit_bias(biases: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    by_id = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size):
            raise bad_request(
                f"logit_bias has the key {key[:20]!r}; keys are token ids from 0 to "
                f"{vocab_size - 1}.",
                param="logit_bias",
            )
        by_id[int(key)] = bias
    return by_id


class _Writer:
    """Writes the answers of one request, whole or as chunks."""

    def __init__(self, service: Service, run: Run, request: ChatRequest, tool_use: ToolUse) -> None:
        self._service = service
        self._run = run
        self._request = request
        self._head = {
            "id": f"chatcmpl-{run.id}",
            "created": int(time.time()),
            "model": service.model,
            "service_tier": run.service_tier,
        }
        self._includes_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._parsers = [ToolCallParser(tool_use.names) for _ in range(request.n or 1)]

    async def whole(self) -> dict[str, Any]:
        choices = [_Choice() for _ in self._parsers]
        async for piece in self._run.pieces():
            choice = choices[piece.index]
            for part in self._parts(piece):
                choice.add(part)
            choice.logprobs += piece.logprobs
            if piece.finish_reason is not None:
                choice.finish_reason = self._finish_reason(piece)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": choice.message(),
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": openai_chat(self._run.usage),
        }

    async def events(self) -> AsyncIterator[str]:
        for index in range(len(self._parsers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for piece in self._run.pieces():
            logprobs = self._logprobs(piece.logprobs)
            for part in self._parts(piece):
                yield self._chunk(piece.index, part, logprobs)
                logprobs = None
            if piece.finish_reason is not None:
                reason = self._finish_reason(piece)
                yield self._chunk(piece.index, {}, logprobs, reason)
            elif logprobs is not None:  # of half a character, say
                yield self._chunk(piece.index, {"content": ""}, logprobs)
        if self._includes_usage:
            yield self._event([], openai_chat(self._run.usage))
        yield "data: [DONE]\n\n"

    def _parts(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece as what it adds to the message."""
        parser = self._parsers[piece.index]
        parts = parser.push(piece.text)
        return parts + parser.end() if piece.finish_reason is not None else parts

    def _finish_reason(self, piece: Piece) -> str:
        assert piece.finish_reason is not None
        if piece.finish_reason is FinishReason.STOP and self._parsers[piece.index].num_calls:
            return "tool_calls"
        return FINISH_REASONS[piece.finish_reason]

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> str:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return self._event([choice], None)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> str:
        event = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return data({**event, "usage": usage} if self._includes_usage else event)

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._request.logprobs or not logprobs:
            return None
        return {"content": [self._token(entry) for entry in logprobs], "refusal": None}

    def _token(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._scored(token_id, logprob) for token_id, logprob in entry.top]
        return {**self._scored(entry.token_id, entry.logprob), "top_logprobs": top}

    def _scored(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._service.engine.tokenizer.token_bytes(token_id)
        return {
            "token": token.decode("utf-8", "replace"),
            "logprob": finite(logprob),
            "bytes": list(token),
        }


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI says -9999 for what is next to impossible."""
    return max(logprob, -9999.0)


class _Choice:
    """One answer, put together."""

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.logprobs: list[TokenLogprobs] = []
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, part: Mapping[str, Any]) -> None:
        self._content.append(part.get("content", ""))
        for call in part.get("tool_calls", ()):
            self._calls.append({key: value for key, value in call.items() if key != "index"})

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "".join(self._content) or (None if self._calls else ""),
            "refusal": None,
            "annotations": [],
        }
        if self._calls:
            message["tool_calls"] = self._calls
        return message
