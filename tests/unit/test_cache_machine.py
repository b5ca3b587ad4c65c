"""Random lives of many requests, checked against a simulated KV store; no model is needed. One
state machine with all its rules: one file.

The store remembers, for every slot of every block, which token at the end of which prefix was
last written there. Before a step, every position that its queries look at and that is said to
be computed must hold the KV of the request's own prefix; after the step, the new ones too. That
catches blocks shared wrongly, published before they were complete, released while a query
still needed them, or evicted in use. Drafts, right ones and wrong ones, write KV like other
tokens and must leave no trace: neither in the bookkeeping nor in what a request gets. One file: the
machine, its tier and the mistakes that it must catch are one simulation.

In half of the lives there is a tier below the pools, with a random will: it stores and loads block
by block whenever it likes, forgets, and fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tael.cache import manager
from tael.cache.block_pool import BlockPool
from tael.cache.manager import CacheManager
from tael.cache.offload import Offload
from tael.cache.tier import Load, Lookup, Transfer
from tael.config import SchedulerConfig
from tael.engine.scheduler import Schedule, ScheduledRequest, Scheduler
from tael.models.spec import CacheGroup
from tael.request import FinishReason, Request, RequestStatus, SamplingParams

EOS, ALPHABET = 0, range(1, 3)  # two tokens: different requests often share prefixes
MAX_MODEL_LEN = 40

windows = st.sampled_from([(None,), (None, 6), (None, 3), (None, 11, 1), (5,), (9, 4)])
token_lists = st.lists(st.sampled_from(ALPHABET), max_size=24)
limits = st.none() | st.integers(1, 40)


class Prefixes:
    """Gives every distinct (salt, token sequence) one number."""

    def __init__(self) -> None:
        self._children: dict[tuple[int | str, int], int] = {}

    def numbers(self, salt: str, token_ids: list[int]) -> list[int]:
        """The number of the prefix that ends with each token."""
        node: int | str = salt
        numbers = []
        for token in token_ids:
            node = self._children.setdefault((node, token), len(self._children))
            numbers.append(node)
        return numbers


class RandomDrafter:
    """Guesses that are right as long as luck has it."""

    def __init__(self, next_token: Callable[[str, list[int]], int], random: Random) -> None:
        self.next_token = next_token
        self.random = random

    def draft(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        num_tokens: int,
        max_num_drafts: int,
    ) -> list[list[int]]:
        assert max_num_drafts > 0 and 0 < len(requests) <= num_tokens
        drafts = []
        for request, limit in zip(requests, limits, strict=True):
            token_ids = list(request.token_ids)
            for _ in range(self.random.randint(0, min(limit, max_num_drafts))):
                right = self.next_token(request.cache_salt, token_ids)
                token_ids.append(right if self.random.random() < 0.8 else self.random.randint(0, 2))
            drafts.append(token_ids[request.num_tokens :])
            max_num_drafts -= len(drafts[-1])
        return drafts

    def observe(self, request: Request, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        assert 0 <= num_accepted_tokens <= num_draft_tokens > 0

    def finish(self, request: Request) -> None:
        assert request.is_finished


class RandomTier:
    """A ``Tier`` that moves a block when ``work`` is called, and not always. It copies what is in
    ``store`` at that moment, so a block that is not pinned, or not complete, is found out."""

    def __init__(self, store: list[list[list[int | None]]], random: Random) -> None:
        self.store = store
        self.random = random
        self.kept: dict[bytes, list[int | None]] = {}
        self._loads: list[Load] = []
        self._ended: list[Load] = []
        self._stores: list[Transfer] = []
        self._copied: list[Transfer] = []

    def lookup(self, key: bytes) -> Lookup:
        loading = [t for load in self._loads for t in load.transfers]
        if any(t.key == key for t in (*loading, *self._stores)):
            return Lookup.PENDING
        return Lookup.HIT if key in self.kept else Lookup.MISS

    def load_pays(self, num_bytes: int, num_tokens: int) -> bool:
        assert num_bytes > 0 and num_tokens > 0
        return self.random.random() < 0.9

    def forgive(self) -> None: ...

    def prepare_load(self, load: Load) -> None:
        assert all(self.lookup(t.key) is Lookup.HIT for t in load.transfers)
        self._loads.append(load)

    def complete_load(self) -> list[Load]:
        ended, self._ended = self._ended, []
        return ended

    def cancel_load(self, load: Load) -> None:
        (self._ended if load in self._ended else self._loads).remove(load)

    def prepare_store(self, chain: Sequence[bytes], transfers: Sequence[Transfer]) -> None:
        assert {t.key for t in transfers} <= set(chain)
        assert all(self.lookup(t.key) is Lookup.MISS for t in transfers)
        if self.random.random() < 0.2:  # as a tier does that is off
            self._copied += transfers
        else:
            self._stores += transfers

    def complete_store(self) -> list[Transfer]:
        copied, self._copied = self._copied, []
        return copied

    def cancel_store(self, group: int, max_num_blocks: int) -> list[Transfer]:
        cancelled = [t for t in reversed(self._stores) if t.group == group][:max_num_blocks]
        self._stores = [t for t in self._stores if t not in cancelled]
        return cancelled

    def observe_prefill(self, num_tokens: int, elapsed_s: float) -> None: ...

    def wait(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...

    def is_busy(self) -> bool:
        return bool(self._loads or self._stores)

    def work(self) -> None:
        """Move some blocks; sometimes lose one."""
        for _ in range(self.random.randint(0, 6)):
            if self._loads and self.random.random() < 0.7:
                self._load_block(self._loads[0])
            elif self._stores:
                transfer = self._stores.pop(0)
                self.kept[transfer.key] = list(self.store[transfer.group][transfer.block])
                self._copied.append(transfer)
        if self.kept and self.random.random() < 0.1:
            del self.kept[self.random.choice(list(self.kept))]

    def _load_block(self, load: Load) -> None:
        transfer = load.transfers[load.num_loaded]
        content = self.kept.get(transfer.key)
        if content is not None and self.random.random() < 0.95:
            self.store[transfer.group][transfer.block][:] = content
            load.num_loaded += 1
        else:
            self.kept.pop(transfer.key, None)  # a bad file is removed
        if content is None or load.num_loaded == len(load.transfers):
            self._loads.remove(load)
            self._ended.append(load)


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        seed=st.none() | st.integers(0, 1000),
        windows=windows,
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 4),
        extra_chunk=st.integers(0, 12),
        extra_blocks=st.integers(0, 20),
        compressed=st.sampled_from([(), (0,), (0, 1, 2)]),
        tier_seed=st.none() | st.integers(0, 1000),
    )
    def start(
        self,
        seed: int | None,
        windows: tuple[int | None, ...],
        block_size: int,
        max_num_seqs: int,
        extra_chunk: int,
        extra_blocks: int,
        compressed: tuple[int, ...],
        tier_seed: int | None,
    ) -> None:
        self.groups = tuple(
            CacheGroup(
                layers=(i,),
                window=window,
                block_bytes=100 + i,
                open_block_bytes=1000 if i in compressed else 0,
            )
            for i, window in enumerate(windows)
        )
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.chunk = max_num_seqs + extra_chunk
        # Tight: one request of the full context fits, and little more.
        num_blocks = tuple(
            group.num_blocks(MAX_MODEL_LEN, self.chunk, block_size) + extra_blocks
            for group in self.groups
        )
        num_open_blocks = self.chunk // block_size + 2 * max_num_seqs
        self.open_store: list[list[list[int | None]]] = [
            [[None] * block_size for _ in range(num_open_blocks)] for _ in self.groups
        ]
        self.store: list[list[list[int | None]]] = [
            [[None] * block_size for _ in range(n)] for n in num_blocks
        ]
        self.tier = None if tier_seed is None else RandomTier(self.store, Random(tier_seed))
        self.manager = CacheManager(
            self.groups, num_blocks, block_size, b"model", num_open_blocks, self.tier
        )
        config = SchedulerConfig(max_num_seqs, self.chunk)
        drafter = None if seed is None else RandomDrafter(self._next_token, Random(seed))
        self.scheduler = Scheduler(config, self.manager, MAX_MODEL_LEN, drafter)
        self.prefixes = Prefixes()
        self.requests: list[Request] = []

    # What callers do.

    @rule(
        prompt=token_lists,
        max_tokens=limits,
        salt=st.sampled_from(["", "", "s"]),
        speculation=st.sampled_from([True, True, False]),
    )
    def add(self, prompt: list[int], max_tokens: int | None, salt: str, speculation: bool) -> None:
        self._add([1, *prompt], max_tokens, salt, speculation)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), extra=token_lists, max_tokens=limits)
    def fork(self, data: st.DataObject, extra: list[int], max_tokens: int | None) -> None:
        """Continue any request, running or not, from somewhere in its tokens."""
        parent = data.draw(st.sampled_from(self.requests))
        cut = data.draw(st.integers(1, parent.num_tokens))
        prompt = (parent.token_ids[:cut] + extra)[: MAX_MODEL_LEN - 1]
        self._add(prompt, max_tokens, parent.cache_salt, parent.speculation)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.requests))
        was_finished = request.is_finished
        aborted = self.scheduler.abort(request.request_id)
        assert aborted is (None if was_finished else request)

    @precondition(lambda self: self.scheduler.has_unfinished())
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """A step of any budget; sometimes a request is aborted while it computes."""
        budget = data.draw(st.integers(self.max_num_seqs, self.chunk))
        schedule = self._schedule(budget)
        aborted = data.draw(st.none() | st.sampled_from([None, *schedule.scheduled]))
        if aborted is not None and data.draw(st.booleans()):
            self.scheduler.abort(aborted.request.request_id)
        self._update(schedule)

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """What a block holds is gone, which nobody holds."""
        group = data.draw(st.integers(0, len(self.groups) - 1))
        pool = self.manager.pools[group]
        idle = [block for block in range(pool.num_blocks) if pool.ref_count(block) == 0]
        if idle:
            block = data.draw(st.sampled_from(idle))
            self.store[group][block][:] = [None] * self.block_size
            self.manager.forget(group, [block])

    @rule(num_steps=st.integers(1, 6))
    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            if self.scheduler.has_unfinished():
                self._update(self._schedule(self.chunk))

    def teardown(self) -> None:
        """Everything ends, and then nothing is held."""
        # Each step computes a token or more, and a preemption repeats at most a whole context.
        for _ in range(100 * (1 + len(self.requests))):
            if not self.scheduler.has_unfinished():
                break
            self._update(self._schedule(self.chunk))
        assert not self.scheduler.has_unfinished(), "no progress"
        for _ in range(1000):
            if self.tier and self.manager.num_referenced:
                self.tier.work()
                self.manager.collect()
        assert self.manager.num_referenced == 0
        assert self.manager.num_free + self.manager.num_cached == sum(map(len, self.store))
        self.bookkeeping_is_sound()

    # What must hold.

    @invariant()
    def bookkeeping_is_sound(self) -> None:
        self.manager.check()
        for request in self.requests:
            assert (request in self.scheduler.running) == (request.status is RequestStatus.RUNNING)
            assert (request in self.scheduler.waiting) == (request.status is RequestStatus.WAITING)
        assert all(request.num_computed_tokens == 0 for request in self.scheduler.waiting)
        for request in self.scheduler.running:
            kv_bytes = 0
            for group, table in zip(self.groups, self.manager.block_tables(request), strict=True):
                first = group.first_block(request.num_computed_tokens, self.block_size)
                held = [i for i, block in enumerate(table) if block >= 0]
                assert held == list(range(first, len(table))), "not what the next query needs"
                assert len(table) == -(-request.num_computed_tokens // self.block_size)
                kv_bytes += len(held) * group.block_bytes
            for group, table in zip(self.groups, self.manager.open_tables(request), strict=True):
                begun = request.num_computed_tokens % self.block_size > 0
                assert len(table) == (1 if begun and group.open_block_bytes else 0)
                kv_bytes += len(table) * group.open_block_bytes
            assert self.manager.kv_bytes(request) == kv_bytes <= request.usage.kv_bytes

    @invariant()
    def outputs_are_those_without_drafts(self) -> None:
        for request in self.requests:
            end = request.num_prompt_tokens
            prefixes = [request.token_ids[:i] for i in range(end, request.num_tokens + 1)]
            for prefix, longer in pairwise(prefixes):
                assert not self._ends(request, prefix), "tokens after the end"
                assert longer[-1] == self._next_token(request.cache_salt, prefix)
            if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert self._ends(request, request.token_ids)
            assert request.usage.num_output_tokens == request.num_output_tokens

    @invariant()
    def every_prompt_token_is_of_one_class(self) -> None:
        for request in self.requests:
            usage = request.usage
            assert usage.num_prompt_tokens == request.num_prompt_tokens
            classes = (
                usage.num_fresh_tokens,
                usage.num_cached_tokens,
                usage.num_cache_write_tokens,
            )
            assert min(classes) >= 0 and sum(classes) == usage.num_prompt_tokens
            if request.num_output_tokens > 0 and usage.num_preemptions == 0:
                # What is fresh was in no complete block, or another request was faster.
                assert usage.num_cache_write_tokens % self.block_size == 0
                assert usage.num_fresh_tokens >= request.num_prompt_tokens % self.block_size

    def _add(self, prompt: list[int], max_tokens: int | None, salt: str, speculation: bool) -> None:
        request = Request(
            str(len(self.requests)),
            prompt,
            SamplingParams(max_tokens=max_tokens),
            cache_salt=salt,
            speculation=speculation,
        )
        self.requests.append(request)
        self.scheduler.add(request)

    def _schedule(self, budget: int) -> Schedule:
        running_before = list(self.scheduler.running)
        full_config = self.scheduler.config
        if self.tier:
            self.tier.work()
        self.scheduler.config = SchedulerConfig(self.max_num_seqs, budget)
        schedule = self.scheduler.schedule()
        self.scheduler.config = full_config

        loading = self.tier is not None and self.tier.is_busy()
        assert schedule.scheduled or loading, "an empty step while requests are unfinished"
        assert [entry.request for entry in schedule.scheduled] == self.scheduler.running
        assert len(self.scheduler.running) <= self.max_num_seqs
        assert sum(entry.num_scheduled_tokens for entry in schedule.scheduled) <= budget
        assert all(entry.num_scheduled_tokens >= 1 for entry in schedule.scheduled)
        assert all(entry.samples for entry in schedule.scheduled[:-1]), "a decode was starved"
        num_logits = sum(entry.num_logits for entry in schedule.scheduled)
        assert num_logits <= full_config.max_num_logits
        for entry in schedule.scheduled:
            if num_drafts := len(entry.draft_token_ids):
                assert entry.samples and entry.request.speculation
                limit = self.scheduler.length_limit(entry.request)
                assert entry.request.num_tokens + num_drafts < limit, "no output can be there"
        for entry in schedule.scheduled:
            end = entry.request.num_computed_tokens + entry.num_scheduled_tokens
            for group, table in zip(
                self.groups, self.manager.block_tables(entry.request), strict=True
            ):
                held = sum(block >= 0 for block in table)
                assert held <= group.num_blocks(end, entry.num_scheduled_tokens, self.block_size)
        if schedule.preempted:
            kept = len(running_before) - len(schedule.preempted)
            assert running_before == self.scheduler.running + schedule.preempted[::-1]
            assert len(schedule.scheduled) == kept, "a step that preempted admitted"
        return schedule

    def _update(self, schedule: Schedule) -> None:
        """Compute, sample and finish, as an engine would."""
        live = [entry for entry in schedule.scheduled if not entry.request.is_finished]
        for entry in live:
            self._check_visible(entry, 0)
        for entry in live:
            self._write(entry)
        for entry in live:
            self._check_visible(entry, entry.num_scheduled_tokens)
        sampled = {entry.request.request_id: self._sample(entry) for entry in live if entry.samples}
        self.scheduler.update(schedule, sampled)
        for request in (entry.request for entry in live):
            if self._ends(request, request.token_ids):
                stopped = request.token_ids[-1] == EOS
                reason = FinishReason.STOP if stopped else FinishReason.LENGTH
                self.scheduler.finish(request, reason)
        self._check_published()

    def _next_token(self, salt: str, token_ids: list[int]) -> int:
        """The model: a function of the prefix, and rarely the end."""
        number = self.prefixes.numbers(salt, token_ids)[-1]
        return EOS if number % 23 == 0 else ALPHABET[number % len(ALPHABET)]

    def _ends(self, request: Request, token_ids: list[int]) -> bool:
        """Whether the last of these tokens of a request ends it."""
        stopped = len(token_ids) > request.num_prompt_tokens and token_ids[-1] == EOS
        return stopped or len(token_ids) == self.scheduler.length_limit(request)

    def _sample(self, entry: ScheduledRequest) -> list[int]:
        """The drafted tokens that the model would choose and one more, up to the end."""
        request = entry.request
        token_ids = list(request.token_ids)
        for drafted in (*entry.draft_token_ids, None):
            token_ids.append(self._next_token(request.cache_salt, token_ids))
            if token_ids[-1] != drafted or self._ends(request, token_ids):
                break
        return token_ids[request.num_tokens :]

    def _numbers(self, entry: ScheduledRequest) -> list[int]:
        token_ids = [*entry.request.token_ids, *entry.draft_token_ids]
        return self.prefixes.numbers(entry.request.cache_salt, token_ids)

    def _write(self, entry: ScheduledRequest) -> None:
        request, numbers = entry.request, self._numbers(entry)
        start = request.num_computed_tokens
        for i, group in enumerate(self.groups):
            table = self.manager.block_tables(request)[i]
            for position in range(start, start + entry.num_scheduled_tokens):
                index, slot = divmod(position, self.block_size)
                self._open_block(request, i, index)[slot] = numbers[position]
                if slot == self.block_size - 1 and group.open_block_bytes:
                    self.store[i][table[index]][:] = self._open_block(request, i, index)

    def _open_block(self, request: Request, group: int, index: int) -> list[int | None]:
        """Where the tokens of this step in table entry ``index`` are written."""
        if self.groups[group].open_block_bytes == 0:
            return self.store[group][self.manager.block_tables(request)[group][index]]
        table = self.manager.open_tables(request)[group]
        place = index - request.num_computed_tokens // self.block_size
        assert 0 <= place < len(table), f"no open block for table entry {index}"
        return self.open_store[group][table[place]]

    def _check_visible(self, entry: ScheduledRequest, num_written: int) -> None:
        """What the queries from ``num_computed_tokens`` on see of the positions before
        ``num_computed_tokens + num_written`` is the KV of the request's own prefix."""
        request, numbers = entry.request, self._numbers(entry)
        start = request.num_computed_tokens
        for i, group in enumerate(self.groups):
            table = self.manager.block_tables(request)[i]
            first = 0 if group.window is None else max(0, start - group.window + 1)
            for position in range(first, start + num_written):
                index, slot = divmod(position, self.block_size)
                assert table[index] >= 0, f"position {position} was released too early"
                complete = self.store[i][table[index]]
                own = index == start // self.block_size  # of the first query
                block = self._open_block(request, i, index) if own else complete
                written = start + num_written
                if own or (index + 1) * self.block_size <= written or not group.open_block_bytes:
                    assert block[slot] == numbers[position], f"wrong KV at position {position}"

    def _check_published(self) -> None:
        """Whoever finds a block finds it complete."""
        for request in self.requests:
            numbers = self.prefixes.numbers(request.cache_salt, request.token_ids)
            for i, block_hash in enumerate(request.block_hashes):
                expected = numbers[i * self.block_size : (i + 1) * self.block_size]
                for manager_pool, pool in zip(self.manager.pools, self.store, strict=True):
                    block = manager_pool.lookup(block_hash)
                    assert block is None or pool[block] == expected, "published too early"


