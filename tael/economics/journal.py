"""The tables of the ledger, and the only statements that change them: each one inserts.

Plain SQL; ``PRAGMA`` and the triggers' ``RAISE`` are all that another database would say
differently.
"""

from __future__ import annotations

import enum
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tael.economics.database import open_database
from tael.economics.rate_card import NO_CURRENCY, RateCard, ServiceTier
from tael.errors import TaelError
from tael.request import Usage

APPLICATION_ID = 0x5461656C  # "Tael"

COUNTS = (
    "fresh_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "output_tokens",
    "kv_byte_s",
    "compute_us",
)

_COUNT_COLUMNS = ",\n    ".join(f"{name} INTEGER NOT NULL" for name in COUNTS)

_TABLES = f"""
CREATE TABLE rate_cards (
    version TEXT PRIMARY KEY,
    currency TEXT NOT NULL,
    content TEXT NOT NULL
);;
CREATE TABLE reservations (
    request_id TEXT PRIMARY KEY CHECK (request_id <> ''),
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    service_tier TEXT NOT NULL,
    rate_card TEXT NOT NULL REFERENCES rate_cards (version),
    amount_nano INTEGER NOT NULL CHECK (amount_nano >= 0),
    created_ms INTEGER NOT NULL
);;
CREATE TABLE progress (
    progress_id INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL REFERENCES reservations (request_id),
    {_COUNT_COLUMNS},
    created_ms INTEGER NOT NULL
);;
CREATE INDEX progress_of_request ON progress (request_id);;
CREATE TABLE charges (
    charge_id INTEGER PRIMARY KEY,
    request_id TEXT NOT NULL REFERENCES reservations (request_id),
    kind TEXT NOT NULL CHECK (kind IN ('settlement', 'reversal', 'correction')),
    reverses INTEGER UNIQUE REFERENCES charges (charge_id),
    reason TEXT NOT NULL,
    rate_card TEXT NOT NULL REFERENCES rate_cards (version),
    {_COUNT_COLUMNS},
    amount_nano INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    CHECK ((kind = 'reversal') = (reverses IS NOT NULL)),
    CHECK (kind = 'reversal'
        OR min(fresh_tokens, cache_read_tokens, cache_write_tokens, output_tokens) >= 0)
);;
CREATE UNIQUE INDEX one_settlement ON charges (request_id) WHERE kind = 'settlement';;
CREATE INDEX charges_of_request ON charges (request_id);;
CREATE INDEX charges_by_time ON charges (created_ms)
"""

SCHEMA = ";;".join(
    [
        _TABLES,
        *(
            f"CREATE TRIGGER {table}_{verb.lower()} BEFORE {verb} ON {table} "
            "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
            for table in ("rate_cards", "reservations", "progress", "charges")
            for verb in ("UPDATE", "DELETE")
        ),
    ]
)


class Outcome(enum.Enum):
    """How a request ended. Only a finished one is charged if it delivered no token."""

    FINISHED = "finished"
    ABORTED = "aborted"
    """The caller went away."""
    FAILED = "failed"
    """The server could not go on with it."""
    RECOVERED = "recovered"
    """The server died; settled at its next start, from the last progress on record."""


