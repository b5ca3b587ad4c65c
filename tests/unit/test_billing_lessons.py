"""Bugs in the accounting of other gateways, each of which a test would have caught. The numbers
are those of the reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

import pytest

from tael.cache.manager import CacheManager
from tael.config import SchedulerConfig
from tael.economics.journal import Outcome
from tael.economics.ledger import Ledger
from tael.economics.rate_card import Rate, RateCard, ServiceTier, Tier
from tael.economics.report import usage_report
from tael.economics.usage import anthropic, openai_chat
from tael.engine.scheduler import Scheduler
from tael.models.spec import CacheGroup
from tael.request import FinishReason, Request, SamplingParams, Usage

DOLLAR = 10**9
CENT = DOLLAR // 100

SIMPLE = RateCard("simple", "USD", (Rate("*", (Tier(1 * DOLLAR, 4 * DOLLAR),)),))


def price(*tiers: Tier, usage: Usage, service_tier: ServiceTier = "default") -> int:
    rate = Rate("*", tiers, service_tiers={"flex": 50, "priority": 150})
    card = RateCard("v", "USD", (rate,))
    at = datetime(2026, 12, 1, tzinfo=timezone.utc)
    return card.price(usage, model="m", service_tier=service_tier, at=at)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path, SIMPLE)) as ledger:
        yield ledger


def reserve(ledger: Ledger, request_id: str) -> None:
    ledger.reserve(
        request_id, key_id="k", model="m", num_prompt_tokens=1000, max_output_tokens=100
    ).result()


def totals(path: Path) -> tuple[int, int]:
    """Requests and nano on the books."""
    _, (row, *_) = usage_report(path, ["model"])
    return int(row["requests"]), int(row["amount_nano"])


# Rows lost


def test_litellm_34805_rows_lost_on_stop(path: Path) -> None:
    ledger = Ledger(path, SIMPLE)
    for i in range(20):
        ledger.reserve(str(i), key_id="k", model="m", num_prompt_tokens=1, max_output_tokens=1)
        ledger.settle(str(i), Usage(1, num_output_tokens=1), Outcome.FINISHED)
    ledger.close()  # nobody has waited for a future
    assert totals(path) == (20, 20 * 5000)


def test_litellm_6633_an_empty_id_swallows_all_but_the_first(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="empty"):
        reserve(ledger, "")


def test_one_api_ids_that_are_not_unique(ledger: Ledger, path: Path) -> None:
    reserve(ledger, "a")
    with pytest.raises(ValueError, match="used before"):
        reserve(ledger, "a")
    ledger.settle("a", Usage(1, num_output_tokens=1), Outcome.FINISHED).result()
    with pytest.raises(ValueError, match="used before"):
        reserve(ledger, "a")
    assert totals(path) == (1, 5000)


def test_openmeter_the_same_event_twice(ledger: Ledger, path: Path) -> None:
    reserve(ledger, "a")
    usage = Usage(1, num_output_tokens=1)
    ledger.settle("a", usage, Outcome.FINISHED).result()
    with pytest.raises(ValueError, match="cannot be settled"):
        ledger.settle("a", usage, Outcome.FINISHED).result()
    assert totals(path) == (1, 5000)


@pytest.mark.parametrize("outcome", [Outcome.ABORTED, Outcome.FAILED])
def test_litellm_35958_33736_37923_an_interrupted_stream_is_logged_at_what_it_delivered(
    ledger: Ledger, path: Path, outcome: Outcome
) -> None:
    reserve(ledger, "a")
    ledger.settle("a", Usage(1000, num_output_tokens=7), outcome).result()
    assert totals(path) == (1, 1000 * 1000 + 7 * 4000)


def test_litellm_30522_a_reservation_leaks(path: Path) -> None:
    with closing(Ledger(path, SIMPLE)) as ledger:
        for request_id in "abc":
            reserve(ledger, request_id)
        ledger.settle("a", Usage(1), Outcome.ABORTED).result()
        assert ledger._journal.open_requests() == ["b", "c"]
    with closing(Ledger(path, SIMPLE)) as ledger:
        assert ledger._journal.open_requests() == []


@pytest.mark.parametrize("outcome", [Outcome.ABORTED, Outcome.FAILED, Outcome.RECOVERED])
def test_new_api_4168_a_stream_that_delivered_nothing_is_charged(
    ledger: Ledger, path: Path, outcome: Outcome
) -> None:
    """Its prompt is on record, and costs nothing."""
    reserve(ledger, "a")
    assert ledger.settle("a", Usage(1000), outcome).result() == 0
    _, (row,) = usage_report(path, ["model"])
    assert (row["fresh_tokens"], row["amount_nano"]) == (1000, 0)


# Classes of prompt tokens


def test_litellm_9812_cache_writes_charged_twice() -> None:
    """0.091311 USD instead of 0.05439. The vendor's usage says {"input_tokens": 3,
    "cache_creation_input_tokens": 12304, "cache_read_input_tokens": 0, "output_tokens": 550}."""
    tier = Tier(3 * DOLLAR, 15 * DOLLAR, 30 * CENT, 375 * CENT)
    usage = Usage(12307, 0, 12304, 550)
    assert anthropic(usage)["input_tokens"] == 3
    assert price(tier, usage=usage) == 54_399_000


def test_litellm_14849_cache_reads_charged_twice() -> None:
    """0.7642 USD instead of 0.1849."""
    tier = Tier(125 * CENT, 10 * DOLLAR, 125 * DOLLAR // 200)
    usage = Usage(262_960, 257_955, 0, 1_744)
    assert price(tier, usage=usage) == 184_918_125
    assert openai_chat(usage)["prompt_tokens_details"]["cached_tokens"] == 257_955


def test_litellm_6215_cached_tokens_charged_as_fresh_ones() -> None:
    tier = Tier(1 * DOLLAR, 0)
    assert price(tier, usage=Usage(1000, 900)) == 100 * 1000 + 900 * 100


def test_aider_5516_a_cached_call_reads_eleven_times_its_price() -> None:
    tier = Tier(3 * DOLLAR, 0)
    assert 10 * price(tier, usage=Usage(10**6, 10**6)) == price(tier, usage=Usage(10**6))


def test_vllm_44607_the_cache_of_the_second_half_is_reported() -> None:
    """There a node that only decodes finds all of the prompt in what the other one sent. Here
    that is a request that was preempted and finds its own blocks."""
    group = CacheGroup(layers=(0,), window=None, block_bytes=1)
    manager = CacheManager((group,), (6,), 4, b"model")
    scheduler = Scheduler(SchedulerConfig(4, 16), manager, 24)
    first = Request("first", [1] * 8, SamplingParams(max_tokens=9))
    second = Request("second", [2] * 8, SamplingParams(max_tokens=9))
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(40):
        schedule = scheduler.schedule()
        assert first.token_ids[:8] == [1] * 8
        sampled = {e.request.request_id: [3] for e in schedule.scheduled if e.samples}
        scheduler.update(schedule, sampled)
        for request in list(scheduler.running):
            if request.num_output_tokens == 9:
                scheduler.finish(request, FinishReason.LENGTH)
    assert first.is_finished and second.is_finished
    assert second.usage.num_preemptions > 0
    assert manager.num_prefix_hit_tokens > 0, "it did find them"
    assert openai_chat(second.usage)["prompt_tokens_details"] == {
        "cached_tokens": 0,
        "cache_write_tokens": 8,
    }


# Tiers

BELOW = Tier(5 * DOLLAR, 25 * DOLLAR, DOLLAR // 2, 625 * CENT, up_to=200_000)
ABOVE = Tier(10 * DOLLAR, 3750 * CENT, 1 * DOLLAR, 1250 * CENT)


def test_litellm_30135_the_tier_of_long_prompts_is_ignored() -> None:
    usage = Usage(585_659, 0, 585_659, 0)
    assert price(BELOW, ABOVE, usage=usage) == 7_320_737_500


def test_litellm_34729_only_what_lies_above_the_bound_is_rated_anew() -> None:
    usage = Usage(300_000, 0, 0, 1000)
    assert price(BELOW, ABOVE, usage=usage) == 3 * DOLLAR + 3750 * CENT // 1000
    cached = Usage(200_001, 200_000, 0, 0)
    assert price(BELOW, ABOVE, usage=cached) == 200_000 * 1000 + 10_000, "cached ones count"


def test_the_service_tier_that_served_is_the_one_that_is_charged(path: Path) -> None:
    usage = Usage(1000, num_output_tokens=1000)
    default = price(BELOW, ABOVE, usage=usage)
    assert price(BELOW, ABOVE, usage=usage, service_tier="priority") == default * 3 // 2
    assert price(BELOW, ABOVE, usage=usage, service_tier="flex") == default // 2
    card = RateCard("v", "USD", (Rate("*", (BELOW, ABOVE), service_tiers={"flex": 50}),))
    with closing(Ledger(path, card)) as ledger:
        ledger.reserve(
            "a",
            key_id="k",
            model="m",
            num_prompt_tokens=1000,
            max_output_tokens=1000,
            service_tier="flex",
        ).result()
        assert ledger.settle("a", usage, Outcome.FINISHED).result() == default // 2