SETTINGS = settings(
    max_examples=200,
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)
TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = SETTINGS


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    windows=windows,
    block_size=st.sampled_from([1, 2, 4]),
    extra_blocks=st.integers(0, 4),
)
def test_crowds_that_draft(
    seed: int, windows: tuple[int | None, ...], block_size: int, extra_blocks: int
) -> None:
    """Requests that all answer at length, in pools that hold little more than one of them."""
    machine = CacheMachine()
    tier_seed = seed if seed % 2 else None
    machine.start(seed, windows, block_size, 4, 12, extra_blocks, (0, 1, 2), tier_seed)
    random = Random(seed)
    for _ in range(8):
        machine.add(random.choices(ALPHABET, k=random.randint(0, 8)), None, "", True)
    while machine.scheduler.has_unfinished():
        machine._update(machine._schedule(machine.chunk))
        machine.bookkeeping_is_sound()
    machine.outputs_are_those_without_drafts()
    machine.teardown()


# The machine must be able to fail: each of these is a mistake that real engines have made.


def publish_when_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = CacheManager.allocate

    def broken(self: CacheManager, request: Request, num_new_tokens: int) -> bool:
        allocated = allocate(self, request, num_new_tokens)
        if allocated:
            request.num_computed_tokens += num_new_tokens
            self.publish(request)
            request.num_computed_tokens -= num_new_tokens
        return allocated

    monkeypatch.setattr(CacheManager, "allocate", broken)


