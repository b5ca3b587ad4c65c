"""The ledger of a running server: one thread writes, one fsync serves all that wait for it."""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tael.economics.journal import Journal, Outcome
from tael.economics.rate_card import RateCard, ServiceTier
from tael.economics.report import Spending
from tael.errors import TaelError
from tael.request import Usage

logger = logging.getLogger(__name__)

RETRY_S = 1.0
"""How long a settlement waits for another try while the file cannot be written."""


class Ledger:
    """Reserve before the first token, settle exactly once at the end, whatever the end is.

    Every method returns at once with a future, whose result is there when the row is on the disk
    (``.result()``, or ``await asyncio.wrap_future(...)``); what was submitted is done even if
    nobody waits for it any more. Any thread may call. Opening settles what a server that died
    left open, and raises TaelError if another process serves on this file.

    If the disk is full or fails, futures of reservations fail with TaelError, so that nothing
    more is served unrecorded, and settlements wait until they can be written.
    """

    def __init__(
        self, path: Path | str, rate_card: RateCard, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.rate_card = rate_card
        self._path = Path(path)
        with ExitStack() as stack:
            self._journal = stack.enter_context(closing(Journal(path, clock=clock)))
            stack.enter_context(_lock(self._path))
            with self._journal.transaction():
                self._journal.add_rate_card(rate_card)
                self.num_recovered = self._journal.recover()
            self._spending = stack.enter_context(closing(Spending(path)))
            self._resources = stack.pop_all()
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._postponed: list[_Entry] = []
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)
        self._thread.start()

    def reserve(
        self,
        request_id: str,
        *,
        key_id: str,
        model: str,
        num_prompt_tokens: int,
        max_output_tokens: int,
        service_tier: ServiceTier = "default",
    ) -> Future[int]:
        """Before anything of a request is served: the most nano that it can cost.
        ``service_tier`` is the one that it will be served in, ``max_output_tokens`` that of all
        its completions. The future fails with ValueError if the id is not new, with TaelError if
        the rate card has no price."""
        return self._submit(
            lambda: self._journal.reserve(
                request_id,
                key_id=key_id,
                model=model,
                service_tier=service_tier,
                rate_card=self.rate_card,
                num_prompt_tokens=num_prompt_tokens,
                max_output_tokens=max_output_tokens,
            )
        )

    def progress(self, request_id: str, usage: Usage) -> Future[None]:
        """Now and then during a request: what it has delivered, which is what it is charged if
        the server dies."""
        counts = replace(usage)  # the caller may go on counting
        return self._submit(lambda: self._journal.progress(request_id, counts))

    def settle(self, request_id: str, usage: Usage, outcome: Outcome) -> Future[int]:
        """Once a request has ended: the nano that it is charged. The future fails with
        ValueError if it is settled already or was never reserved."""
        counts = replace(usage)
        return self._submit(
            lambda: self._journal.settle(request_id, counts, outcome), must_be_written=True
        )

    def spent(self, key_id: str) -> tuple[str, int]:
        """The currency, and the nano that a key was charged up to now."""
        return self._spending.of(key_id)

    def close(self) -> None:
        """Write what was submitted, then end. Nothing may be submitted after."""
        self._queue.put(None)
        self._thread.join()
        self._resources.close()

    def _submit(self, write: Callable[[], Any], *, must_be_written: bool = False) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # from here it cannot be cancelled
        self._queue.put(_Entry(write, future, must_be_written))
        return future

    def _write(self) -> None:
        """Take all that waits, commit it as one transaction, tell those who wait; again."""
        closing = False
        while not closing:
            batch, self._postponed = self._postponed, []
            try:
                entry = self._queue.get(timeout=RETRY_S if batch else None)
                while entry is not None:
                    batch.append(entry)
                    entry = self._queue.get_nowait()
                closing = True
            except queue.Empty:
                pass
            if batch:
                self._commit(batch)
        for entry in self._postponed:
            logger.error("a settlement could not be written; the next start recovers its request")
            entry.future.set_exception(TaelError(f"cannot write the ledger {self._path}."))

    def _commit(self, batch: list[_Entry]) -> None:
        results: list[tuple[_Entry, Any, Exception | None]] = []
        try:
            with self._journal.transaction():
                for entry in batch:
                    try:
                        with self._journal.savepoint():
                            results.append((entry, entry.write(), None))
                    except sqlite3.OperationalError:
                        raise  # the disk, or a lock: it concerns all
                    except Exception as error:
                        results.append((entry, None, error))
        except sqlite3.Error as error:
            logger.error("cannot write the ledger %s: %s", self._path, error)
            self._postponed = [entry for entry in batch if entry.must_be_written]
            message = f"cannot write the ledger {self._path}: {error}; make room on its disk."
            results = [
                (entry, None, TaelError(message)) for entry in batch if not entry.must_be_written
            ]
        for entry, result, failure in results:
            if failure is not None:
                entry.future.set_exception(failure)
            else:
                entry.future.set_result(result)


@dataclass(frozen=True, slots=True)
class _Entry:
    write: Callable[[], Any]
    future: Future[Any]
    must_be_written: bool


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Be the one process that serves on a ledger. The system drops the lock of a dead one."""
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise TaelError(
            f"another server writes the ledger {path}; stop it, or name another ledger."
        ) from error
    finally:
        os.close(lock)
