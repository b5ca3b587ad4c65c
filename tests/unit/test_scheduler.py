"""Order, budget, preemption and refusal, in simulated steps."""

from __future__ import annotations

import pytest

from tael.cache.manager import CacheManager
from tael.config import SchedulerConfig
from tael.engine.scheduler import Schedule, Scheduler
from tael.errors import TaelError
from tael.models.spec import CacheGroup
from tael.request import FinishReason, Request, RequestStatus, SamplingParams

GROUP = CacheGroup(layers=(0,), window=None, block_bytes=100)
BLOCK = 4


def make_scheduler(
    *, max_num_seqs: int = 4, budget: int = 16, num_blocks: int = 32, max_model_len: int = 64
) -> Scheduler:
    manager = CacheManager((GROUP,), (num_blocks,), BLOCK, b"model")
    return Scheduler(SchedulerConfig(max_num_seqs, budget), manager, max_model_len)


def add(
    scheduler: Scheduler, request_id: str, num_tokens: int, max_tokens: int | None = None
) -> Request:
    """A request whose prompt shares nothing with those of other ids."""
    prompt = [ord(request_id)] * num_tokens
    request = Request(request_id, prompt, SamplingParams(max_tokens=max_tokens))
    scheduler.add(request)
    return request


def step(scheduler: Scheduler) -> Schedule:
    schedule = scheduler.schedule()
    sampled = {entry.request.request_id: [1] for entry in schedule.scheduled if entry.samples}
    scheduler.update(schedule, sampled)
    return schedule


def shape(schedule: Schedule) -> dict[str, int]:
    return {entry.request.request_id: entry.num_scheduled_tokens for entry in schedule.scheduled}


def test_a_prompt_is_computed_in_chunks_and_then_decodes() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", 36)
    schedules = [step(scheduler) for _ in range(5)]
    assert [shape(schedule)["a"] for schedule in schedules] == [16, 16, 4, 1, 1]
    assert [schedule.scheduled[0].samples for schedule in schedules] == [False, False] + [True] * 3
    assert request.num_output_tokens == request.usage.num_output_tokens == 3
    assert request.num_computed_tokens == request.num_tokens - 1


def test_running_requests_go_before_waiting_ones_and_share_the_budget() -> None:
    scheduler = make_scheduler()
    for name, num_tokens in (("a", 10), ("b", 20), ("c", 3)):
        add(scheduler, name, num_tokens)
    assert [shape(step(scheduler)) for _ in range(4)] == [
        {"a": 10, "b": 4},
        {"a": 1, "b": 12},
        {"a": 1, "b": 4, "c": 3},
        {"a": 1, "b": 1, "c": 1},
    ]


def test_prompts_are_cut_between_choices_where_a_step_has_room_for_one() -> None:
    roomy, narrow = make_scheduler(max_num_seqs=4, budget=7), make_scheduler(budget=6)
    for scheduler in (roomy, narrow):
        for name in "abc":
            add(scheduler, name, 1)
        add(scheduler, "d", 9)
    assert [shape(step(roomy)) for _ in range(4)] == [
        {"a": 1, "b": 1, "c": 1, "d": 4},
        {"a": 1, "b": 1, "c": 1, "d": 4},
        {"a": 1, "b": 1, "c": 1, "d": 1},
        {"a": 1, "b": 1, "c": 1, "d": 1},
    ]
    assert [shape(step(narrow))["d"] for _ in range(4)] == [3, 3, 3, 1]


def test_nothing_is_admitted_for_less_than_a_choice() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 13)
    add(scheduler, "b", 8)
    assert [shape(step(scheduler)) for _ in range(2)] == [{"a": 13}, {"a": 1, "b": 8}]


def test_a_prompt_whose_logits_are_wanted_is_cut_where_these_end() -> None:
    scheduler = make_scheduler(budget=32)
    scheduler.add(Request("a", [1] * 38, SamplingParams(prompt_logprobs=0)))
    assert [shape(step(scheduler))["a"] for _ in range(4)] == [16, 16, 6, 1]


def test_a_long_prompt_starves_no_decode() -> None:
    scheduler = make_scheduler(max_num_seqs=4, budget=4)
    for name in "abc":
        add(scheduler, name, 1)
    step(scheduler)
    add(scheduler, "d", 5)
    assert [shape(step(scheduler)) for _ in range(6)] == [{"a": 1, "b": 1, "c": 1, "d": 1}] * 6


def test_no_more_than_max_num_seqs_run() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    a, _, _ = (add(scheduler, name, 2) for name in "abc")
    assert shape(step(scheduler)) == {"a": 2, "b": 2}
    scheduler.finish(a, FinishReason.STOP)
    assert shape(step(scheduler)) == {"b": 1, "c": 2}