def release_one_position_early(monkeypatch: pytest.MonkeyPatch) -> None:
    trim = CacheManager.trim

    def broken(self: CacheManager, request: Request) -> None:
        request.num_computed_tokens += 1
        trim(self, request)
        request.num_computed_tokens -= 1

    monkeypatch.setattr(CacheManager, "trim", broken)


def forget_to_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: BlockPool, block: int) -> None:
        self._ref_counts[block] += 1  # and leave it where eviction finds it

    monkeypatch.setattr(BlockPool, "ref", broken)


def hash_without_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(parent: bytes, token_ids: list[int]) -> bytes:
        return bytes(token_ids)

    monkeypatch.setattr(manager, "block_hash", broken)


def count_rejected_drafts_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = Scheduler._extend

    def broken(self: Scheduler, entry: ScheduledRequest, token_ids: Sequence[int]) -> None:
        extend(self, entry, token_ids)
        entry.request.num_computed_tokens += len(entry.draft_token_ids) - len(token_ids) + 1

    monkeypatch.setattr(Scheduler, "_extend", broken)


def load_into_blocks_that_are_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Offload.restore

    def broken(self: Offload, *args: Any) -> Any:
        before = set(self._loads)
        readiness = restore(self, *args)
        for load in set(self._loads) - before:
            for t in load.transfers:
                self._pools[t.group].deref(t.block)
        return readiness

    monkeypatch.setattr(Offload, "restore", broken)


