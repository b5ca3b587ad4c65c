"""The ledger against a model of it, killed between any two statements of SQL.

One thread writes what is submitted in order, so what a killed server leaves is a beginning of what
was submitted, and no shorter than what had been acknowledged.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tael.economics.journal import Journal, Outcome
from tael.economics.ledger import Ledger
from tael.economics.rate_card import Rate, RateCard, Tier
from tael.economics.report import usage_report
from tael.request import Usage

CARD = RateCard("v1", "USD", (Rate("*", (Tier(10 * 10**6, 40 * 10**6, 10**6, 13 * 10**6),)),))

counts = st.integers(0, 500)
usages = st.builds(
    lambda fresh, read, write, output: Usage(fresh + read + write, read, write, output),
    counts,
    counts,
    counts,
    st.integers(0, 3),
)


def price(usage: Usage) -> int:
    """What CARD says, in other words."""
    others = usage.num_cached_tokens + usage.num_cache_write_tokens
    fresh = usage.num_prompt_tokens - others
    output = usage.num_output_tokens
    return 10 * fresh + usage.num_cached_tokens + 13 * usage.num_cache_write_tokens + 40 * output


@dataclass(frozen=True)
class Operation:
    request_id: str
    usage: Usage | None = None
    """None: reserve."""
    outcome: Outcome | None = None
    """None: progress."""


@dataclass
class Books:
    """What a ledger should hold: what was delivered by open requests, what the others cost."""

    delivered: dict[str, Usage]
    charged: dict[str, int]

    def after(self, operations: list[Operation]) -> Books:
        books = Books(dict(self.delivered), dict(self.charged))
        for operation in operations:
            books.apply(operation)
        return books

    def apply(self, operation: Operation) -> None:
        request_id, usage = operation.request_id, operation.usage
        if usage is None:
            self.delivered[request_id] = Usage()
        elif operation.outcome is None:
            self.delivered[request_id] = usage
        else:
            del self.delivered[request_id]
            free = usage.num_output_tokens == 0 and operation.outcome is not Outcome.FINISHED
            self.charged[request_id] = 0 if free else price(usage)

    def recovered(self) -> Books:
        open_requests = [
            Operation(request_id, usage, Outcome.RECOVERED)
            for request_id, usage in self.delivered.items()
        ]
        return self.after(open_requests)


class LedgerMachine(RuleBasedStateMachine):
    ledger_class: type[Ledger] = Ledger

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "0" / "ledger.sqlite"
        self.ledger = self.ledger_class(self.path, CARD)
        self.books = Books({}, {})
        self.num_requests = 0

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            shutil.rmtree(self.folder)

    @rule(data=st.data())
    def serve(self, data: st.DataObject) -> None:
        operations = self._draw(data)
        for operation in operations:
            result = self._submit(operation).result()
            self.books.apply(operation)
            if operation.outcome is not None:
                assert result == self.books.charged[operation.request_id], "the answer"
        self._check()

    @rule(data=st.data(), num_statements=st.integers(0, 30))
    def kill(self, data: st.DataObject, num_statements: int) -> None:
        """Submit all at once, and take the files as they are before a statement."""
        operations = self._draw(data)
        futures: list[Future[Any]] = []
        num_done: list[int] = []
        copy = self.folder / str(len(list(self.folder.iterdir()))) / "ledger.sqlite"
        copy.parent.mkdir()

        def photograph() -> None:
            num_done.append(sum(future.done() for future in futures))
            for suffix in ("", "-wal"):
                source = self.path.with_name(self.path.name + suffix)
                if source.exists():
                    shutil.copyfile(source, copy.with_name(copy.name + suffix))

        with held(self.ledger):
            call_before_statement(self.ledger, num_statements, photograph)
            futures += [self._submit(operation) for operation in operations]
        for future in futures:
            future.result()
        if not num_done:
            photograph()
        self.ledger.close()

        self.path = copy
        self.ledger = self.ledger_class(self.path, CARD)
        possible = [
            self.books.after(operations[:n]).recovered()
            for n in range(num_done[0], len(operations) + 1)
        ]
        charged = self._charged()
        assert charged in [books.charged for books in possible], "an operation lost or half done"
        self.books = Books({}, charged)
        self._check()

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = self.ledger_class(self.path, CARD)
        assert self.ledger.num_recovered == len(self.books.delivered)
        self.books = self.books.recovered()
        self._check()

    @precondition(lambda self: self.books.charged)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.books.charged)))
        with closing(Journal(self.path)) as journal:
            standing = "SELECT count(*) % 2 FROM charges WHERE request_id = ?"
            if journal.connection.execute(standing, (request_id,)).fetchone() == (1,):
                with journal.transaction():
                    journal.correct(request_id, "refund")
        self.books.charged[request_id] = 0
        self._check()

    def _draw(self, data: st.DataObject) -> list[Operation]:
        """Some operations that make sense one after the other."""
        operations: list[Operation] = []
        open_requests = list(self.books.delivered)
        for _ in range(data.draw(st.integers(1, 5))):
            kind = data.draw(st.sampled_from(["reserve", "progress", "settle", "settle"]))
            if kind == "reserve" or not open_requests:
                self.num_requests += 1
                open_requests.append(str(self.num_requests))
                operations.append(Operation(open_requests[-1]))
                continue
            request_id = data.draw(st.sampled_from(open_requests))
            outcome = None
            if kind == "settle":
                outcome = data.draw(st.sampled_from(Outcome))
                open_requests.remove(request_id)
            operations.append(Operation(request_id, data.draw(usages), outcome))
        return operations

    def _submit(self, operation: Operation) -> Future[Any]:
        if operation.usage is None:
            return self.ledger.reserve(
                operation.request_id,
                key_id="k",
                model="m",
                num_prompt_tokens=1500,
                max_output_tokens=3,
            )
        if operation.outcome is None:
            return self.ledger.progress(operation.request_id, operation.usage)
        return self.ledger.settle(operation.request_id, operation.usage, operation.outcome)

    def _charged(self) -> dict[str, int]:
        with closing(sqlite3.connect(self.path)) as connection:
            query = (
                "SELECT request_id, sum(amount_nano), sum(kind = 'settlement') FROM charges "
                "GROUP BY request_id"
            )
            rows = connection.execute(query).fetchall()
        assert all(num_settlements == 1 for _, _, num_settlements in rows)
        return {request_id: amount for request_id, amount, _ in rows}

    def _check(self) -> None:
        assert self._charged() == self.books.charged
        _, report = usage_report(self.path, ["key"])
        total = sum(int(row["amount_nano"]) for row in report)
        assert total == sum(self.books.charged.values()), "the sum of the answers"


def call_before_statement(ledger: Ledger, index: int, call: Callable[[], None]) -> None:
    num_left = index

    def trace(_: str) -> None:
        nonlocal num_left
        if num_left == 0:
            call()
        num_left -= 1

    ledger._journal.connection.set_trace_callback(trace)


@contextmanager
def held(ledger: Ledger) -> Iterator[None]:
    """Let the writer wait, so that what is submitted meanwhile is committed together. It has to
    wait inside a write: were it only kept from the file, it might have taken one of the
    operations already, and a failure would depend on threads."""
    waits, go_on = Event(), Event()

    def wait() -> None:
        waits.set()
        go_on.wait()

    ledger._submit(wait)
    waits.wait()
    try:
        yield
    finally:
        go_on.set()


SETTINGS = settings(
    stateful_step_count=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(SETTINGS, max_examples=40)


class AnswersTooEarly(Ledger):
    """Says that it is done when it has only begun."""

    def _submit(self, write: Callable[[], Any], *, must_be_written: bool = False) -> Future[Any]:
        begun = Event()

        def write_and_say() -> Any:
            result = write()
            begun.set()
            return result

        future = super()._submit(write_and_say, must_be_written=must_be_written)
        # Who waits for the result still waits for the commit: what the machine sees of this
        # ledger depends on its operations only, and not on which thread was faster.
        vars(future)["done"] = begun.is_set
        return future


class ForgetsTheDead(Ledger):
    def __init__(self, path: Path | str, rate_card: RateCard) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Journal, "recover", lambda self: 0)
            super().__init__(path, rate_card)


class ChargesTheReservation(Ledger):
    def __init__(self, path: Path | str, rate_card: RateCard) -> None:
        bound = Usage(1500, 0, 0, 3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tael.economics.journal._usage", lambda counts: bound)
            super().__init__(path, rate_card)


@pytest.mark.parametrize("broken", [AnswersTooEarly, ForgetsTheDead, ChargesTheReservation])
def test_the_machine_catches(broken: type[Ledger]) -> None:
    class Machine(LedgerMachine):
        ledger_class = broken

    found = settings(SETTINGS, max_examples=200, phases=[Phase.generate], database=None)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Machine, settings=found)  # type: ignore[no-untyped-call]
