"""``/v1/completions``: text or token ids in, text out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tael.economics.usage import openai_chat
from tael.request import TokenLogprobs
from tael.server.chat import FINISH_REASONS, finite, openai_error_event, sampling_params
from tael.server.errors import bad_request
from tael.server.openai_schema import CompletionRequest
from tael.server.service import Piece, Run, Service, Work
from tael.server.streaming import EventStream, data


async def answer(
    service: Service, run: Run, request: CompletionRequest
) -> dict[str, Any] | EventStream:
    """The response, or the stream of it. Raises ApiError."""
    prompts = await _token_ids(service, request)
    ready = service.engine.ready
    if any(max(prompt) >= ready.vocab_size for prompt in prompts if prompt):
        raise bad_request(
            f"A token id is not of this model; they go from 0 to {ready.vocab_size - 1}.",
            param="prompt",
        )
    params = sampling_params(
        request,
        vocab_size=ready.vocab_size,
        max_tokens=request.max_tokens,
        logprobs=request.logprobs,
    )
    if request.echo and request.logprobs is not None:
        params = replace(params, prompt_logprobs=request.logprobs)
    await run.start(Work(prompts, params, request.stream))
    writer = _Writer(service, run, request, prompts)
    if request.stream:
        return EventStream(run, writer.events(), openai_error_event)
    return await writer.whole()


async def _token_ids(service: Service, request: CompletionRequest) -> list[list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [await encoded(service, prompt)]
    if isinstance(prompt[0], str):
        return [await encoded(service, text) for text in prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


async def encoded(service: Service, text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text. Raises ApiError for one that is longer than any that can fit."""
    service.check_length(len(text))
    tokenizer = service.engine.tokenizer
    return await service.in_thread(partial(tokenizer.encode, text, add_special_tokens))


class _Writer:
    """Writes the answers of one request, whole or as chunks."""

    def __init__(
        self,
        service: Service,
        run: Run,
        request: CompletionRequest,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._tokenizer = service.engine.tokenizer
        self._run = run
        self._request = request
        self._includes_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._n = request.n or 1
        self._num_choices = len(prompts) * self._n
        self._echoes = [
            self._tokenizer.decode(prompt) if request.echo else "" for prompt in prompts
        ]
        self._prompts = prompts
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        """By prompt."""
        self._num_shown = [0] * self._num_choices
        """Characters of each answer that tokens with log-probabilities stand for."""
        self._head = {
            "id": f"cmpl-{run.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model,
        }

    async def whole(self) -> dict[str, Any]:
        texts = [self._echoes[index // self._n] for index in range(self._num_choices)]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in texts]
        reasons: list[str | None] = [None] * self._num_choices
        async for piece in self._run.pieces():
            self._note(piece)
            texts[piece.index] += piece.text
            logprobs[piece.index] += piece.logprobs
            if piece.finish_reason is not None:
                reasons[piece.index] = FINISH_REASONS[piece.finish_reason]
        choices = [
            {
                "index": index,
                "text": text,
                "logprobs": self._logprobs(index, logprobs[index], with_prompt=True),
                "finish_reason": reasons[index],
            }
            for index, text in enumerate(texts)
        ]
        return {**self._head, "choices": choices, "usage": openai_chat(self._run.usage)}

    async def events(self) -> AsyncIterator[str]:
        is_begun = [not self._request.echo] * self._num_choices
        async for piece in self._run.pieces():
            self._note(piece)
            index, text, with_prompt = piece.index, piece.text, not is_begun[piece.index]
            if with_prompt:
                text = self._echoes[index // self._n] + text
                is_begun[index] = True
            logprobs = self._logprobs(index, piece.logprobs, with_prompt)
            if text or logprobs or piece.finish_reason:
                yield self._chunk(index, text, logprobs, _reason(piece))
        if self._includes_usage:
            yield self._event([], openai_chat(self._run.usage))
        yield "data: [DONE]\n\n"

    def _note(self, piece: Piece) -> None:
        """The log-probabilities of a prompt come with its first answer, and are those of all."""
        if piece.prompt_logprobs:
            self._prompt_logprobs[piece.index // self._n] = piece.prompt_logprobs

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None
    ) -> str:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._event([choice], None)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> str:
        event = {**self._head, "choices": choices}
        return data({**event, "usage": usage} if self._includes_usage else event)

    def _logprobs(
        self, index: int, entries: Sequence[TokenLogprobs], with_prompt: bool
    ) -> dict[str, Any] | None:
        """Of the next tokens of an answer, after those of the prompt if that is echoed."""
        if self._request.logprobs is None:
            return None
        tokens: list[str] = []
        logprobs: list[float | None] = []
        top: list[dict[str, float] | None] = []
        if with_prompt and self._request.echo:
            place = index // self._n
            tokens.append(self._token(self._prompts[place][0]))
            logprobs.append(None)  # nothing comes before the first token
            top.append(None)
            entries = [*self._prompt_logprobs.get(place, ()), *entries]
        for entry in entries:
            tokens.append(self._token(entry.token_id))
            logprobs.append(finite(entry.logprob))
            top.append({self._token(i): finite(value) for i, value in reversed(entry.top)})
        offsets = []
        for token in tokens:
            offsets.append(self._num_shown[index])
            self._num_shown[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _token(self, token_id: int) -> str:
        return self._tokenizer.token_text(token_id)


def _reason(piece: Piece) -> str | None:
    return None if piece.finish_reason is None else FINISH_REASONS[piece.finish_reason]