def publish_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    restore = Offload.restore

    def broken(self: Offload, *args: Any) -> Any:
        before = set(self._loads)
        readiness = restore(self, *args)
        for load in set(self._loads) - before:
            for t in load.transfers:
                self._pools[t.group].publish(t.block, t.block_hash)
        return readiness

    monkeypatch.setattr(Offload, "restore", broken)


def publish_what_failed_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    end = Offload._end

    def broken(self: Offload, load: Load) -> None:
        for t in load.transfers:
            self._pools[t.group].publish(t.block, t.block_hash)
        end(self, load)

    monkeypatch.setattr(Offload, "_end", broken)


def store_blocks_that_are_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Offload.store

    def broken(self: Offload, *args: Any) -> None:
        before = set(self._storing)
        store(self, *args)
        for t in self._storing - before:
            self._pools[t.group].deref(t.block)

    monkeypatch.setattr(Offload, "store", broken)


def trim_before_drafts_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate, trim = CacheManager.allocate, CacheManager.trim

    def broken(self: CacheManager, request: Request, num_new_tokens: int) -> bool:
        allocated = allocate(self, request, num_new_tokens)
        if allocated and request.num_computed_tokens + num_new_tokens > request.num_tokens:
            request.num_computed_tokens += num_new_tokens
            trim(self, request)
            request.num_computed_tokens -= num_new_tokens
        return allocated

    monkeypatch.setattr(CacheManager, "allocate", broken)


def keep_blocks_of_rejected_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    trim = CacheManager.trim

    def broken(self: CacheManager, request: Request) -> None:
        num_blocks = len(self.block_tables(request)[0])
        trim(self, request)
        self.allocate(request, num_blocks * self.block_size - request.num_computed_tokens)

    monkeypatch.setattr(CacheManager, "trim", broken)


@pytest.mark.parametrize(
    "plant",
    [
        count_rejected_drafts_as_computed,
        trim_before_drafts_are_verified,
        keep_blocks_of_rejected_drafts,
        publish_when_allocated,
        release_one_position_early,
        forget_to_touch,
        hash_without_parent,
        load_into_blocks_that_are_not_pinned,
        publish_before_it_is_loaded,
        publish_what_failed_to_load,
        store_blocks_that_are_not_pinned,
    ],
)
def test_the_machine_catches(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            CacheMachine, settings=settings(SETTINGS, phases=[Phase.generate])
        )
