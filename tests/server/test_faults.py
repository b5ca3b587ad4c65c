"""Clients that go away, engines that die or hang, and a server that is told to end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from running import MODEL, Running, eventually, running

from tael.server import engine_client
from tael.server.messages import EngineSettings, Report
from tael.server.serve import ServerConfig, opened

ENDLESS: dict[str, Any] = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def fragile(folder: Path) -> Iterator[Running]:
    """A server whose engine is killed, with little patience for one that hangs."""
    with running(folder, stall_s=1.0) as server:
        yield server


def pid_of(server: Running) -> int:
    pid = server.service.engine.pid
    assert pid is not None
    return pid


def is_ready(server: Running) -> bool:
    with server.http() as http:
        return http.get("/health/ready").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_disconnect_frees_the_blocks(server: Running, stream: bool, reset: bool) -> None:
    """Of what is being computed, what waits for its turn, and what has many answers."""
    body = {"model": MODEL, "prompt": ["a" * 50] * 4, "max_tokens": 200, "ignore_eos": True}
    admission = server.service.admission
    for n in (1, 3, 8):
        connections = [sent(server, {**body, "n": n, "stream": stream}) for _ in range(3)]
        eventually(lambda: admission.num_requests == 3)
        if stream:
            assert connections[0].recv(15) == b"HTTP/1.1 200 OK"
        num_tokens = metric(server, "tael_generation_tokens_total")
        for connection in connections:
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        eventually(server.is_idle)
        # Cut off, not finished.
        assert metric(server, "tael_generation_tokens_total") < num_tokens + 3 * 4 * n * 200


def sent(server: Running, body: dict[str, Any]) -> socket.socket:
    """A connection over which a request has gone."""
    url = httpx.URL(server.url)
    content = json.dumps(body).encode()
    connection = socket.create_connection((url.host, url.port))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(content) + content
    )
    return connection


def metric(server: Running, name: str) -> float:
    with server.http() as http:
        lines = http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))


def num_requests(server: Running) -> float:
    """Those that were settled."""
    with server.http() as http:
        lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("tael_requests_total{"))


def test_one_disconnect_ends_one_request(server: Running) -> None:
    client = server.openai()
    expected = client.completions.create(model=MODEL, prompt="abc", temperature=0, **ENDLESS)
    kept = client.completions.create(
        model=MODEL, prompt="abc", temperature=0, stream=True, **ENDLESS
    )
    dropped = client.completions.create(model=MODEL, prompt="abc", stream=True, **ENDLESS)
    next(iter(dropped))
    dropped.close()
    assert "".join(chunk.choices[0].text for chunk in kept) == expected.choices[0].text


def test_a_killed_engine_is_replaced(fragile: Running) -> None:
    client = fragile.openai()
    stream = client.completions.create(
        model=MODEL, prompt="abc", stream=True, temperature=0, **ENDLESS
    )
    next(iter(stream))
    pid = pid_of(fragile)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine"):
        for _ in stream:
            pass
    eventually(lambda: fragile.service.engine.pid not in (pid, None) and is_ready(fragile))
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=3)
    assert answer.usage is not None and answer.usage.completion_tokens > 0
    assert fragile.is_idle() or eventually(fragile.is_idle) is None


def test_a_hanging_engine_is_replaced(fragile: Running) -> None:
    client = fragile.openai()
    stream = client.completions.create(model=MODEL, prompt="abc", stream=True, **ENDLESS)
    next(iter(stream))
    results: list[Exception] = []

    def whole() -> None:
        try:
            client.completions.create(model=MODEL, prompt="abc", **ENDLESS)
        except openai.APIError as error:
            results.append(error)

    pid = pid_of(fragile)
    os.kill(pid, signal.SIGSTOP)
    waiting = threading.Thread(target=whole)
    waiting.start()
    eventually(lambda: not is_ready(fragile))
    assert fragile.http().get("/health/live").status_code == 200
    with pytest.raises(openai.APIError, match="engine"):
        for _ in stream:
            pass
    waiting.join()
    (error,) = results
    assert isinstance(error, openai.InternalServerError) and error.status_code == 503
    assert "retry-after" in error.response.headers
    eventually(lambda: is_ready(fragile))
    assert pid_of(fragile) != pid


def test_requests_of_many_prompts_survive_a_hang_uncounted(fragile: Running) -> None:
    """Some of their prompts run, others have been sent, the rest waits: each ends once."""
    body = {"model": MODEL, "prompt": ["a" * 50] * 16, "max_tokens": 200, "ignore_eos": True}
    num_settled = num_requests(fragile)
    connections = [sent(fragile, body) for _ in range(3)]
    eventually(lambda: fragile.service.admission.num_waiting > 0)
    pid = pid_of(fragile)
    os.kill(pid, signal.SIGSTOP)
    for connection in connections:
        connection.settimeout(60)
        assert connection.recv(12) == b"HTTP/1.1 503"
        connection.close()
    eventually(lambda: is_ready(fragile) and fragile.is_idle())
    assert num_requests(fragile) == num_settled + 3


@pytest.mark.parametrize("num_reports", [0, 1])
def test_an_engine_that_dies_as_it_starts_is_replaced(
    fragile: Running, monkeypatch: pytest.MonkeyPatch, num_reports: int
) -> None:
    """After it has connected: before it says that it is ready, or right after that."""
    read, launch = engine_client._read, fragile.service.engine._launch
    num_left = [num_reports]

    async def cut_off(reader: asyncio.StreamReader) -> Report:
        if asyncio.get_running_loop() is not fragile.loop:  # of another server of this process
            return await read(reader)
        num_left[0] -= 1
        if num_left[0] == -1:
            raise asyncio.IncompleteReadError(b"", 4)
        return await read(reader)

    async def launch_cut_off() -> asyncio.StreamReader:
        monkeypatch.setattr(engine_client, "_read", cut_off)
        return await launch()

    monkeypatch.setattr(fragile.service.engine, "_launch", launch_cut_off)
    num_restarts, pid = fragile.service.engine.num_restarts, pid_of(fragile)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: fragile.service.engine.num_restarts == num_restarts + 2)
    eventually(lambda: is_ready(fragile))


def test_no_engine_is_answered_at_once(fragile: Running) -> None:
    """While a new one starts."""
    pid = pid_of(fragile)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_ready(fragile))
    with fragile.http() as http:
        response = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        if response.status_code != 200:  # it may be back already
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_restarting"
    eventually(lambda: is_ready(fragile))


def test_the_socket_is_private(server: Running) -> None:
    path = server.service.engine._path
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_the_http_process_never_imports_the_kernels() -> None:
    script = (
        "import sys, tael.server.serve, tael.cli.serve\n"
        "print({'tael._native', 'tael.backends.cpu', 'tael.llm', 'torch'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "set()\n"), result.stderr


def test_it_listens_when_it_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tael.server")
    config = ServerConfig(MODEL, EngineSettings(str(folder), "reference"), port=0)

    async def main() -> None:
        async with opened(config, keys=None, ledger=None) as (_, listener):
            assert "listening on" in caplog.text
            socket.create_connection(listener.getsockname()).close()

    asyncio.run(main())


COMMAND = [sys.executable, "-c", "from tael.cli.main import main; main()", "serve"]


@pytest.fixture
def process(
    model_path: Callable[[str], Path], tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``tael serve`` with a real model, and its address."""
    path = str(model_path("smollm2:135m"))
    arguments = [path, "--port", "0", "--context", "1024", "--name", MODEL, "--memory", "600MiB"]
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path)}
    server = subprocess.Popen(
        [*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert server.stderr is not None
    seen = ""
    for line in server.stderr:
        seen += line
        if "listening on " in line:
            break
    else:
        raise AssertionError(seen)
    try:
        yield server, line.split()[-1]
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs(
    process: tuple[subprocess.Popen[str], str], number: signal.Signals
) -> None:
    server, url = process
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    parameters: dict[str, Any] = {"max_tokens": 60, "extra_body": {"ignore_eos": True}}
    streams = [
        client.completions.create(model=MODEL, prompt="Once", stream=True, **parameters)
        for _ in range(3)
    ]
    for stream in streams:
        next(iter(stream))
    server.send_signal(number)
    with httpx.Client(base_url=url) as http:
        eventually(lambda: http.get("/health/ready").status_code == 503)
        refused = http.post("/v1/completions", json={"model": MODEL, "prompt": "a"})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert refused.json()["error"]["code"] == "shutting_down"
    for stream in streams:
        assert [c.choices[0].finish_reason for c in stream][-1] == "length"
    assert server.wait(timeout=60) == 0


def test_a_killed_server_takes_its_engine_along(
    process: tuple[subprocess.Popen[str], str],
) -> None:
    server, _ = process
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    assert len(children) == 1
    server.kill()
    eventually(lambda: not is_running(int(children[0])))


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    result = subprocess.run(
        [*COMMAND, str(tmp_path / "x.gguf"), "--port", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_DATA_HOME": str(tmp_path)},
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("tael: ") and "Traceback" not in result.stderr
