"""Server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tael.server.errors import ApiError
from tael.server.service import Run

logger = logging.getLogger(__name__)

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
"""Silence after which a comment is sent, for proxies that end quiet connections."""

_encoder = msgspec.json.Encoder()


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` while the client waits. Raises ClientGoneError, with the work cancelled, as soon
    as it does not: nothing else would notice before the next write."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """The events of a run, which is closed at the end, whatever the end is.

    ``failed`` writes the event of an error. A client takes a stream that just ends for a whole one,
    so an error is always said.
    """

    def __init__(
        self,
        run: Run,
        events: AsyncIterator[str],
        failed: Callable[[ApiError], str],
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **run.headers},
        )
        del self.headers["content-length"]
        self._run = run
        self._events = events
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send(send))
        except (ClientGoneError, OSError):
            pass  # the run below is told
        finally:
            self._run.close()

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            async for event in _kept_alive(self._events):
                await send(
                    {"type": "http.response.body", "body": event.encode(), "more_body": True}
                )
        except ApiError as error:
            event = self._failed(error)
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _kept_alive(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events, and a comment in every long silence between them."""
    following = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=KEEP_ALIVE_S)
            if not done:
                yield ": still working\n\n"
                continue
            event = following.result()
            if event is None:
                return
            yield event
            following = asyncio.ensure_future(anext(events, None))
    finally:
        following.cancel()


def data(value: Mapping[str, Any], event: str | None = None) -> str:
    """One event, of a name if the dialect has names."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {_encoder.encode(value).decode()}\n\n"
