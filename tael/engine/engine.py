"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from tael.backends.base import Backend, HeadOutput, TieredBlocks
from tael.cache.manager import CacheManager
from tael.config import BLOCK_SIZE, CHOICE_TOKENS, NUM_QUESTION_TOKENS, EngineConfig
from tael.engine.grammar import TokenMask
from tael.engine.output import OutputProcessor, Piece
from tael.engine.runner import run_step
from tael.engine.sampler import Sampler
from tael.engine.scheduler import Schedule, Scheduler
from tael.errors import LostBlocksError, TaelError
from tael.loader.paths import cache_dir
from tael.loader.tokenizer import Tokenizer
from tael.memory.budget import (
    available_memory_bytes,
    format_bytes,
    kv_budget,
    plan_pools,
    plan_tiered_pools,
)
from tael.memory.kv_store import KVStore
from tael.memory.tiers.disk import DiskTier
from tael.memory.tiers.disk import overhead_bytes as tier_overhead_bytes
from tael.models.spec import CacheGroup, ModelSpec, cache_groups
from tael.request import FinishReason, Request, SamplingParams, TokenLogprobs, Usage
from tael.speculative.drafter import Drafter

logger = logging.getLogger(__name__)

SPARE_FRACTION = 0.75
"""Of the machine's available memory, what an engine takes unless told. Pages of files that
other programs read count as available; a quarter leaves them some, and room to start more."""

OVERHEAD_BYTES = 12 << 20
"""For what running takes in Python: requests, batches and what drafts are looked up in."""

SAMPLING_BYTES = 96
"""Per token of the vocabulary, for the temporaries of sampling. Measured: 84, with top_p at a
high temperature."""


TOKEN_BYTES = 48
"""Per token of the longest context: an int in the list of a prompt and its place there, and the
places in a request's copy. It counts from some 100,000 tokens on."""

NUM_PREFILL_TOKENS = 128
"""A step of so many tokens or more says how fast prompts are computed."""

