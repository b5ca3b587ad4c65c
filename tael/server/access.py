"""What every request meets first: who are you, under which name do you call, how much do you send.

Plain ASGI, around the whole application: a route cannot forget it, and no path is let through for
how it begins.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tael.economics.keys import Key, Keys
from tael.server.errors import ApiError
from tael.server.page import FILES

PUBLIC = frozenset({"/health/live", "/health/ready", *FILES})
"""Exact paths that need no key. They tell nothing but whether to send requests here, and what is in
the package: the page asks for a key itself."""

ANONYMOUS = Key(key_id="anonymous", name="anonymous", tenant="anonymous")
"""Who calls a server that has no keys."""

BODY_TIMEOUT_S = 60.0
"""For a body to arrive. Longer ones are a slow connection held open on purpose, mostly."""

LINGER_S = 5.0
"""For the rest of a refused request to arrive."""


class Access:
    """Refuses callers without a key on every route but ``PUBLIC``, from the moment that there is
    one; and host names other than ``allowed_hosts``, which is how web pages reach servers on the
    loopback interface."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys | None, allowed_hosts: frozenset[str] | None
    ) -> None:
        self._app = app
        self._keys = keys
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there are no web sockets here
        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            key = self._identify(headers, scope["path"])
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = key
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        if self._allowed_hosts is None:
            return
        host = headers.get("host", "")  # h11 refuses requests with two
        bracketed = host.startswith("[")
        name = host[1:].partition("]")[0] if bracketed else host.partition(":")[0]
        if name.lower() not in self._allowed_hosts:
            raise ApiError(421, "This server is not called by that host name.", "host_not_allowed")

    def _identify(self, headers: Headers, path: str) -> Key:
        if path in PUBLIC or self._keys is None or not self._keys.exist():
            return ANONYMOUS
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        key = self._keys.verify(sent) if sent else None
        if key is None:
            raise ApiError(
                401,
                "Incorrect API key provided." if sent else "You didn't provide an API key.",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return key


class BodyLimit:
    """Reads the body of a request, within a size and a time, before anything parses it."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), BODY_TIMEOUT_S)
        except asyncio.TimeoutError:
            error = ApiError(408, "The body took too long to arrive.", "request_timeout")
            await refuse(error, scope, receive, send)
            return
        except ApiError as error:
            await refuse(error, scope, receive, send)
            return
        if body is None:
            return  # the client has gone
        is_read = False

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        error = ApiError(
            413, f"A request may have {self._max_bytes:,} bytes at most.", "request_too_large"
        )
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise error
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise error
            if not message.get("more_body", False):
                return bytes(body)


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without the application, and end the connection.

    What the client still sends is read and thrown away for a while: to close a socket with unread
    bytes resets it, and the client may then lose the answer (RFC 9112, 9.6)."""
    headers = {**error.headers, "connection": "close"}
    response = JSONResponse(error.body(scope["path"]), error.status, headers)
    start = {"status": response.status_code, "headers": response.raw_headers}
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": bytes(response.body), "more_body": True})
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_rest(receive), LINGER_S)
    await send({"type": "http.response.body", "body": b""})


async def _rest(receive: Receive) -> None:
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass
