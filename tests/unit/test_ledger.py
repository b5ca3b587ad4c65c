"""The ledger: durable before it answers, settled exactly once, never rewritten."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tael.economics import ledger as ledger_module
from tael.economics.journal import Journal, Outcome
from tael.economics.ledger import Ledger
from tael.economics.rate_card import FREE, Rate, RateCard, Tier
from tael.economics.report import format_nano, usage_report
from tael.errors import TaelError
from tael.request import Usage

CARD = RateCard("v1", "USD", (Rate("*", (Tier(10 * 10**6, 40 * 10**6),)),))
"""10 nano a prompt token, 1 if it was cached, 40 an output token."""

USAGE = Usage(100, 50, 20, 3, kv_byte_s=1234.4, compute_s=0.5)
COST = 50 * 10 + 50 * 1 + 3 * 40


class Clock:
    """Seconds since 1970, which a test sets."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0  # 2027-01-15 08:00 UTC

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "books" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path, CARD)) as ledger:
        yield ledger


def reserve(ledger: Ledger, request_id: str, key_id: str = "k", model: str = "m") -> Future[int]:
    return ledger.reserve(
        request_id, key_id=key_id, model=model, num_prompt_tokens=100, max_output_tokens=10
    )


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def total(path: Path) -> int:
    _, report = usage_report(path, ["model"])
    return sum(int(row["amount_nano"]) for row in report)


def test_a_request_from_reservation_to_report(ledger: Ledger, path: Path) -> None:
    assert reserve(ledger, "a").result() == 100 * 10 + 10 * 40
    ledger.progress("a", Usage(100, 50, 20, 1)).result()
    assert ledger.settle("a", USAGE, Outcome.FINISHED).result() == COST
    currency, report = usage_report(path, ["key", "model"])
    assert currency == "USD"
    assert report == [
        {
            "key": "k",
            "model": "m",
            "requests": 1,
            "fresh_tokens": 30,
            "cache_read_tokens": 50,
            "cache_write_tokens": 20,
            "output_tokens": 3,
            "kv_byte_s": 1234,
            "compute_us": 500_000,
            "amount_nano": COST,
        }
    ]


def test_the_file_is_the_owners_and_commits_reach_the_disk(ledger: Ledger, path: Path) -> None:
    reserve(ledger, "a").result()
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    connection = ledger._journal.connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"