TIER_WAIT_S = 0.01
"""A step waits no longer for blocks from disk: the caller may have something else to do."""


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What one step added to one completion of a request."""

    request_id: str
    index: int
    """Which of the ``n`` completions."""
    text: str
    """May be empty: of half a character, say, or of what could become a stop string."""
    token_ids: tuple[int, ...]
    """More than one if drafts were right."""
    logprobs: tuple[TokenLogprobs, ...]
    """One for each token, if asked for."""
    finish_reason: FinishReason | None
    error: str | None
    """What went wrong, if the finish reason is ERROR."""
    usage: Usage | None
    """With the last delta of the last completion: what the whole request took."""
    stop_string: str | None = None
    """The one that ended the completion, if one did."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """With the first delta of the first completion, if asked for: of all tokens of the prompt but
    its first."""


class Engine:
    """Runs one model. Not thread-safe: one thread at a time calls it.

    ``baseline_bytes`` is what the process held before the backend took the weights; it counts
    against the memory budget as they do. Raises TaelError if the budget is too small.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        baseline_bytes: int,
    ) -> None:
        self.spec = spec
        self.config = config
        self.backend = backend
        self.tokenizer = tokenizer
        if config.memory_bytes is None:
            spare_bytes = int(SPARE_FRACTION * available_memory_bytes())
            self.memory_bytes = baseline_bytes + spare_bytes
        else:
            self.memory_bytes = config.memory_bytes
        groups = cache_groups(spec, BLOCK_SIZE, tiered=config.kv_disk_bytes is not None)
        longest = spec.max_position_embeddings
        if config.max_model_len is not None:
            longest = min(longest, config.max_model_len)
        workspace_bytes = overhead_bytes(spec, longest)
        workspace_bytes += backend.reserve(config.scheduler, longest)
        if config.cache_dir is not None:
            workspace_bytes += tier_overhead_bytes(config.cache_bytes, groups)
        kv_bytes = kv_budget(
            self.memory_bytes, backend.weights_bytes, workspace_bytes, baseline_bytes
        )
        tiered: TieredBlocks | None = None
        if config.kv_disk_bytes is None:
            plan = plan_pools(groups, kv_bytes, BLOCK_SIZE, longest, config.scheduler)
        else:
            plan = plan_tiered_pools(
                groups, kv_bytes, config.kv_disk_bytes, BLOCK_SIZE, longest, config.scheduler
            )
            folder = config.kv_disk_dir or cache_dir()
            tiered = backend.tier(groups[0], plan.num_blocks[0], plan.num_slots, folder)
        self.max_model_len = plan.max_model_len
        num_open_blocks = config.scheduler.max_num_open_blocks
        self.kv_store = KVStore(groups, plan.num_blocks, num_open_blocks, tiered)
        store = self.kv_store
        backend.bind_kv(store.pools, store.open_pools, store.summaries)
        fingerprint = kv_fingerprint(spec, backend, config)
        self.tier: DiskTier | None = None
        if config.cache_dir is not None:
            if not backend.fingerprint:
                raise TaelError(
                    "prefixes can be kept on disk by the cpu backend only; leave out the folder "
                    "for KV blocks."
                )
            self.tier = DiskTier(config.cache_dir, config.cache_bytes, self.kv_store, fingerprint)
            # Also when the engine is dropped without close(), or the program ends.
            self._close_tier = weakref.finalize(self, self.tier.close)
        self.manager = CacheManager(
            groups,
            plan.num_blocks,
            BLOCK_SIZE,
            json.dumps(fingerprint, sort_keys=True).encode(),
            num_open_blocks,
            self.tier,
        )
        drafter = Drafter() if config.speculation else None
        self.scheduler = Scheduler(config.scheduler, self.manager, self.max_model_len, drafter)
        self._unfinished: dict[str, list[_Completion]] = {}
        """By the caller's request id."""
        self._forks: dict[str, list[_Completion]] = {}
        """Those of them that wait for the prompt of the first."""
        self._completions: dict[str, _Completion] = {}
        """By the scheduler's request id."""

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        speculation: bool = True,
        mask: TokenMask | None = None,
    ) -> None:
        """Queue a request. Raises TaelError if it cannot be run, ValueError if the id is in use.
        Without ``speculation`` it gets a token a step, as all do if the engine's is off. ``mask``
        says which tokens each answer may consist of.

        Of ``n`` completions the first computes the prompt. The others are queued when it has,
        and find the prompt in the prefix cache.
        """
        if request_id in self._unfinished:
            raise ValueError(f"request {request_id!r} is not finished")
        self._check_token_ids("the prompt", prompt_token_ids)
        self._check_token_ids("logit_bias", params.logit_bias)
        completions = []
        for index in range(params.n):
            request = Request(
                f"{request_id}/{index}",
                prompt_token_ids,
                params if index == 0 else replace(params, prompt_logprobs=None),
                eos_token_ids=self.tokenizer.eos_token_ids,
                cache_salt=cache_salt,
                speculation=speculation,
                is_masked=mask is not None,
            )
            output = OutputProcessor(request, self.scheduler.length_limit(request), self.tokenizer)
            sampler = Sampler(request, index, None if mask is None else mask.copy())
            completions.append(_Completion(request_id, index, request, sampler, output))
        self.scheduler.add(completions[0].request)
        self._unfinished[request_id] = completions
        self._forks[request_id] = completions[1:]
        self._completions.update((c.request.request_id, c) for c in completions)

    def step(self) -> list[OutputDelta]:
        """Compute one step of the unfinished requests.

        An exception in the sampling or the text of one request, or KV of it that the disk has lost,
        ends that request with the reason ERROR; any other is raised. If all requests wait for
        blocks from disk, so does the step, for a moment.
        """
        self._take_lost_blocks()  # nobody is to find what the disk has lost since the last step
        schedule = self.scheduler.schedule()
        if self.tier and not schedule.scheduled:
            self.tier.wait(TIER_WAIT_S)
            return []
        start = time.monotonic()
        result = run_step(schedule, self.manager, self.backend, self.config, self._sample)
        lost, reason = self._take_lost_blocks()
        for entry in schedule.scheduled if lost else ():
            if not lost.isdisjoint(self.manager.block_tables(entry.request)[0]):
                result.fail(entry.request.request_id, LostBlocksError(reason))
        _share(time.monotonic() - start, schedule)
        deltas = [self._fail(self._completions[key], e) for key, e in result.errors.items()]
        pieces: dict[str, Piece] = {}
        for key, token_ids in result.token_ids.items():
            try:
                pieces[key] = self._completions[key].output.extend(token_ids)
            except Exception as error:
                deltas.append(self._fail(self._completions[key], error))
        for key, logprobs in result.prompt_logprobs.items():
            self._completions[key].request.prompt_logprobs += logprobs
        self.scheduler.update(schedule, {key: p.token_ids for key, p in pieces.items()})
        now = time.monotonic()
        num_tokens = sum(entry.num_scheduled_tokens for entry in schedule.scheduled)
        if self.tier and num_tokens >= NUM_PREFILL_TOKENS:
            self.tier.observe_prefill(num_tokens, now - start)
        for key, piece in pieces.items():
            kept = result.logprobs[key][: len(piece.token_ids)]
            deltas.append(self._extend(self._completions[key], piece, kept, now))
        self._queue_forks()
        return deltas

    def abort(self, request_id: str) -> Usage | None:
        """End a request that is no longer wanted. Returns what it took; None if it is not here,
        having finished already perhaps."""
        if request_id not in self._unfinished:
            return None
        forks = self._forks[request_id]
        for completion in self._unfinished[request_id]:
            if not completion.request.is_finished and completion not in forks:
                self.scheduler.finish(completion.request, FinishReason.ABORT)
        return self._forget(request_id)

    def usage(self, request_id: str) -> Usage:
        """What an unfinished request has taken so far. Raises KeyError if it is not here."""
        completions = self._unfinished[request_id]
        return _total([completion.request.usage for completion in completions])

    def has_unfinished(self) -> bool:
        return bool(self._unfinished)

    def close(self) -> None:
        """Finish what is being stored on disk. The engine must not be used afterwards."""
        if self.tier:
            self._close_tier()

    def describe(self) -> str:
        """One line: the longest context, what a token of it costs, and where the bytes go."""
        costs = ", ".join(_token_cost(group) for group in self.manager.groups)
        tiered = self.kv_store.tiered
        on_disk = f" and {format_bytes(tiered.file_bytes)} on disk" if tiered else ""
        return (
            f"context {self.max_model_len:,} tokens ({costs}), "
            f"KV {format_bytes(self.kv_store.num_bytes)}{on_disk}, "
            f"weights {format_bytes(self.backend.weights_bytes)}, "
            f"budget {format_bytes(self.memory_bytes)}"
        )

    def _take_lost_blocks(self) -> tuple[set[int], str]:
        """What the disk has lost since the last call, and why. Nobody finds it any more."""
        if self.kv_store.tiered is None:
            return set(), ""
        lost, reason = self.kv_store.tiered.take_lost()
        if lost:
            logger.error("%s", reason)
            self.manager.forget(0, lost)
        return lost, reason

    def _check_token_ids(self, where: str, token_ids: Collection[int]) -> None:
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.spec.vocab_size:
            raise TaelError(
                f"{where} has a token id that the model does not know; ids go from 0 to "
                f"{self.spec.vocab_size - 1}."
            )

    def _sample(
        self, key: str, head: HeadOutput, row: int, accepted: Sequence[int]
    ) -> tuple[int, TokenLogprobs | None]:
        return self._completions[key].sampler.sample(head, row, accepted)

    def _extend(
        self, completion: _Completion, piece: Piece, logprobs: Sequence[TokenLogprobs], now: float
    ) -> OutputDelta:
        """The delta of a completion that has got its next tokens."""
        request, usage = completion.request, completion.request.usage
        is_first = usage.num_output_tokens == len(piece.token_ids)
        if is_first:
            usage.time_to_first_token_s = now - request.arrival_time
        usage.decode_s = now - request.arrival_time - usage.time_to_first_token_s
        if piece.finish_reason is not None:
            self.scheduler.finish(request, piece.finish_reason)
        return OutputDelta(
            request_id=completion.request_id,
            index=completion.index,
            text=piece.text,
            token_ids=piece.token_ids,
            logprobs=tuple(logprobs),
            finish_reason=piece.finish_reason,
            error=None,
            usage=self._settle(completion),
            stop_string=piece.stop_string,
            prompt_logprobs=tuple(request.prompt_logprobs) if is_first else (),
        )

    def _fail(self, completion: _Completion, error: Exception) -> OutputDelta:
        """End a completion, which is not finished, with an error."""
        logger.error("request %s failed", completion.request.request_id, exc_info=error)
        self.scheduler.finish(completion.request, FinishReason.ERROR)
        return OutputDelta(
            request_id=completion.request_id,
            index=completion.index,
            text="",
            token_ids=(),
            logprobs=(),
            finish_reason=FinishReason.ERROR,
            error=str(error),
            usage=self._settle(completion),
        )

    def _queue_forks(self) -> None:
        for request_id, forks in self._forks.items():
            first = self._unfinished[request_id][0].request
            if first.is_finished or first.num_computed_tokens >= first.num_prompt_tokens:
                for fork in forks:
                    self.scheduler.add(fork.request)
                forks.clear()

    def _settle(self, completion: _Completion) -> Usage | None:
        """The usage of the whole request if ``completion`` was the last of it to finish."""
        completions = self._unfinished[completion.request_id]
        if all(c.request.is_finished for c in completions):
            return self._forget(completion.request_id)
        return None

    def _forget(self, request_id: str) -> Usage:
        del self._forks[request_id]
        completions = self._unfinished.pop(request_id)
        for completion in completions:
            del self._completions[completion.request.request_id]
        return _total([completion.request.usage for completion in completions])


