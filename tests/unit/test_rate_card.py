"""Prices: which rate holds, which tier, and how the sum is rounded."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.economics.rate_card import FREE, Rate, RateCard, ServiceTier, Tier
from tael.errors import TaelError
from tael.request import Usage

EXAMPLE = Path(__file__).parents[2] / "examples" / "rate-card.json"
NOON = datetime(2026, 12, 2, 12, tzinfo=timezone.utc)  # a Wednesday

prices = st.integers(0, 10**15)
tiers = st.builds(Tier, prices, prices, st.none() | prices, st.none() | prices)
counts = st.integers(0, 10**6)
service_tiers: st.SearchStrategy[ServiceTier] = st.sampled_from(["default", "flex", "priority"])


def card(*tiers: Tier, **fields: Any) -> RateCard:
    return RateCard("v1", "USD", (Rate("*", tiers, **fields),))


def price(
    card: RateCard,
    usage: Usage,
    service_tier: ServiceTier = "default",
    at: datetime = NOON,
    model: str = "m",
) -> int:
    return card.price(usage, model=model, service_tier=service_tier, at=at)


def test_the_classes_have_prices_of_their_own() -> None:
    usage = Usage(1_000_000, 300_000, 200_000, 100_000)
    assert price(card(Tier(10**9, 4 * 10**9, 2 * 10**8, 125 * 10**7)), usage) == (
        500_000_000 + 60_000_000 + 250_000_000 + 400_000_000
    )


def test_a_cache_read_costs_a_tenth_and_a_write_nothing_more_unless_given() -> None:
    tier = Tier(3 * 10**8, 0)
    assert price(card(tier), Usage(1_000_000, 1_000_000)) == 3 * 10**7
    assert price(card(tier), Usage(1_000_000, 0, 1_000_000)) == 3 * 10**8
    assert price(card(Tier(1, 0)), Usage(1_000_000, 1_000_000)) == 1, "not for nothing"


@pytest.mark.parametrize(
    ("num_tokens", "nano"), [(1, 0), (499_999, 0), (500_000, 1), (1_499_999, 1), (1_500_000, 2)]
)
def test_the_sum_is_rounded_once_to_the_nearest_nano(num_tokens: int, nano: int) -> None:
    assert price(card(Tier(1, 1)), Usage(num_tokens)) == nano
    half = num_tokens // 2
    assert price(card(Tier(1, 1)), Usage(half, num_output_tokens=num_tokens - half)) == nano


@given(tiers, counts, counts, counts, counts, st.integers(0, 10_000))
def test_the_price_is_within_half_a_nano(
    tier: Tier, fresh: int, read: int, write: int, output: int, percent: int
) -> None:
    usage = Usage(fresh + read + write, read, write, output)
    cache_read = -(-tier.input // 10) if tier.cache_read is None else tier.cache_read
    cache_write = tier.input if tier.cache_write is None else tier.cache_write
    exact = Fraction(percent, 100) * sum(
        Fraction(count * rate, 10**6)
        for count, rate in (
            (fresh, tier.input),
            (read, cache_read),
            (write, cache_write),
            (output, tier.output),
        )
    )
    charged = price(card(tier, service_tiers={"flex": percent}), usage, "flex")
    assert abs(charged - exact) <= Fraction(1, 2)


@given(st.lists(tiers, min_size=3, max_size=3), counts, counts, counts, counts, service_tiers)
def test_no_request_costs_more_than_its_reservation(
    three: list[Tier], fresh: int, read: int, write: int, output: int, service_tier: ServiceTier
) -> None:
    bounds = (1000, 100_000, None)
    rates = [
        Tier(tier.input, tier.output, tier.cache_read, tier.cache_write, up_to)
        for tier, up_to in zip(three, bounds, strict=True)
    ]
    some = card(*rates, service_tiers={"flex": 33, "priority": 175})
    usage = Usage(fresh + read + write, read, write, output)
    bound = some.upper_bound(
        usage.num_prompt_tokens, output + 7, model="m", service_tier=service_tier, at=NOON
    )
    assert price(some, usage, service_tier) <= bound


def test_the_bound_of_a_tier_is_the_last_length_in_it() -> None:
    some = card(Tier(10**6, 10**6, up_to=200_000), Tier(2 * 10**6, 5 * 10**6))
    assert price(some, Usage(200_000)) == 200_000
    assert price(some, Usage(200_001)) == 400_002


def test_windows_are_those_of_utc_on_days_that_are_no_holidays() -> None:
    example = RateCard.load(EXAMPLE)
    usage = Usage(1_000_000)

    def at(text: str) -> int:
        moment = datetime.fromisoformat(text)
        return price(example, usage, at=moment, model="qwen2.5-coder:1.5b")

    peak, normal = 300_000_000, 150_000_000
    assert at("2026-12-02T00:59:59+00:00") == normal
    assert at("2026-12-02T01:00:00+00:00") == peak
    assert at("2026-12-02T03:59:59+00:00") == peak
    assert at("2026-12-02T04:00:00+00:00") == normal
    assert at("2026-12-02T17:30:00+08:00") == peak, "09:30 UTC"
    assert at("2026-12-05T01:30:00+00:00") == normal, "Saturday"
    assert at("2027-01-01T01:30:00+00:00") == normal, "a holiday, and a Friday"
    assert at("2027-01-08T01:30:00+00:00") == peak, "the Friday after it"


def test_dates_and_names_choose_the_first_rate_that_holds() -> None:
    example = RateCard.load(EXAMPLE)
    end = datetime(2027, 7, 1, tzinfo=timezone.utc)
    name = "qwen2.5-coder:1.5b"
    usage = Usage(100_000)
    assert price(example, usage, at=end - timedelta(milliseconds=1), model=name) == 15_000_000
    assert price(example, usage, at=end, model=name) == 50_000_000, "the rate of any model"
    assert price(example, usage, at=NOON, model="other") == 50_000_000


def test_a_model_without_a_price_is_refused() -> None:
    only = RateCard("v1", "USD", (Rate("a", (Tier(1, 1),)),))
    with pytest.raises(TaelError, match="rate card v1 has no price of model b at 2026-12-02 12:00"):
        price(only, Usage(1), model="b")


def test_the_free_card_counts_and_charges_nothing() -> None:
    assert price(FREE, Usage(10**6, 5, 6, 10**6), "priority") == 0


def test_a_card_is_written_as_it_was_read() -> None:
    example = RateCard.load(EXAMPLE)
    assert RateCard.decode(example.encode()) == example
    assert "\n" not in example.encode()


GOOD: dict[str, Any] = {
    "version": "v1",
    "currency": "USD",
    "rates": [{"model": "*", "tiers": [{"input": 1, "output": 1}]}],
}
TIER = {"input": 1, "output": 1}
NIGHT = {"start": "22:00", "end": "02:00"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": ""}, r"length >= 1 - at `\$.version`"),
        ({"currency": "dollars"}, r"\$.currency"),
        ({"colour": 1}, "unknown field `colour`"),
        ({"rates": [{"model": "*", "tiers": []}]}, "every tier but the last"),
        ({"rates": [{"model": "*", "tiers": [{"input": 0.5, "output": 1}]}]}, "Expected `int`"),
        ({"rates": [{"model": "*", "tiers": [{"input": -1, "output": 1}]}]}, ">= 0"),
        ({"rates": [{"model": "*", "tiers": [{"input": 10**16, "output": 1}]}]}, "<= 10000000"),
        ({"rates": [{"model": "*", "tiers": [TIER | {"up_to": 5}]}]}, "the last must not"),
        (
            {"rates": [{"model": "*", "tiers": [TIER | {"up_to": i} for i in (9, 5)] + [TIER]}]},
            "ascend",
        ),
        (
            {"rates": [{"model": "*", "tiers": [TIER], "windows": [NIGHT]}]},
            "midnight",
        ),
        (
            {"rates": [{"model": "*", "tiers": [TIER], "effective_from": "2026-01-01T00:00:00"}]},
            "time zone",
        ),
        ({"rates": [{"model": "*", "tiers": [TIER], "service_tiers": {"fast": 1}}]}, "'fast'"),
    ],
)  # fmt: skip
def test_what_is_not_a_card_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(GOOD))
    RateCard.load(path)
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(TaelError, match=message) as caught:
        RateCard.load(path)
    assert str(caught.value).startswith(f"{path} is not a rate card: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    with pytest.raises(TaelError, match="cannot read the rate card"):
        RateCard.load(path)
    path.write_bytes(b"{")
    with pytest.raises(TaelError, match="is not a rate card"):
        RateCard.load(path)
