"""From settings to a server that runs until it is told to end."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
from fastapi import FastAPI

from tael.economics.keys import Keys
from tael.economics.ledger import Ledger
from tael.errors import TaelError
from tael.server.admission import Admission, Limits
from tael.server.app import create_app
from tael.server.engine_client import EngineClient
from tael.server.messages import EngineSettings
from tael.server.metrics import Metrics
from tael.server.operators import create_operators_app
from tael.server.service import Service

logger = logging.getLogger(__name__)

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How to serve one model. ``model`` is the name by which callers ask for it."""

    model: str
    engine: EngineSettings
    host: str = "127.0.0.1"
    port: int = 8000
    limits: Limits = field(default_factory=Limits)
    stall_s: float = 8.0
    """The longest that a step may take."""
    drain_s: float = 300.0
    """The longest that requests are waited for at the end."""
    max_body_bytes: int = 16 << 20
    metrics_address: tuple[str, int] | None = None
    """Where operators look, without a key. None: ``/metrics`` is beside the other routes."""


async def serve(config: ServerConfig, *, keys: Keys | None, ledger: Ledger | None) -> None:
    """Load the model, serve it until SIGTERM or SIGINT, finish what is under way. A second signal
    ends at once. As long as there are no keys, anyone may call who can reach the server, so it must
    be on the loopback interface. Raises TaelError for a model that cannot be loaded and a port
    that cannot be had."""
    async with opened(config, keys=keys, ledger=ledger) as (server, listener):
        await server.serve(sockets=[listener])


@asynccontextmanager
async def opened(
    config: ServerConfig, *, keys: Keys | None, ledger: Ledger | None
) -> AsyncIterator[tuple[DrainingServer, socket.socket]]:
    """A server with its engine, and the socket that it is to listen on."""
    is_open = keys is None or not keys.exist()
    if is_open and config.host not in LOOPBACK:
        raise TaelError(
            f"there are no keys, so anyone who reaches {config.host} could use this server; make "
            "one with 'tael keys create NAME', or leave out --host."
        )
    with _bound(config.host, config.port) as listener:  # before the model takes its time
        engine = EngineClient(config.engine, stall_s=config.stall_s)
        await engine.start()
        try:
            admission = Admission(config.limits, config.engine.max_num_seqs)
            metrics = Metrics()
            metrics.watch(engine, admission)
            service = Service(engine, admission, metrics, config.model, keys=keys, ledger=ledger)
            app = create_app(
                service,
                max_body_bytes=config.max_body_bytes,
                allowed_hosts=LOOPBACK if is_open else None,
                has_metrics=config.metrics_address is None,
            )
            host, port = listener.getsockname()[:2]
            listener.listen()  # who reads the next lines may connect, and is answered in a moment
            logger.info("%s: %s", config.model, engine.ready.description)
            logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
            async with _metrics_served(config.metrics_address, service):
                yield DrainingServer(_settings(app), service, config.drain_s), listener
        finally:
            await engine.close()


@asynccontextmanager
async def _metrics_served(address: tuple[str, int] | None, service: Service) -> AsyncIterator[None]:
    """A second server beside, if it has an address."""
    if address is None:
        yield
        return
    with _bound(*address) as listener:
        app = create_operators_app(service)
        server = _MetricsServer(_settings(app))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        logger.info("metrics on http://%s:%d/metrics", *listener.getsockname()[:2])
        try:
            yield
        finally:
            server.should_exit = True
            await serving


def _settings(app: FastAPI) -> uvicorn.Config:
    """h11, whatever else is installed: it bounds the headers of a request, which httptools does
    not."""
    return uvicorn.Config(
        app,
        http="h11",
        lifespan="off",
        access_log=False,
        server_header=False,
        log_level="warning",
    )


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise TaelError(
            f"cannot listen on {host} port {port}: {error.strerror}; name another port or address."
        ) from error
    return listener


class _MetricsServer(uvicorn.Server):
    """Leaves signals to the other one."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class DrainingServer(uvicorn.Server):
    """Ends in two steps. On the first signal it goes on listening, so that new requests are told
    503 and load balancers see that it is not ready, and ends when the last request has."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self.service = service
        self._drain_s = drain_s
        self._loop = asyncio.get_running_loop()
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's: it would raise the signal again at the end, and so exit with its number.
        self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """What a signal does."""
        if self._drain is not None:
            self.should_exit = self.force_exit = True
            return
        self.service.is_draining = True
        self._drain = asyncio.create_task(self._wait_for_requests())

    async def _wait_for_requests(self) -> None:
        num_requests = self.service.admission.num_requests
        if num_requests:
            logger.warning("waiting for %d requests to end", num_requests)
        deadline = self._loop.time() + self._drain_s
        while self.service.admission.num_requests and self._loop.time() < deadline:
            await asyncio.sleep(0.05)
        self.should_exit = True
