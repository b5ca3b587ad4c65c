"""``tael serve`` in a process of its own, its clients and its ledger: for benchmarks that break it.

Prices are simple (``CARD``), so that what every request ought to cost can be computed again.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tael.economics.journal import COUNTS
from tael.errors import TaelError

NAME = "m"
CARD = {
    "version": "v1",
    "currency": "USD",
    "rates": [{"model": "*", "tiers": [{"input": 10 * 10**6, "output": 40 * 10**6}]}],
}
"""Nano a token: 10 for the prompt, 1 if it was cached, 40 for the answer."""

START_S = 120.0
"""The longest that a server may take to be ready."""

MAX_LINE_BYTES = 1 << 22
"""Of an answer: one that is not streamed is a single line."""


class Serving:
    """A server in ``folder``, which keeps its ledger from one ``start`` to the next."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.ledger = folder / "ledger.sqlite"
        card = folder / "card.json"
        card.write_text(json.dumps(CARD))
        self.port = free_port()
        self._command = [sys.executable, "-c", "from tael.cli.main import main; main()", "serve"]
        self._command += [str(model), "--name", NAME, "--port", str(self.port), *options]
        self._command += ["--ledger", str(self.ledger), "--rate-card", str(card)]
        self._command += ["--keys", str(folder / "keys.sqlite")]
        self._log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Does not wait until it is ready."""
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(self._command, stderr=log)

    @property
    def engine_pid(self) -> int | None:
        """None while there is none."""
        assert self.process is not None
        pid = self.process.pid
        with suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return int(children[0]) if children else None
        return None

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end, as an operator does; the exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_ready(self) -> bool:
        return responds(f"{self.url}/health/ready")

    def wait_for_engine(self, killed_pid: int | None) -> int:
        """The process of another engine than the one that was killed. It may not be ready."""
        assert self.process is not None
        wait_until(lambda: self.engine_pid not in (None, killed_pid), self.process)
        pid = self.engine_pid
        assert pid is not None
        return pid

    def wait_until_ready(self, killed_pid: int | None = None) -> None:
        """With another engine than the one that was killed. Raises TaelError if the server ends
        instead, or takes too long."""
        assert self.process is not None
        try:
            self.wait_for_engine(killed_pid)
            wait_until(lambda: self.is_ready, self.process)
        except TaelError as error:
            raise TaelError(f"{error} {self._log.read_text()[-500:]}") from None

    def metrics(self) -> dict[str, float]:
        """By name, with labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        rows = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("tael_"): float(value) for name, value in rows}


@contextmanager
def serving(model: Path, *options: str) -> Iterator[Serving]:
    """A server that is ready, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        server = Serving(model, Path(folder), *options)
        server.start()
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.stop()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def responds(url: str) -> bool:
    """Whether the status is 200."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):  # refused, cut off, or 503
        return False


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Raises TaelError if the process ends first, or takes too long."""
    deadline_s = time.perf_counter() + START_S
    while not condition():
        if process.poll() is not None or time.perf_counter() > deadline_s:
            raise TaelError("the server did not start.")
        time.sleep(0.02)


@dataclass
class Answer:
    """What a client has seen of its request."""

    status: int = 0
    request_id: str = ""
    num_tokens: int = 0
    """Whose log-probabilities came."""
    usage: dict[str, Any] | None = None
    error: str = ""
    """Code of the error that ended it."""
    is_whole: bool = False

    def read(self, line: bytes) -> None:
        """A line of the body: of the event stream, or JSON."""
        if line.startswith(b"data: [DONE]"):
            self.is_whole = True
        elif line.startswith(b"data: "):
            self._note(msgspec.json.decode(line[6:]))
        elif line.startswith(b"{"):
            self.is_whole = self.status == 200
            self._note(msgspec.json.decode(line))

    def _note(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = event["error"]["code"] or "unknown"
            return
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self.num_tokens += len((choice["logprobs"] or {}).get("tokens", ()))


def request_bytes(body: dict[str, Any]) -> bytes:
    content = msgspec.json.encode(body)
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port, limit=MAX_LINE_BYTES)


async def read_head(reader: asyncio.StreamReader, answer: Answer) -> None:
    """Status and headers. Raises IncompleteReadError or ConnectionError if the server is gone."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    answer.status = int(head[0].split()[1])
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    answer.request_id = headers.get("x-request-id", "")


@dataclass(frozen=True)
class Charge:
    """A settled request of the ledger."""

    reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    amount_nano: int
    priced_nano: int
    """What it ought to cost."""


def is_usage(answer: Answer, charge: Charge) -> bool:
    """Whether a request is charged for what its answer said."""
    usage = answer.usage or {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    return counts == (charge.num_prompt_tokens, charge.num_output_tokens)


def charges_of(ledger: Path) -> tuple[dict[str, Charge], dict[str, int]]:
    """By request id, and what is wrong with the ledger by itself: all counts should be 0."""
    with closing(sqlite3.connect(ledger)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        query = f"SELECT request_id, reason, amount_nano, {', '.join(COUNTS)} FROM charges"
        rows = connection.execute(query).fetchall()
        reserved = {row[0] for row in connection.execute("SELECT request_id FROM reservations")}
    charges = {}
    for request_id, reason, amount_nano, fresh, cached, written, output, *_ in rows:
        is_charged = output > 0 or reason == "finished"
        price = 10 * (fresh + written) + cached + 40 * output if is_charged else 0
        prompt = fresh + cached + written
        charges[request_id] = Charge(reason, prompt, output, amount_nano, price)
    num_charges = Counter(row[0] for row in rows)
    return charges, {
        "settled_twice": sum(n > 1 for n in num_charges.values()),
        "never_settled": len(reserved - charges.keys()),
        "mispriced": sum(c.amount_nano != c.priced_nano for c in charges.values()),
    }