class Journal:
    """One connection to a ledger. Not thread-safe.

    Changes are made inside ``transaction``, and are durable when it has ended without an
    exception. ``clock`` gives seconds since 1970.
    """

    def __init__(self, path: Path | str, *, clock: Callable[[], float] = time.time) -> None:
        self.connection = open_database(path, APPLICATION_ID, SCHEMA)
        self._clock = clock
        self._cards: dict[str, RateCard] = {}

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:  # SQLite rolls back by itself on a full disk
                self.connection.execute("ROLLBACK")
            raise

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Inside a transaction: all of the block, or nothing of it."""
        self.connection.execute("SAVEPOINT one")
        try:
            yield
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK TO one")
                self.connection.execute("RELEASE one")
            raise
        self.connection.execute("RELEASE one")

    def add_rate_card(self, card: RateCard) -> None:
        """Keep a card, so that every price can be recomputed. Raises TaelError if its version
        names another content already, or its currency is not that of the ledger."""
        rows = self.connection.execute("SELECT version, currency, content FROM rate_cards")
        for version, currency, content in rows.fetchall():
            if currency != card.currency and NO_CURRENCY not in (currency, card.currency):
                raise TaelError(
                    f"the ledger is in {currency} and rate card {card.version} in "
                    f"{card.currency}; start another ledger."
                )
            if version == card.version and content != card.encode():
                raise TaelError(
                    f"rate card {version} is not what it was when it priced earlier requests; "
                    "give the changed card a version of its own."
                )
            if version == card.version:
                return
        self._insert(
            "rate_cards", version=card.version, currency=card.currency, content=card.encode()
        )

    def reserve(
        self,
        request_id: str,
        *,
        key_id: str,
        model: str,
        service_tier: ServiceTier,
        rate_card: RateCard,
        num_prompt_tokens: int,
        max_output_tokens: int,
    ) -> int:
        """Record that a request is about to be served, and the most that it can cost. Raises
        ValueError if the id is not new, TaelError if the card has no price."""
        created_ms = self._now_ms()
        amount_nano = rate_card.upper_bound(
            num_prompt_tokens,
            max_output_tokens,
            model=model,
            service_tier=service_tier,
            at=_moment(created_ms),
        )
        try:
            self._insert(
                "reservations",
                request_id=request_id,
                key_id=key_id,
                model=model,
                service_tier=service_tier,
                rate_card=rate_card.version,
                amount_nano=amount_nano,
                created_ms=created_ms,
            )
        except sqlite3.IntegrityError as error:
            raise ValueError(f"request id {request_id!r} is empty or was used before") from error
        return amount_nano

    def progress(self, request_id: str, usage: Usage) -> None:
        """Record what a reserved request has delivered so far."""
        self._insert("progress", request_id=request_id, **_counts(usage), created_ms=self._now_ms())

    def settle(self, request_id: str, usage: Usage, outcome: Outcome) -> int:
        """Charge a reserved request, once, by the rate card of its reservation. Returns nano.
        Raises ValueError if it is settled already or was never reserved."""
        reservation = self._reservation(request_id)
        delivered = usage.num_output_tokens > 0 or outcome is Outcome.FINISHED
        amount_nano = self._price(usage, reservation) if delivered else 0
        card = reservation["rate_card"]
        try:
            self._charge(request_id, "settlement", outcome.value, card, _counts(usage), amount_nano)
        except sqlite3.IntegrityError as error:
            raise ValueError(f"request {request_id!r} cannot be settled: {error}") from error
        return amount_nano

    def recover(self) -> int:
        """Settle every open reservation; how many. For the start of the one process that serves:
        whoever made them is gone."""
        request_ids = self.open_requests()
        for request_id in request_ids:
            row = self.connection.execute(
                f"SELECT {', '.join(COUNTS)} FROM progress WHERE request_id = ? "
                "ORDER BY progress_id DESC LIMIT 1",
                (request_id,),
            ).fetchone()
            usage = _usage(row) if row is not None else Usage()
            self.settle(request_id, usage, Outcome.RECOVERED)
        return len(request_ids)

    def correct(self, request_id: str, reason: str, card: RateCard | None = None) -> int:
        """Take back what a request is charged, and charge its usage by another card if one is
        given. Returns the nano that it is charged from now on. Raises TaelError if there is no
        charge that stands."""
        row = self.connection.execute(
            f"SELECT charge_id, rate_card, amount_nano, {', '.join(COUNTS)} FROM charges AS charge "
            "WHERE request_id = ? AND kind <> 'reversal' AND NOT EXISTS "
            "(SELECT 1 FROM charges WHERE reverses = charge.charge_id)",
            (request_id,),
        ).fetchone()
        if row is None:
            raise TaelError(f"request {request_id} has no charge to correct; check its id.")
        charge_id, version, amount_nano, *counts = row
        negated = {name: -count for name, count in zip(COUNTS, counts, strict=True)}
        self._charge(request_id, "reversal", reason, version, negated, -amount_nano, charge_id)
        if card is None:
            return 0
        self.add_rate_card(card)
        reservation = {**self._reservation(request_id), "rate_card": card.version}
        amount_nano = self._price(_usage(counts), reservation)
        self._charge(
            request_id,
            "correction",
            reason,
            card.version,
            dict(zip(COUNTS, counts, strict=True)),
            amount_nano,
        )
        return amount_nano

    def open_requests(self) -> list[str]:
        """Ids of the requests that are reserved and not settled, oldest first."""
        rows = self.connection.execute(
            "SELECT request_id FROM reservations WHERE NOT EXISTS (SELECT 1 FROM charges WHERE "
            "charges.request_id = reservations.request_id AND kind = 'settlement') ORDER BY rowid"
        )
        return [request_id for (request_id,) in rows.fetchall()]

    def close(self) -> None:
        self.connection.close()

    def _reservation(self, request_id: str) -> dict[str, Any]:
        columns = ("rate_card", "model", "service_tier", "created_ms")
        row = self.connection.execute(
            f"SELECT {', '.join(columns)} FROM reservations WHERE request_id = ?", (request_id,)
        ).fetchone()
        if row is None:
            raise ValueError(f"request {request_id!r} was never reserved")
        return dict(zip(columns, row, strict=True))

    def _price(self, usage: Usage, reservation: dict[str, Any]) -> int:
        """By the card and the time of the reservation, whatever holds now."""
        version = reservation["rate_card"]
        if version not in self._cards:
            (content,) = self.connection.execute(
                "SELECT content FROM rate_cards WHERE version = ?", (version,)
            ).fetchone()
            self._cards[version] = RateCard.decode(content)
        return self._cards[version].price(
            usage,
            model=reservation["model"],
            service_tier=reservation["service_tier"],
            at=_moment(reservation["created_ms"]),
        )

    def _charge(
        self,
        request_id: str,
        kind: str,
        reason: str,
        rate_card: str,
        counts: dict[str, int],
        amount_nano: int,
        reverses: int | None = None,
    ) -> None:
        self._insert(
            "charges",
            request_id=request_id,
            kind=kind,
            reverses=reverses,
            reason=reason,
            rate_card=rate_card,
            **counts,
            amount_nano=amount_nano,
            created_ms=self._now_ms(),
        )

    def _insert(self, table: str, **values: str | int | None) -> None:
        marks = ", ".join("?" * len(values))
        self.connection.execute(
            f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks})", tuple(values.values())
        )

    def _now_ms(self) -> int:
        return round(self._clock() * 1000)


def _counts(usage: Usage) -> dict[str, int]:
    return {
        "fresh_tokens": usage.num_fresh_tokens,
        "cache_read_tokens": usage.num_cached_tokens,
        "cache_write_tokens": usage.num_cache_write_tokens,
        "output_tokens": usage.num_output_tokens,
        "kv_byte_s": round(usage.kv_byte_s),
        "compute_us": round(usage.compute_s * 1e6),
    }


def _usage(counts: Sequence[int]) -> Usage:
    fresh, cache_read, cache_write, output, kv_byte_s, compute_us = counts
    return Usage(
        num_prompt_tokens=fresh + cache_read + cache_write,
        num_cached_tokens=cache_read,
        num_cache_write_tokens=cache_write,
        num_output_tokens=output,
        kv_byte_s=kv_byte_s,
        compute_s=compute_us / 1e6,
    )


def _moment(created_ms: int) -> datetime:
    return datetime.fromtimestamp(created_ms / 1000, timezone.utc)
