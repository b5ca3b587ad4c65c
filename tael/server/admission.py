"""Who may be computed when: bounds, rates and a fair order.

Every request passes two gates. At the first, before anything is allocated for it, it is counted:
against the requests that the server holds and against the concurrency and the rates of its key.
Then its prompts are tokenised and priced. At the second gate each prompt waits for its turn: keys
get tokens in proportion to their weights (start-time fair queueing, Goyal et al. 1996), so a key
that sends a thousand requests delays another key's single one by about one request, not by all.

Behind the gates the engine takes prompts first come, first served. For the order to stay fair, few
may wait there, be it for their computation or for KV blocks: a prompt gets its turn when those
before it that have no token yet are fewer than two, or short.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from tael.economics.keys import Key
from tael.economics.rate_card import ServiceTier
from tael.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the whole server. Counts are of requests that have not ended, tokens those of prompts and
    the longest answers they may have."""

    max_requests: int = 256
    max_tokens: int = 4_000_000
    queue_timeout_s: float = 60.0


SERVICE_TIERS: dict[ServiceTier, float] = {"priority": 4.0, "default": 1.0, "flex": 0.25}
"""Factors on the weight of a key, by ``service_tier``."""

NUM_TOKENS_AHEAD = 1024
"""Of prompts that the engine has and that have no token yet, if they are more than two: enough for
two of its steps, so that it never waits for us."""


@dataclass(slots=True)
class Price:
    """Of a request that was counted in full."""

    num_used_tokens: int = 0
    """Set by the caller, when it is known."""


@dataclass(slots=True)
class Bucket:
    """A rate per minute with a burst of a minute. ``level`` is what is left."""

    per_minute: int
    level: float
    time_s: float

    def refill(self, now_s: float) -> None:
        added = (now_s - self.time_s) * self.per_minute / 60
        self.level = min(float(self.per_minute), self.level + added)
        self.time_s = now_s

    def seconds_until(self, amount: float) -> float:
        return max(0.0, (amount - self.level) * 60 / self.per_minute)


@dataclass(slots=True)
class _Account:
    """What a key has under way."""

    key: Key
    requests: Bucket | None
    tokens: Bucket | None
    num_requests: int = 0
    finish: float = 0.0
    """Virtual time at which what it has queued so far is through."""


@dataclass(slots=True, order=True)
class Turn:
    """A prompt that waits, or that is being computed, in ``num_seqs`` sequences."""

    start: float
    number: int
    num_prompt_tokens: int = field(compare=False)
    num_seqs: int = field(compare=False)
    granted: asyncio.Future[None] = field(compare=False)
    has_begun: bool = field(default=False, compare=False)
    """Its first token is there."""


