"""Bounds, rates and the fair order, with a clock that the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from tael.economics.keys import Key
from tael.economics.rate_card import ServiceTier
from tael.server.admission import NUM_TOKENS_AHEAD, Admission, Limits, Turn
from tael.server.errors import ApiError

pytest.importorskip("fastapi")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def key(name: str, **limits: Any) -> Key:
    return Key(name, name, name, **limits)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


async def order(
    requests: list[tuple[Key, int]], num_seqs: int = 1, tiers: list[ServiceTier] | None = None
) -> list[str]:
    """The keys of requests, all there at once, in the order in which they get their turn."""
    admission = Admission(Limits(), num_seqs)
    served: list[str] = []

    async def one(caller: Key, num_tokens: int, tier: ServiceTier) -> None:
        taken = await admission.turn(caller, 1, num_tokens, 1, tier)
        served.append(caller.key_id)
        await asyncio.sleep(0)
        admission.done(taken)

    tiers = tiers or ["default"] * len(requests)
    await asyncio.gather(*(one(*r, tier) for r, tier in zip(requests, tiers, strict=True)))
    assert admission.num_waiting == 0
    return served


async def passed() -> None:
    """All that can happen has happened."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_greedy_key_does_not_delay_another() -> None:
    async def main() -> None:
        served = await order([(key("a"), 100)] * 20 + [(key("b"), 100)])
        assert served.index("b") <= 2

    run(main())


def test_weights_and_tiers_share_tokens() -> None:
    async def main() -> None:
        a, b = key("a", weight=3), key("b")
        served = await order([(a, 100)] * 12 + [(b, 100)] * 12)
        assert served[:12].count("a") == 9
        served = await order([(b, 100)] * 12 + [(key("c"), 300)] * 12)
        assert served[:12].count("b") == 9
        tiers: list[ServiceTier] = ["flex"] * 12 + ["default"] * 12
        served = await order([(key("c"), 100)] * 12 + [(key("d"), 100)] * 12, tiers=tiers)
        assert served[:10].count("d") == 8

    run(main())


def test_who_was_idle_has_saved_nothing_up() -> None:
    async def main() -> None:
        admission = Admission(Limits(), 1)
        served: list[str] = []

        async def one(caller: Key) -> None:
            taken = await admission.turn(caller, 1, 100, 1, "default")
            served.append(caller.key_id)
            await asyncio.sleep(0)
            admission.done(taken)

        a, b = key("a"), key("b")
        await asyncio.gather(*(one(a) for _ in range(10)))
        served.clear()
        await asyncio.gather(*(one(b) for _ in range(10)), *(one(a) for _ in range(10)))
        assert 4 <= served[:10].count("a") <= 6

    run(main())


def test_no_more_sequences_than_the_engine_computes() -> None:
    async def main() -> None:
        admission = Admission(Limits(), 4)
        first = await admission.turn(key("a"), 1, 1, 3, "default")
        second = asyncio.create_task(admission.turn(key("a"), 1, 1, 2, "default"))
        third = asyncio.create_task(admission.turn(key("a"), 1, 1, 1, "default"))
        await asyncio.sleep(0)
        assert not second.done() and not third.done() and admission.num_waiting == 2
        admission.done(first)
        assert (await second).num_seqs == 2 and (await third).num_seqs == 1
        # One that is larger than the engine runs alone.
        large = asyncio.create_task(admission.turn(key("a"), 1, 1, 100, "default"))
        admission.done(await second)
        await asyncio.sleep(0)
        assert not large.done()
        admission.done(await third)
        assert (await large).num_seqs == 4

    run(main())


