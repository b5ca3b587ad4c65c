"""The HTTP process's side of the engine: starts it, talks to it, and restarts it when it is gone.

Everything here runs in one event loop. A watchdog needs no task of its own: reports come several
times a second from the thread that computes, so a silence means that it hangs.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from tael.economics.journal import Outcome
from tael.engine.engine import OutputDelta
from tael.errors import TaelError
from tael.loader.tokenizer import Tokenizer
from tael.request import SamplingParams, Usage
from tael.server.messages import (
    HEADER,
    Abort,
    Accepted,
    Add,
    Begun,
    Deltas,
    Ended,
    EngineSettings,
    Failed,
    Message,
    Ready,
    Refused,
    Report,
    Status,
    frame,
    report_decoder,
)

logger = logging.getLogger(__name__)

MAX_RESTART_DELAY_S = 30.0

Settled = Callable[[Outcome, Usage | None], None]


class EngineDownError(Exception):
    """The engine process has ended, or hangs and was killed. A new one is on its way."""


class RefusedError(Exception):
    """The engine cannot run a request."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Generation:
    """The deltas of one request, as they come. ``close`` it in any case; that ends the request.

    ``settled`` is called once: with how it ended, and with what the engine says that the request
    took, None if the engine died with it. ``usage`` is what it said with the first token.
    """

    def __init__(
        self,
        client: EngineClient,
        request_id: str,
        settled: Settled,
    ) -> None:
        self._client = client
        self._request_id = request_id
        self._settled = settled
        self.usage: Usage | None = None
        self._received: asyncio.Queue[OutputDelta | Accepted | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[OutputDelta]:
        """Raises EngineDownError."""
        while True:
            item = await self._received.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, OutputDelta):
                yield item
                if item.usage is not None:
                    return

    def close(self) -> None:
        self._client._abort(self._request_id)

    async def _accepted(self) -> None:
        item = await self._received.get()
        if isinstance(item, Exception):
            raise item