@pytest.mark.parametrize("table", ["rate_cards", "reservations", "progress", "charges"])
def test_no_row_is_changed_or_deleted(ledger: Ledger, table: str) -> None:
    reserve(ledger, "a").result()
    ledger.progress("a", USAGE).result()
    ledger.settle("a", USAGE, Outcome.FINISHED).result()
    connection = ledger._journal.connection
    (column, *_), *_ = [row[1:] for row in connection.execute(f"PRAGMA table_info({table})")]
    before = connection.execute(f"SELECT * FROM {table}").fetchall()
    assert len(before) == 1
    for statement in (
        f"UPDATE {table} SET {column} = {column}",
        f"DELETE FROM {table}",
        f"INSERT OR REPLACE INTO {table} SELECT * FROM {table}",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    assert connection.execute(f"SELECT * FROM {table}").fetchall() == before


def test_a_request_is_settled_once(ledger: Ledger, path: Path) -> None:
    reserve(ledger, "a").result()
    settlements = [ledger.settle("a", USAGE, outcome) for outcome in Outcome]
    assert settlements[0].result() == COST
    for settlement in settlements[1:]:
        with pytest.raises(ValueError, match="'a' cannot be settled"):
            settlement.result()
    assert total(path) == COST


def test_programming_errors_harm_nobody_else(ledger: Ledger, path: Path) -> None:
    futures = [
        reserve(ledger, "a"),
        reserve(ledger, "a"),
        reserve(ledger, ""),
        ledger.progress("nobody", USAGE),
        ledger.settle("nobody", USAGE, Outcome.FINISHED),
        reserve(ledger, "b"),
        ledger.settle("b", Usage(1, 2), Outcome.FINISHED),
        ledger.settle("b", Usage(1 << 70), Outcome.ABORTED),
        ledger.settle("a", USAGE, Outcome.FINISHED),
    ]
    errors = [type(future.exception()).__name__ for future in futures]
    assert errors == [
        "NoneType",
        "ValueError",
        "ValueError",
        "IntegrityError",
        "ValueError",
        "NoneType",
        "ValueError",
        "OverflowError",
        "NoneType",
    ]
    assert total(path) == COST


def test_what_the_caller_counts_on_with_is_copied(ledger: Ledger) -> None:
    usage = Usage(100, num_output_tokens=1)
    reserve(ledger, "a").result()
    ledger.progress("a", usage)
    settled = ledger.settle("a", usage, Outcome.FINISHED)
    usage.num_output_tokens = 1000
    assert settled.result() == 1040


def test_an_event_loop_waits_without_a_thread_for_each(ledger: Ledger, path: Path) -> None:
    async def serve(i: int) -> int:
        await asyncio.wrap_future(reserve(ledger, str(i)))
        return await asyncio.wrap_future(ledger.settle(str(i), USAGE, Outcome.FINISHED))

    async def main() -> list[int]:
        gone = asyncio.ensure_future(asyncio.wrap_future(reserve(ledger, "gone")))
        await asyncio.sleep(0)
        gone.cancel()  # its row is written all the same
        return await asyncio.gather(*(serve(i) for i in range(200)))

    assert asyncio.run(main()) == [COST] * 200
    ledger.settle("gone", USAGE, Outcome.ABORTED).result()
    assert total(path) == 201 * COST


def test_those_who_wait_share_a_commit(ledger: Ledger, path: Path) -> None:
    commits: list[str] = []
    ledger._journal.connection.set_trace_callback(
        lambda statement: commits.append(statement) if statement == "COMMIT" else None
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # the writer has to wait, and all others for it
        futures = [reserve(ledger, str(i)) for i in range(100)]
        other.execute("COMMIT")
    assert [future.result() for future in futures] == [1400] * 100
    assert len(commits) <= 2, "of those that came before the writer waited, and of the others"


def test_a_dead_server_is_settled_by_the_next(path: Path, tmp_path: Path) -> None:
    with closing(Ledger(path, CARD)) as ledger:
        for request_id in "abcd":
            reserve(ledger, request_id).result()
        ledger.progress("a", Usage(100, 50, 20, 1)).result()
        ledger.progress("a", USAGE).result()
        ledger.progress("b", Usage(100)).result()
        ledger.settle("d", USAGE, Outcome.FINISHED).result()
    with closing(Ledger(path, CARD)) as ledger:
        assert ledger.num_recovered == 3
    charges = "SELECT request_id, kind, reason, amount_nano FROM charges ORDER BY request_id"
    assert rows(path, charges) == [
        ("a", "settlement", "recovered", COST),
        ("b", "settlement", "recovered", 0),
        ("c", "settlement", "recovered", 0),
        ("d", "settlement", "finished", COST),
    ]
    with closing(Ledger(path, CARD)) as ledger:
        assert ledger.num_recovered == 0


def test_a_request_is_priced_by_the_card_of_its_reservation(path: Path) -> None:
    with closing(Ledger(path, CARD)) as ledger:
        reserve(ledger, "a").result()
        ledger.progress("a", USAGE).result()
    dearer = RateCard("v2", "USD", (Rate("*", (Tier(10**9, 10**9),)),))
    with closing(Ledger(path, dearer)) as ledger:
        assert ledger.num_recovered == 1
        reserve(ledger, "b").result()
        ledger.settle("b", USAGE, Outcome.FINISHED).result()
    charges = "SELECT request_id, rate_card, amount_nano FROM charges ORDER BY request_id"
    assert rows(path, charges) == [("a", "v1", COST), ("b", "v2", 50_000 + 5_000 + 3_000)]


def test_it_is_priced_by_the_time_of_its_reservation(path: Path) -> None:
    clock = Clock()
    card = RateCard.load(Path(__file__).parents[2] / "examples" / "rate-card.json")
    clock.now_s += (
        86400 * 3 - 4 * 3600 - 1
    )  # Monday 2027-01-18 03:59:59: one second of peak is left
    with closing(Ledger(path, card, clock=clock)) as ledger:
        for request_id, step_s in (("a", 1), ("b", 1)):
            reserve(ledger, request_id, model="qwen2.5-coder:1.5b").result()
            clock.now_s += step_s
        usage = Usage(1000, num_output_tokens=1)
        assert ledger.settle("a", usage, Outcome.FINISHED).result() == 300_000 + 1200
        assert ledger.settle("b", usage, Outcome.FINISHED).result() == 150_000 + 600


def test_a_version_names_one_card_and_a_ledger_has_one_currency(path: Path) -> None:
    Ledger(path, FREE).close()
    Ledger(path, CARD).close()
    Ledger(path, CARD).close()
    Ledger(path, FREE).close()
    for card, message in (
        (RateCard("v1", "USD", (Rate("*", (Tier(1, 1),)),)), "is not what it was"),
        (RateCard("v2", "CNY", CARD.rates), "in USD and rate card v2 in CNY"),
    ):
        with pytest.raises(TaelError, match=message):
            Ledger(path, card)
        Ledger(path, CARD).close()  # and the lock was given back


def test_two_servers_do_not_write_one_ledger(ledger: Ledger, path: Path) -> None:
    reserve(ledger, "a").result()
    with pytest.raises(TaelError, match="another server"):
        Ledger(path, CARD)
    assert ledger.settle("a", USAGE, Outcome.FINISHED).result() == COST


def test_spent_is_what_the_file_says(path: Path) -> None:
    """For each key, whoever wrote it: this server, an earlier one, or another process."""
    for run in range(2):
        with closing(Ledger(path, CARD)) as ledger:
            assert ledger.spent("k") == ("USD", 2 * COST * run)
            for i, key_id in enumerate(("k", "other", "k")):
                reserve(ledger, f"{run}/{i}", key_id).result()
                ledger.settle(f"{run}/{i}", USAGE, Outcome.FINISHED).result()
                assert ledger.spent("k") == ("USD", COST * (2 * run + (1, 1, 2)[i]))
            assert ledger.spent("other") == ("USD", COST * (run + 1))
    with closing(Ledger(path, CARD)) as ledger, closing(Journal(path)) as journal:
        with journal.transaction():
            journal.correct("0/0", "goodwill")
        assert ledger.spent("k") == ("USD", 3 * COST)
        assert ledger.spent("nobody") == ("USD", 0)


def test_corrections_reverse(path: Path) -> None:
    clock = Clock()
    with closing(Ledger(path, CARD, clock=clock)) as ledger:
        reserve(ledger, "a").result()
        ledger.settle("a", USAGE, Outcome.FINISHED).result()
    clock.now_s += 86400
    cheaper = RateCard("v2", "USD", (Rate("*", (Tier(10**6, 10**6),)),))
    with closing(Journal(path, clock=clock)) as journal:
        with journal.transaction():
            assert journal.correct("a", "wrong card", cheaper) == 50 + 5 + 3
        with journal.transaction():
            assert journal.correct("a", "goodwill") == 0
        for request_id in ("a", "nobody"):
            with pytest.raises(TaelError, match="no charge to correct"), journal.transaction():
                journal.correct(request_id, "again")
    query = "SELECT kind, reverses, rate_card, output_tokens, amount_nano FROM charges"
    assert rows(path, query) == [
        ("settlement", None, "v1", 3, COST),
        ("reversal", 1, "v1", -3, -COST),
        ("correction", None, "v2", 3, 58),
        ("reversal", 3, "v2", -3, -58),
    ]
    _, report = usage_report(path, ["day"])
    assert [(r["day"], r["requests"], r["amount_nano"]) for r in report] == [
        ("2027-01-15", 1, COST),
        ("2027-01-16", 0, -COST),
    ]


def test_a_full_disk_refuses_reservations_and_keeps_settlements(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_S", 0.001)
    reserve(ledger, "a").result()
    connection = ledger._journal.connection
    (num_pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {num_pages}")
    reserved = []
    while not (reserved and reserved[-1].exception()):
        reserved.append(reserve(ledger, f"{len(reserved)}-{'x' * 3000}"))
    with pytest.raises(TaelError, match=r"cannot write the ledger .*full"):
        reserved[-1].result()
    settled = ledger.settle("a", USAGE, Outcome.FINISHED)
    with pytest.raises(TaelError):
        reserve(ledger, "y" * 5000).result()
    connection.execute("PRAGMA max_page_count = 1000000")
    assert settled.result() == COST
    assert reserve(ledger, "y" * 5000).result() > 0
    assert total(path) == COST


def test_what_was_submitted_is_written_before_the_end(path: Path) -> None:
    ledger = Ledger(path, CARD)
    for i in range(50):
        reserve(ledger, str(i))
        last = ledger.settle(str(i), USAGE, Outcome.FINISHED)
    ledger.close()
    assert last.result(timeout=0) == COST
    assert total(path) == 50 * COST


def test_reports_group_and_cut_by_day(path: Path) -> None:
    clock = Clock()
    with closing(Ledger(path, CARD, clock=clock)) as ledger:
        for i, (key_id, model) in enumerate([("k", "m"), ("k", "n"), ("l", "m"), ("k", "m")]):
            reserve(ledger, str(i), key_id, model).result()
            ledger.settle(str(i), USAGE, Outcome.FINISHED).result()
            clock.now_s += 8 * 3600
        _, by_key = usage_report(path, ["key"])  # while it is open
    assert [(r["key"], r["requests"]) for r in by_key] == [("k", 3), ("l", 1)]
    _, by_all = usage_report(path, ["day", "model", "key"])
    assert [(r["day"], r["model"], r["key"], r["requests"]) for r in by_all] == [
        ("2027-01-15", "m", "k", 1),
        ("2027-01-15", "n", "k", 1),
        ("2027-01-16", "m", "k", 1),
        ("2027-01-16", "m", "l", 1),
    ]


def test_files_that_are_no_ledger(path: Path, tmp_path: Path) -> None:
    with pytest.raises(TaelError, match="there is no ledger"):
        usage_report(path, ["key"])
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 1000)
    other = tmp_path / "other"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE keys (a)")
    for file in (junk, other):
        with pytest.raises(TaelError, match=f"{file} is not a ledger"):
            usage_report(file, ["key"])
        with pytest.raises(TaelError, match=str(file)):
            Ledger(file, CARD)
    Ledger(path, CARD).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    with pytest.raises(TaelError, match="has format 2"):
        Ledger(path, CARD)


@pytest.mark.parametrize(
    ("amount_nano", "text"),
    [(0, "0.000000000"), (1, "0.000000001"), (-15 * 10**8, "-1.500000000")],
)
def test_amounts_are_shown_exactly(amount_nano: int, text: str) -> None:
    assert format_nano(amount_nano) == text
