"""Rate cards: what tokens cost, as versioned data.

A card is a JSON file; ``examples/rate-card.json`` is one and ``docs/ledger.md`` explains it.
Prices are integers: nano-units of the currency for a million tokens, so 0.30 USD is 300000000.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from tael.errors import TaelError
from tael.request import Usage

PerMillion = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
"""Nano-currency for a million tokens. The bound keeps every sum within SQLite's 64 bits."""

Percent = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
Clock = Annotated[str, msgspec.Meta(pattern=r"^(([01]\d|2[0-3]):[0-5]\d|24:00)$")]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
ServiceTier = Literal["default", "flex", "priority"]
"""The one that a request was served in, which may not be the one that it asked for."""
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Tier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prices of prompts of up to ``up_to`` tokens, that number included; of any length if null."""

    input: PerMillion
    output: PerMillion
    cache_read: PerMillion | None = None
    """A tenth of ``input``, rounded up, unless given."""
    cache_write: PerMillion | None = None
    """``input`` unless given: writing costs the engine nothing beside computing."""
    up_to: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def amount(self, usage: Usage) -> int:
        """Millionths of a nano."""
        cache_read = -(-self.input // 10) if self.cache_read is None else self.cache_read
        cache_write = self.input if self.cache_write is None else self.cache_write
        return (
            usage.num_fresh_tokens * self.input
            + usage.num_cached_tokens * cache_read
            + usage.num_cache_write_tokens * cache_write
            + usage.num_output_tokens * self.output
        )


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From ``start`` until before ``end``, UTC, on ``days`` that are not ``holidays``."""

    start: Clock = "00:00"
    end: Clock = "24:00"
    days: tuple[Day, ...] = DAYS
    holidays: frozenset[date] = frozenset()

    def __post_init__(self) -> None:
        if not self.start < self.end:
            raise ValueError("a window must start before it ends; split one that passes midnight")

    def contains(self, at: datetime) -> bool:
        return (
            self.start <= f"{at:%H:%M}" < self.end
            and DAYS[at.weekday()] in self.days
            and at.date() not in self.holidays
        )


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prices of a model (``*``: of any) at certain times."""

    model: Text
    tiers: tuple[Tier, ...]
    """The length of the whole prompt, cached or not, picks one for all of the request."""
    effective_from: datetime | None = None
    effective_until: datetime | None = None
    """From the first moment until before the second. With a time zone."""
    windows: tuple[Window, ...] = ()
    """If there are any, the prices hold within them only."""
    service_tiers: dict[Literal["flex", "priority"], Percent] = {}
    """Percent of every price that a service tier pays: 100 unless it is given."""

    def __post_init__(self) -> None:
        bounds = [tier.up_to for tier in self.tiers]
        inner = [bound for bound in bounds[:-1] if bound is not None]
        if not bounds or bounds[-1] is not None or len(inner) < len(bounds) - 1:
            raise ValueError("every tier but the last must have up_to, and the last must not")
        if inner != sorted(set(inner)):
            raise ValueError("up_to must ascend from tier to tier")
        for moment in (self.effective_from, self.effective_until):
            if moment is not None and moment.tzinfo is None:
                raise ValueError("effective dates need a time zone, such as Z")

    def holds(self, model: str, at: datetime) -> bool:
        return (
            self.model in ("*", model)
            and (self.effective_from is None or self.effective_from <= at)
            and (self.effective_until is None or at < self.effective_until)
            and (not self.windows or any(window.contains(at) for window in self.windows))
        )

    def tier(self, num_prompt_tokens: int) -> Tier:
        return next(
            tier for tier in self.tiers if tier.up_to is None or num_prompt_tokens <= tier.up_to
        )


class RateCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of the ``rates`` the first one that holds for a model and a time is used."""

    version: Text
    """Names this content for ever: a changed card needs another one."""
    currency: Annotated[str, msgspec.Meta(pattern="^[A-Z]{3}$")]
    rates: tuple[Rate, ...]

    @classmethod
    def load(cls, path: Path | str) -> RateCard:
        """Read a card. Raises TaelError, which names the field, if it is not one."""
        try:
            return cls.decode(Path(path).read_bytes())
        except OSError as error:
            raise TaelError(f"cannot read the rate card {path}: {error.strerror}.") from error
        except msgspec.DecodeError as error:
            raise TaelError(f"{path} is not a rate card: {error}; correct it.") from error

    @classmethod
    def decode(cls, content: bytes | str) -> RateCard:
        return msgspec.json.decode(content, type=cls)

    def encode(self) -> str:
        """The card as one line of JSON, the same for equal cards."""
        return msgspec.json.encode(self, order="deterministic").decode()

    def price(self, usage: Usage, *, model: str, service_tier: ServiceTier, at: datetime) -> int:
        """What a request costs that arrived at ``at``, in nano-currency.

        Amounts of all classes are added up exactly and rounded once, to the nearest nano, halves
        up. Raises TaelError if the card has no such price.
        """
        rate = self._rate(model, at)
        percent = 100 if service_tier == "default" else rate.service_tiers.get(service_tier, 100)
        return _round(rate.tier(usage.num_prompt_tokens).amount(usage) * percent)

    def upper_bound(
        self,
        num_prompt_tokens: int,
        max_output_tokens: int,
        *,
        model: str,
        service_tier: ServiceTier,
        at: datetime,
    ) -> int:
        """The most that ``price`` can say of a request of this size, however much of its prompt
        turns out to be cached."""
        classes: Sequence[Usage] = (
            Usage(num_prompt_tokens, num_output_tokens=max_output_tokens),
            Usage(num_prompt_tokens, num_prompt_tokens, num_output_tokens=max_output_tokens),
            Usage(num_prompt_tokens, 0, num_prompt_tokens, max_output_tokens),
        )
        return max(
            self.price(usage, model=model, service_tier=service_tier, at=at) for usage in classes
        )

    def _rate(self, model: str, at: datetime) -> Rate:
        utc = at.astimezone(timezone.utc)
        for rate in self.rates:
            if rate.holds(model, utc):
                return rate
        raise TaelError(
            f"rate card {self.version} has no price of model {model} at {utc:%Y-%m-%d %H:%M} UTC; "
            'add one, or one of model "*".'
        )


NO_CURRENCY = "XXX"
"""Of ISO 4217."""

FREE = RateCard("free", NO_CURRENCY, (Rate("*", (Tier(0, 0),)),))
"""Where nothing is charged and all is counted."""


def _round(amount: int) -> int:
    """Percents of millionths to the nearest whole, halves up."""
    unit = 100 * 1_000_000
    return (amount + unit // 2) // unit