def test_the_last_running_request_makes_room_and_returns_to_the_head() -> None:
    scheduler = make_scheduler(num_blocks=4, max_model_len=16, budget=12)
    a, b = add(scheduler, "a", 8), add(scheduler, "b", 4)
    assert shape(step(scheduler)) == {"a": 8, "b": 4}
    c = add(scheduler, "c", 1)
    schedule = step(scheduler)  # a takes the last block, so b has none for its fifth token
    assert shape(schedule) == {"a": 1}
    assert schedule.preempted == [b], "and c, which would fit now, is not admitted"
    assert list(scheduler.waiting) == [b, c]
    assert b.status is RequestStatus.WAITING and b.num_computed_tokens == 0
    assert b.usage.num_preemptions == 1 and b.num_output_tokens == 1, "its output is kept"

    scheduler.finish(a, FinishReason.STOP)
    assert shape(step(scheduler)) == {"b": 1, "c": 1}, "b found its own block"
    assert b.num_output_tokens == 2
    assert b.usage.num_cached_tokens == 0, "that was no saving"


def test_several_may_be_preempted_in_one_step() -> None:
    scheduler = make_scheduler(num_blocks=4, max_model_len=16)
    _, _, c, d = (add(scheduler, name, 4) for name in "abcd")
    step(scheduler)
    schedule = step(scheduler)  # everybody needs a second block
    assert shape(schedule) == {"a": 1, "b": 1}
    assert schedule.preempted == [d, c]
    assert list(scheduler.waiting) == [c, d], "in order of arrival"


def test_usage_of_a_prefix_hit() -> None:
    scheduler = make_scheduler()
    first = add(scheduler, "a", 10)
    step(scheduler)
    assert first.usage.num_cached_tokens == 0 and first.usage.kv_bytes == 300
    second = add(scheduler, "a", 12)
    step(scheduler)
    assert second.usage.num_cached_tokens == 8
    assert second.usage.num_prompt_tokens == 12
    assert second.usage.queue_s >= 0


def test_abort_at_every_stage() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = add(scheduler, "a", 4), add(scheduler, "b", 4)
    schedule = scheduler.schedule()
    assert scheduler.abort("a") is running, "while its step computes"
    assert scheduler.abort("b") is waiting
    scheduler.update(schedule, {"a": [1]})
    assert running.num_output_tokens == 0
    assert running.is_finished and waiting.finish_reason is FinishReason.ABORT
    assert not scheduler.has_unfinished()
    assert scheduler.abort("a") is None
    assert scheduler.manager.num_referenced == 0
    assert scheduler.schedule() == Schedule([], [])


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "message"),
    [
        (64, 1, "prompt has 64 tokens and the context holds 64"),
        (40, None, "40 tokens and its answer, 64 tokens in all, do not fit"),
        (40, 9, "40 tokens and its answer, 49 tokens in all, do not fit"),
        (0, 1, "no tokens"),
    ],
)
def test_what_can_never_run_is_refused(
    num_tokens: int, max_tokens: int | None, message: str
) -> None:
    scheduler = make_scheduler(num_blocks=12)
    with pytest.raises(TaelError, match=message):
        add(scheduler, "a", num_tokens, max_tokens)
    assert not scheduler.has_unfinished()


def test_what_just_fits_runs_to_its_end() -> None:
    scheduler = make_scheduler(num_blocks=12)
    request = add(scheduler, "a", 40, max_tokens=8)
    assert scheduler.length_limit(request) == 48
    while request.num_tokens < 48:
        assert step(scheduler).preempted == []
    assert request.usage.kv_bytes == 1200


def test_prompt_tokens_written_to_the_cache_are_counted_once() -> None:
    scheduler = make_scheduler(budget=4, num_blocks=4, max_model_len=16)
    a, b = add(scheduler, "a", 2), add(scheduler, "b", 10)
    for _ in range(4):
        step(scheduler)
    assert (b.usage.num_cached_tokens, b.usage.num_cache_write_tokens) == (0, 8)
    assert b.usage.num_fresh_tokens == 2, "the block that is not full"
    while a.num_tokens < 16:  # it takes all blocks, and what b had published with them
        step(scheduler)
    assert b.usage.num_preemptions == 1
    scheduler.finish(a, FinishReason.LENGTH)
    for _ in range(5):
        step(scheduler)
    assert b.num_computed_tokens > 10
    assert b.usage.num_cache_write_tokens == 8, "though they were computed, and offered, again"
    scheduler.finish(b, FinishReason.LENGTH)
    c = add(scheduler, "b", 10)
    step(scheduler)
    assert (c.usage.num_cached_tokens, c.usage.num_cache_write_tokens) == (8, 0)


def test_of_two_that_compute_a_block_at_once_one_writes_it() -> None:
    scheduler = make_scheduler(budget=16)
    a, b = add(scheduler, "x", 8), add(scheduler, "x", 8)
    step(scheduler)
    assert [r.usage.num_cache_write_tokens for r in (a, b)] == [8, 0]
    assert b.usage.num_fresh_tokens == 8


def test_held_bytes_are_integrated_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("tael.engine.scheduler.time.monotonic", lambda: now)
    scheduler = make_scheduler(budget=16)
    request = add(scheduler, "a", 4)  # a block of 100 bytes
    step(scheduler)
    now = 2.0
    step(scheduler)  # 2 s later it needs another one
    now = 5.0
    scheduler.finish(request, FinishReason.STOP)
    assert request.usage.kv_byte_s == 2 * 100 + 3 * 200
    assert request.usage.kv_bytes == 200
