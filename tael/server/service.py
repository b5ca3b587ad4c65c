"""One API request on its way: admitted, priced, recorded, computed, settled.

The endpoints of all dialects turn what they are sent into prompts and parameters, ``Run`` them, and
write what comes in their own words.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import TypeVar

from tael.economics.journal import Outcome
from tael.economics.keys import Key, Keys
from tael.economics.ledger import Ledger
from tael.economics.rate_card import ServiceTier
from tael.engine.engine import OutputDelta
from tael.errors import TaelError
from tael.request import FinishReason, SamplingParams, TokenLogprobs, Usage
from tael.server.admission import Admission, Price
from tael.server.engine_client import EngineClient, EngineDownError, RefusedError
from tael.server.errors import ApiError, bad_request, engine_down
from tael.server.meter import Meter
from tael.server.metrics import Metrics

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_TOKEN_CHARACTERS = 128
"""More than any vocabulary's tokens stand for on average, runs of spaces included."""

PROGRESS_TOKENS = 256
"""Output tokens between two progress records in the ledger."""

RECORD_TIMEOUT_S = 5.0
"""How long the end of an answer waits for its settlement to be on the disk. A ledger that cannot be
written goes on trying, and holds nobody up."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of an answer. Answers are numbered through: those to the first prompt, then those to the
    second."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None
    stop_string: str | None
    """The one that ended the answer, if one did."""
    prompt_logprobs: tuple[TokenLogprobs, ...]
    """With the first piece of the first answer to a prompt, if asked for."""


@dataclass(frozen=True, slots=True)
class Work:
    """What an API request asks the engine for."""

    prompts: Sequence[list[int]]
    params: SamplingParams
    is_streamed: bool
    """Answers are delivered as they come, and not when they are whole."""
    grammar: str | None = None


class Service:
    """What all requests share."""

    def __init__(
        self,
        engine: EngineClient,
        admission: Admission,
        metrics: Metrics,
        model: str,
        *,
        keys: Keys | None,
        ledger: Ledger | None,
    ) -> None:
        self.engine = engine
        self.admission = admission
        self.metrics = metrics
        self.model = model
        """The name that callers use."""
        self.keys = keys
        self.ledger = ledger
        self.output_tokens = Meter()
        """Of all callers, as they are delivered."""
        self.usage_of_key: defaultdict[str, Usage] = defaultdict(Usage)
        """By key id: of the requests that this process has settled."""
        self.is_draining = False
        """No request is taken any more; those under way are finished."""
        # Two, so that a long prompt does not hold up short ones; more would take cores from steps.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tael-text")

    @property
    def is_ready(self) -> bool:
        return self.engine.is_ready and not self.is_draining

    def check_model(self, name: str) -> None:
        if name != self.model:
            raise ApiError(
                404,
                f"The model {name[:100]!r} does not exist; this server has {self.model!r}.",
                "model_not_found",
                param="model",
            )

    def check_length(self, num_characters: int) -> None:
        """Raises ApiError for a prompt that cannot fit, however it is tokenised."""
        longest = self.engine.ready.max_model_len
        if num_characters > longest * MAX_TOKEN_CHARACTERS:
            raise bad_request(
                f"A prompt of {num_characters:,} characters cannot fit the context of "
                f"{longest:,} tokens.",
                "context_length_exceeded",
            )

    async def in_thread(self, function: Callable[[], T]) -> T:
        """For templates and tokenizers. Raises ApiError for what they refuse."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function)
        except TaelError as error:
            raise bad_request(str(error)) from error

    def run(self, key: Key, service_tier: ServiceTier) -> Run:
        """Let a request in. Raises ApiError; nothing has been allocated then."""
        if self.is_draining:
            raise ApiError(
                503, "The server is shutting down; retry.", "shutting_down", retry_after_s=5.0
            )
        if not self.engine.is_ready:
            raise engine_down()
        return Run(self, key, service_tier)


