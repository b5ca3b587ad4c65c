"""Which requests compute how many tokens in the next step.

There is no prefill and no decode phase. A step moves ``num_computed_tokens`` of each request
toward ``num_tokens`` under one budget of tokens; a prompt computed in chunks, a prefix hit and
a decode are the same subtraction. A draft adds guesses after ``num_tokens``, and the step moves
past those that were right. What holds, and why:

- *Order.* Running requests go first, in the order in which they were admitted; then waiting
  ones, first come first served.
- *A decode is never starved by a prompt.* A request is left with tokens to compute only when
  the step's budget ran out on it, and then nothing was admitted behind it. So only the last
  running request can be in the middle of its prompt, and the ones before it need one token
  each, for which ``max_num_seqs <= max_num_batched_tokens`` is always enough.
- *A prompt is cut at multiples of CHOICE_TOKENS*, as so many may choose together what they read.
  Only where a step may have no room for them, or its logits are wanted, it is cut anywhere.
- *There is always a next step.* When blocks run out, the last running request gives its own
  back. The first one can thus claim every block of the pools, and ``add`` refused it unless
  empty pools hold it to its very end.
- *No thrashing within a step.* A step that preempted admits nothing.
- *A transfer takes nothing from anybody.* A request whose prefix comes back from disk waits while
  those behind it are admitted, and running requests get the blocks that transfers hold.
- *Drafts take nothing from anybody.* They get what is left of the budget and the blocks once all
  requests have theirs, and ``update`` takes back the blocks of those that were wrong.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from tael.cache.manager import CacheManager
from tael.cache.offload import Readiness
from tael.config import MAX_DRAFT_TOKENS, SchedulerConfig
from tael.errors import TaelError
from tael.request import FinishReason, Request, RequestStatus
from tael.speculative.drafter import Drafter


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """``num_scheduled_tokens`` of a request, from position ``num_computed_tokens`` on."""

    request: Request
    num_scheduled_tokens: int
    """Drafted ones included."""
    samples: bool
    """These are the last of its tokens, so the step's logits give the next one."""
    num_prompt_logits: int
    """Of those before, whose logits are wanted for the log-probabilities of the prompt."""
    draft_token_ids: tuple[int, ...] = ()
    """Guesses of the tokens after the last."""

    @property
    def num_logits(self) -> int:
        """Tokens at the end of the scheduled ones whose logits are wanted."""
        return self.num_prompt_logits + (1 + len(self.draft_token_ids) if self.samples else 0)


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step: its requests in running order, and those that were preempted to make room."""

    scheduled: list[ScheduledRequest]
    preempted: list[Request]


class Scheduler:
    """Holds every unfinished request. A step is ``schedule``, a forward pass and ``update``;
    ``add``, ``finish`` and ``abort`` may come at any moment outside those two calls."""

    def __init__(
        self,
        config: SchedulerConfig,
        manager: CacheManager,
        max_model_len: int,
        drafter: Drafter | None = None,
    ) -> None:
        self.config = config
        self.manager = manager
        self.max_model_len = max_model_len
        self.drafter = drafter
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request. Raises TaelError if it could never run."""
        num_prompt_tokens, limit = request.num_prompt_tokens, self.length_limit(request)
        if num_prompt_tokens == 0:
            raise TaelError("the prompt has no tokens; give at least one.")
        if num_prompt_tokens >= self.max_model_len:
            raise TaelError(
                f"the prompt has {num_prompt_tokens} tokens and the context holds "
                f"{self.max_model_len}, one of them for the answer; shorten the prompt, or raise "
                "the memory budget or the maximum context."
            )
        if not self.manager.can_ever_hold(limit, self.config.max_num_batched_tokens):
            raise TaelError(
                f"a prompt of {num_prompt_tokens} tokens and its answer, {limit} tokens in all, "
                "do not fit the KV cache even alone; lower max_tokens or raise the memory budget."
            )
        self.waiting.append(request)

    def schedule(self) -> Schedule:
        """Choose the next step and allocate its blocks. Empty, while requests are unfinished, only
        if all of them wait for a tier."""
        self.manager.collect()
        scheduled: list[ScheduledRequest] = []
        preempted: list[Request] = []
        budget = self.config.max_num_batched_tokens
        num_logits = self.config.max_num_logits

        while len(scheduled) < len(self.running):  # preemption shortens it from the end
            request = self.running[len(scheduled)]
            num_new_tokens = self._chunk(request, budget, num_logits)
            if self.manager.claim(request, num_new_tokens):
                scheduled.append(self._scheduled(request, num_new_tokens))
                budget = self._budget_after(scheduled[-1], budget)
                num_logits -= scheduled[-1].num_logits
            else:
                preempted.append(self._preempt_last())

        num_passed = 0  # of those at the head of the queue, whose blocks are on their way
        while (
            len(self.waiting) > num_passed
            and not preempted
            and budget >= self.config.prompt_alignment
            and num_logits > 0
            and len(self.running) < self.config.max_num_seqs
        ):
            request = self.waiting[num_passed]
            chunk = partial(self._chunk, request, budget, num_logits)
            readiness = self.manager.restore(request)
            if readiness is Readiness.PENDING:
                num_passed += 1
                continue
            if readiness is Readiness.FULL or not self.manager.start(request, chunk):
                break
            del self.waiting[num_passed]
            self._admit(request)
            scheduled.append(self._scheduled(request, chunk()))
            budget = self._budget_after(scheduled[-1], budget)
            num_logits -= scheduled[-1].num_logits
        if self.drafter is not None:
            self._add_drafts(self.drafter, scheduled, budget)
        return Schedule(scheduled, preempted)

    def update(self, schedule: Schedule, sampled: Mapping[str, Sequence[int]]) -> None:
        """Record a completed forward pass. ``sampled`` maps the id of each request that
        ``samples`` to its next tokens: the first of its draft, as far as they were right, and
        one more. Requests finished during the pass are passed over."""
        for entry in schedule.scheduled:
            request = entry.request
            if request.is_finished:
                continue
            request.num_computed_tokens += entry.num_scheduled_tokens
            if entry.samples:
                self._extend(entry, sampled[request.request_id])
            self.manager.publish(request)
            self.manager.trim(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Take an unfinished request out and give back its blocks."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._meter(request, 0)
            self.manager.store(request)
            self.manager.free(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        if self.drafter is not None:
            self.drafter.finish(request)

    def abort(self, request_id: str) -> Request | None:
        """Finish a request that is no longer wanted; None if there is no such request."""
        for request in chain(self.running, self.waiting):
            if request.request_id == request_id:
                self.finish(request, FinishReason.ABORT)
                return request
        return None

    def has_unfinished(self) -> bool:
        return bool(self.running or self.waiting)

    def length_limit(self, request: Request) -> int:
        """Tokens, prompt and output, at which a request must end."""
        if request.params.max_tokens is None:
            return self.max_model_len
        return min(request.num_prompt_tokens + request.params.max_tokens, self.max_model_len)

    def _chunk(self, request: Request, budget: int, num_logits: int) -> int:
        """Tokens of a request to compute in a step that has this much left."""
        first, left = request.num_computed_tokens, request.num_tokens - request.num_computed_tokens
        if request.wants_prompt_logits:
            return min(left, budget, num_logits)
        return left if left <= budget else budget - (first + budget) % self.config.prompt_alignment

    def _budget_after(self, entry: ScheduledRequest, budget: int) -> int:
        """Nothing is admitted behind a request that is left with tokens to compute."""
        return budget - entry.num_scheduled_tokens if entry.samples else 0

    def _scheduled(
        self, request: Request, num_new_tokens: int, draft: tuple[int, ...] = ()
    ) -> ScheduledRequest:
        self._meter(request, self.manager.kv_bytes(request))
        samples = request.num_computed_tokens + num_new_tokens == request.num_tokens
        num_prompt_logits = num_new_tokens - samples if request.wants_prompt_logits else 0
        return ScheduledRequest(
            request, num_new_tokens + len(draft), samples, num_prompt_logits, draft
        )

    def _meter(self, request: Request, kv_bytes: int) -> None:
        """Count the KV that a request has held until now; from now on it holds ``kv_bytes``."""
        usage, now = request.usage, time.monotonic()
        usage.kv_byte_s += request.held_kv_bytes * (now - request.held_since)
        usage.kv_bytes = max(usage.kv_bytes, kv_bytes)
        request.held_kv_bytes, request.held_since = kv_bytes, now

    def _add_drafts(self, drafter: Drafter, scheduled: list[ScheduledRequest], budget: int) -> None:
        """Lengthen entries of a step by drafts."""
        sampling = [i for i, entry in enumerate(scheduled) if entry.samples]
        num_logits = self.config.max_num_logits - sum(entry.num_logits for entry in scheduled)
        max_num_drafts = min(budget, num_logits)
        drafting = [i for i in sampling if scheduled[i].request.speculation]
        if max_num_drafts <= 0 or not drafting:
            return
        requests = [scheduled[i].request for i in drafting]
        # A step gives one token more than it verifies, and none may lie beyond the limit.
        limits = [
            min(MAX_DRAFT_TOKENS, self.length_limit(request) - request.num_tokens - 1)
            for request in requests
        ]
        num_tokens = sum(entry.num_scheduled_tokens for entry in scheduled)
        drafts = drafter.draft(requests, limits, num_tokens, max_num_drafts)
        for i, request, draft in zip(drafting, requests, drafts, strict=True):
            num_new_tokens = scheduled[i].num_scheduled_tokens
            if draft and self.manager.allocate(request, num_new_tokens + len(draft)):
                scheduled[i] = self._scheduled(request, num_new_tokens, tuple(draft))

    def _extend(self, entry: ScheduledRequest, token_ids: Sequence[int]) -> None:
        """Append the tokens that a request got, and move back before wrong drafts."""
        request, usage = entry.request, entry.request.usage
        num_draft_tokens, num_accepted_tokens = len(entry.draft_token_ids), len(token_ids) - 1
        request.token_ids.extend(token_ids)
        request.num_computed_tokens -= num_draft_tokens - num_accepted_tokens
        usage.num_output_tokens += len(token_ids)
        usage.num_draft_tokens += num_draft_tokens
        usage.num_accepted_tokens += num_accepted_tokens
        if self.drafter is not None and num_draft_tokens > 0:
            self.drafter.observe(request, num_draft_tokens, num_accepted_tokens)

    def _admit(self, request: Request) -> None:
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        # What a request finds in the cache after a preemption is mostly its own, and what it
        # does not find is the engine's doing: neither changes what the first admission saved.
        if request.usage.num_preemptions == 0:
            request.usage.num_cached_tokens = request.num_computed_tokens
            request.usage.queue_s = time.monotonic() - request.arrival_time

    def _preempt_last(self) -> Request:
        """Put the last running request back at the head of the queue, without its blocks."""
        request = self.running.pop()
        self._meter(request, 0)
        self.manager.free(request)
        request.num_computed_tokens = 0
        if request.wants_prompt_logits:
            request.prompt_logprobs.clear()
        request.status = RequestStatus.WAITING
        request.usage.num_preemptions += 1
        self.waiting.appendleft(request)
        return request
