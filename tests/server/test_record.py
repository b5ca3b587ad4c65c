"""What callers are told, what they are charged, and when that is on the disk."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from running import MODEL, Running, eventually, running

from tael.economics.ledger import Ledger
from tael.economics.rate_card import Rate, RateCard, Tier
from tael.server import service

CARD = RateCard("1", "USD", (Rate("*", (Tier(input=1_000_000, output=10_000_000),)),))


@dataclass(frozen=True)
class Recorded:
    server: Running
    ledger: Ledger

    def charges(self) -> list[tuple[str, int, int]]:
        """Reason, output tokens and nano, oldest first."""
        return self._rows("SELECT reason, output_tokens, amount_nano FROM charges ORDER BY rowid")

    def is_settled(self) -> bool:
        open_requests = "SELECT request_id FROM reservations EXCEPT SELECT request_id FROM charges"
        return not self._rows(open_requests)

    def _rows(self, query: str) -> list[Any]:
        with closing(sqlite3.connect(self.ledger._path)) as connection:
            return connection.execute(query).fetchall()

    def stream(self, lines: list[str]) -> threading.Thread:
        """Ask for an answer; its events come into ``lines``."""
        body = {
            "model": MODEL,
            "prompt": "abc",
            "max_tokens": 5,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

        def read() -> None:
            with (
                self.server.http() as http,
                http.stream("POST", "/v1/completions", json=body) as response,
            ):
                lines.extend(iter(response.iter_lines()))

        thread = threading.Thread(target=read)
        thread.start()
        return thread


@pytest.fixture(scope="module")
def recorded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    with closing(Ledger(path, CARD)) as ledger, running(folder, ledger=ledger) as server:
        yield Recorded(server, ledger)


@pytest.fixture
def may_settle(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, settlements do not come to the disk."""
    event, settle = threading.Event(), recorded.ledger._journal.settle

    def late(*arguments: Any) -> int:
        event.wait()
        return settle(*arguments)

    monkeypatch.setattr(recorded.ledger._journal, "settle", late)
    yield event
    event.set()
    eventually(recorded.is_settled)


def test_usage_is_told_when_it_is_on_record(
    recorded: Recorded, may_settle: threading.Event
) -> None:
    """A server that dies has told nobody what its ledger does not know."""
    lines: list[str] = []
    thread = recorded.stream(lines)
    eventually(lambda: any('"length"' in line for line in lines))
    with recorded.server.http() as http:
        for _ in range(10):  # time for anything else that would come
            http.get("/health/live")
    assert not any('"prompt_tokens"' in line or "[DONE]" in line for line in lines)
    may_settle.set()
    thread.join()
    assert any('"prompt_tokens"' in line for line in lines) and "data: [DONE]" in lines
    assert recorded.charges()[-1][:2] == ("finished", 5)


def test_a_ledger_that_cannot_be_written_holds_no_answer_up(
    recorded: Recorded, may_settle: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "RECORD_TIMEOUT_S", 0.0)
    lines: list[str] = []
    recorded.stream(lines).join()
    assert "data: [DONE]" in lines and not may_settle.is_set()


def test_an_answer_of_which_nothing_came_costs_nothing(recorded: Recorded) -> None:
    """It was computed, but the engine died before it was whole."""
    before = len(recorded.charges())
    body = {"model": MODEL, "prompt": "abc", "n": 8, "max_tokens": 200, "ignore_eos": True}
    statuses: list[int] = []

    def ask() -> None:
        with recorded.server.http() as http:
            statuses.append(http.post("/v1/completions", json=body).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    engine, pid = recorded.server.service.engine, recorded.server.service.engine.pid
    assert pid is not None
    eventually(lambda: any(g.usage is not None for g in list(engine._generations.values())))
    os.kill(pid, signal.SIGKILL)
    thread.join()
    assert statuses == [503]
    eventually(lambda: len(recorded.charges()) == before + 1)
    assert recorded.charges()[-1] == ("failed", 0, 0)
    eventually(lambda: recorded.server.service.is_ready)
