"""A server in a thread of the tests, with its engine in a process of its own, as always."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
from anthropic import Anthropic
from byte_llama import save_byte_llama
from openai import OpenAI

from tael.economics.keys import Keys
from tael.economics.ledger import Ledger
from tael.server.admission import Limits
from tael.server.messages import EngineSettings
from tael.server.serve import DrainingServer, ServerConfig, opened
from tael.server.service import Service

MODEL = "byte-llama"

TOOL_TEMPLATE = (
    "{% if tools %}tools: {{ tools | map(attribute='function') | map(attribute='name') | "
    "join(' ') }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def save_model(path: Path, template: str | None = None) -> None:
    """The byte Llama; with a chat template of its own, if given."""
    save_byte_llama(path)
    if template is not None:
        config = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(
            json.dumps({**config, "chat_template": template})
        )


@dataclass(frozen=True)
class Running:
    url: str
    server: DrainingServer
    service: Service
    loop: asyncio.AbstractEventLoop

    def openai(self, api_key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    def anthropic(self, api_key: str = "none") -> Anthropic:
        return Anthropic(base_url=self.url, api_key=api_key, max_retries=0)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def is_idle(self) -> bool:
        """Whether no request is held, and no KV block."""
        status = self.service.engine.status
        return (
            self.service.admission.num_requests == 0
            and status is not None
            and status.num_referenced_blocks == 0
        )


@contextmanager
def running(
    folder: Path,
    *,
    keys: Keys | None = None,
    ledger: Ledger | None = None,
    limits: Limits | None = None,
    stall_s: float = 30.0,
    max_num_seqs: int = 8,
    max_body_bytes: int = 1 << 20,
    metrics_address: tuple[str, int] | None = None,
) -> Iterator[Running]:
    config = ServerConfig(
        model=MODEL,
        engine=EngineSettings(str(folder), "reference", max_num_seqs=max_num_seqs),
        port=0,
        limits=limits or Limits(),
        stall_s=stall_s,
        max_body_bytes=max_body_bytes,
        metrics_address=metrics_address,
    )
    started: list[Running] = []
    failed: list[BaseException] = []
    ready = threading.Event()

    async def serve() -> None:
        try:
            async with opened(config, keys=keys, ledger=ledger) as (server, listener):
                port = listener.getsockname()[1]
                service = server.service
                loop = asyncio.get_running_loop()
                started.append(Running(f"http://127.0.0.1:{port}", server, service, loop))
                serving = asyncio.create_task(server.serve(sockets=[listener]))
                while not server.started and not serving.done():
                    await asyncio.sleep(0.01)
                ready.set()
                await serving
        except BaseException as error:
            failed.append(error)
            ready.set()
            raise

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait()
    if failed:
        thread.join()
        raise failed[0]
    (server,) = started
    try:
        yield server
    finally:
        server.loop.call_soon_threadsafe(server.server.end)
        thread.join()


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Wait for something that happens in another thread or process."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
