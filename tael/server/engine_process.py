"""The engine in a process of its own: commands in, reports out, over a Unix socket.

One thread reads commands, computes a step and reports it, in a loop; that reports come is
therefore the proof that the engine moves. The process ends when its socket does.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import msgspec

from tael.engine.engine import Engine, OutputDelta
from tael.engine.grammar import GrammarCompiler, TokenMask
from tael.errors import TaelError
from tael.llm import LLM
from tael.server.messages import (
    HEADER,
    Abort,
    Accepted,
    Add,
    Begun,
    Command,
    Deltas,
    Ended,
    EngineSettings,
    Failed,
    Message,
    Ready,
    Refused,
    Status,
    TierUsage,
    command_decoder,
    frame,
)

STATUS_INTERVAL_S = 0.25
COMPILE_DEADLINE_S = 5.0


class Link:
    """The engine's end of the socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        # Another thread wakes ``receive`` by a byte through this pipe.
        wake_read, self._wake_write = os.pipe()
        self._selector.register(wake_read, selectors.EVENT_READ)

    def send(self, message: Message) -> None:
        self._connection.sendall(frame(message))

    def receive(self, timeout_s: float) -> Iterator[Command]:
        """The commands that have come; waits for one, or for ``wake``, up to ``timeout_s``.
        Raises EOFError when the other end is gone."""
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._connection:
                received = self._connection.recv(1 << 20)
                if not received:
                    raise EOFError
                self._buffer += received
            else:
                os.read(key.fd, 4096)
        while len(self._buffer) >= HEADER.size:
            (num_bytes,) = HEADER.unpack_from(self._buffer)
            end = HEADER.size + num_bytes
            if len(self._buffer) < end:
                return
            command = command_decoder.decode(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield command

    def wake(self) -> None:
        os.write(self._wake_write, b"\0")


class EngineLoop:
    """Runs the commands of one link on an engine until the link ends."""

    def __init__(self, engine: Engine, link: Link) -> None:
        self._engine = engine
        self._link = link
        self._grammars = GrammarCompiler(engine.tokenizer, engine.spec.vocab_size)
        self._compiling: dict[str, float] = {}
        """When the grammar of a request must be compiled, by the monotonic clock."""
        self._compiled: SimpleQueue[tuple[Add, TokenMask | TaelError]] = SimpleQueue()
        self._begun: set[str] = set()
        """Requests whose first token has been reported, until they end."""
        self._num_steps = 0
        self._next_status_s = 0.0

    def run(self) -> None:
        """Raises EOFError when the link ends, and whatever a step raises."""
        engine = self._engine
        while True:
            for command in self._link.receive(0 if engine.has_unfinished() else STATUS_INTERVAL_S):
                self._obey(command)
            self._add_compiled()
            if engine.has_unfinished():
                deltas = engine.step()
                self._num_steps += 1
                self._report(deltas)
            if time.monotonic() >= self._next_status_s:
                self._link.send(self._status())
                self._next_status_s = time.monotonic() + STATUS_INTERVAL_S

    def _report(self, deltas: list[OutputDelta]) -> None:
        for delta in deltas:
            if delta.usage is not None:
                self._begun.discard(delta.request_id)
            elif delta.token_ids and delta.request_id not in self._begun:
                self._begun.add(delta.request_id)
                self._link.send(Begun(delta.request_id, self._engine.usage(delta.request_id)))
        if deltas:
            self._link.send(Deltas(deltas))

    def _obey(self, command: Command) -> None:
        if isinstance(command, Abort):
            self._begun.discard(command.request_id)
            self._compiling.pop(command.request_id, None)
            usage = self._engine.abort(command.request_id)
            self._link.send(Ended(command.request_id, usage))
            # Before the next step, so that who waits for the blocks to come back sees them.
            self._link.send(self._status())
            return
        assert isinstance(command, Add)
        if command.grammar is None:
            self._add(command, None)
            return
        self._compiling[command.request_id] = time.monotonic() + COMPILE_DEADLINE_S

        def compiled(result: TokenMask | TaelError) -> None:
            self._compiled.put((command, result))
            self._link.wake()

        self._grammars.compile(command.grammar, compiled)

    def _add_compiled(self) -> None:
        """Go on with the requests whose grammar is compiled, and refuse those that wait too long
        for that."""
        while not self._compiled.empty():
            command, result = self._compiled.get()
            if self._compiling.pop(command.request_id, None) is None:
                continue  # aborted or refused meanwhile
            if isinstance(result, TaelError):
                self._link.send(Refused(command.request_id, "invalid_schema", str(result)))
            else:
                self._add(command, result)
        now_s = time.monotonic()
        for request_id in [i for i, deadline_s in self._compiling.items() if now_s > deadline_s]:
            del self._compiling[request_id]
            message = f"the schema took more than {COMPILE_DEADLINE_S:g} s to compile; simplify it."
            self._link.send(Refused(request_id, "invalid_schema", message))

    def _add(self, command: Add, mask: TokenMask | None) -> None:
        try:
            self._engine.add_request(
                command.request_id,
                command.token_ids,
                command.params,
                cache_salt=command.cache_salt,
                mask=mask,
            )
        except TaelError as error:
            # What else can be wrong, the server has looked at before.
            self._link.send(Refused(command.request_id, "context_length_exceeded", str(error)))
        else:
            self._link.send(Accepted(command.request_id))

    def _status(self) -> Status:
        scheduler, manager = self._engine.scheduler, self._engine.manager
        manager.collect()  # an engine without requests takes no step that would
        return Status(
            num_steps=self._num_steps,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=sum(pool.num_blocks for pool in manager.pools),
            num_referenced_blocks=manager.num_referenced,
            num_prefix_query_tokens=manager.num_prefix_query_tokens,
            num_prefix_hit_tokens=manager.num_prefix_hit_tokens,
            tiers=self._tiers(),
        )

    def _tiers(self) -> tuple[TierUsage, ...]:
        manager, disk = self._engine.manager, self._engine.tier
        store = self._engine.kv_store
        used = (manager.pool_bytes, manager.referenced_bytes, manager.cached_bytes)
        if store.tiered is None:
            tiers = [TierUsage("memory", *used)]
        else:  # in memory is what was read last of the blocks on disk: always full, soon
            tiers = [
                TierUsage("memory", store.num_bytes, store.num_bytes, 0),
                TierUsage("live disk", *used, store.tiered.counters["num_errors"]),
            ]
        if disk is not None:
            capacity_bytes = 0 if disk.failure else disk.index.capacity_bytes
            num_io_errors = disk.counters.num_io_errors
            tiers.append(TierUsage("disk", capacity_bytes, 0, disk.used_bytes, num_io_errors))
        return tuple(tiers)


def main(socket_path: str) -> None:
    """Connect, load the model that the first message names, and serve until the socket ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which drains first
    logging.basicConfig(format="tael engine: %(message)s")
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(socket_path)
    link = Link(connection)
    try:
        settings = next(link.receive(60))
        assert isinstance(settings, EngineSettings)
        try:
            llm = LLM(**msgspec.structs.asdict(settings))
        except TaelError as error:
            link.send(Failed(str(error)))
            return
        engine = llm.engine
        tokenizer_dir = Path(socket_path).parent / "tokenizer"
        engine.tokenizer.save(tokenizer_dir)
        link.send(
            Ready(
                max_model_len=engine.max_model_len,
                vocab_size=engine.spec.vocab_size,
                description=engine.describe(),
                tokenizer_dir=str(tokenizer_dir),
            )
        )
        EngineLoop(engine, link).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the server is gone


if __name__ == "__main__":
    main(sys.argv[1])