def test_few_prompts_wait_in_the_engine() -> None:
    """It takes them in the order in which they come, so the rest waits where another key can get
    in between."""

    async def turns(
        admission: Admission, caller: Key, num_prompt_tokens: int, number: int
    ) -> list[asyncio.Task[Turn]]:
        turns = [
            asyncio.create_task(admission.turn(caller, num_prompt_tokens, 5000, 1, "default"))
            for _ in range(number)
        ]
        await passed()
        return turns

    async def main() -> None:
        admission = Admission(Limits(), 32)
        greedy = await turns(admission, key("a"), 4000, 20)
        assert [task.done() for task in greedy] == [True] * 2 + [False] * 18
        (single,) = await turns(admission, key("b"), 4000, 1)
        assert not single.done()
        admission.begun(greedy[0].result())
        admission.begun(greedy[0].result())  # with its second token
        await passed()
        assert single.done() and not greedy[2].done()
        admission.done(greedy[1].result())  # without a token
        await passed()
        assert greedy[2].done() and not greedy[3].done()
        short = await turns(Admission(Limits(), 32), key("a"), 100, 20)
        assert sum(task.done() for task in short) == NUM_TOKENS_AHEAD // 100
        admission = Admission(Limits(), 32)
        free = await turns(admission, key("c"), 0, 8)
        (other,) = await turns(admission, key("a"), 5000, 1)
        assert all(task.done() for task in [*free, other])
        for task in greedy + short:
            task.cancel()

    run(main())


def test_who_leaves_the_queue_is_passed_over() -> None:
    async def main() -> None:
        admission = Admission(Limits(), 1)
        first = await admission.turn(key("a"), 1, 1, 1, "default")
        gone = asyncio.create_task(admission.turn(key("a"), 1, 1, 1, "default"))
        stays = asyncio.create_task(admission.turn(key("a"), 1, 1, 1, "default"))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        admission.done(first)
        assert (await stays).num_seqs == 1

    run(main())


def test_the_queue_has_a_deadline() -> None:
    async def main() -> None:
        admission = Admission(Limits(queue_timeout_s=0.0), 1)
        first = await admission.turn(key("a"), 1, 1, 1, "default")
        with pytest.raises(ApiError) as caught:
            await admission.turn(key("b"), 1, 1, 1, "default")
        assert (caught.value.status, caught.value.code) == (503, "queue_timeout")
        assert "retry-after" in caught.value.headers
        admission.done(first)
        await admission.turn(key("b"), 1, 1, 1, "default")

    run(main())


def test_bounds_of_the_server() -> None:
    admission = Admission(Limits(max_requests=2, max_tokens=100), 1)
    with admission.request(key("a")), admission.request(key("b")):
        with pytest.raises(ApiError) as caught, admission.request(key("c")):
            pass
        assert caught.value.status == 503 and "retry-after" in caught.value.headers
        with admission.tokens(key("a"), 60):
            with pytest.raises(ApiError) as caught, admission.tokens(key("b"), 50):
                pass
            assert caught.value.status == 503
        with pytest.raises(ApiError) as caught, admission.tokens(key("a"), 101):
            pass
        assert caught.value.status == 400  # it would never fit
    assert admission.num_requests == admission.num_tokens == 0


def test_bounds_of_a_key() -> None:
    clock = Clock()
    admission = Admission(Limits(), 1, clock=clock)
    caller = key("a", max_concurrency=1, requests_per_min=2, tokens_per_min=600)
    with admission.request(caller):
        with pytest.raises(ApiError) as caught, admission.request(caller):
            pass
        assert caught.value.status == 429
        with admission.request(key("other")):
            pass
        with admission.tokens(caller, 500) as price:
            price.num_used_tokens = 100
        with pytest.raises(ApiError) as caught, admission.tokens(caller, 501):
            pass
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
        assert caught.value.headers["retry-after-ms"] == "100"
        assert caught.value.headers["x-ratelimit-remaining-tokens"] == "500"
    with admission.request(caller):
        pass
    with pytest.raises(ApiError) as caught, admission.request(caller):
        pass
    assert caught.value.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now_s += 30
    with admission.request(caller):
        pass