class Admission:
    """The two gates. ``num_seqs`` is how many sequences the engine computes at once; what waits
    does so here, where its order is fair, and not in the engine. ``clock`` gives seconds."""

    def __init__(
        self, limits: Limits, num_seqs: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self.num_requests = 0
        self.num_tokens = 0
        self._num_seqs = num_seqs
        self._num_running = 0
        self._num_ahead = 0
        """Prompts that have had their turn and not begun, but for those of no tokens."""
        self._num_tokens_ahead = 0
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._waiting: list[Turn] = []
        self._numbers = count()
        self._virtual_time = 0.0

    @property
    def num_waiting(self) -> int:
        return sum(not turn.granted.done() for turn in self._waiting)

    @contextmanager
    def request(self, key: Key) -> Iterator[None]:
        """The first gate. Raises ApiError at once: 503 if the server is full, 429 if the key has
        had its share."""
        account = self._account(key)
        if self.num_requests >= self.limits.max_requests:
            raise ApiError(
                503, "The server is overloaded; please retry.", "overloaded", retry_after_s=1.0
            )
        if key.max_concurrency is not None and account.num_requests >= key.max_concurrency:
            raise ApiError(
                429,
                f"This key may have {key.max_concurrency} requests under way at a time.",
                "rate_limit_exceeded",
                retry_after_s=1.0,
                headers=self.headers(key),
            )
        if account.requests is not None:
            self._charge(account, account.requests, 1, "requests")
        self.num_requests += 1
        account.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1
            account.num_requests -= 1

    @contextmanager
    def tokens(self, key: Key, num_tokens: int) -> Iterator[Price]:
        """Between the gates: count the price of a request. What it did not use goes back to the
        rate of the key. Raises ApiError as ``request``."""
        account = self._account(key)
        if num_tokens > self.limits.max_tokens:
            raise ApiError(
                400,
                f"This request may take {num_tokens:,} tokens, prompts and answers together, and "
                f"the server accepts {self.limits.max_tokens:,}; ask for less at a time.",
                "request_too_large",
            )
        if self.num_tokens + num_tokens > self.limits.max_tokens:
            raise ApiError(
                503, "The server is overloaded; please retry.", "overloaded", retry_after_s=2.0
            )
        if account.tokens is not None:
            self._charge(account, account.tokens, num_tokens, "tokens")
        self.num_tokens += num_tokens
        price = Price()
        try:
            yield price
        finally:
            self.num_tokens -= num_tokens
            if account.tokens is not None:
                account.tokens.level += num_tokens - price.num_used_tokens

    async def turn(
        self,
        key: Key,
        num_prompt_tokens: int,
        num_tokens: int,
        num_seqs: int,
        service_tier: ServiceTier,
    ) -> Turn:
        """The second gate: wait until a prompt may run in ``num_seqs`` sequences, ``num_tokens`` in
        all. ``num_prompt_tokens`` is 0 for one that must not keep others waiting until it begins.
        Tell ``begun`` and ``done`` of it. Raises ApiError 503 if that takes longer than the queue
        timeout."""
        account = self._account(key)
        turn = Turn(
            start=max(self._virtual_time, account.finish),
            number=next(self._numbers),
            num_prompt_tokens=num_prompt_tokens,
            num_seqs=min(num_seqs, self._num_seqs),
            granted=asyncio.get_running_loop().create_future(),
        )
        account.finish = turn.start + num_tokens / (key.weight * SERVICE_TIERS[service_tier])
        heapq.heappush(self._waiting, turn)
        self._dispatch()
        try:
            await asyncio.wait_for(asyncio.shield(turn.granted), self.limits.queue_timeout_s)
        except asyncio.TimeoutError:
            self._withdraw(turn)
            raise ApiError(
                503,
                f"The request waited {self.limits.queue_timeout_s:g} s for its turn; please retry.",
                "queue_timeout",
                retry_after_s=5.0,
            ) from None
        except BaseException:
            self._withdraw(turn)
            raise
        return turn

    def begun(self, turn: Turn) -> None:
        """Its first token is there. May be said again with every other."""
        if not turn.has_begun:
            turn.has_begun = True
            self._num_ahead -= turn.num_prompt_tokens > 0
            self._num_tokens_ahead -= turn.num_prompt_tokens
            self._dispatch()

    def done(self, turn: Turn) -> None:
        """Its sequences have ended."""
        self._num_running -= turn.num_seqs
        self.begun(turn)
        self._dispatch()

    def headers(self, key: Key) -> dict[str, str]:
        """Of a response: what is left of the rates of a key."""
        account = self._account(key)
        headers = {}
        for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            if bucket is not None:
                bucket.refill(self._clock())
                headers[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level)))
                reset_s = bucket.seconds_until(bucket.per_minute)
                headers[f"x-ratelimit-reset-{name}"] = f"{reset_s:.3f}s"
        return headers

    def _account(self, key: Key) -> _Account:
        account = self._accounts.get(key.key_id)
        if account is None or account.key != key:  # the limits of a key may have been changed
            now_s = self._clock()

            def bucket(per_minute: int | None) -> Bucket | None:
                return None if per_minute is None else Bucket(per_minute, per_minute, now_s)

            account = _Account(key, bucket(key.requests_per_min), bucket(key.tokens_per_min))
            self._accounts[key.key_id] = account
        return account

    def _charge(self, account: _Account, bucket: Bucket, amount: int, unit: str) -> None:
        bucket.refill(self._clock())
        if bucket.level < amount:
            raise ApiError(
                429,
                f"This key may use {bucket.per_minute:,} {unit} a minute; this request needs "
                f"{amount:,} and {max(0, int(bucket.level)):,} are left.",
                "rate_limit_exceeded",
                retry_after_s=bucket.seconds_until(min(amount, bucket.per_minute)),
                headers=self.headers(account.key),
            )
        bucket.level -= amount

    def _dispatch(self) -> None:
        while self._waiting:
            turn = self._waiting[0]
            if not turn.granted.done() and not self._has_place(turn):
                return
            heapq.heappop(self._waiting)
            if not turn.granted.done():
                self._virtual_time = turn.start
                self._num_running += turn.num_seqs
                self._num_ahead += turn.num_prompt_tokens > 0
                self._num_tokens_ahead += turn.num_prompt_tokens
                turn.granted.set_result(None)

    def _has_place(self, turn: Turn) -> bool:
        num_tokens_ahead = self._num_tokens_ahead + turn.num_prompt_tokens
        return self._num_running + turn.num_seqs <= self._num_seqs and (
            self._num_ahead < 2 or num_tokens_ahead <= NUM_TOKENS_AHEAD
        )

    def _withdraw(self, turn: Turn) -> None:
        """Of someone who no longer waits."""
        if turn.granted.done():
            self.done(turn)
        else:
            turn.granted.cancel()
            self._dispatch()