def overhead_bytes(spec: ModelSpec, max_model_len: int) -> int:
    """Memory that an engine takes besides the backend and the KV cache."""
    return OVERHEAD_BYTES + SAMPLING_BYTES * spec.vocab_size + TOKEN_BYTES * max_model_len


def kv_fingerprint(spec: ModelSpec, backend: Backend, config: EngineConfig) -> dict[str, str]:
    """All that the KV of given tokens depends on. It holds what the tokens before have read."""
    return {
        "family": spec.family,
        "spec": hashlib.sha256(repr(spec).encode()).hexdigest(),
        "block_size": str(BLOCK_SIZE),
        "budgets": " ".join(
            map(str, (config.prefill_budget, CHOICE_TOKENS, NUM_QUESTION_TOKENS, config.kv_budget))
        ),
        "layout": "blocks" if config.kv_disk_bytes is None else "slots",
        **backend.fingerprint,
    }


@dataclass(frozen=True, slots=True)
class _Completion:
    """One of the ``n`` answers to a request: a request of its own to the scheduler."""

    request_id: str
    index: int
    request: Request
    sampler: Sampler
    output: OutputProcessor


def _share(step_s: float, schedule: Schedule) -> None:
    """Divide the time of a step among its requests."""
    num_tokens = sum(entry.num_scheduled_tokens for entry in schedule.scheduled)
    for entry in schedule.scheduled:
        entry.request.usage.compute_s += step_s * entry.num_scheduled_tokens / num_tokens