class Run:
    """An API request from its admission to its settlement. ``close`` it in any case."""

    def __init__(self, service: Service, key: Key, service_tier: ServiceTier) -> None:
        self.id = secrets.token_hex(16)
        """Unique, and the server's own: what callers call their requests is a label at most."""
        self.service_tier = service_tier
        self.usage = Usage()
        """What the engine said that the request took. Whole once all pieces have come."""
        self._service = service
        self._key = key
        self._gate = ExitStack()
        self._gate.enter_context(service.admission.request(key))
        self._tasks: list[asyncio.Task[None]] = []
        self._received: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._num_choices = 0
        self._num_unsettled = 0
        self._outcomes: set[Outcome] = set()
        self._is_streamed = False
        self._settlement: Future[int] | None = None
        self._price = Price()
        self._delivered: dict[int, Usage] = {}
        """By the first of a prompt's choices: what has been delivered so far."""
        self._arrival_s = time.monotonic()
        self._last_token_s: float | None = None

    @property
    def headers(self) -> dict[str, str]:
        return {
            "x-request-id": self.id,
            **self._service.admission.headers(self._key),
        }

    async def start(self, work: Work) -> None:
        """Queue the work, and wait until the engine has taken the first of it. Raises ApiError."""
        params = work.params
        max_model_len = self._service.engine.ready.max_model_len
        for prompt in work.prompts:
            if len(prompt) >= max_model_len:
                raise bad_request(
                    f"This model's maximum context length is {max_model_len} tokens and the prompt "
                    f"has {len(prompt)}; one at least must be left for the answer.",
                    "context_length_exceeded",
                )
            if not prompt:
                raise bad_request("The prompt has no tokens.")
        longest = [
            min(params.max_tokens or max_model_len, max_model_len - len(prompt))
            for prompt in work.prompts
        ]
        num_prompt_tokens = sum(map(len, work.prompts))
        max_output_tokens = params.n * sum(longest)
        self._price = self._gate.enter_context(
            self._service.admission.tokens(self._key, num_prompt_tokens + max_output_tokens)
        )
        await self._reserve(num_prompt_tokens, max_output_tokens)
        self._is_streamed = work.is_streamed
        self._num_choices = len(work.prompts) * params.n
        self._num_unsettled = len(work.prompts)
        self._tasks = [
            asyncio.create_task(
                self._compute(i * params.n, prompt, len(prompt) + params.n * longest[i], work)
            )
            for i, prompt in enumerate(work.prompts)
        ]
        first = await self._received.get()
        if isinstance(first, Exception):
            raise first

    async def pieces(self) -> AsyncIterator[Piece]:
        """Until all answers have ended, and that is on record: what comes after, the usage, is what
        the ledger has even if the server dies. Raises ApiError if one cannot be brought to its
        end."""
        num_left = self._num_choices
        while num_left > 0:
            item = await self._received.get()
            if isinstance(item, Exception):
                raise item
            if item is not None:
                num_left -= item.finish_reason is not None
                yield item
        if self._settlement is not None:
            recorded = asyncio.wrap_future(self._settlement)
            await asyncio.wait({recorded}, timeout=RECORD_TIMEOUT_S)

    def close(self) -> None:
        """End what is not finished."""
        for task in self._tasks:
            task.cancel()
        if not self._tasks:
            self._gate.close()

    async def _reserve(self, num_prompt_tokens: int, max_output_tokens: int) -> None:
        """Put the price on record. Raises ApiError if that cannot be done."""
        if self._service.ledger is None:
            return
        reservation = asyncio.wrap_future(
            self._service.ledger.reserve(
                self.id,
                key_id=self._key.key_id,
                model=self._service.model,
                num_prompt_tokens=num_prompt_tokens,
                max_output_tokens=max_output_tokens,
                service_tier=self.service_tier,
            )
        )
        try:
            await asyncio.shield(reservation)
        except TaelError as error:
            raise ApiError(503, str(error), "ledger_unavailable", retry_after_s=30.0) from error
        except asyncio.CancelledError:  # the row will be there all the same
            self._outcomes.add(Outcome.ABORTED)
            self._settle_ledger()
            raise

    async def _compute(self, first_index: int, prompt: list[int], price: int, work: Work) -> None:
        """One prompt: wait for its turn, and pass on what the engine says."""
        service, turn, is_taken, is_settled = self._service, None, False, False
        self._delivered[first_index] = Usage(num_prompt_tokens=len(prompt))

        def settle(outcome: Outcome, usage: Usage | None) -> None:
            # Once: an engine can die, or a caller leave, between its taking the prompt and our
            # hearing of that.
            nonlocal is_settled
            if not is_settled:
                is_settled = True
                self._settle(outcome, usage or self._delivered[first_index])

        try:
            # A grammar that takes long to compile must not keep other prompts waiting.
            num_prompt_tokens = len(prompt) if work.grammar is None else 0
            turn = await service.admission.turn(
                self._key, num_prompt_tokens, price, work.params.n, self.service_tier
            )
            generation = await service.engine.submit(
                prompt,
                work.params,
                cache_salt="" if service.keys is None else service.keys.cache_salt(self._key),
                grammar=work.grammar,
                settled=settle,
            )
            is_taken = True
            self._received.put_nowait(None)
            try:
                async for delta in generation:
                    service.admission.begun(turn)
                    if generation.usage is not None and work.is_streamed:
                        self._count(first_index, delta, generation.usage)
                    self._deliver(first_index, delta)
            finally:
                generation.close()
        except EngineDownError:
            self._received.put_nowait(engine_down())
        except RefusedError as error:
            self._received.put_nowait(bad_request(str(error), error.code))
        except ApiError as error:
            self._received.put_nowait(error)
        except Exception:
            logger.exception("request %s failed", self.id)
            self._received.put_nowait(ApiError(500, "The server failed on it.", "internal"))
        finally:
            if turn is not None:
                service.admission.done(turn)
            if not is_taken:
                settle(Outcome.ABORTED, Usage())

    def _deliver(self, first_index: int, delta: OutputDelta) -> None:
        if delta.finish_reason is FinishReason.ERROR:
            self._outcomes.add(Outcome.FAILED)
            message = f"The engine failed on this request: {delta.error}"
            self._received.put_nowait(ApiError(500, message, "engine_error"))
            return
        index = first_index + delta.index
        self._received.put_nowait(
            Piece(
                index,
                delta.text,
                delta.token_ids,
                delta.logprobs,
                delta.finish_reason,
                delta.stop_string,
                delta.prompt_logprobs,
            )
        )
        if self._last_token_s is None:
            self._service.metrics.first_token(self._arrival_s)
        elif delta.token_ids:
            self._service.metrics.next_token(self._last_token_s)
        self._last_token_s = time.monotonic()
        self._service.output_tokens.add(len(delta.token_ids))

    def _count(self, first_index: int, delta: OutputDelta, begun: Usage) -> None:
        """Record what is delivered, and what its prompt took: at the first token and then now and
        again, for a server that does not live to settle it."""
        before = self._delivered[first_index].num_output_tokens
        after = before + len(delta.token_ids)
        self._delivered[first_index] = replace(begun, num_output_tokens=after)
        if before == 0 or before // PROGRESS_TOKENS < after // PROGRESS_TOKENS:
            self._record_progress()

    def _settle(self, outcome: Outcome, usage: Usage) -> None:
        """One of the prompts has ended. With the last one, the request has."""
        self.usage = _sum([self.usage, usage])
        self._outcomes.add(outcome)
        self._num_unsettled -= 1
        if self._num_unsettled == 0:
            if self._outcome is Outcome.FAILED and not self._is_streamed:
                # All that the caller gets is an error.
                self.usage = replace(self.usage, num_output_tokens=0)
            self._price.num_used_tokens = (
                self.usage.num_prompt_tokens + self.usage.num_output_tokens
            )
            self._gate.close()
            total = self._service.usage_of_key
            total[self._key.key_id] = _sum([total[self._key.key_id], self.usage])
            self._service.metrics.request(self._arrival_s, self.usage, self._outcome)
            self._settle_ledger()

    @property
    def _outcome(self) -> Outcome:
        """Of several prompts, the worst."""
        for outcome in (Outcome.FAILED, Outcome.ABORTED):
            if outcome in self._outcomes:
                return outcome
        return Outcome.FINISHED

    def _record_progress(self) -> None:
        if self._service.ledger is not None:
            self._service.ledger.progress(self.id, _sum(list(self._delivered.values())))

    def _settle_ledger(self) -> None:
        if self._service.ledger is not None:
            self._settlement = self._service.ledger.settle(self.id, self.usage, self._outcome)


def _sum(usages: list[Usage]) -> Usage:
    """Of prompts that are computed apart."""
    names = [field.name for field in fields(Usage)]
    return Usage(**{name: sum(getattr(usage, name) for usage in usages) for name in names})