class EngineClient:
    """An engine process that is kept alive. ``start`` it, and ``close`` it at the end.

    It is not ready when it has been silent for ``stall_s``, and killed after one and a half times
    as long: more than the longest step may take.
    """

    def __init__(self, settings: EngineSettings, *, stall_s: float = 8.0) -> None:
        self.settings = settings
        self.stall_s = stall_s
        self.ready: Ready
        """What the engine said when it had loaded the model."""
        self.tokenizer: Tokenizer
        self.status: Status | None = None
        """Its last report; None while no engine runs."""
        self.num_restarts = 0
        self._ids = count()
        self._generations: dict[str, Generation] = {}
        """Those that the engine has not ended."""
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._last_report_s = 0.0
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model. Raises TaelError if that fails."""
        self._directory = tempfile.TemporaryDirectory(prefix="tael-")  # only its owner may enter
        path = Path(self._directory.name) / "engine.sock"
        self._arrivals: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.Queue()
        )
        self._server = await asyncio.start_unix_server(
            lambda reader, writer: self._arrivals.put_nowait((reader, writer)), path
        )
        path.chmod(0o600)
        self._path = path
        try:
            reader = await self._launch()
        except BaseException:
            await self.close()
            raise
        self.tokenizer = await asyncio.to_thread(Tokenizer.load, Path(self.ready.tokenizer_dir))
        self._supervisor = asyncio.create_task(self._supervise(reader))

    async def close(self) -> None:
        """End the engine process and whatever it does."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
        await self._end_process()
        self._server.close()
        self._directory.cleanup()

    @property
    def is_ready(self) -> bool:
        """Whether the engine has moved lately."""
        silent_s = time.monotonic() - self._last_report_s
        return self.status is not None and silent_s < self.stall_s

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def submit(
        self,
        token_ids: list[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        grammar: str | None = None,
        settled: Settled,
    ) -> Generation:
        """Give the engine a request, and wait until it has taken it. Raises RefusedError if it
        cannot be run, EngineDownError if there is no engine; ``settled`` may then be called or
        not."""
        if self.status is None or self._writer is None:
            raise EngineDownError
        generation = Generation(self, str(next(self._ids)), settled)
        request_id = generation._request_id
        message = frame(Add(request_id, token_ids, params, cache_salt, grammar))
        self._generations[request_id] = generation
        try:
            self._writer.write(message)
            await generation._accepted()
        except BaseException:
            generation.close()
            raise
        return generation

    def _abort(self, request_id: str) -> None:
        if request_id in self._generations:
            self._send(Abort(request_id))

    def _send(self, message: Message) -> None:
        if self._writer is not None:
            self._writer.write(frame(message))

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        """Follow engine after engine."""
        while True:
            reason = await self._follow(reader)
            logger.error("the engine %s; starting another one", reason)
            await self._end_process()
            reader = await self._relaunch()

    async def _follow(self, reader: asyncio.StreamReader) -> str:
        """Deliver the reports of one engine. Returns what happened to it."""
        while True:
            try:
                report = await asyncio.wait_for(_read(reader), 1.5 * self.stall_s)
            except asyncio.TimeoutError:
                return f"has not moved for {1.5 * self.stall_s:.0f} s"
            except (asyncio.IncompleteReadError, ConnectionError):
                return "ended"
            self._last_report_s = time.monotonic()
            self._deliver(report)

    def _deliver(self, report: Report) -> None:
        if isinstance(report, Deltas):
            for delta in report.deltas:
                generation = self._generations.get(delta.request_id)
                if generation is None:
                    continue  # closed, and the engine has not read of it yet
                generation._received.put_nowait(delta)
                if delta.usage is not None:
                    self._forget(delta.request_id, Outcome.FINISHED, delta.usage)
        elif isinstance(report, Begun):
            if report.request_id in self._generations:
                self._generations[report.request_id].usage = report.usage
        elif isinstance(report, Status):
            self.status = report
        elif isinstance(report, Accepted):
            if report.request_id in self._generations:
                self._generations[report.request_id]._received.put_nowait(report)
        elif isinstance(report, Refused):
            generation = self._generations.pop(report.request_id)
            generation._received.put_nowait(RefusedError(report.code, report.message))
        elif isinstance(report, Ended) and report.request_id in self._generations:
            self._forget(report.request_id, Outcome.ABORTED, report.usage)

    def _forget(self, request_id: str, outcome: Outcome, usage: Usage | None) -> None:
        self._generations.pop(request_id)._settled(outcome, usage)

    async def _relaunch(self) -> asyncio.StreamReader:
        delay_s = 0.1
        while True:
            self.num_restarts += 1
            try:
                return await self._launch()
            except (TaelError, OSError) as error:
                logger.error("cannot start the engine: %s", error)
                await self._end_process()
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_RESTART_DELAY_S)

    async def _launch(self) -> asyncio.StreamReader:
        """Start a process and wait until it has loaded the model. Raises TaelError."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tael.server.engine_process", str(self._path)
        )
        self._process = process
        arrival = asyncio.ensure_future(self._arrivals.get())
        ended = asyncio.ensure_future(process.wait())
        await asyncio.wait({arrival, ended}, return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not arrival.done():
            arrival.cancel()
            raise TaelError("the engine process ended as it started; see the messages above.")
        reader, self._writer = arrival.result()
        self._send(self.settings)
        try:
            report = await _read(reader)
            if isinstance(report, Failed):
                raise TaelError(report.message)
            first = await _read(reader)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise TaelError(
                "the engine process ended while it loaded the model; see the messages above, and "
                "whether the memory was enough."
            ) from error
        assert isinstance(report, Ready) and isinstance(first, Status)
        self.ready, self.status = report, first
        self._last_report_s = time.monotonic()
        return reader

    async def _end_process(self) -> None:
        """Kill the engine if it still is, and tell those who wait for it."""
        self.status = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()  # it may be stopped, or deep in a step
            await self._process.wait()
            self._process = None
        for request_id, generation in list(self._generations.items()):
            generation._received.put_nowait(EngineDownError())
            self._forget(request_id, Outcome.FAILED, None)


async def _read(reader: asyncio.StreamReader) -> Report:
    (num_bytes,) = HEADER.unpack(await reader.readexactly(HEADER.size))
    report: Report = report_decoder.decode(await reader.readexactly(num_bytes))
    return report