def _total(usages: Sequence[Usage]) -> Usage:
    """The usage of a request from those of its completions. The prompt is the first one's: that
    the others found it in the cache is no saving of the caller's. A KV block that several of them
    referenced counts for each."""
    first = usages[0]
    end_s = max(usage.time_to_first_token_s + usage.decode_s for usage in usages)
    return Usage(
        num_prompt_tokens=first.num_prompt_tokens,
        num_cached_tokens=first.num_cached_tokens,
        num_cache_write_tokens=first.num_cache_write_tokens,
        num_restored_tokens=first.num_restored_tokens,
        num_output_tokens=sum(usage.num_output_tokens for usage in usages),
        num_draft_tokens=sum(usage.num_draft_tokens for usage in usages),
        num_accepted_tokens=sum(usage.num_accepted_tokens for usage in usages),
        num_preemptions=sum(usage.num_preemptions for usage in usages),
        kv_bytes=sum(usage.kv_bytes for usage in usages),
        kv_byte_s=sum(usage.kv_byte_s for usage in usages),
        compute_s=sum(usage.compute_s for usage in usages),
        queue_s=first.queue_s,
        time_to_first_token_s=first.time_to_first_token_s,
        decode_s=end_s - first.time_to_first_token_s,
    )


def _token_cost(group: CacheGroup) -> str:
    cost = f"{group.block_bytes // BLOCK_SIZE:,} bytes a token"
    return cost if group.window is None else f"{cost} of the last {group.window:,}"
